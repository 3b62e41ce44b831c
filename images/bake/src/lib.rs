//! Bakes μVMs: puts a guest together from a distribution's kernel and kiln's agent.

#![deny(missing_docs)]

pub mod cpio;
mod elf;
pub mod initramfs;
pub mod kernel;
pub mod modules;
