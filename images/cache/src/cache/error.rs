//! What can go wrong with cached images.

use std::io;
use std::path::PathBuf;

use kiln_store::lock::LockError;

use crate::erofs::ImageError;

/// Why there is no image to start a container from.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// A file or directory of the cache could not be used.
    #[error("cannot {action} {path}")]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Another process holds a lock for too long.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The layers could not be made into an image.
    #[error("cannot make an image of the layers")]
    Image(#[from] ImageError),
    /// No room, not even after everything unused was removed.
    #[error(
        "an image of {needed} bytes does not fit on the disk under {dir}, though all unused images are gone; \
         free space there, or move the cache"
    )]
    NoSpace {
        /// The image's size.
        needed: u64,
        /// The cache's directory.
        dir: PathBuf,
    },
    /// A cached image could not be read back.
    #[error("cannot read a cached image")]
    Verify(#[source] io::Error),
}
