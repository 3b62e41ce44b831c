//! The virtio devices: what each does with the requests its driver makes.
//!
//! They trust the VMM's own calls and the descriptors it hands over; they trust nothing that comes
//! from the guest or, for vsock and net, from whoever is at the other end of a socket or a tap.
//! The transport they sit on and the contract they keep are in [`crate::virtio`].

pub mod block;
pub mod chain;
#[cfg(test)]
mod conformance;
pub mod fs;
#[cfg(any(test, feature = "test-utils"))]
pub mod fuzzing;
pub mod mem;
pub mod net;
pub mod ring;
pub mod rng;
mod slab;
#[cfg(any(test, feature = "test-utils"))]
pub mod testing;
pub mod vsock;

/// Answers a read of configuration space: what lies past its end reads as zero.
pub(crate) fn read_config(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|at| config.get(at..))
        .unwrap_or_default();
    for (to, from) in data.iter_mut().zip(rest) {
        *to = *from;
    }
}
