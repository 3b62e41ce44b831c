//! containerd's shim for kiln.

pub mod bootstrap;
pub mod error;
pub mod events;
pub mod log;
pub mod publisher;
pub mod stdio;
pub mod time;
