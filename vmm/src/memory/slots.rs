//! Memory as guest and devices see it: KVM slots and a map over the host's mappings.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::GuestMemoryMmap;

use super::hotplug::HotplugRegion;
use super::mapping::Mapping;
use super::{GuestRam, HostMemory, MemoryError, MemoryShape};
use crate::layout;

#[derive(Debug, Default)]
pub(super) struct Slots {
    /// Lengths of the window's slots; they follow each other without gaps.
    pub(super) lens: Vec<u64>,
    pub(super) usable: u64,
    /// Bytes at the window's start that still show a memory file.
    pub(super) from_file: u64,
}

/// A machine's memory.
#[derive(Debug)]
pub struct Memory {
    pub(super) shape: MemoryShape,
    pub(super) base: Mapping,
    pub(super) window: Option<Mapping>,
    ram: GuestRam,
    slots: Mutex<Slots>,
    vm: Arc<VmFd>,
}

/// KVM slot numbers of base RAM; the window's follow.
const SLOT_LOW: u32 = 0;
const SLOT_HIGH: u32 = 1;
pub(super) const SLOT_WINDOW: u32 = 2;

impl HostMemory {
    /// Shows the mappings to a VM.
    pub fn attach(self, vm: Arc<VmFd>) -> Result<Arc<Memory>, MemoryError> {
        let slots = Slots {
            lens: if self.shape.usable > 0 {
                vec![self.shape.usable]
            } else {
                Vec::new()
            },
            usable: self.shape.usable,
            from_file: self.window_from_file,
        };
        let map = regions(
            &self.shape,
            &self.base,
            self.window.as_ref(),
            self.shape.usable,
        )?;
        let memory = Memory {
            shape: self.shape,
            base: self.base,
            window: self.window,
            ram: GuestRam::new(map),
            slots: Mutex::new(slots),
            vm,
        };
        let (low, high) = layout::split_ram(memory.shape.ram);
        memory.set_slot(SLOT_LOW, 0, low, &memory.base, 0)?;
        if high > 0 {
            memory.set_slot(SLOT_HIGH, layout::RAM_ABOVE_4G, high, &memory.base, low)?;
        }
        if let (Some(w), usable @ 1..) = (&memory.window, memory.shape.usable) {
            memory.set_slot(SLOT_WINDOW, memory.base(), usable, w, 0)?;
        }
        Ok(Arc::new(memory))
    }
}

/// The map of base RAM and so much of the window.
pub(super) fn regions(
    shape: &MemoryShape,
    base: &Mapping,
    window: Option<&Mapping>,
    usable: u64,
) -> Result<GuestMemoryMmap<()>, MemoryError> {
    let (low, high) = layout::split_ram(shape.ram);
    let mut all = vec![base.region(0, low, 0)?];
    if high > 0 {
        all.push(base.region(low, high, layout::RAM_ABOVE_4G)?);
    }
    if let (Some(w), 1..) = (window, usable) {
        all.push(w.region(0, usable, layout::hotplug_base(shape.ram))?);
    }
    GuestMemoryMmap::from_regions(all).map_err(|e| MemoryError::Regions(e.to_string()))
}

impl Memory {
    /// The handle devices use.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The sizes as they are now.
    pub fn shape(&self) -> MemoryShape {
        MemoryShape {
            usable: self.slots().lens.iter().sum(),
            ..self.shape
        }
    }

    /// Makes this process's own copies of pages of base RAM, at an offset of the memory file.
    pub fn copy_pages(&self, offset: u64, len: u64) -> io::Result<()> {
        self.base.advise(offset, len, libc::MADV_POPULATE_WRITE)
    }

    /// The memory in the order of a memory file. The machine must stand still while the slices live.
    pub fn contents(&self) -> Vec<&[u8]> {
        let usable = self.shape().usable;
        let mut all = Vec::with_capacity(2);
        all.extend(self.base.bytes(0, self.shape.ram));
        if let (Some(w), 1..) = (&self.window, usable) {
            all.extend(w.bytes(0, usable));
        }
        all
    }

    /// Where in this process the memory lies, as addresses and lengths, in the order of a memory file.
    pub fn places(&self) -> Vec<(u64, u64)> {
        let usable = self.shape().usable;
        let mut all = vec![(self.base.address(0), self.shape.ram)];
        if let (Some(window), 1..) = (&self.window, usable) {
            all.push((window.address(0), usable));
        }
        all
    }

    pub(super) fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_slot(
        &self,
        slot: u32,
        gpa: u64,
        len: u64,
        mapping: &Mapping,
        at: u64,
    ) -> Result<(), MemoryError> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: gpa,
            memory_size: len,
            userspace_addr: mapping.address(at),
        };
        // SAFETY: callers pass `at + len` inside `mapping`, which stays mapped for the life of the process,
        // and nothing but the guest and vm-memory's volatile accessors use the bytes.
        unsafe { self.vm.set_user_memory_region(region) }
            .map_err(|source| MemoryError::Slot { gpa, source })
    }

    pub(super) fn replace_map(&self, map: GuestMemoryMmap<()>) {
        match self.ram.lock() {
            Ok(guard) => guard.replace(map),
            // Only a panic while holding it poisons the lock, and a panic ends the process.
            Err(poisoned) => poisoned.into_inner().replace(map),
        }
    }
}
