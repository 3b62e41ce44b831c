//! The machine's own devices, outside PCI: power registers, panic, events, hot-plug controllers, serial.

pub mod hotplug;
pub mod power;
pub mod serial;
