//! Hot-plug of vCPUs, and the end of devices and vCPUs the guest has let go of.

use std::collections::BTreeSet;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};

use super::exits::lock;
use super::{Machine, MachineError};
use crate::cpu::{CpuError, cpuid};
use crate::layout;
use crate::platform::hotplug::HotplugAction;

impl Machine {
    /// Asks for `count` vCPUs: offers new ones, or asks the guest to let go of the last ones. The guest answers
    /// later; see [`followed`](Self::followed).
    pub fn request_cpus(&self, count: u8) -> Result<(), MachineError> {
        let max = lock(&self.config).max_cpus;
        if count == 0 || count > max {
            return Err(MachineError::Usage(format!(
                "{count} vCPUs: this machine takes 1 to {max}"
            )));
        }
        let present: BTreeSet<u8> = self.present_cpus().into_iter().collect();
        let planned = self.planned_cpus(count, &present);
        let (go, come): (Vec<u8>, Vec<u8>) = planned.iter().partition(|i| present.contains(i));
        for index in &come {
            self.make_vcpu(*index)?;
        }
        if planned.is_empty() {
            return Ok(());
        }
        self.board.hotplug_event(|h| {
            for index in come {
                h.insert_cpu(index);
            }
            for index in go {
                h.remove_cpu(index);
            }
        });
        Ok(())
    }

    /// vCPUs the guest has.
    pub fn present_cpus(&self) -> Vec<u8> {
        lock(&self.board.hotplug).present_cpus().collect()
    }

    /// The vCPUs that [`request_cpus`](Self::request_cpus) would ask to come or go.
    pub fn planned_cpus(&self, count: u8, present: &BTreeSet<u8>) -> BTreeSet<u8> {
        let max = lock(&self.config).max_cpus;
        let missing = usize::from(count).saturating_sub(present.len());
        let surplus = present.len().saturating_sub(usize::from(count));
        let come = (0..max).filter(|i| !present.contains(i)).take(missing);
        let go = present
            .iter()
            .rev()
            .copied()
            .filter(|i| *i > 0)
            .take(surplus);
        come.chain(go).collect()
    }

    /// Has `observer` called after every change of the plugged memory. It must not wait.
    pub fn observe_memory(&self, observer: impl Fn() + Send + Sync + 'static) {
        self.with_mem(|_, m| m.observe(move |_| observer()));
    }

    /// A vCPU that was there before is still there: KVM has no way to destroy one, and the guest's INIT restarts it.
    fn make_vcpu(&self, index: u8) -> Result<(), MachineError> {
        if self.board.vcpus.contains(index) {
            return Ok(());
        }
        let like = self.template_cpuid()?;
        let fd = self.create_vcpu(index, &cpuid::for_vcpu(&like, index))?;
        // Setting a local APIC, though to what it is, makes KVM look up all vCPUs anew. It did so last before this one
        // was among them, and would drop the guest's start-up message.
        let kvm = |call| {
            move |source| CpuError::Kvm {
                call,
                index,
                source,
            }
        };
        let apic = fd.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?;
        fd.set_lapic(&apic).map_err(kvm("KVM_SET_LAPIC"))?;
        self.start_vcpu(index, fd, Vec::new())?;
        Ok(())
    }

    /// The CPUID new vCPUs get. The host's, because a snapshot only resumes on a host whose CPUID is the same.
    fn template_cpuid(&self) -> Result<CpuId, MachineError> {
        self.kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|source| MachineError::Kvm {
                call: "KVM_GET_SUPPORTED_CPUID",
                source,
            })
    }

    /// Follows up what the guest did with a hot-plug request. Runs off the vCPU threads.
    pub fn followed(&self, action: HotplugAction) -> Result<(), CpuError> {
        match action {
            HotplugAction::EjectCpu(index) => {
                tracing::info!(index, "the guest let go of a vCPU");
            }
            HotplugAction::CpuStatus(index, status) => {
                if status != 0 {
                    tracing::warn!(index, status, "the guest refused a change of a vCPU");
                }
            }
            HotplugAction::EjectSlots(slots) => {
                for slot in (1..layout::PCI_SLOTS).filter(|s| slots & (1 << s) != 0) {
                    self.remove_device(slot);
                }
            }
        }
        Ok(())
    }

    fn remove_device(&self, slot: u8) {
        self.board.pci.set(slot, None);
        if let Some(device) = lock(&self.devices).remove(&slot) {
            device.reset();
            lock(&self.config).devices.retain(|d| d.slot != slot);
            tracing::info!(slot, "the guest let go of a device");
        }
    }
}
