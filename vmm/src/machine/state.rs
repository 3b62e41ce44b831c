//! A machine's saved state, as it goes into the state file's body.

use kvm_bindings::{kvm_clock_data, kvm_irqchip};
use serde::{Deserialize, Serialize};

use crate::cpu::VcpuState;
use crate::machine::MachineConfig;
use crate::platform::hotplug::HotplugState;
use crate::platform::serial::SerialState;
use crate::virtio::pci::VirtioPciState;

/// Everything but memory.
#[derive(Serialize, Deserialize)]
pub struct MachineState {
    /// What the machine consists of.
    pub config: MachineConfig,
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

const TRIP: () = {
    // Stored as raw bytes: a new size means a new format (docs/vmm.md).
    assert!(size_of::<kvm_irqchip>() == 520);
    assert!(size_of::<kvm_clock_data>() == 48);
};

/// Interrupt controllers that are saved, by KVM's chip id.
pub(crate) const IRQCHIPS: [u32; 3] = {
    let () = TRIP;
    [
        kvm_bindings::KVM_IRQCHIP_PIC_MASTER,
        kvm_bindings::KVM_IRQCHIP_PIC_SLAVE,
        kvm_bindings::KVM_IRQCHIP_IOAPIC,
    ]
};
