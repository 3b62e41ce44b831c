//! The machine's answers to its vCPUs' exits.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use kvm_ioctls::VmFd;

use crate::acpi::Event;
use crate::cpu::thread::{ExitHandler, VcpuEnd, Vcpus};
use crate::layout;
use crate::pci::PciRoot;
use crate::platform::hotplug::{HotplugAction, HotplugRegisters};
use crate::platform::power::{self, Outcome};
use crate::platform::serial::Console;

pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic aborts the process, so a poisoned lock is never seen outside unit tests.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Told about what happens in the machine; called on vCPU threads.
pub trait Observer: Send + Sync + std::fmt::Debug {
    /// The machine is over. When that was the guest's doing, its console's last words come along.
    fn ended(&self, outcome: &Outcome, last_words: &str);
    /// The guest answered a hot-plug request.
    fn hotplug(&self, action: HotplugAction);
}

/// Everything a vCPU's exit can reach.
#[derive(Debug)]
pub struct Board {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) pci: PciRoot,
    pub(crate) hotplug: Mutex<HotplugRegisters>,
    pub(crate) console: Option<Mutex<Console>>,
    pub(crate) vcpus: Arc<Vcpus>,
    pub(crate) outcome: OnceLock<Outcome>,
    pub(crate) observer: Arc<dyn Observer>,
}

impl Board {
    /// Ends the machine, once; the first reason stays.
    pub fn end(&self, outcome: Outcome) {
        if self.outcome.set(outcome).is_ok()
            && let Some(outcome) = self.outcome.get()
        {
            self.vcpus.end_soon();
            self.observer.ended(outcome, &self.last_words(outcome));
        }
    }

    fn last_words(&self, outcome: &Outcome) -> String {
        match (&self.console, outcome) {
            (
                Some(console),
                Outcome::Reset | Outcome::TripleFault | Outcome::Panicked | Outcome::Failed(_),
            ) => lock(console).last_words(),
            _ => String::new(),
        }
    }

    /// Raises the generic event device's interrupt.
    pub fn raise_event_irq(&self) {
        // Edge-triggered: up and down again.
        for level in [true, false] {
            if let Err(e) = self.vm.set_irq_line(layout::EVENT_IRQ, level) {
                tracing::error!(error = %e, "the event interrupt could not be raised");
            }
        }
    }

    /// Changes the hot-plug registers and tells the guest to look.
    pub fn hotplug_event(&self, change: impl FnOnce(&mut HotplugRegisters)) {
        change(&mut lock(&self.hotplug));
        self.raise_event_irq();
    }

    /// Tells the guest of one event.
    pub fn event(&self, event: Event) {
        self.hotplug_event(|h| h.raise(event));
    }

    fn port_read(&self, port: u16) -> Option<u32> {
        Some(match port {
            layout::EVENT_PORT => lock(&self.hotplug).read_events(),
            p if (layout::CPU_PORT..layout::CPU_PORT + 12).contains(&p) => {
                lock(&self.hotplug).read_cpu(p - layout::CPU_PORT)
            }
            p if (layout::PCI_HOTPLUG_PORT..layout::PCI_HOTPLUG_PORT + 12).contains(&p) => {
                lock(&self.hotplug).read_pci(p - layout::PCI_HOTPLUG_PORT)
            }
            layout::PVPANIC_PORT => u32::from(power::PANIC_EVENTS),
            p if (layout::SERIAL_PORT..layout::SERIAL_PORT + layout::SERIAL_PORTS).contains(&p) => {
                let console = self.console.as_ref()?;
                u32::from(lock(console).read((p - layout::SERIAL_PORT) as u8))
            }
            // Sleep status reads as awake, the keyboard controller's buffers as empty.
            p if (layout::POWER_PORT..layout::POWER_PORT + 3).contains(&p) => 0,
            layout::I8042_COMMAND => 0,
            _ => return None,
        })
    }

    fn port_write(&self, port: u16, value: u32) {
        let byte = value as u8;
        let ended = match port {
            p if p == layout::POWER_PORT => power::sleep_control(byte),
            p if p == layout::POWER_PORT + 2 => power::reset(byte),
            layout::I8042_COMMAND => power::i8042(byte),
            layout::PVPANIC_PORT => power::panic(byte),
            _ => None,
        };
        if let Some(outcome) = ended {
            self.end(outcome);
            return;
        }
        let action = match port {
            p if (layout::CPU_PORT..layout::CPU_PORT + 12).contains(&p) => {
                lock(&self.hotplug).write_cpu(p - layout::CPU_PORT, value)
            }
            p if (layout::PCI_HOTPLUG_PORT..layout::PCI_HOTPLUG_PORT + 12).contains(&p) => {
                lock(&self.hotplug).write_pci(p - layout::PCI_HOTPLUG_PORT, value)
            }
            p if (layout::SERIAL_PORT..layout::SERIAL_PORT + layout::SERIAL_PORTS).contains(&p) => {
                if let Some(console) = &self.console {
                    lock(console).write((p - layout::SERIAL_PORT) as u8, byte);
                }
                None
            }
            _ => None,
        };
        if let Some(action) = action {
            self.observer.hotplug(action);
        }
    }
}

fn value_of(data: &[u8]) -> u32 {
    let mut bytes = [0; 4];
    for (to, from) in bytes.iter_mut().zip(data) {
        *to = *from;
    }
    u32::from_le_bytes(bytes)
}

impl ExitHandler for Board {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        match self.port_read(port) {
            Some(value) => {
                data.fill(0);
                for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
                    *to = from;
                }
            }
            // An empty bus floats high.
            None => data.fill(0xff),
        }
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        self.port_write(port, value_of(data));
    }

    fn mmio_read(&self, addr: u64, data: &mut [u8]) {
        if let Some(offset) = addr
            .checked_sub(layout::ECAM)
            .filter(|o| *o < layout::ECAM_LEN)
        {
            self.pci.ecam_read(offset, data);
        } else if !self.pci.mmio_read(addr, data) {
            data.fill(0xff);
        }
    }

    fn mmio_write(&self, addr: u64, data: &[u8]) {
        if let Some(offset) = addr
            .checked_sub(layout::ECAM)
            .filter(|o| *o < layout::ECAM_LEN)
        {
            self.pci.ecam_write(offset, data);
        } else {
            self.pci.mmio_write(addr, data);
        }
    }

    fn vcpu_ended(&self, index: u8, how: VcpuEnd) {
        match how {
            VcpuEnd::TripleFault => self.end(Outcome::TripleFault),
            VcpuEnd::Error(what) => self.end(Outcome::Failed(format!("vCPU {index}: {what}"))),
        }
    }
}
