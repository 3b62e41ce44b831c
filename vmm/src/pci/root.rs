//! The root bus: finds the function an access is for.

use std::fmt::Debug;
use std::sync::{Arc, RwLock};

use super::config::{PciConfig, PciId};
use crate::layout;

/// A function behind the root bus.
pub trait PciFunction: Send + Sync + Debug {
    /// Configuration space is read.
    fn config_read(&self, offset: usize, data: &mut [u8]);
    /// Configuration space is written.
    fn config_write(&self, offset: usize, data: &[u8]);
    /// Where the BAR answers now, and its length.
    fn bar(&self) -> Option<(u64, u64)>;
    /// The BAR is read.
    fn bar_read(&self, offset: u64, data: &mut [u8]);
    /// The BAR is written.
    fn bar_write(&self, offset: u64, data: &[u8]);
}

type Slots = [Option<Arc<dyn PciFunction>>; layout::PCI_SLOTS as usize];

/// Bus 0.
#[derive(Debug)]
pub struct PciRoot {
    bridge: PciConfig,
    slots: RwLock<Slots>,
}

/// The host bridge's identity; the vendor is Red Hat's virtual-device vendor, the device its generic host bridge.
const BRIDGE: PciId = PciId {
    vendor: 0x1b36,
    device: 0x0008,
    class: 0x06_0000,
    subsystem: 0,
};

impl Default for PciRoot {
    fn default() -> Self {
        Self {
            bridge: PciConfig::new(BRIDGE),
            slots: RwLock::default(),
        }
    }
}

impl PciRoot {
    fn slot(&self, slot: usize) -> Option<Arc<dyn PciFunction>> {
        let slots = self
            .slots
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        slots.get(slot)?.clone()
    }

    /// Puts a function into a slot (1 to 31), or empties it. Returns what was there.
    pub fn set(
        &self,
        slot: u8,
        function: Option<Arc<dyn PciFunction>>,
    ) -> Option<Arc<dyn PciFunction>> {
        let mut slots = self
            .slots
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        slots
            .get_mut(usize::from(slot))
            .and_then(|s| std::mem::replace(s, function))
    }

    /// Bus, device, function and register of an ECAM offset; only function 0 of bus 0 exists.
    fn target(offset: u64) -> Option<(usize, usize)> {
        let (bus, device, function) = (offset >> 20, (offset >> 15) & 31, (offset >> 12) & 7);
        (bus == 0 && function == 0).then_some((device as usize, (offset & 0xfff) as usize))
    }

    /// The guest reads configuration space.
    pub fn ecam_read(&self, offset: u64, data: &mut [u8]) {
        match Self::target(offset) {
            Some((0, register)) => self.bridge.read(register, data),
            Some((device, register)) => match self.slot(device) {
                Some(f) => f.config_read(register, data),
                None => data.fill(0xff),
            },
            None => data.fill(0xff),
        }
    }

    /// The guest writes configuration space.
    pub fn ecam_write(&self, offset: u64, data: &[u8]) {
        if let Some((device @ 1.., register)) = Self::target(offset)
            && let Some(f) = self.slot(device)
        {
            f.config_write(register, data);
        }
    }

    /// The function whose BAR holds `addr`, and the offset in it.
    fn find(&self, addr: u64) -> Option<(Arc<dyn PciFunction>, u64)> {
        let slots = self
            .slots
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let hit = |f: &Arc<dyn PciFunction>| {
            let (base, len) = f.bar()?;
            let offset = addr.checked_sub(base)?;
            (offset < len).then(|| (f.clone(), offset))
        };
        // Where the BAR was placed by us, and where Linux leaves it.
        let likely = usize::try_from(addr.checked_sub(layout::PCI_WINDOW)? / BAR_STRIDE);
        if let Some(found) = likely
            .ok()
            .and_then(|i| slots.get(i))
            .and_then(|s| s.as_ref())
            .and_then(hit)
        {
            return Some(found);
        }
        slots.iter().flatten().find_map(hit)
    }

    /// The guest reads in the PCI window. Returns whether anything answered.
    pub fn mmio_read(&self, addr: u64, data: &mut [u8]) -> bool {
        match self.find(addr) {
            Some((f, offset)) => {
                f.bar_read(offset, data);
                true
            }
            None => false,
        }
    }

    /// The guest writes in the PCI window. Returns whether anything answered.
    pub fn mmio_write(&self, addr: u64, data: &[u8]) -> bool {
        match self.find(addr) {
            Some((f, offset)) => {
                f.bar_write(offset, data);
                true
            }
            None => false,
        }
    }
}

/// Distance of the BARs as we place them: slot n at `PCI_WINDOW + n * BAR_STRIDE`.
pub const BAR_STRIDE: u64 = 0x1_0000;
