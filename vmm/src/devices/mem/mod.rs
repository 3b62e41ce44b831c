//! virtio-mem (virtio 1.2 §5.15): memory that comes and goes in blocks, at the host's wish and the
//! guest's pace.
//!
//! The VMM states how much it wants plugged ([`Mem::request`]); the guest plugs and unplugs blocks
//! towards that and can refuse to give up what it uses. Every block given back is returned to the host at
//! once. Nothing here waits for the guest: whoever resizes watches [`MemStatus`].

mod blocks;
mod device;

#[cfg(test)]
mod tests;

pub use device::{Mem, MemStatus};
