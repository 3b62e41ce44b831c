//! Finding a guest kernel on this machine.

use std::cmp::Ordering;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// A kernel image and its modules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestKernel {
    /// As `uname -r` says.
    pub release: String,
    /// The image (bzImage).
    pub image: PathBuf,
    /// The directory of its modules.
    pub modules: PathBuf,
}

/// Why there is no kernel to bake with.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// None is installed.
    #[error(
        "no kernel with modules was found in /boot and /lib/modules: install one \
         (`apt install linux-image-cloud-amd64`) or name one (`--kernel FILE --modules DIR`)"
    )]
    None,
    /// The image cannot be read.
    #[error("reading {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is no kernel.
    #[error("{} is no x86 kernel image (bzImage)", .0.display())]
    NotAKernel(PathBuf),
    /// There are no modules for it.
    #[error(
        "there are no modules for kernel {release} in {}: name their directory (`--modules DIR`)",
        tried.display()
    )]
    NoModules {
        /// The kernel's release.
        release: String,
        /// Where they should be.
        tried: PathBuf,
    },
}

/// The kernel to bake with: the one that is named, or the best that is installed.
///
/// The best is the newest cloud kernel (it starts quickest and is smallest), or the newest at all.
pub fn choose(
    root: &Path,
    image: Option<&Path>,
    modules: Option<&Path>,
) -> Result<GuestKernel, KernelError> {
    match image {
        Some(image) => named(root, image, modules),
        None => installed(root).into_iter().next().ok_or(KernelError::None),
    }
}

fn named(root: &Path, image: &Path, modules: Option<&Path>) -> Result<GuestKernel, KernelError> {
    let release = release_of(image)?;
    let modules = match modules {
        Some(dir) => dir.to_owned(),
        None => module_dirs(root, &release)
            .into_iter()
            .find(|dir| dir.is_dir())
            .ok_or_else(|| KernelError::NoModules {
                tried: root.join("lib/modules").join(&release),
                release: release.clone(),
            })?,
    };
    if !modules.is_dir() {
        return Err(KernelError::NoModules {
            release,
            tried: modules,
        });
    }
    Ok(GuestKernel {
        release,
        image: image.to_owned(),
        modules,
    })
}

fn module_dirs(root: &Path, release: &str) -> [PathBuf; 2] {
    ["lib/modules", "usr/lib/modules"].map(|dir| root.join(dir).join(release))
}

/// Every installed kernel that has modules, the best first.
pub fn installed(root: &Path) -> Vec<GuestKernel> {
    let boot = root.join("boot");
    let names = fs::read_dir(&boot).into_iter().flatten().flatten();
    let mut kernels: Vec<GuestKernel> = names
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let release = name.strip_prefix("vmlinuz-")?.to_owned();
            let modules = module_dirs(root, &release)
                .into_iter()
                .find(|dir| dir.is_dir())?;
            Some(GuestKernel {
                release,
                image: boot.join(name),
                modules,
            })
        })
        .collect();
    let cloud = |kernel: &GuestKernel| kernel.release.contains("cloud");
    kernels.sort_by(|a, b| {
        cloud(b)
            .cmp(&cloud(a))
            .then_with(|| compare(&b.release, &a.release))
    });
    kernels
}

/// Compares releases as people do: numbers by value.
fn compare(a: &str, b: &str) -> Ordering {
    let mut parts = (pieces(a), pieces(b));
    loop {
        match (parts.0.next(), parts.1.next()) {
            (None, None) => return Ordering::Equal,
            (a, b) if a == b => {}
            (Some(Ok(a)), Some(Ok(b))) => return a.cmp(&b),
            (a, b) => return a.map(text).cmp(&b.map(text)),
        }
    }
}

fn text(piece: Result<u64, &str>) -> String {
    piece.map_or_else(str::to_owned, |number| number.to_string())
}

/// Runs of digits as numbers, everything else as text.
fn pieces(text: &str) -> impl Iterator<Item = Result<u64, &str>> {
    text.split_inclusive(|c: char| !c.is_ascii_digit())
        .flat_map(|piece| {
            let digits = piece.trim_end_matches(|c: char| !c.is_ascii_digit());
            let rest = &piece[digits.len()..];
            let number = digits.parse().ok().map(Ok);
            let rest = (!rest.is_empty()).then_some(Err(rest));
            number.into_iter().chain(rest)
        })
}

