//! The node's disk: Debian's packages, nothing else, cached by a hash of this recipe.
//!
//! What kiln adds to the node (set-up script, configuration) travels in the initramfs instead, so that
//! a change there does not build a disk.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::cache;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Debian {
    Trixie,
    Sid,
}

impl Debian {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Debian::Trixie => "trixie",
            Debian::Sid => "sid",
        }
    }

    fn packages(self) -> Vec<&'static str> {
        match self {
            Debian::Trixie => PACKAGES.to_vec(),
            Debian::Sid => [PACKAGES, KUBERNETES_PACKAGES].concat(),
        }
    }

    /// Packages whose files alone are wanted: their post-installation fails where no system runs.
    fn unpacked(self) -> &'static [&'static str] {
        match self {
            Debian::Trixie => &[],
            Debian::Sid => &["docker-registry"],
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

/// What kubelet, kube-proxy and the tests of both call or look for.
const KUBERNETES_PACKAGES: &[&str] = &[
    "apparmor",
    "conntrack",
    "curl",
    "ethtool",
    "ipset",
    "mount",
    "openssl",
    "socat",
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

/// Unpacks a package over the system.
const UNPACK: &str = r#"
set -eu
root=$1 package=$2
chroot "$root" sh -c "cd /tmp && apt-get -q download $package && dpkg -x $package*.deb / && rm $package*.deb"
"#;

/// What a boot needs from a built image.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) disk: PathBuf,
    pub(crate) kernel: PathBuf,
    pub(crate) disk_driver: PathBuf,
}

/// The image for this recipe, from the cache or built now. Others who ask for it meanwhile wait.
pub(crate) fn prepare(debian: Debian) -> Result<Image> {
    let entry = cache::Entry {
        folder: cache::folder()?.join("node"),
        name: debian.name(),
        hash: recipe_hash(debian),
        ending: "",
    };
    entry.prepare(|work| build(debian, work))?;
    let finished = entry.path();
    Ok(Image {
        disk: finished.join("disk.img"),
        kernel: finished.join("vmlinuz"),
        disk_driver: finished.join("virtio_blk.ko"),
    })
}

fn recipe_hash(debian: Debian) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&RECIPE_VERSION.to_le_bytes());
    hasher.update(debian.name().as_bytes());
    hasher.update(debian.packages().join(" ").as_bytes());
    hasher.update(KERNELS.as_bytes());
    for package in debian.unpacked() {
        hasher.update(package.as_bytes());
        hasher.update(UNPACK.as_bytes());
    }
    cache::short_hash(&hasher)
}

fn build(debian: Debian, work: &Path) -> Result<PathBuf> {
    let name = debian.name();
    eprintln!("node: building the {name} image from Debian packages: one to three minutes, once");
    let tree = work.join("tree");
    let disk = work.join("disk.img");

    // fakeroot keeps owners and device nodes right without being root.
    let kernels = work.join("kernels");
    fs::write(&kernels, KERNELS.replace("SUITE", name))?;
    let unpack = work.join("unpack");
    fs::write(&unpack, UNPACK)?;
    let tarball = work.join("system.tar");
    run(Command::new("mmdebstrap")
        .args([
            "--variant=apt",
            "--aptopt=Acquire::Check-Valid-Until \"false\"",
        ])
        .arg(format!("--include={}", debian.packages().join(",")))
        .args(
            debian.unpacked().iter().map(|package| {
                format!("--customize-hook=sh {} \"$1\" {package}", unpack.display())
            }),
        )
        .arg(format!("--customize-hook=sh {} \"$1\"", kernels.display()))
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
        work.join("vmlinuz"),
    )?;
    let driver = format!("usr/lib/modules/{version}/kernel/drivers/block/virtio_blk.ko.xz");
    let unpacked = File::create(work.join("virtio_blk.ko"))?;
    run(Command::new("xz")
        .arg("-dc")
        .arg(tree.join(driver))
        .stdout(unpacked))?;
    fs::remove_dir_all(&tree)?;
    fs::remove_file(&kernels)?;
    fs::remove_file(&unpack)?;
    Ok(work.to_owned())
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
        assert_ne!(recipe_hash(Debian::Trixie), recipe_hash(Debian::Sid));
        assert_eq!(recipe_hash(Debian::Sid), recipe_hash(Debian::Sid));
    }
}
