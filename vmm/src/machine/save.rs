//! A machine that stands still, and how it is saved.

use std::fs::File;

use kvm_bindings::kvm_irqchip;

use super::exits::lock;
use super::{Machine, MachineError};
use crate::cpu::VcpuState;
use crate::devices::block::{Block, Content};
use crate::event::Stillness;
use crate::snapshot::{ConfigState, MachineState};

/// Interrupt controllers that are saved, by KVM's chip id.
const IRQCHIPS: [u32; 3] = [
    kvm_bindings::KVM_IRQCHIP_PIC_MASTER,
    kvm_bindings::KVM_IRQCHIP_PIC_SLAVE,
    kvm_bindings::KVM_IRQCHIP_IOAPIC,
];

/// A machine that stands still: no vCPU runs and no device works, so its memory can be read. It goes on when this is dropped.
#[derive(Debug)]
#[must_use = "the machine goes on when this is dropped"]
pub struct Paused<'m> {
    machine: &'m Machine,
    /// Given back before the vCPUs start.
    still: Option<Stillness>,
}

impl Machine {
    /// Stops vCPUs and devices. Only one can hold the machine still.
    pub fn pause(&self) -> Result<Paused<'_>, MachineError> {
        {
            let mut paused = lock(&self.paused);
            if *paused {
                let why = "the machine is paused already".to_owned();
                return Err(MachineError::Usage(why));
            }
            *paused = true;
        }
        // In this order: no new kicks, then no unhandled kicks, then no requests in flight.
        self.board.vcpus.pause();
        let still = self.events.still();
        let drained = still.drain();
        // From here on whatever fails lets the machine go on.
        let paused = Paused {
            machine: self,
            still: Some(still),
        };
        let drained = drained.map_err(|source| MachineError::Io {
            action: "handling pending device events",
            source,
        })?;
        if !drained {
            tracing::warn!("a device was still busy when the machine was paused");
        }
        for (slot, d) in lock(&self.devices).iter() {
            d.pause().map_err(|source| MachineError::Device {
                slot: *slot,
                source,
            })?;
        }
        Ok(paused)
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        for d in lock(&self.machine.devices).values() {
            d.unpause();
        }
        self.still = None;
        let mut paused = lock(&self.machine.paused);
        *paused = false;
        self.machine.board.vcpus.start();
    }
}

impl Paused<'_> {
    /// Reads everything but memory, and so not where memory has holes.
    pub fn save(&self) -> Result<MachineState, MachineError> {
        let machine = self.machine;
        let kvm = |call| move |source| MachineError::Kvm { call, source };
        if let Some(outcome) = machine.outcome() {
            return Err(MachineError::Usage(format!(
                "the machine has ended: {outcome:?}"
            )));
        }
        let vm = &machine.board.vm;
        let mut irqchips = Vec::with_capacity(IRQCHIPS.len());
        for id in IRQCHIPS {
            let mut chip = kvm_irqchip {
                chip_id: id,
                ..Default::default()
            };
            vm.get_irqchip(&mut chip).map_err(kvm("KVM_GET_IRQCHIP"))?;
            irqchips.push(chip);
        }
        let clock = vm.get_clock().map_err(kvm("KVM_GET_CLOCK"))?;
        let msrs = machine
            .kvm
            .get_msr_index_list()
            .map_err(kvm("KVM_GET_MSR_INDEX_LIST"))?;
        let mut vcpus = Vec::new();
        machine.board.vcpus.for_each(|index, fd| {
            vcpus.push(VcpuState::save(fd, index, &msrs)?);
            Ok::<(), crate::cpu::CpuError>(())
        })?;
        let mut config = lock(&machine.config).clone();
        config.memory = machine.memory.shape();
        let devices = lock(&machine.devices);
        config.devices.sort_by_key(|d| d.slot);
        let saved: Result<Vec<_>, _> = devices.values().map(|d| d.save()).collect();
        Ok(MachineState {
            config: ConfigState::from(&config),
            clock,
            irqchips,
            vcpus,
            hotplug: lock(&machine.board.hotplug).save(),
            serial: machine.board.console.as_ref().map(|c| lock(c).save()),
            devices: saved?,
            holes: Vec::new(),
        })
    }

    /// Guest memory in the order of a memory file.
    pub fn memory(&self) -> Vec<&[u8]> {
        self.machine.memory.contents()
    }

    /// Writes an overlay's content into an empty file.
    pub fn save_overlay(&self, slot: u8, into: &File) -> Result<u64, MachineError> {
        let saved = self
            .machine
            .device(slot)?
            .with(|b: &mut Block| b.save_content(into));
        match saved {
            Some(Ok(Content::Saved(bytes))) => Ok(bytes),
            Some(Err(source)) => Err(MachineError::Io {
                action: "saving an overlay",
                source,
            }),
            _ => Err(MachineError::Usage(format!("slot {slot} holds no overlay"))),
        }
    }
}
