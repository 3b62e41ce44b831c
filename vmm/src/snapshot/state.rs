//! A machine's saved state, as it goes into the state file's body.
//!
//! These types are the format: what clients say over the socket and what the running machine holds are other types, so a
//! change of those can't change a file. The state of a vCPU, of the serial port and of a device stands beside what it belongs
//! to (`VcpuState`, `SerialState`, `VirtioPciState`).

use kvm_bindings::{kvm_clock_data, kvm_irqchip};
use serde::{Deserialize, Serialize};

use crate::cpu::VcpuState;
use crate::machine::{DeviceKind, DeviceSpec, MachineConfig};
use crate::memory::MemoryShape;
use crate::platform::serial::SerialState;
use crate::virtio::pci::VirtioPciState;

/// Everything but memory.
#[derive(Serialize, Deserialize)]
pub struct MachineState {
    /// What the machine consists of.
    pub config: ConfigState,
    /// The paravirtual clock.
    pub clock: kvm_clock_data,
    /// Both PICs and the I/O APIC.
    pub irqchips: Vec<kvm_irqchip>,
    /// vCPUs.
    pub vcpus: Vec<VcpuState>,
    /// Events and hot-plug registers.
    pub hotplug: HotplugState,
    /// The serial port, if there is one.
    pub serial: Option<SerialState>,
    /// Devices with their transports.
    pub devices: Vec<VirtioPciState>,
    /// Whole huge pages of base RAM without data, next to each other as one range from start to end. Kept here,
    /// because asking the memory file takes the longer the more memory there is.
    pub holes: Vec<(u64, u64)>,
}

impl std::fmt::Debug for MachineState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MachineState")
            .field("config", &self.config)
            .field("vcpus", &self.vcpus)
            .finish_non_exhaustive()
    }
}

/// What the machine consists of. See [`MachineConfig`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigState {
    /// vCPUs at boot.
    pub boot_cpus: u8,
    /// vCPUs there may ever be.
    pub max_cpus: u8,
    /// Its memory.
    pub memory: MemoryState,
    /// Whether there is a serial port.
    pub serial: bool,
    /// Devices in the order of their slots.
    pub devices: Vec<DeviceEntry>,
}

/// Sizes of the memory. See [`MemoryShape`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryState {
    /// Base RAM.
    pub ram: u64,
    /// The hot-plug window.
    pub hotplug: u64,
    /// How much of the window the guest can reach.
    pub usable: u64,
}

/// A device on the bus. See [`DeviceSpec`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceEntry {
    /// Its slot.
    pub slot: u8,
    /// What it is.
    pub kind: KindState,
}

/// Kinds of devices. Their order is part of the format. See [`DeviceKind`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "DeviceKind says what they mean")]
pub enum KindState {
    Block { id: String, queues: u16 },
    Net { pairs: u16, mac: [u8; 6] },
    Vsock { cid: u64 },
    Rng,
    Mem,
    Fs { tag: String },
}

/// Registers of hot-plug. See [`HotplugRegisters`](crate::platform::hotplug::HotplugRegisters).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HotplugState {
    /// Events the guest has not read.
    pub events: u32,
    /// The vCPU whose registers the guest looks at.
    pub cpu_selector: u32,
    /// One bit per vCPU that is there.
    pub cpus_present: u64,
    /// One bit per vCPU that is offered.
    pub cpus_inserting: u64,
    /// One bit per vCPU that the guest is asked for.
    pub cpus_removing: u64,
    /// One bit per PCI slot that got a device.
    pub pci_up: u32,
    /// One bit per PCI slot that the guest is asked for.
    pub pci_down: u32,
}

impl From<&MachineConfig> for ConfigState {
    fn from(config: &MachineConfig) -> Self {
        let entry = |spec: &DeviceSpec| DeviceEntry {
            slot: spec.slot,
            kind: KindState::from(&spec.kind),
        };
        Self {
            boot_cpus: config.boot_cpus,
            max_cpus: config.max_cpus,
            memory: config.memory.into(),
            serial: config.serial,
            devices: config.devices.iter().map(entry).collect(),
        }
    }
}

impl From<ConfigState> for MachineConfig {
    fn from(state: ConfigState) -> Self {
        let spec = |entry: DeviceEntry| DeviceSpec {
            slot: entry.slot,
            kind: entry.kind.into(),
        };
        Self {
            boot_cpus: state.boot_cpus,
            max_cpus: state.max_cpus,
            memory: state.memory.into(),
            serial: state.serial,
            devices: state.devices.into_iter().map(spec).collect(),
        }
    }
}

impl From<MemoryShape> for MemoryState {
    fn from(shape: MemoryShape) -> Self {
        let MemoryShape {
            ram,
            hotplug,
            usable,
        } = shape;
        Self {
            ram,
            hotplug,
            usable,
        }
    }
}

impl From<MemoryState> for MemoryShape {
    fn from(state: MemoryState) -> Self {
        let MemoryState {
            ram,
            hotplug,
            usable,
        } = state;
        Self {
            ram,
            hotplug,
            usable,
        }
    }
}

impl From<&DeviceKind> for KindState {
    fn from(kind: &DeviceKind) -> Self {
        match kind.clone() {
            DeviceKind::Block { id, queues } => Self::Block { id, queues },
            DeviceKind::Net { pairs, mac } => Self::Net { pairs, mac },
            DeviceKind::Vsock { cid } => Self::Vsock { cid },
            DeviceKind::Rng => Self::Rng,
            DeviceKind::Mem => Self::Mem,
            DeviceKind::Fs { tag } => Self::Fs { tag },
        }
    }
}

impl From<KindState> for DeviceKind {
    fn from(state: KindState) -> Self {
        match state {
            KindState::Block { id, queues } => Self::Block { id, queues },
            KindState::Net { pairs, mac } => Self::Net { pairs, mac },
            KindState::Vsock { cid } => Self::Vsock { cid },
            KindState::Rng => Self::Rng,
            KindState::Mem => Self::Mem,
            KindState::Fs { tag } => Self::Fs { tag },
        }
    }
}

const _: () = {
    // Stored as raw bytes: a new size means a new format (docs/vmm.md).
    assert!(size_of::<kvm_irqchip>() == 520);
    assert!(size_of::<kvm_clock_data>() == 48);
};
