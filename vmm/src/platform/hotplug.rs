//! The register files behind the hot-plug AML: events, vCPUs, PCI slots.
//!
//! All values come from the guest: selectors out of range select nothing.

use crate::acpi::Event;
use crate::layout;
use crate::snapshot::HotplugState;

/// Pending events and controllers' registers.
#[derive(Debug, Default)]
pub struct HotplugRegisters {
    events: u32,
    cpu_selector: u32,
    /// One bit per vCPU.
    cpus_present: u64,
    cpus_inserting: u64,
    cpus_removing: u64,
    pci_up: u32,
    pci_down: u32,
}

/// What the guest did that the machine has to follow up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HotplugAction {
    /// The guest let go of this vCPU.
    EjectCpu(u8),
    /// The guest said how a request for this vCPU went (`_OST` status; 0 is success).
    CpuStatus(u8, u32),
    /// The guest let go of these PCI slots.
    EjectSlots(u32),
}

impl HotplugRegisters {
    /// Registers of a machine that boots with this many vCPUs.
    pub fn new(boot_cpus: u8) -> Self {
        let present = if boot_cpus >= 64 {
            u64::MAX
        } else {
            (1 << boot_cpus) - 1
        };
        Self {
            cpus_present: present,
            ..Default::default()
        }
    }

    /// The registers as they go into a state file.
    pub fn save(&self) -> HotplugState {
        HotplugState {
            events: self.events,
            cpu_selector: self.cpu_selector,
            cpus_present: self.cpus_present,
            cpus_inserting: self.cpus_inserting,
            cpus_removing: self.cpus_removing,
            pci_up: self.pci_up,
            pci_down: self.pci_down,
        }
    }

    /// Registers as they were saved.
    pub fn restore(state: &HotplugState) -> Self {
        Self {
            events: state.events,
            cpu_selector: state.cpu_selector,
            cpus_present: state.cpus_present,
            cpus_inserting: state.cpus_inserting,
            cpus_removing: state.cpus_removing,
            pci_up: state.pci_up,
            pci_down: state.pci_down,
        }
    }

    /// Makes an event pending. The caller raises the interrupt.
    pub fn raise(&mut self, event: Event) {
        self.events |= event as u32;
    }

    /// Present vCPUs.
    pub fn present_cpus(&self) -> impl Iterator<Item = u8> + '_ {
        (0..layout::MAX_CPUS).filter(|i| self.cpus_present & (1 << i) != 0)
    }

    /// Offers a vCPU to the guest.
    pub fn insert_cpu(&mut self, index: u8) {
        if index < layout::MAX_CPUS {
            self.cpus_present |= 1 << index;
            self.cpus_inserting |= 1 << index;
            self.cpus_removing &= !(1 << index);
            self.raise(Event::Cpus);
        }
    }

    /// Asks the guest to let go of a vCPU.
    pub fn remove_cpu(&mut self, index: u8) {
        if index < layout::MAX_CPUS {
            self.cpus_removing |= 1 << index;
            self.cpus_inserting &= !(1 << index);
            self.raise(Event::Cpus);
        }
    }

    /// Tells the guest of a device in this slot.
    pub fn insert_slot(&mut self, slot: u8) {
        if slot < layout::PCI_SLOTS {
            self.pci_up |= 1 << slot;
            self.pci_down &= !(1 << slot);
            self.raise(Event::Pci);
        }
    }

    /// Asks the guest to let go of the device in this slot.
    pub fn remove_slot(&mut self, slot: u8) {
        if slot < layout::PCI_SLOTS {
            self.pci_down |= 1 << slot;
            self.pci_up &= !(1 << slot);
            self.raise(Event::Pci);
        }
    }

    fn selected(&self) -> Option<u8> {
        u8::try_from(self.cpu_selector)
            .ok()
            .filter(|i| *i < layout::MAX_CPUS)
    }

    /// The guest reads the event register, which clears it.
    pub fn read_events(&mut self) -> u32 {
        std::mem::take(&mut self.events)
    }

    /// The guest reads CPU register `offset`.
    pub fn read_cpu(&self, offset: u16) -> u32 {
        match (offset, self.selected()) {
            (0, _) => self.cpu_selector,
            (4, Some(i)) => {
                let bit = |set: u64, to: u32| (((set >> i) & 1) as u32) << to;
                bit(self.cpus_present, 0) | bit(self.cpus_inserting, 1) | bit(self.cpus_removing, 2)
            }
            _ => 0,
        }
    }

    /// The guest writes CPU register `offset`.
    pub fn write_cpu(&mut self, offset: u16, value: u32) -> Option<HotplugAction> {
        if offset == 0 {
            self.cpu_selector = value;
            return None;
        }
        let i = self.selected()?;
        match offset {
            4 => {
                if value & 2 != 0 {
                    self.cpus_inserting &= !(1 << i);
                }
                if value & 4 != 0 {
                    self.cpus_removing &= !(1 << i);
                }
                // The boot processor can't be ejected, whatever the guest says.
                if value & 8 != 0 && i > 0 && self.cpus_present & (1 << i) != 0 {
                    self.cpus_present &= !(1 << i);
                    return Some(HotplugAction::EjectCpu(i));
                }
                None
            }
            8 => Some(HotplugAction::CpuStatus(i, value)),
            _ => None,
        }
    }

    /// The guest reads PCI register `offset`; the two change registers clear.
    pub fn read_pci(&mut self, offset: u16) -> u32 {
        match offset {
            0 => std::mem::take(&mut self.pci_up),
            4 => std::mem::take(&mut self.pci_down),
            _ => 0,
        }
    }

    /// The guest writes PCI register `offset`.
    pub fn write_pci(&mut self, offset: u16, value: u32) -> Option<HotplugAction> {
        (offset == 8 && value != 0).then_some(HotplugAction::EjectSlots(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_goes_through_insert_clear_and_eject() {
        let mut h = HotplugRegisters::new(1);
        h.insert_cpu(2);
        assert_eq!(h.read_events(), Event::Cpus as u32);
        assert_eq!(h.read_events(), 0);
        h.write_cpu(0, 2);
        assert_eq!(h.read_cpu(4), 0b011);
        assert_eq!(h.write_cpu(4, 2), None);
        assert_eq!(h.read_cpu(4), 0b001);
        h.remove_cpu(2);
        assert_eq!(h.read_cpu(4), 0b101);
        assert_eq!(h.write_cpu(4, 8), Some(HotplugAction::EjectCpu(2)));
        assert_eq!(h.present_cpus().collect::<Vec<_>>(), [0]);
        assert_eq!(h.write_cpu(4, 8), None, "ejecting twice");
    }

    #[test]
    fn what_is_pending_is_pending_after_a_resume() {
        let mut h = HotplugRegisters::new(2);
        h.insert_cpu(3);
        h.remove_cpu(1);
        h.insert_slot(4);
        h.remove_slot(5);
        h.write_cpu(0, 3);
        let mut back = HotplugRegisters::restore(&h.save());
        assert_eq!(back.save(), h.save());
        assert_eq!(back.read_cpu(4), 0b011);
        assert_eq!(back.read_events(), Event::Cpus as u32 | Event::Pci as u32);
        assert_eq!((back.read_pci(0), back.read_pci(4)), (1 << 4, 1 << 5));
    }

    #[test]
    fn wild_selectors_and_the_boot_processor_eject_nothing() {
        let mut h = HotplugRegisters::new(64);
        for selector in [64, u32::MAX, 0] {
            h.write_cpu(0, selector);
            assert_eq!(h.write_cpu(4, 8), None);
        }
        assert_eq!(h.present_cpus().count(), 64);
    }
}
