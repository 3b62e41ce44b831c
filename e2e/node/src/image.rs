//! The node's disk: Debian's packages, nothing else, cached by a hash of this recipe.
//!
//! What kiln adds to the node (set-up script, configuration) travels in the initramfs instead, so that
//! a change there does not build a disk.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::cleanup;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Suite {
    /// containerd 1.7
    Trixie,
    /// containerd 2.x
    Sid,
}

impl Suite {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Suite::Trixie => "trixie",
            Suite::Sid => "sid",
        }
    }
}

/// Raise it when the steps below change in a way that the package list does not show.
const RECIPE_VERSION: u32 = 1;

const PACKAGES: &[&str] = &[
    "busybox-static",
    "containerd",
    "containernetworking-plugins",
    "dmsetup",
    "e2fsprogs",
    "erofs-utils",
    "iproute2",
    "iptables",
    "iputils-ping",
    "kmod",
    "linux-perf",
    "procps",
    "qemu-system-x86",
    "runc",
    "strace",
    "tcpdump",
];

/// Fetches both guest kernels (the first is the node's own too) without their post-installation, which
/// would build an initramfs that nobody boots. A suite's sources are the node's with another name in them.
const KERNELS: &str = r#"
set -eu
root=$1
for suite in trixie bookworm; do
    sed -n "/^deb .*debian SUITE /p; /^deb .*debian SUITE /q" "$root/etc/apt/sources.list" |
        sed "s/ SUITE / $suite /" > "$root/etc/apt/sources.list.d/$suite.list"
done
chroot "$root" apt-get -o Acquire::Check-Valid-Until=false -q update
for series in 6.12 6.1.0; do
    kernel=$(chroot "$root" apt-cache search --names-only "^linux-image-$series[.+0-9a-z-]*-cloud-amd64\$" |
        cut -d' ' -f1 | sort -V | tail -n 1)
    test -n "$kernel" || { echo "no cloud kernel of series $series is to be had" >&2; exit 1; }
    (cd "$root/tmp" && chroot "$root" sh -c "cd /tmp && apt-get -q download $kernel")
    chroot "$root" sh -c 'dpkg -x /tmp/linux-image-*.deb /tmp/kernel && rm /tmp/linux-image-*.deb'
    test -d "$root/usr/lib/modules" || mkdir -p "$root/usr/lib/modules"
    cp -a "$root"/tmp/kernel/boot/. "$root/boot/"
    test -d "$root/tmp/kernel/usr/lib/modules" && modules=usr/lib/modules || modules=lib/modules
    cp -a "$root/tmp/kernel/$modules/." "$root/usr/lib/modules/"
    version=$(ls "$root/tmp/kernel/$modules")
    chroot "$root" depmod "$version"
    rm -r "$root/tmp/kernel"
