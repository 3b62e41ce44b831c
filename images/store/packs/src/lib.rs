//! Packs: a μVM's memory as the store keeps it.
//!
//! Most pages of a saved memory are zeroes, or equal to pages that the node has anyway: pages of the bake that the μVM
//! came from (its *parent*), or blocks of a disk *image*. A pack holds a *page map*, which says of each page where it
//! comes from, and the pages that come from nowhere else (*literals*), compressed in *frames* of sixteen.
//!
//! - [`Writer`] makes a pack of a memory, its parents and its images. An [`ImageIndex`] finds image blocks by content.
//! - [`Pack`] is a pack's page map and frame table; a [`FrameReader`] decodes frames. Both need descriptors only, and
//!   after [`Pack::open`] no system call but `pread`, so a jailed VMM can serve page faults with them.
//! - [`rebuild_flat`] and [`rebuild_patch`] make files that can be mapped; [`first_difference`] compares with the memory
//!   that was packed.
//!
//! Trust: a pack may be damaged or made by an enemy. Whatever its bytes are, reading ends in the pages that were
//! packed or in an error, with bounded memory. A frame's stored bytes are verified before they are decompressed, the
//! result is verified before it is given out. What this crate cannot verify is that a parent or an image is the one
//! that was there at writing: the caller compares [`Pack::parents`] and [`Pack::images`] with what it opens.
//!
//! `docs/formats/pack.md` and `docs/formats/image-index.md` define both formats to the byte.

#![deny(missing_docs)]
#![forbid(unsafe_code)]

mod blocks;
mod compare;
mod content;
mod error;
mod frame;
mod header;
mod image_index;
mod map;
mod pack;
mod rebuild;
mod table;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod write;

pub use compare::first_difference;
pub use content::Content;
pub use error::{Error, IndexError, RunFault, TableFault, WriteError};
pub use frame::FrameReader;
pub use header::{Limits, Origin, VERSION};
pub use image_index::{INDEX_VERSION, ImageIndex};
pub use map::{PageMap, Run, Source};
pub use pack::{Pack, Placement, Placements};
pub use rebuild::{rebuild_flat, rebuild_patch};
pub use table::{Coding, FrameEntry, Window};
pub use write::{Copies, DEFAULT_LEVEL, Image, Options, Parent, Summary, Writer};

/// Bytes of a page of memory, and of a block of an image.
pub const PAGE: usize = 4096;
/// Literal pages a frame holds; the last one may hold fewer.
pub const FRAME_PAGES: usize = 16;
/// Most pages of a parent that a frame can be compressed against.
pub const WINDOW_PAGES: usize = 32;
/// Most pages of a memory: 256 GiB.
pub const MAX_PAGES: u32 = 1 << 26;
/// Most runs of a page map.
pub const MAX_RUNS: usize = 1 << 22;
/// Most parents of a pack.
pub const MAX_PARENTS: usize = 16;
/// Most images of a pack.
pub const MAX_IMAGES: usize = 256;

/// The first half of a BLAKE3 digest: long enough that nobody finds two frames with one.
pub(crate) type ShortDigest = [u8; 16];

pub(crate) fn short_digest(bytes: &[u8]) -> ShortDigest {
    let mut short = ShortDigest::default();
    short.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
    short
}
