//! virtio-blk (virtio 1.2 §5.2): a disk, or an empty slot for one.
//!
//! A slot is a disk of capacity 0. Putting a backend in, or taking it out, changes the capacity and
//! raises the configuration interrupt: the guest sees a disk grow out of nothing, or vanish, without
//! enumerating any hardware. That is the quick way to hot-plug a disk into a resumed μVM.
//!
//! The device checks every request against the disk before the backend hears of it; see
//! [`BlockBackend`] for what a backend may rely on.

mod backend;
mod device;
mod file;
mod overlay;
mod request;
mod uring;
mod worker;

#[cfg(test)]
mod tests;

pub use backend::{
    BlockBackend, BlockOp, BlockRequest, Completion, Content, IoBuffers, RequestTag, SECTOR_SIZE,
    Submitted,
};
pub use device::{Block, BlockConfig};
pub use file::{FileBackend, FileError};
pub use overlay::OverlayBackend;
pub use uring::Rings;
