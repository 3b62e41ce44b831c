//! The virtual machine monitor: KVM, memory, PCI, virtio devices, hot-plug, snapshot and resume,
//! and the jail all of it runs in. Knows nothing of containers or Kubernetes.
//!
//! What it trusts: the process that started it and the files that process handed over. What it does
//! not trust: the guest, and every byte the guest can write (memory, rings, registers, AML mailboxes).

pub mod acpi;
pub mod boot;
pub mod cpu;
pub mod devices;
pub mod event;
pub mod layout;
pub mod machine;
mod map_ahead;
pub mod memory;
pub mod pci;
pub mod platform;
pub mod snapshot;
pub mod timeline;
pub mod virtio;
pub mod vm;