done
rm -rf "$root"/var/lib/apt/lists/* "$root"/usr/share/doc/* "$root"/usr/share/man/*
"#;

/// What a boot needs from a built image.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) disk: PathBuf,
    pub(crate) kernel: PathBuf,
    pub(crate) disk_driver: PathBuf,
}

/// The image for this recipe, from the cache or built now. Others who ask for it meanwhile wait.
pub(crate) fn prepare(suite: Suite) -> Result<Image> {
    let folder = cache_folder()?.join("node");
    let finished = folder.join(format!("{}-{}", suite.name(), recipe_hash(suite)));
    if !finished.is_dir() {
        fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        let lock = File::create(folder.join(format!("{}.lock", suite.name())))?;
        // SAFETY: flock only takes a descriptor, which is open.
        if unsafe { nix::libc::flock(lock.as_raw_fd(), nix::libc::LOCK_EX) } != 0 {
            return Err(std::io::Error::last_os_error()).context("waiting for another image build");
        }
        remove_stale(&folder, suite, &finished)?;
        if !finished.is_dir() {
            build(suite, &folder, &finished)?;
        }
    }
    Ok(Image {
        disk: finished.join("disk.img"),
        kernel: finished.join("vmlinuz"),
        disk_driver: finished.join("virtio_blk.ko"),
    })
}

fn cache_folder() -> Result<PathBuf> {
    let set = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    set("KILN_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|folder| folder.join("kiln")))
        .or_else(|| set("HOME").map(|folder| folder.join(".cache/kiln")))
        .context("no folder for the cache: set KILN_CACHE or HOME")
}

fn recipe_hash(suite: Suite) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&RECIPE_VERSION.to_le_bytes());
    hasher.update(suite.name().as_bytes());
    hasher.update(PACKAGES.join(" ").as_bytes());
    hasher.update(KERNELS.as_bytes());
    hasher.finalize().to_hex()[..16].to_owned()
}

/// Half-built images (of builders that were killed: we hold the lock) and those of older recipes.
fn remove_stale(folder: &Path, suite: Suite, current: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let ours = path
            .file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.starts_with(&format!("{}-", suite.name())));
        if ours && path != current {
            fs::remove_dir_all(&path).with_context(|| format!("removing {}", path.display()))?;
        }
    }
    Ok(())
}

fn build(suite: Suite, folder: &Path, finished: &Path) -> Result<()> {
    let name = suite.name();
    eprintln!("node: building the {name} image from Debian packages: one to three minutes, once");
    let work = folder.join(format!("{name}-building"));
    fs::create_dir_all(&work)?;
    let work = cleanup::TemporaryFolder::new(work);
    let tree = work.path().join("tree");
    let disk = work.path().join("disk.img");

    // fakeroot keeps owners and device nodes right without being root.
    let hook = work.path().join("kernels");
    fs::write(&hook, KERNELS.replace("SUITE", name))?;
    let tarball = work.path().join("system.tar");
    run(Command::new("mmdebstrap")
        .args([
            "--variant=apt",
            "--aptopt=Acquire::Check-Valid-Until \"false\"",
        ])
        .arg(format!("--include={}", PACKAGES.join(",")))
        .arg(format!("--customize-hook=sh {} \"$1\"", hook.display()))
        .arg(name)
        .arg(&tarball))?;
    run(Command::new("fakeroot")
        .args(["sh", "-euc"])
        .arg(
            "mkdir \"$1\"; tar -xf \"$2\" -C \"$1\"; rm \"$2\"
         mke2fs -q -t ext4 -O ^has_journal -E lazy_itable_init=1 -L node -d \"$1\" \"$3\" 24G",
        )
        .arg("sh")
        .args([&tree, &tarball, &disk]))?;

    let version = newest(&tree.join("usr/lib/modules"))?;
    fs::copy(
        tree.join(format!("boot/vmlinuz-{version}")),
        work.path().join("vmlinuz"),
    )?;
    let driver = format!("usr/lib/modules/{version}/kernel/drivers/block/virtio_blk.ko.xz");
    let unpacked = File::create(work.path().join("virtio_blk.ko"))?;
    run(Command::new("xz")
        .arg("-dc")
        .arg(tree.join(driver))
        .stdout(unpacked))?;
    fs::remove_dir_all(&tree)?;
    fs::remove_file(&hook)?;
    work.keep_as(finished)
}

fn newest(modules: &Path) -> Result<String> {
    fs::read_dir(modules)
        .with_context(|| format!("reading {}", modules.display()))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .find(|version| version.starts_with("6.12"))
        .context("the image has no 6.12 kernel")
}

fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("running {program}; `make setup` installs it"))?;
    if !status.success() {
        bail!("{program} ended with {status}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suites_have_images_of_their_own() {
        assert_ne!(recipe_hash(Suite::Trixie), recipe_hash(Suite::Sid));
        assert_eq!(recipe_hash(Suite::Sid), recipe_hash(Suite::Sid));
    }

    #[test]
    fn stale_images_of_the_suite_go_and_others_stay() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["trixie-building", "trixie-old", "trixie-new", "sid-old"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        remove_stale(
            folder.path(),
            Suite::Trixie,
            &folder.path().join("trixie-new"),
        )
        .unwrap();
        let mut left: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        left.sort();
        assert_eq!(left, ["sid-old", "trixie-new"]);
    }
}
