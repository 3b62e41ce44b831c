//! An interrupt that a thread raises without any other, and without a descriptor of the machine's: by an eventfd that KVM
//! listens to (an irqfd).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// One end is its thread's, the other one the MSI-X table's that it was connected to.
#[derive(Debug)]
pub struct Wire {
    signal: EventFd,
    connected: AtomicBool,
}

impl Wire {
    /// A wire that leads nowhere yet.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            signal: EventFd::new(EFD_NONBLOCK)?,
            connected: AtomicBool::new(false),
        })
    }

    /// What is written to.
    pub fn signal(&self) -> &EventFd {
        &self.signal
    }

    /// Whether it leads anywhere.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::SeqCst)
    }

    /// Raises the interrupt. If the answer is `false`, it has to be raised by other means (and may be raised twice).
    #[must_use]
    pub fn raise(&self) -> bool {
        if !self.is_connected() {
            return false;
        }
        // A full counter has not been seen yet, which is all that counts.
        let _ = self.signal.write(1);
        // Whoever takes it away looks for what was written before, and not again.
        self.is_connected()
    }

    pub(super) fn connect(&self) {
        self.connected.store(true, Ordering::SeqCst);
    }

    /// Whether it was raised and nobody has listened.
    pub(super) fn disconnect(&self) -> bool {
        self.connected.store(false, Ordering::SeqCst);
        self.signal.read().is_ok()
    }
}

/// KVM's table of what the numbers of interrupts mean, which can only be set as a whole.
#[derive(Debug, Default)]
pub struct Routes(BTreeMap<u32, (u64, u32)>);

/// Pins of the I/O APIC, whose numbers come first.
const PINS: u32 = 24;
/// Pins of the two PICs, whose numbers are the same.
const PIC_PINS: u32 = 16;
/// Pins of one.
const PIC: u32 = 8;
/// More than there are vectors of all devices.
const MOST: u32 = 4096;

impl Routes {
    /// Has KVM deliver the message when `signal` is written to; the number by which this is ended.
    pub fn connect(&mut self, vm: &VmFd, signal: &EventFd, message: (u64, u32)) -> Option<u32> {
        let number = (PINS..MOST).find(|number| !self.0.contains_key(number))?;
        self.0.insert(number, message);
        let connected = KvmIrqRouting::from_entries(&self.entries())
            .ok()
            .and_then(|table| vm.set_gsi_routing(&table).ok())
            .and_then(|()| vm.register_irqfd(signal, number).ok());
        if connected.is_none() {
            self.0.remove(&number);
        }
        connected.map(|()| number)
    }

    /// Ends that. What the number means is forgotten when the table is set the next time.
    pub fn disconnect(&mut self, vm: &VmFd, signal: &EventFd, number: u32) {
        // It was registered with these very arguments, so there is nothing to fail.
        let _ = vm.unregister_irqfd(signal, number);
        self.0.remove(&number);
    }

    /// All of the table: KVM's own part, and ours.
    fn entries(&self) -> Vec<kvm_irq_routing_entry> {
        let pins = (0..PINS).map(|pin| chip(pin, KVM_IRQCHIP_IOAPIC, pin));
        let pics = (0..PIC_PINS).map(|pin| match pin < PIC {
            true => chip(pin, KVM_IRQCHIP_PIC_MASTER, pin),
            false => chip(pin, KVM_IRQCHIP_PIC_SLAVE, pin - PIC),
        });
        let messages = self
            .0
            .iter()
            .map(|(number, message)| msi(*number, *message));
        pins.chain(pics).chain(messages).collect()
    }
}

fn chip(number: u32, chip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi: number,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip.irqchip = chip;
    entry.u.irqchip.pin = pin;
    entry
}

fn msi(number: u32, (address, data): (u64, u32)) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi: number,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi.address_lo = address as u32;
    entry.u.msi.address_hi = (address >> 32) as u32;
    entry.u.msi.data = data;
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_raised_is_heard_by_one_side_or_the_other() {
        let wire = Wire::new().unwrap();
        assert!(!wire.raise(), "leads nowhere");
        assert!(!wire.disconnect(), "was not raised");
        wire.connect();
        assert!(wire.raise());
        assert!(wire.disconnect(), "nobody has listened");
        assert!(!wire.raise());
    }

    #[test]
    fn table_has_what_kvm_begins_with_and_each_message_once() {
        let mut routes = Routes::default();
        routes.0.insert(24, (0xfee0_1000, 0x41));
        routes.0.insert(26, (0x1_fee0_2000, 0x42));
        let entries = routes.entries();
        assert_eq!(entries.len(), 24 + 16 + 2);
        let of = |number: u32| {
            let of = entries.iter().filter(move |entry| entry.gsi == number);
            of.map(|entry| entry.type_).collect::<Vec<_>>()
        };
        assert_eq!(of(4), [KVM_IRQ_ROUTING_IRQCHIP; 2]);
        assert_eq!(of(23), [KVM_IRQ_ROUTING_IRQCHIP]);
        assert_eq!((of(24), of(25)), (vec![KVM_IRQ_ROUTING_MSI], vec![]));
        // SAFETY: an entry of this type was made with this member.
        let last = unsafe { entries.last().unwrap().u.msi };
        assert_eq!(
            (last.address_hi, last.address_lo, last.data),
            (1, 0xfee0_2000, 0x42)
        );
    }
}
