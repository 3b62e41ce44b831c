//! Read-only EROFS images of containers' root filesystems: made once per node, kept, and evicted by a byte budget.
//!
//! [`OverlayMount`] reads containerd's mount options, [`Cache`] keeps images and makes them when they are
//! missing, [`erofs`] is the format. Knows nothing of pods or virtual machines.

#![forbid(unsafe_code)]

mod cache;
pub mod erofs;
mod lowers;
mod mount;

pub use cache::{Cache, CacheError, Entry, ImageKey, Lease};
pub use lowers::Lowers;
pub use mount::{OptionsError, OverlayMount};
