//! What can go wrong between a tree on disk and its image.

use std::io;
use std::path::PathBuf;

/// Why no image was made of a tree.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A layer's directory could not be opened.
    #[error("cannot open the layer {path}; is its snapshot still there?")]
    OpenLayer {
        /// The layer's directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Something in a layer could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The thing, under its layer's directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file was not the same when it was copied as when the tree was listed.
    #[error("{path} changed while its image was made; a layer must stand still")]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A file whose data overlayfs keeps in another file.
    #[error(
        "{path} was written with overlayfs' metacopy=on, which kiln cannot follow; mount with metacopy=off"
    )]
    Metacopy {
        /// The file.
        path: PathBuf,
    },
    /// An overlay redirect that is neither a name nor an absolute path.
    #[error("{path} has an overlay redirect that makes no sense: {redirect:?}")]
    Redirect {
        /// The directory with the redirect.
        path: PathBuf,
        /// The attribute's value.
        redirect: String,
    },
    /// More attributes on one inode than EROFS can hold.
    #[error("{path} has {len} bytes of extended attributes, EROFS holds at most {max}", max = super::format::XATTR_MAX_LEN)]
    XattrsTooLarge {
        /// The inode's path.
        path: PathBuf,
        /// Their length.
        len: usize,
    },
    /// More data than 32-bit block numbers reach.
    #[error("the tree needs {blocks} blocks of 4 KiB, EROFS reaches 2^32")]
    TooLarge {
        /// Blocks needed.
        blocks: u64,
    },
    /// A tree of no layers at all.
    #[error("no layers were given, so there is nothing to make an image of")]
    NoLayers,
    /// The image could not be written.
    #[error("cannot write the image")]
    Write(#[source] io::Error),
}
