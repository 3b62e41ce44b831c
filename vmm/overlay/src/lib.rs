//! A writable disk over a read-only one. Writes live in RAM; past a threshold the coldest of them
//! move to a file on the node's disk, and come back if they become hot.
//!
//! A [`Pool`] is a pod's RAM and spill file, a [`Overlay`] one disk of the pod; the disks of a pod
//! share its pool. A [`Membership`] makes the pool keep to a budget that all pods of the node share.
//!
//! What it trusts: its caller, the disk below, and the spill file's contents. What it does not trust:
//! offsets, lengths and contents of requests, the spill file's success, and the other members of the
//! budget. `docs/overlay.md` describes the structures and the guarantees.

mod arena;
mod base;
mod bounce;
mod budget;
mod buffers;
mod error;
mod file;
mod mover;
mod overlay;
mod pool;
mod read;
mod save;
mod sectors;
mod signal;
mod slots;
mod stats;
mod table;
mod worker;

#[cfg(test)]
mod tests;

pub use base::{Base, FileBase};
pub use budget::{Budget, BudgetError, Membership, Seat};
pub use buffers::{BufferError, Source, Target};
pub use error::Error;
pub use file::{Caching, DiskFile, SpillFile, WINDOW};
pub use overlay::{Attempt, Overlay, Watch};
pub use pool::{FlushPolicy, LEAST_RAM, Pool, PoolConfig};
pub use sectors::{CHUNK_SIZE, PAGE_SIZE, SECTOR_SIZE};
pub use stats::{OverlayStats, PoolStats};
