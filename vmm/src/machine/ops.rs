//! What can be done with a machine that exists: run, stop, swap disks.

use std::sync::Arc;

use super::build::{HostEnd, open_disk, open_taps};
use super::config::{DeviceKind, DeviceSpec};
use super::exits::lock;
use super::{Machine, MachineError};
use crate::devices::block::{Block, BlockBackend, OverlayBackend};
use crate::devices::mem::{Mem, MemStatus};
use crate::devices::net::Net;
use crate::layout;
use crate::platform::power::Outcome;
use crate::virtio::pci::VirtioPci;

/// A machine's figures.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// vCPUs the guest has been offered and not ejected.
    pub cpus: u8,
    /// Base RAM and what the guest has plugged, in bytes.
    pub memory: u64,
    /// Whether the machine is paused.
    pub paused: bool,
    /// Devices on the bus.
    pub devices: usize,
}

impl Machine {
    /// How the machine ended, if it has.
    pub fn outcome(&self) -> Option<&Outcome> {
        self.board.outcome.get()
    }

    /// Ends the machine from outside.
    pub fn stop(&self) {
        self.board.end(Outcome::Stopped);
    }

    /// Lets it run for the first time.
    pub fn start(&self) {
        let paused = lock(&self.paused);
        if !*paused {
            self.board.vcpus.start();
        }
    }

    pub(super) fn device(&self, slot: u8) -> Result<Arc<VirtioPci>, MachineError> {
        lock(&self.devices)
            .get(&slot)
            .cloned()
            .ok_or_else(|| MachineError::Usage(format!("there is no device in slot {slot}")))
    }

    /// Puts a disk into an empty block slot.
    pub fn attach_block(&self, slot: u8, disk: HostEnd) -> Result<(), MachineError> {
        let backend: Box<dyn BlockBackend> = match disk {
            HostEnd::Disk { file, read_only } => {
                Box::new(open_disk(slot, file, read_only, &self.rings)?)
            }
            HostEnd::Overlay(overlay) => Box::new(OverlayBackend::new(overlay)),
            _ => {
                return Err(MachineError::Usage(
                    "a disk wants a file or an overlay".to_owned(),
                ));
            }
        };
        match self.device(slot)?.with(|b: &mut Block| b.attach(backend)) {
            Some(result) => result.map_err(|source| MachineError::Device { slot, source }),
            None => Err(MachineError::Usage(format!(
                "slot {slot} does not take disks"
            ))),
        }
    }

    /// Takes the disk out of a block slot.
    pub fn detach_block(&self, slot: u8) -> Result<(), MachineError> {
        match self.device(slot)?.with(Block::detach) {
            Some(result) => result
                .map(drop)
                .map_err(|source| MachineError::Device { slot, source }),
            None => Err(MachineError::Usage(format!("slot {slot} holds no disk"))),
        }
    }

    /// Puts taps behind a network card in place of what was there; without any, the link goes down.
    pub fn set_net(
        &self,
        slot: u8,
        taps: Vec<std::os::fd::OwnedFd>,
        mac: Option<[u8; 6]>,
    ) -> Result<(), MachineError> {
        let backends = open_taps(slot, taps)?;
        let change = |net: &mut Net| {
            // A card without a tap has nothing to detach.
            let _ = net.detach();
            if let Some(mac) = mac {
                net.set_mac(mac);
            }
            if backends.is_empty() {
                Ok(())
            } else {
                net.attach(backends)
            }
        };
        match self.device(slot)?.with(change) {
            Some(result) => result.map_err(|source| MachineError::Device { slot, source }),
            None => Err(MachineError::Usage(format!(
                "slot {slot} is no network card"
            ))),
        }
    }

    pub(super) fn with_mem<R>(&self, f: impl FnOnce(u8, &mut Mem) -> R) -> Option<R> {
        let devices = lock(&self.devices);
        let (slot, device) = devices
            .iter()
            .find(|(_, d)| d.kind() == crate::virtio::DeviceType::Mem)
            .map(|(s, d)| (*s, d.clone()))?;
        drop(devices);
        device.with(|m: &mut Mem| f(slot, m))
    }

    /// Asks the guest to have `total` bytes of memory, base RAM included. It answers later.
    pub fn request_memory(&self, total: u64) -> Result<(), MachineError> {
        let ram = self.memory.shape().ram;
        let Some(plugged) = total.checked_sub(ram) else {
            return Err(MachineError::Usage(format!(
                "{total} bytes are less than the {ram} this machine was baked with"
            )));
        };
        match self.with_mem(|slot, m| {
            m.request(plugged)
                .map_err(|source| MachineError::Device { slot, source })
        }) {
            Some(result) => result,
            None if plugged == 0 => Ok(()),
            None => Err(MachineError::Usage(
                "this machine has no memory hot-plug".to_owned(),
            )),
        }
    }

    /// Asks the guest once more for the memory that it was asked for, if it has not followed.
    pub fn remind_of_memory(&self) {
        self.with_mem(|_, m| m.remind());
    }

    /// What is plugged into the hot-plug window.
    pub fn plugged(&self) -> MemStatus {
        self.with_mem(|_, m| m.status()).unwrap_or_default()
    }

    /// Where guest memory lies in this process, as addresses and lengths, in the order of a memory file.
    pub fn memory_places(&self) -> Vec<(u64, u64)> {
        self.memory.places()
    }

    /// Devices on the bus.
    pub fn device_specs(&self) -> Vec<DeviceSpec> {
        lock(&self.config).devices.clone()
    }

    /// Whether the block slot holds a disk; `None` if it is no block slot.
    pub fn disk_attached(&self, slot: u8) -> Option<bool> {
        self.device(slot)
            .ok()?
            .with(|b: &mut Block| b.is_attached())
    }

    /// Puts a new device into a free PCI slot and tells the guest.
    pub fn plug_device(&self, kind: DeviceKind, end: Option<HostEnd>) -> Result<u8, MachineError> {
        let taken: Vec<u8> = lock(&self.devices).keys().copied().collect();
        let slot = (1..layout::PCI_SLOTS)
            .find(|s| !taken.contains(s))
            .ok_or_else(|| MachineError::Busy("all PCI slots are taken".to_owned()))?;
        let spec = DeviceSpec { slot, kind };
        let device = self.make_device(&spec, end)?;
        self.add_device(slot, device);
        lock(&self.config).devices.push(spec);
        self.board.hotplug_event(|h| h.insert_slot(slot));
        Ok(slot)
    }

    /// Asks the guest to let go of the device in a slot; it is gone when the guest ejects it.
    pub fn unplug_device(&self, slot: u8) -> Result<(), MachineError> {
        self.device(slot)?;
        self.board.hotplug_event(|h| h.remove_slot(slot));
        Ok(())
    }

    /// Figures.
    pub fn stats(&self) -> Stats {
        let ram = self.memory.shape().ram;
        Stats {
            cpus: lock(&self.board.hotplug).present_cpus().count() as u8,
            memory: ram + self.plugged().plugged,
            paused: *lock(&self.paused),
            devices: lock(&self.devices).len(),
        }
    }
}
