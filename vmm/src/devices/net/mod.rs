//! virtio-net (virtio 1.2 §5.1): a network card whose cable is a tap interface of the host.
//!
//! The card is baked without a cable: its link is down. On resume the VMM puts in the tap of the pod's
//! network namespace, and the link comes up. Packets go between the tap and the guest's buffers
//! without a copy in this process, checksums and segmentation left to whoever needs them done.
//!
//! The MAC address is what the VMM says when the driver probes the card, and what the driver says
//! from then on: a resumed guest takes over its pod's address by setting it.

mod control;
mod device;
mod pair;
mod tap;

#[cfg(test)]
mod tests;

pub use device::{Net, NetConfig};
pub use tap::{NetBackend, Offloads, Tap, TapError};
