//! EROFS images: a directory tree, or a stack of overlayfs layers seen as one, becomes a read-only file system in
//! one file.
//!
//! Images are uncompressed, have blocks of 4 KiB, and are the same to the byte for the same tree. What of the
//! format is used stands in `docs/images.md`.

mod attributes;
mod directory;
mod error;
mod format;
mod layout;
mod merge;
mod probe;
mod scan;
mod source;
mod tree;
mod write;

use std::os::fd::OwnedFd;

use kiln_store::SegmentDigest;

pub use error::ImageError;
use layout::Layout;
use source::Layers;
use tree::{Content, Tree};
use write::Writer;
pub(crate) use write::digest;

use crate::lowers::Lowers;

/// Waiting for a cold disk is what more threads than cores are for.
const LEAST_THREADS: usize = 4;
const MOST_THREADS: usize = 16;

/// An image that has been planned to the last block, but not written.
#[derive(Debug)]
pub struct Plan {
    layers: Layers,
    tree: Tree,
    layout: Layout,
    threads: usize,
}

/// An image that has been written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Length in bytes.
    pub size: u64,
    /// Identifies the image's content: the BLAKE3 digest of its segments' lengths and digests.
    pub digest: [u8; 32],
    /// The image's parts, from its first byte to its last.
    pub segments: Vec<SegmentDigest>,
}

impl Plan {
    /// Lists the tree and decides where everything goes. No file's content is read.
    pub fn new(lowers: &Lowers) -> Result<Plan, ImageError> {
        let threads = std::thread::available_parallelism()
            .map_or(LEAST_THREADS, usize::from)
            .clamp(LEAST_THREADS, MOST_THREADS);
        let layers = Layers::open(lowers)?;
        let tree = {
            let _span = tracing::info_span!("image-scan").entered();
            scan::scan(lowers, &layers, threads)?
        };
        if tree.xattrs_left_out > 0 {
            tracing::warn!(
                count = tree.xattrs_left_out,
                "extended attributes that EROFS cannot hold were left out"
            );
        }
        let layout = {
            let _span = tracing::info_span!("image-layout").entered();
            Layout::new(&tree)?
        };
        Ok(Plan {
            layers,
            tree,
            layout,
            threads,
        })
    }

    /// The image's length in bytes.
    pub fn size(&self) -> u64 {
        self.layout.blocks * format::BLOCK
    }

    /// Inodes in the image.
    pub fn inodes(&self) -> u64 {
        self.tree.inodes.len() as u64
    }

    /// Bytes of all files, each counted once however many names it has.
    pub fn file_bytes(&self) -> u64 {
        self.tree
            .inodes
            .iter()
            .map(|inode| match &inode.content {
                Content::File(file) => file.size,
                _ => 0,
            })
            .sum()
    }

    /// Extended attributes of the tree that EROFS has no place for, and that the image lacks: those of
    /// unknown namespaces, and values of 64 KiB.
    pub fn xattrs_left_out(&self) -> u64 {
        self.tree.xattrs_left_out
    }

    /// Writes the image to `out`, an empty file. Nothing is synced.
    pub fn write(&self, out: &OwnedFd) -> Result<Written, ImageError> {
        let span = tracing::info_span!("image-write", bytes = self.size(), inodes = self.inodes());
        let _span = span.entered();
        let segments = Writer {
            tree: &self.tree,
            layout: &self.layout,
            layers: &self.layers,
            out,
        }
        .write(self.threads)?;
        Ok(Written {
            size: self.size(),
            digest: digest(&segments),
            segments,
        })
    }
}
