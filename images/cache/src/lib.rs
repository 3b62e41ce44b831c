//! Read-only EROFS images of containers' root filesystems, for the catalogue that the store has of them.
//!
//! [`OverlayMount`] reads containerd's mount options, [`erofs`] is the format, and [`image_for`] finds the image of a
//! stack of layers in the store, or makes it. Knows nothing of pods or virtual machines.

#![forbid(unsafe_code)]

pub mod erofs;
mod lowers;
mod make;
mod mount;

pub use lowers::Lowers;
pub use make::{CacheError, image_for, image_of};
pub use mount::{OptionsError, OverlayMount};
