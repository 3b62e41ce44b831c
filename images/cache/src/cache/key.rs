//! What an image is cached under.

use std::fmt;
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{AtFlags, CWD, StatxFlags};

use crate::erofs::ImageError;
use crate::lowers::Lowers;

/// Identifies the content of a stack of layers. Equal keys must mean equal trees.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageKey(String);

impl ImageKey {
    /// A key from what the caller knows to identify the content: chain id, diff ids.
    pub fn from_identity<S: AsRef<[u8]>>(parts: impl IntoIterator<Item = S>) -> ImageKey {
        let mut hasher = blake3::Hasher::new_derive_key("kiln image cache 1 identity");
        for part in parts {
            // With its length, so that no two lists of parts run together to the same bytes.
            hasher.update(&(part.as_ref().len() as u64).to_le_bytes());
            hasher.update(part.as_ref());
        }
        ImageKey(hasher.finalize().to_hex().to_string())
    }

    /// A key for layers that containerd committed: their paths, and which directories stand there. A
    /// snapshotter that starts its numbers again makes new directories, born at another time, and so gets
    /// other keys. Not for directories that are still being written.
    pub fn from_lowers(lowers: &Lowers) -> Result<ImageKey, ImageError> {
        let mut parts = vec![format!("{:?}", lowers.rules).into_bytes()];
        for dir in &lowers.dirs {
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

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ImageKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
