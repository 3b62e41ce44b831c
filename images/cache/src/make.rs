//! The image of a stack of layers: the one that the store has, or a new one.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use kiln_store::{Image, ImageKey, Images, Making, Turn};
use rustix::fs::{AtFlags, CWD, StatxFlags};

use crate::erofs::{ImageError, Plan};
use crate::lowers::Lowers;

/// Why there is no image to start a container from.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The store could not be used.
    #[error(transparent)]
    Store(#[from] kiln_store::Error),
    /// The layers could not be made into an image.
    #[error("cannot make an image of the layers")]
    Image(#[from] ImageError),
}

/// The image of `lowers`, which `key` identifies; it is made if the store has none. When several processes ask
/// at once, one makes it and the others wait.
pub fn image_for(images: &Images, key: &ImageKey, lowers: &Lowers) -> Result<Image, CacheError> {
    image_of(images, key, |_| Ok(lowers.clone()))
}

/// The same for layers that have to be unpacked first if there is no image: into the directory that `unpack` is given,
/// or below, and they go with it.
pub fn image_of<E: From<CacheError>>(
    images: &Images,
    key: &ImageKey,
    unpack: impl FnOnce(&Path) -> Result<Lowers, E>,
) -> Result<Image, E> {
    let span = tracing::info_span!("image", key = %key);
    let _span = span.entered();
    if let Some(image) = images.lookup(key).map_err(CacheError::from)? {
        return Ok(image);
    }
    match images.turn(key).map_err(CacheError::from)? {
        Turn::There(image) => Ok(image),
        Turn::Make(making) => {
            let lowers = unpack(making.dir())?;
            Ok(make(making, &lowers)?)
        }
    }
}

fn make(making: Making, lowers: &Lowers) -> Result<Image, CacheError> {
    let plan = Plan::new(lowers)?;
    let file = OwnedFd::from(making.reserve(plan.size())?);
    let written = plan.write(&file).map_err(|error| match error {
        ImageError::Write(source) if source.kind() == io::ErrorKind::StorageFull => {
            making.no_space(plan.size()).into()
        }
        error => CacheError::from(error),
    })?;
    drop(file);
    Ok(making.finish(written.digest, written.segments)?)
}

impl Lowers {
    /// A key for layers that containerd committed: their paths, and which directories stand there. A
    /// snapshotter that starts its numbers again makes new directories, born at another time, and so gets
    /// other keys. Not for directories that are still being written.
    pub fn key(&self) -> Result<ImageKey, ImageError> {
        let mut parts = vec![format!("{:?}", self.rules).into_bytes()];
        for dir in &self.dirs {
            let wanted = StatxFlags::INO | StatxFlags::BTIME | StatxFlags::CTIME;
            let stat = rustix::fs::statx(CWD, dir, AtFlags::empty(), wanted).map_err(|e| {
                ImageError::OpenLayer {
                    path: dir.clone(),
                    source: e.into(),
                }
            })?;
            // Not every file system knows when a directory was made.
            let born = if stat.stx_mask & StatxFlags::BTIME.bits() != 0 {
                stat.stx_btime
            } else {
                stat.stx_ctime
            };
            parts.push(dir.as_os_str().as_bytes().to_vec());
            parts.push(stat.stx_ino.to_le_bytes().to_vec());
            parts.push(born.tv_sec.to_le_bytes().to_vec());
            parts.push(born.tv_nsec.to_le_bytes().to_vec());
        }
        Ok(ImageKey::from_identity(parts))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn layer(dir: &Path, name: &str) -> Lowers {
        let dir = dir.join(name);
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("content"), vec![7; 100 << 10]).unwrap();
        Lowers::plain(dir)
    }

    #[test]
    fn image_of_layers_is_made_once_and_is_good() {
        let dir = tempfile::tempdir().unwrap();
        let images = Images::at(dir.path().join("store"));
        let lowers = layer(dir.path(), "a");
        let key = lowers.key().unwrap();
        let made = image_for(&images, &key, &lowers).unwrap();
        let again = image_for(&images, &key, &lowers).unwrap();
        assert_eq!((made.made, again.made), (true, false));
        let bytes = fs::read(&made.path).unwrap();
        // EROFS's magic number.
        assert_eq!(bytes[1024..1028], 0xE0F5_E1E2_u32.to_le_bytes());
        let store = kiln_store::Store::open(dir.path().join("store")).unwrap();
        let report = store.verify(&[key.digest()]).unwrap();
        assert_eq!((report.images, report.damage.len()), (1, 0));
    }

    #[test]
    fn what_is_unpacked_for_an_image_is_gone_when_it_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let images = Images::at(dir.path().join("store"));
        let key = ImageKey::from_identity(["a"]);
        let unpack = |into: &Path| Ok::<_, CacheError>(layer(into, "tree"));
        assert!(image_of(&images, &key, unpack).unwrap().made);
        let left = fs::read_dir(dir.path().join("store/tmp")).unwrap();
        assert_eq!(left.count(), 0);
    }

    #[test]
    fn a_failed_conversion_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let images = Images::at(dir.path().join("store"));
        let lowers = layer(dir.path(), "a");
        let key = lowers.key().unwrap();
        fs::remove_dir_all(dir.path().join("a")).unwrap();
        let error = image_for(&images, &key, &lowers).unwrap_err();
        assert!(matches!(
            error,
            CacheError::Image(ImageError::OpenLayer { .. })
        ));
        for empty in ["images", "tmp", "making"] {
            let left = fs::read_dir(dir.path().join("store").join(empty)).unwrap();
            assert_eq!(left.count(), 0, "{empty}");
        }
    }
}
