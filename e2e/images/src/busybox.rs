//! busybox as Kubernetes' suites know it: of Debian 12's source, but as its authors configure it, and static.
//!
//! Debian's own `busybox-static` lacks `pgrep` and `ipcs` and runs its commands without an exec, which the suites see;
//! later versions' shell says `sh: line 0:` where the suites want `sh:`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::{run, run_with};
use crate::image::fingerprint;
use crate::once::{host, once};
use crate::{Error, Result};

const ARCHIVE: &str = "busybox_1.35.0.orig.tar.bz2";
const FOLDER: &str = "busybox-1.35.0";
/// The release of Debian that has this version.
const RELEASE: &str = "bookworm";
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

const APT: &str = "busybox's source comes from Debian by apt-get: look at the network and at the machine's mirror";
const TOOLS: &str = "`make setup` installs what building it takes (make, gcc, libc6-dev, bzip2)";

/// The program, from the cache or built now, which takes a minute.
pub(crate) fn busybox(cache: &Path) -> Result<PathBuf> {
    let hash = fingerprint([include_bytes!("busybox.rs").as_slice()]);
    once(cache, "busybox", &hash, |work| {
        let kept = cache.join(ARCHIVE);
        let archive = if kept.is_file() {
            kept
        } else {
            fetch(cache, work)?
        };
        build(&archive, work)
    })
}

/// Gets the source in a configuration of apt's own, since this machine's may have no sources. apt checks the
/// signature and the hashes.
fn fetch(cache: &Path, work: &Path) -> Result<PathBuf> {
    let mirror = mirror()?.ok_or_else(|| Error::NoMirror {
        archive: ARCHIVE,
        folder: cache.to_owned(),
    })?;
    for folder in ["state/lists/partial", "cache/archives/partial"] {
        let folder = work.join(folder);
        host("make the folder", &folder, fs::create_dir_all(&folder))?;
    }
    let sources = work.join("sources.list");
    let line = format!("deb-src [signed-by={KEYS}] {mirror} {RELEASE} main\n");
    host("write", &sources, fs::write(&sources, line))?;
    let apt = || {
        let mut command = Command::new("apt-get");
        for (option, value) in [
            ("Dir::State", work.join("state")),
            ("Dir::Cache", work.join("cache")),
            ("Dir::Etc::sourcelist", sources.clone()),
            ("Dir::Etc::sourceparts", "/dev/null".into()),
        ] {
            command
                .arg("-o")
                .arg(format!("{option}={}", value.display()));
        }
        // As root, apt would give rights up that it needs in this folder.
        command
            .args(["-q", "-o", "APT::Sandbox::User=root"])
            .current_dir(work);
        command
    };
    run(apt().arg("update"), APT)?;
    run(
        apt().args(["source", "--download-only", "--tar-only", "busybox"]),
        APT,
    )?;
    Ok(work.join(ARCHIVE))
}

/// Where this machine's own packages come from, if it is a Debian.
fn mirror() -> Result<Option<String>> {
    let system = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let Some(release) = release(&system) else {
        return Ok(None);
    };
    let said = run(
        Command::new("apt-get")
            .args([
                "indextargets",
                "--format",
                "$(REPO_URI)",
                "Created-By: Packages",
            ])
            .arg(format!("Release: {release}")),
        APT,
    )?;
    let said = String::from_utf8_lossy(&said);
    Ok(said.lines().next().map(str::to_owned))
}

fn release(system: &str) -> Option<&str> {
    let value = |name: &str| {
        system.lines().find_map(|line| {
            Some(
                line.strip_prefix(name)?
                    .strip_prefix('=')?
                    .trim_matches('"'),
            )
        })
    };
    (value("ID") == Some("debian")).then(|| value("VERSION_CODENAME"))?
}

fn build(archive: &Path, work: &Path) -> Result<PathBuf> {
    run(
        Command::new("tar")
            .arg("-xf")
            .arg(archive)
            .arg("-C")
            .arg(work),
        TOOLS,
    )?;
    let folder = work.join(FOLDER);
    let make = || {
        let mut command = Command::new("make");
        // What a make around this one told it; and no time in what it builds.
        for name in ["MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARCH", "CROSS_COMPILE"] {
            command.env_remove(name);
        }
        command.env("SOURCE_DATE_EPOCH", "0").current_dir(&folder);
        command
    };
    run(make().arg("defconfig"), TOOLS)?;
    let path = folder.join(".config");
    let defaults = host("read", &path, fs::read_to_string(&path))?;
    host("write", &path, fs::write(&path, configuration(&defaults)))?;
    // Each question that the changes raise is answered with its default.
    let answers = work.join("answers");
    host("write", &answers, fs::write(&answers, "\n".repeat(1000)))?;
    let answers = host("open", &answers, File::open(&answers))?;
    run_with(make().arg("oldconfig"), answers.into(), TOOLS)?;
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    run(make().arg(format!("-j{jobs}")), TOOLS)?;
    Ok(folder.join("busybox"))
}

/// Static, and without `tc`, which newer kernels' headers have nothing for.
fn configuration(defaults: &str) -> String {
    let lines = defaults.lines().map(|line| match line {
        "# CONFIG_STATIC is not set" => "CONFIG_STATIC=y",
        "CONFIG_TC=y" => "# CONFIG_TC is not set",
        line => line,
    });
    lines.flat_map(|line| [line, "\n"]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_debian_has_a_release_of_debian() {
        assert_eq!(
            release("NAME=\"Debian\"\nVERSION_CODENAME=trixie\nID=debian\n"),
            Some("trixie")
        );
        assert_eq!(release("ID=ubuntu\nVERSION_CODENAME=noble\n"), None);
        assert_eq!(release("ID=debian\n"), None);
        assert_eq!(release(""), None);
    }

    #[test]
    fn the_configuration_is_the_authors_own_but_for_two_lines() {
        let defaults = "CONFIG_A=y\n# CONFIG_STATIC is not set\nCONFIG_TC=y\nCONFIG_TCPSVD=y\n";
        assert_eq!(
            configuration(defaults),
            "CONFIG_A=y\nCONFIG_STATIC=y\n# CONFIG_TC is not set\nCONFIG_TCPSVD=y\n"
        );
    }
}
