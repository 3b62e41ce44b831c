//! The images that the end-to-end tests and the benches use.

use std::path::Path;
use std::process::Command;

use crate::{Compression, Error, Image, ImageBuilder, Layer, Result};

/// Name of the sandbox ("pause") image: containerd's configuration in the node has the same.
pub const PAUSE: &str = "kiln.test/pause:1";
/// Name of the image that tests run containers from.
pub const BUSYBOX: &str = "kiln.test/busybox:1";
/// Where Debian's `busybox-static` puts its program.
pub const BUSYBOX_PROGRAM: &str = "/bin/busybox";

/// A long path in the test image (names over 100 bytes need an extension of the tar format).
pub const LONG_NAME: &str = "opt/a-directory-with-a-name-that-is-longer-than-the-hundred-bytes-\
    which-the-oldest-tar-format-has-for-a-whole-path/and-a-file-in-it";

/// Reads a program to put into an image.
pub fn program(path: &Path, remedy: &'static str) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|source| Error::Input {
        path: path.display().to_string(),
        remedy,
        source,
    })
}

/// The commands that a busybox program offers, by asking it.
pub fn applets(busybox: &Path) -> Result<Vec<String>> {
    let input = |source| Error::Input {
        path: busybox.display().to_string(),
        remedy: "install Debian's package busybox-static",
        source,
    };
    let output = Command::new(busybox)
        .arg("--list")
        .output()
        .map_err(input)?;
    let names = String::from_utf8_lossy(&output.stdout);
    Ok(names
        .lines()
        .map(str::to_owned)
        .filter(|name| name != "busybox")
        .collect())
}

/// The sandbox image: one layer with one program that waits and reaps.
pub fn pause(testprog: &[u8]) -> Result<Image> {
    ImageBuilder::new()
        .layer(Layer::new().file("testprog", testprog, 0o755))
        .entrypoint(&["/testprog", "pause"])
        .user("65535:65535")
        .build()
}

/// The test image: busybox with its applets, `/bin/testprog`, and in three layers (one of each
/// compression) what layers can do to each other: override, remove, make opaque.
pub fn busybox(busybox: &[u8], applets: &[String], testprog: &[u8]) -> Result<Image> {
    let mut base = Layer::new()
        .dir("dev", 0o755)
        .dir("proc", 0o555)
        .dir("sys", 0o555)
        .dir("run", 0o755)
        .dir("root", 0o700)
        .dir("home/user", 0o755)
        .owned_by("home/user", 1000, 1000)
        .dir("tmp", 0o1777)
        .dir("var/tmp", 0o1777)
        .dir("var/log", 0o755)
        .symlink("var/run", "../run")
        .file("bin/busybox", busybox, 0o755)
        .file(
            "etc/passwd",
            "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
            0o644,
        )
        .file(
            "etc/group",
            "root:x:0:\nuser:x:1000:\nextra:x:2000:user\n",
            0o644,
        )
        .file("etc/layered/overridden", "from the layer below\n", 0o644)
        .file("etc/layered/removed", "must not be seen\n", 0o644)
        .file("opt/opaque/below", "must not be seen\n", 0o644);
    for applet in applets {
        base = base.symlink(&format!("bin/{applet}"), "busybox");
    }
    let program = Layer::new()
        .compressed(Compression::Gzip)
        .file("bin/testprog", testprog, 0o755)
        .file("etc/layered/overridden", "from the layer above\n", 0o644);
    let changes = Layer::new()
        .compressed(Compression::Zstd)
        .whiteout("etc/layered/removed")
        .opaque("opt/opaque", 0o755)
        .file("opt/opaque/above", "seen\n", 0o644)
        .file(LONG_NAME, "found\n", 0o644)
        .file("opt/links/first", "linked\n", 0o644)
        .hardlink("opt/links/second", "opt/links/first")
        .file("opt/owned", "mine\n", 0o640)
        .owned_by("opt/owned", 1000, 2000);
    ImageBuilder::new()
        .layer(base)
        .layer(program)
        .layer(changes)
        .command(&["/bin/sh"])
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .env("FROM_IMAGE", "yes")
        .label("dev.kiln.test", "busybox")
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_test_image_has_a_link_for_each_applet_and_three_kinds_of_layers() {
        let applets = ["sh".to_owned(), "cat".to_owned()];
        let image = busybox(b"program", &applets, b"testprog").unwrap();
        let types: Vec<_> = image
            .layers
            .iter()
            .map(|layer| layer.descriptor.media_type.clone())
            .collect();
        assert_eq!(
            types,
            [Compression::None, Compression::Gzip, Compression::Zstd].map(Compression::media_type)
        );
        let links: Vec<String> = tar::Archive::new(&image.layers[0].bytes[..])
            .entries()
            .unwrap()
            .map(Result::unwrap)
            .filter(|entry| {
                entry
                    .link_name()
                    .unwrap()
                    .is_some_and(|to| to.ends_with("busybox"))
            })
            .map(|entry| entry.path().unwrap().display().to_string())
            .collect();
        assert_eq!(links, ["bin/cat", "bin/sh"]);
    }

    #[test]
    fn the_pause_image_is_one_file() {
        let image = pause(b"testprog").unwrap();
        assert_eq!(image.layers.len(), 1);
        assert_eq!(image.chain_ids(), image.diff_ids);
    }

    #[test]
    fn a_program_that_is_missing_is_named_with_the_remedy() {
        let error = program(Path::new("/nowhere/busybox"), "install it").unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot read /nowhere/busybox: install it"
        );
    }
}
