//! The control API of kiln-vmm and its client: spawns a VMM process and drives it.
//!
//! The VMM inherits one end of a socket pair as its standard input. A frame is a length and a postcard
//! message; file descriptors travel with it by `SCM_RIGHTS`. There is no handshake: the client writes the
//! first request before the new program has even started, so a resume waits for no round trip. Requests are
//! answered in order; a client may be shared by threads.

pub mod api;
mod client;
mod refusal;
pub mod wire;

pub use api::*;
pub use client::{Jail, Spawn, Vmm, VmmError};
pub use kiln_vmm_saved::{PageRun, cpu};
pub use refusal::RefusalKind;