/// The release that a kernel image says it is (`Documentation/arch/x86/boot.rst`).
pub fn release_of(image: &Path) -> Result<String, KernelError> {
    const MAGIC: u64 = 0x202;
    const VERSION: u64 = 0x20e;
    let wrap = |source| KernelError::Read {
        path: image.to_owned(),
        source,
    };
    let not_a_kernel = || KernelError::NotAKernel(image.to_owned());
    let file = File::open(image).map_err(wrap)?;
    let read = |at: u64, buffer: &mut [u8]| match file.read_exact_at(buffer, at) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(not_a_kernel()),
        other => other.map_err(wrap),
    };
    let mut magic = [0; 4];
    read(MAGIC, &mut magic)?;
    if magic != *b"HdrS" {
        return Err(not_a_kernel());
    }
    let mut offset = [0; 2];
    read(VERSION, &mut offset)?;
    let mut text = [0; 128];
    read(u64::from(u16::from_le_bytes(offset)) + 0x200, &mut text)?;
    let end = text
        .iter()
        .position(|byte| matches!(byte, 0 | b' '))
        .ok_or_else(not_a_kernel)?;
    match std::str::from_utf8(&text[..end]) {
        Ok(release) if release.starts_with(|c: char| c.is_ascii_digit()) => Ok(release.to_owned()),
        _ => Err(not_a_kernel()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(releases: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("boot")).unwrap();
        for release in releases {
            fs::write(dir.path().join(format!("boot/vmlinuz-{release}")), "").unwrap();
            fs::create_dir_all(dir.path().join("lib/modules").join(release)).unwrap();
        }
        dir
    }

    #[test]
    fn newest_cloud_kernel_is_preferred_and_numbers_count_as_numbers() {
        let dir = machine(&[
            "6.1.0-9-cloud-amd64",
            "6.1.0-56-cloud-amd64",
            "6.12.9-cloud-amd64",
            "6.18.1-amd64",
            "6.12.95+deb12-cloud-amd64",
        ]);
        let releases: Vec<_> = installed(dir.path())
            .into_iter()
            .map(|k| k.release)
            .collect();
        assert_eq!(
            releases,
            [
                "6.12.95+deb12-cloud-amd64",
                "6.12.9-cloud-amd64",
                "6.1.0-56-cloud-amd64",
                "6.1.0-9-cloud-amd64",
                "6.18.1-amd64",
            ]
        );
    }

    #[test]
    fn kernel_without_modules_does_not_count() {
        let dir = machine(&[]);
        fs::write(dir.path().join("boot/vmlinuz-6.12-cloud"), "").unwrap();
        assert!(matches!(
            choose(dir.path(), None, None),
            Err(KernelError::None)
        ));
    }

    fn image(text: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 0x1000];
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        bytes[0x20e..0x210].copy_from_slice(&0x300u16.to_le_bytes());
        bytes[0x500..0x500 + text.len()].copy_from_slice(text);
        bytes
    }

    #[test]
    fn release_is_read_from_the_image() {
        let dir = machine(&["6.1.0-56"]);
        let path = dir.path().join("kernel");
        fs::write(&path, image(b"6.1.0-56 (builder@debian) #1 SMP")).unwrap();
        let kernel = choose(dir.path(), Some(&path), None).unwrap();
        assert_eq!(kernel.release, "6.1.0-56");
        assert!(kernel.modules.ends_with("lib/modules/6.1.0-56"));
        fs::write(&path, image(b"6.2 x")).unwrap();
        assert!(matches!(
            choose(dir.path(), Some(&path), None),
            Err(KernelError::NoModules { .. })
        ));
    }

    #[test]
    fn what_is_no_kernel_is_refused_by_name() {
        let dir = machine(&[]);
        let path = dir.path().join("kernel");
        for wrong in [
            vec![],
            vec![0; 0x1000],
            image(b"nonsense "),
            image(&[b'6'; 128]),
        ] {
            fs::write(&path, wrong).unwrap();
            assert!(matches!(release_of(&path), Err(KernelError::NotAKernel(_))));
        }
        assert!(matches!(
            release_of(dir.path()),
            Err(KernelError::Read { .. })
        ));
    }
}
