//! A machine: its parts put together, and what can be done with it.
//!
//! [`Machine::boot`] and [`Machine::resume`] are two functions on purpose: resuming reads top to bottom with
//! no branches for booting. What happens to a running machine is in `ops`, hot-plug in `hotplug`,
//! what the guest is waited for in `resize`, and what needs a machine that stands still in `save`.

mod build;
mod config;
mod exits;
mod hotplug;
mod ops;
mod resize;
mod save;

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use kvm_ioctls::Kvm;

use crate::acpi::AcpiError;
use crate::boot::BootError;
use crate::cpu::CpuError;
use crate::devices::block::{FileError, Rings};
use crate::devices::net::TapError;
use crate::event::EventLoop;
use crate::memory::{Memory, MemoryError};
use crate::virtio::DeviceError;
use crate::virtio::pci::{TransportEnv, TransportError, VirtioPci};

pub use build::{BootSpec, HostEnd, HostEnds, ResumeSpec};
pub use config::{ConfigError, DeviceKind, DeviceSpec, MachineConfig};
pub use exits::{Board, Observer};
pub use ops::Stats;
pub use resize::Answers;
pub use save::Paused;

/// Runs first on every new vCPU thread; the jail's filter.
pub type EnterVcpu = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

/// Why a machine could not be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The configuration makes no sense.
    #[error("the machine's configuration is refused")]
    Config(#[from] ConfigError),
    /// Memory.
    #[error("guest memory")]
    Memory(#[from] MemoryError),
    /// Kernel loading.
    #[error("loading the kernel")]
    Boot(#[from] BootError),
    /// ACPI tables.
    #[error("writing ACPI tables")]
    Acpi(#[from] AcpiError),
    /// vCPUs.
    #[error("virtual CPUs")]
    Cpu(#[from] CpuError),
    /// A device with its transport.
    #[error("devices")]
    Transport(#[from] TransportError),
    /// A device alone.
    #[error("device in slot {slot}")]
    Device {
        /// Its slot.
        slot: u8,
        /// What it said.
        #[source]
        source: DeviceError,
    },
    /// A KVM call.
    #[error("{call} failed")]
    Kvm {
        /// The call.
        call: &'static str,
        /// KVM's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A system call.
    #[error("{action} failed")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Saved state contradicts itself.
    #[error("the state file is damaged: {0}")]
    Damaged(&'static str),
    /// The saved configuration can't be.
    #[error("the state file is damaged")]
    SavedConfig(#[source] ConfigError),
    /// A descriptor is no tap.
    #[error("network card in slot {slot}")]
    Tap {
        /// Its slot.
        slot: u8,
        /// What is wrong with it.
        #[source]
        source: TapError,
    },
    /// A descriptor is no disk.
    #[error("disk in slot {slot}")]
    Disk {
        /// Its slot.
        slot: u8,
        /// What is wrong with it.
        #[source]
        source: FileError,
    },
    /// Something is in use.
    #[error("{0}")]
    Busy(String),
    /// The request makes no sense for this machine.
    #[error("{0}")]
    Usage(String),
}

/// A machine, running or paused.
#[derive(Debug)]
pub struct Machine {
    board: Arc<Board>,
    memory: Arc<Memory>,
    events: EventLoop,
    env: TransportEnv,
    kvm: Kvm,
    config: Mutex<MachineConfig>,
    devices: Mutex<BTreeMap<u8, Arc<VirtioPci>>>,
    /// Whether a [`Paused`] holds it still.
    paused: Mutex<bool>,
    /// Made before the system call filter, which forbids making them.
    rings: Rings,
    enter_vcpu: Enter,
}

struct Enter(EnterVcpu);

impl std::fmt::Debug for Enter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EnterVcpu")
    }
}
