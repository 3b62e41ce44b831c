//! Bakes μVMs: puts a guest together from a distribution's kernel and kiln's agent, boots it once,
//! and saves it in the state in which every pod will begin.

#![deny(missing_docs)]

mod bake;
pub mod cpio;
pub mod cpu;
mod elf;
pub mod initramfs;
pub mod kernel;
mod machine;
pub mod modules;
mod recipe;
mod rehearsal;
mod scratch;
pub mod touched;

pub use bake::{BakeError, Baked, COMMAND_LINE, Order, Progress, bake, identity, random};
pub use machine::{Boot, Machine, MachineError, jail};
pub use recipe::Recipe;
pub use scratch::ScratchError;
