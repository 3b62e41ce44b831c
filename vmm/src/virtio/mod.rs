//! What a virtio device is to the rest of the VMM, and the PCI transport that carries it.
//!
//! The contract ([`VirtioDevice`]) is here; the devices themselves are in [`crate::devices`].

mod device;
mod interrupt;
pub mod pci;
mod queue;
mod state;
pub mod testing;

pub use device::{Activation, DeviceError, DeviceType, VirtioDevice};
pub use interrupt::{Interrupt, InterruptSink};
pub use queue::{ActiveQueue, SavedQueue};
pub use state::{DeviceState, StateError};
