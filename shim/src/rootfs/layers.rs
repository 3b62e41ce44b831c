//! Layers that are EROFS images already: containerd's erofs snapshotter keeps one for each layer and mounts it where an
//! overlay mount wants a directory.

use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::statfs::{FsType, statfs};

use super::devices;
use super::mounts::{Mounted, Mounts};
use crate::error::{Error, Result};

/// Where an image has its superblock, and how much of it is looked at.
const SUPERBLOCK: (u64, usize) = (1024, 128);
const MAGIC: [u8; 4] = 0xE0F5_E1E2_u32.to_le_bytes();
/// Number of further devices that an image has content on, 16 bits.
const EXTRA_DEVICES: std::ops::Range<usize> = 86..88;

/// An image with a layer in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layer {
    /// A file or a block device.
    pub(super) path: PathBuf,
    superblock: Vec<u8>,
}

/// The images of which these directories are mounts, in the same order, if every one of them is that.
pub(super) fn find(dirs: &[&Path]) -> Result<Option<Vec<Layer>>> {
    // A node has thousands of mounts, and most pods' layers are none of them: the table is read for those that may be.
    if !dirs.iter().all(|dir| is_on_erofs(dir)) {
        return Ok(None);
    }
    let mounts = Mounts::read()
        .map_err(|e| Error::failed("look for the mounts of the root file system's layers", e))?;
    let mut layers = Vec::new();
    for dir in dirs {
        // A directory that can't be looked at is for whoever reads it to complain of.
        let Some(layer) = mounts.at(dir).ok().flatten().and_then(layer) else {
            return Ok(None);
        };
        layers.push(layer);
    }
    Ok(Some(layers))
}

fn is_on_erofs(dir: &Path) -> bool {
    let magic = i64::from(u32::from_le_bytes(MAGIC));
    statfs(dir).is_ok_and(|found| found.filesystem_type() == FsType(magic))
}

fn layer(mounted: &Mounted) -> Option<Layer> {
    if mounted.kind != "erofs" || mounted.root != Path::new("/") {
        return None;
    }
    let layer = image(mounted).and_then(|path| Layer::open(&path));
    layer
        .inspect_err(|error| {
            let source = mounted.source.display();
            tracing::info!(
                error = error.chain(),
                "the layer {source} is not used as it is"
            );
        })
        .ok()
}

/// Where the image of a mounted file system is.
fn image(mounted: &Mounted) -> Result<PathBuf> {
    let (major, minor) = mounted.device;
    if major == 0 {
        // Mounted without a block device: the kernel reads the file.
        return Ok(mounted.source.clone());
    }
    let loop_device = PathBuf::from(format!("/sys/dev/block/{major}:{minor}/loop"));
    backing_file(&loop_device).map_or_else(|| devices::path(major, minor), Ok)
}

/// The file below a loop device that shows all of it, by the device's directory in sysfs.
fn backing_file(loop_device: &Path) -> Option<PathBuf> {
    let read = |name| fs::read(loop_device.join(name)).ok();
    let is_zero = |name| read(name).is_some_and(|text| text.trim_ascii() == b"0");
    if !is_zero("offset") || !is_zero("sizelimit") {
        return None;
    }
    let mut path = read("backing_file")?;
    path.pop_if(|last| *last == b'\n');
    let path = PathBuf::from(std::ffi::OsString::from_vec(path));
    // One that was removed has another name.
    path.is_file().then_some(path)
}

impl Layer {
    /// Looks whether an image stands for itself.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let wrong = |why| Error::failed(format!("use the image {}", path.display()), why);
        let mut superblock = vec![0; SUPERBLOCK.1];
        open(path)?
            .read_exact_at(&mut superblock, SUPERBLOCK.0)
            .map_err(|e| wrong(e.to_string()))?;
        if !superblock.starts_with(&MAGIC) {
            return Err(wrong("it is not EROFS".into()));
        }
        if superblock[EXTRA_DEVICES] != [0, 0] {
            return Err(wrong("it has content on other devices".into()));
        }
        Ok(Self {
            path: path.to_owned(),
            superblock,
        })
    }

    /// Opens it for the guest.
    pub(super) fn file(&self) -> Result<File> {
        open(&self.path)
    }

    /// What tells it from any other image.
    pub(super) fn identity(&self) -> Result<Vec<u8>> {
        let found = self.file()?.metadata().map_err(|e| self.unusable(e))?;
        let mut identity = self.superblock.clone();
        for number in [found.dev(), found.ino(), found.len(), found.rdev()] {
            identity.extend(number.to_le_bytes());
        }
        for number in [found.mtime(), found.mtime_nsec()] {
            identity.extend(number.to_le_bytes());
        }
        identity.extend(self.path.as_os_str().as_bytes());
        Ok(identity)
    }

    fn unusable(&self, error: io::Error) -> Error {
        Error::failed(format!("look at the image {}", self.path.display()), error)
    }
}

fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(|e| Error::failed(format!("open the image {}", path.display()), e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn superblock(extra_devices: u16) -> Vec<u8> {
        let mut image = vec![0; 4096];
        image[1024..1028].copy_from_slice(&MAGIC);
        image[1024 + 86..1024 + 88].copy_from_slice(&extra_devices.to_le_bytes());
        image
    }

    #[test]
    fn an_image_of_its_own_is_used_and_others_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("layer.erofs");
        fs::write(&image, superblock(0)).unwrap();
        let layer = Layer::open(&image).unwrap();
        assert_eq!(layer.path, image);
        let first = layer.identity().unwrap();
        fs::write(&image, [superblock(0), vec![0; 4096]].concat()).unwrap();
        assert_ne!(layer.identity().unwrap(), first);

        for (content, why) in [
            (superblock(2), "other devices"),
            (vec![0; 4096], "not EROFS"),
            (vec![0; 100], "layer.erofs"),
        ] {
            fs::write(&image, content).unwrap();
            let error = Layer::open(&image).unwrap_err().chain();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn loop_device_of_a_whole_file_is_that_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a b\\c");
        let sys = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        fs::write(&file, "").unwrap();
        sys("offset", "0\n");
        sys("sizelimit", "0\n");
        sys("backing_file", &format!("{}\n", file.display()));
        assert_eq!(backing_file(dir.path()), Some(file.clone()));
        sys("backing_file", &format!("{} (deleted)\n", file.display()));
        assert_eq!(backing_file(dir.path()), None);
        sys("backing_file", &format!("{}\n", file.display()));
        sys("offset", "512\n");
        assert_eq!(backing_file(dir.path()), None);
    }

    #[test]
    fn directories_that_are_no_mounts_are_no_images() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(find(&[dir.path()]).unwrap(), None);
        // A mount, of something else.
        assert_eq!(find(&[Path::new("/proc")]).unwrap(), None);
        let missing = Path::new("/no/such/layer");
        assert_eq!(find(&[missing]).unwrap(), None);
    }
}
