//! Disks of a running μVM: the slots that were baked, and what the guest sees in one.

use std::collections::BTreeSet;

use kiln_agent_api::slots;

/// A block device as the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestDisk {
    /// The VMM's number for it.
    pub slot: u8,
    /// Its device path in the guest.
    pub path: String,
    /// Its size, which the agent waits for.
    pub size: u64,
}

/// The disk slots that are free, of those that were baked.
#[derive(Debug)]
pub(crate) struct DiskSlots {
    free: BTreeSet<u8>,
    /// The first slot that was not baked.
    end: u8,
}

impl DiskSlots {
    /// So many were baked, of which some are in use.
    pub(crate) fn new(count: u32, used: impl IntoIterator<Item = u8>) -> Self {
        let count = u8::try_from(count).unwrap_or(u8::MAX).min(slots::MAX_DISKS);
        let end = slots::FIRST_DISK + count;
        let mut free: BTreeSet<u8> = (slots::FIRST_DISK..end).collect();
        for slot in used {
            free.remove(&slot);
        }
        Self { free, end }
    }

    pub(crate) fn take(&mut self) -> Option<u8> {
        self.free.pop_first()
    }

    /// A plugged disk's slot goes with it.
    pub(crate) fn put_back(&mut self, slot: u8) {
        if slot < self.end {
            self.free.insert(slot);
        }
    }

    /// The device path in the guest of a disk in this slot.
    pub(crate) fn path(&self, slot: u8) -> String {
        match slots::disk_name(slot).filter(|_| slot < self.end) {
            Some(name) => name,
            None => slots::plugged_disk_path(slot),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_slots_are_used_lowest_first_and_again() {
        let mut disks = DiskSlots::new(2, []);
        let (a, b) = (disks.take().unwrap(), disks.take().unwrap());
        assert_eq!((a, b), (slots::FIRST_DISK, slots::FIRST_DISK + 1));
        assert_eq!(disks.take(), None);
        disks.put_back(a);
        assert_eq!(disks.take(), Some(a));
        let plugged = slots::FIRST_DISK + 2;
        disks.put_back(plugged);
        assert_eq!(disks.take(), None);
        assert_eq!(disks.path(plugged), slots::plugged_disk_path(plugged));
        assert_eq!(disks.path(a), slots::disk_name(a).unwrap());
        let most = DiskSlots::new(1000, []).free.len();
        assert_eq!(most, usize::from(slots::MAX_DISKS));
    }

    #[test]
    fn slots_that_a_saved_guest_uses_are_not_free() {
        let plugged = slots::FIRST_DISK + 3;
        let mut disks = DiskSlots::new(3, [slots::FIRST_DISK, plugged]);
        assert_eq!(disks.take(), Some(slots::FIRST_DISK + 1));
        assert_eq!(disks.take(), Some(slots::FIRST_DISK + 2));
        assert_eq!(disks.take(), None);
    }
}
