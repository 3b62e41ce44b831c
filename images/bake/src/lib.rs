//! Bakes μVMs: puts a guest together from a distribution's kernel and kiln's agent, boots it once,
//! and saves it in the state in which every pod will begin.

#![deny(missing_docs)]

mod bake;
mod boot;
mod class;
mod console;
pub mod cpio;
pub mod cpu;
mod elf;
mod failure;
pub mod initramfs;
pub mod kernel;
mod library;
pub mod modules;
mod recipe;
mod rehearsal;
mod scratch;
mod try_out;

pub use bake::{BakeError, Baked, COMMAND_LINE, Order, Progress, bake};
pub use class::ClassError;
pub use recipe::Recipe;
pub use scratch::ScratchError;
