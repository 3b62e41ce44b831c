//! Read-only EROFS images of containers' root filesystems: made once per node, kept, and evicted by a byte budget.
//!
//! [`erofs`] makes images.

#![forbid(unsafe_code)]

pub mod erofs;
mod lowers;

pub use lowers::Lowers;
