//! Guest memory: base RAM, the hot-plug window, and the KVM slots that show them to the guest.
//!
//! All `mmap` calls for guest memory are here. Base RAM is one host mapping, whatever holes the guest
//! sees; offset in that mapping = offset in a memory file. The hot-plug window is reserved behind its own
//! mapping, and in a memory file it follows base RAM. Neither mapping ever moves or goes away.

use std::fmt::{self, Debug};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap, GuestRegionMmap};

use crate::layout;

/// Guest memory, shared and replaceable: hot-plug swaps the map, readers keep the one they hold.
pub type GuestRam = GuestMemoryAtomic<GuestMemoryMmap<()>>;

/// Page size of guest and host.
pub const PAGE: u64 = 4096;
/// Size of a huge page, and so of the holes worth a mapping of their own.
pub const HUGE_PAGE: u64 = 2 << 20;
/// Plugging granularity of the hot-plug window.
pub const HOTPLUG_BLOCK: u64 = 2 << 20;

/// Why guest memory could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A size that can't be.
    #[error("memory size of {bytes} bytes is not a multiple of {of} or too large")]
    Size {
        /// The size asked for.
        bytes: u64,
        /// What it must be a multiple of.
        of: u64,
    },
    /// The kernel refused a mapping.
    #[error("mapping {bytes} bytes of guest memory failed")]
    Map {
        /// Length of the mapping.
        bytes: u64,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The pieces do not form a map.
    #[error("guest memory map is inconsistent: {0}")]
    Regions(String),
    /// KVM refused a memory slot.
    #[error("KVM refused the memory slot at {gpa:#x}")]
    Slot {
        /// Guest address of the slot.
        gpa: u64,
        /// KVM's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// What a memory device may do to the hot-plug region; the machine implements it.
///
/// The region lies at a fixed guest address, is reserved in the host's address space for its full
/// length from the start (costing nothing) and is visible to the guest and to devices only up to what
/// [`set_usable`](Self::set_usable) allowed.
pub trait HotplugRegion: Send + Sync + Debug {
    /// Guest physical address of the region.
    fn base(&self) -> u64;
    /// Its full length in bytes.
    fn len(&self) -> u64;
    /// Whether the region has no length: the machine was made without room for hot-plug.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Granularity of plugging, in bytes: a power of two.
    fn block_size(&self) -> u64;
    /// Makes at least the first `bytes` (a multiple of the block size) accessible to the guest and
    /// devices. Growing waits for a KVM grace period. Shrinking hides whole slots only, so that memory
    /// still in use is never taken away from under the guest; pages behind `bytes` are given back.
    fn set_usable(&self, bytes: u64) -> io::Result<()>;
    /// Gives the pages of `[offset, offset + len)` back to the host; they read as zero afterwards.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;
}

/// A host mapping that lives as long as the process.
#[derive(Clone, Copy)]
struct Mapping {
    start: NonNull<u8>,
    len: u64,
}

// SAFETY: a Mapping is an address range that is mapped for the rest of the process's life; it owns no
// thread-bound state, and all access to its bytes goes through vm-memory's volatile operations.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:p}+{:#x}", self.start, self.len)
    }
}

impl Mapping {
    /// Reserves `len` bytes of zero pages, aligned for huge ones. They cost nothing until touched.
    fn reserve(len: u64) -> Result<Self, MemoryError> {
        let reserved = Self::reserve_anywhere(len.saturating_add(HUGE_PAGE))?;
        let start = reserved.start.as_ptr();
        let huge = usize::try_from(HUGE_PAGE).unwrap_or(1);
        let start = start.wrapping_add(start.align_offset(huge));
        Self::from_mmap(start.cast(), len)
    }

    fn reserve_anywhere(len: u64) -> Result<Self, MemoryError> {
        let bytes = usize::try_from(len).map_err(|_| MemoryError::Size {
            bytes: len,
            of: PAGE,
        })?;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        Self::from_mmap(start, len)
    }

    /// Maps a file privately: reads see the file, writes stay in this process.
    fn private_file(file: &File, offset: u64, len: u64) -> Result<Self, MemoryError> {
        let mapping = Self::reserve(len)?;
        mapping
            .replace(0, len, Some((file, offset)))
            .map_err(|source| MemoryError::Map { bytes: len, source })?;
        Ok(mapping)
    }

    /// Puts zero pages in the place of a file's large holes. The first touch of a page of a file's hole
    /// takes the kernel two pages and a copy, and each page is one touch; this way it takes a huge page for all
    /// of them. Small holes stay: every replacement is one more mapping.
    fn free_holes(&self, holes: &[(u64, u64)]) -> io::Result<()> {
        for &(start, end) in holes {
            let len = end.checked_sub(start).filter(|_| start % HUGE_PAGE == 0);
            let len = len.ok_or(io::ErrorKind::InvalidInput)?;
            self.replace(start, len, None)?;
            // A kernel without huge pages refuses it, and small ones do as well.
            let _ = self.advise(start, len, libc::MADV_HUGEPAGE);
        }
        Ok(())
    }

    /// Gives the kernel an advice that leaves contents as they are.
    fn advise(&self, at: u64, len: u64, advice: libc::c_int) -> io::Result<()> {
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let at = usize::try_from(at).map_err(invalid)?;
        let len = usize::try_from(len).map_err(invalid)?;
        // SAFETY: the range is in this mapping, and whatever the advice, its bytes stay what they are.
        let failed = unsafe { libc::madvise(self.start.as_ptr().add(at).cast(), len, advice) };
        if failed == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    fn from_mmap(start: *mut libc::c_void, len: u64) -> Result<Self, MemoryError> {
        if start == libc::MAP_FAILED {
            return Err(MemoryError::Map {
                bytes: len,
                source: io::Error::last_os_error(),
            });
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| MemoryError::Map {
            bytes: len,
            source: io::Error::from_raw_os_error(libc::ENOMEM),
        })?;
        Ok(Self { start, len })
    }

    /// Puts other pages in the place of `[at, at + len)` of this mapping: a private view of `file`, or zero pages.
    fn replace(&self, at: u64, len: u64, file: Option<(&File, u64)>) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let bytes = usize::try_from(len).map_err(invalid)?;
        let at = usize::try_from(at).map_err(invalid)?;
        let (fd, offset, anon) = match file {
            Some((f, o)) => (f.as_raw_fd(), libc::off_t::try_from(o).map_err(invalid)?, 0),
            None => (-1, 0, libc::MAP_ANONYMOUS),
        };
        // SAFETY: the range was checked to lie inside this mapping, which is ours alone; MAP_FIXED replaces its
        // pages in one step, so the address stays mapped throughout for devices and KVM that use it.
        let got = unsafe {
            libc::mmap(
                self.start.as_ptr().add(at).cast(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED | anon,
                fd,
                offset,
            )
        };
        if got == libc::MAP_FAILED {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// A vm-memory region over `[at, at + len)`.
    fn region(&self, at: u64, len: u64, gpa: u64) -> Result<GuestRegionMmap<()>, MemoryError> {
        let bad = |e: &dyn fmt::Display| MemoryError::Regions(e.to_string());
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(MemoryError::Regions(format!(
                "{len:#x} bytes at {at:#x} are too many"
            )));
        }
        let at = usize::try_from(at).map_err(|e| bad(&e))?;
        let bytes = usize::try_from(len).map_err(|e| bad(&e))?;
        // SAFETY: `at + len` was checked against the mapping, which stays for the life of the process; a
        // region made from a raw pointer does not unmap it.
        let region = unsafe {
            MmapRegionBuilder::<()>::new(bytes)
                .with_raw_mmap_pointer(self.start.as_ptr().add(at))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .build()
        }
        .map_err(|e| bad(&e))?;
        GuestRegionMmap::new(region, GuestAddress(gpa))
            .ok_or_else(|| MemoryError::Regions(format!("region at {gpa:#x} overflows")))
    }

    /// The bytes `[at, at + len)` as the snapshot writer reads them.
    fn bytes(&self, at: u64, len: u64) -> Option<&[u8]> {
        let end = at.checked_add(len)?;
        if end > self.len {
            return None;
        }
        let (at, len) = (usize::try_from(at).ok()?, usize::try_from(len).ok()?);
        // SAFETY: in range of a live mapping, as just checked. The caller holds the machine still (vCPUs
        // stopped, devices paused), so nothing writes the bytes while the slice is in use.
        Some(unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(at), len) })
    }
}

/// Sizes that define a machine's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryShape {
    /// Base RAM in bytes.
    pub ram: u64,
    /// Length of the hot-plug window in bytes; 0 for none.
    pub hotplug: u64,
    /// How much of the window the guest can reach now, as consecutive slot lengths.
    pub usable: u64,
}

impl MemoryShape {
    fn check(&self) -> Result<(), MemoryError> {
        const MAX: u64 = 1 << 42;
        for (bytes, of) in [
            (self.ram, PAGE),
            (self.hotplug, layout::HOTPLUG_ALIGN),
            (self.usable, HOTPLUG_BLOCK),
        ] {
            if bytes % of != 0 || bytes > MAX {
                return Err(MemoryError::Size { bytes, of });
            }
        }
        // The kernel and its boot structures need some room.
        if self.ram < 16 << 20 {
            return Err(MemoryError::Size {
                bytes: self.ram,
                of: 16 << 20,
            });
        }
        if self.usable > self.hotplug {
            return Err(MemoryError::Size {
                bytes: self.usable,
                of: HOTPLUG_BLOCK,
            });
        }
        Ok(())
    }

    /// Length of the machine's memory file.
    pub fn file_len(&self) -> u64 {
        self.ram + self.usable
    }
}

#[derive(Debug, Default)]
struct Slots {
    /// Lengths of the window's slots; they follow each other without gaps.
    lens: Vec<u64>,
    usable: u64,
    /// Bytes at the window's start that still show a memory file.
    from_file: u64,
}

/// A machine's memory.
#[derive(Debug)]
pub struct Memory {
    shape: MemoryShape,
    base: Mapping,
    window: Option<Mapping>,
    ram: GuestRam,
    slots: Mutex<Slots>,
    vm: Arc<VmFd>,
}

/// KVM slot numbers of base RAM; the window's follow.
const SLOT_LOW: u32 = 0;
const SLOT_HIGH: u32 = 1;
const SLOT_WINDOW: u32 = 2;

/// Host mappings, made before there is a VM to show them to.
#[derive(Debug)]
pub struct HostMemory {
    shape: MemoryShape,
    base: Mapping,
    window: Option<Mapping>,
    from_file: bool,
}

impl HostMemory {
    /// Zeroed memory for a machine that boots.
    pub fn fresh(shape: MemoryShape) -> Result<Self, MemoryError> {
        shape.check()?;
        let base = Mapping::reserve(shape.ram)?;
        Ok(Self {
            shape,
            base,
            window: Self::window(&shape)?,
            from_file: false,
        })
    }

    /// A private view of a memory file; takes as long for a large file as for a small one. `holes` are whole huge
    /// pages of base RAM that hold no data.
    pub fn from_file(
        shape: MemoryShape,
        file: &File,
        holes: &[(u64, u64)],
    ) -> Result<Self, MemoryError> {
        shape.check()?;
        let base = Mapping::private_file(file, 0, shape.ram)?;
        base.free_holes(holes).map_err(|source| MemoryError::Map {
            bytes: shape.ram,
            source,
        })?;
        let window = Self::window(&shape)?;
        if let Some(w) = &window {
            w.replace(0, shape.usable, Some((file, shape.ram)))
                .map_err(|source| MemoryError::Map {
                    bytes: shape.usable,
                    source,
                })?;
        }
        Ok(Self {
            shape,
            base,
            window,
            from_file: true,
        })
    }

    /// Has no page of the memory file read but those that are touched.
    pub fn read_singly(&self) -> Result<(), MemoryError> {
        let len = self.base.len;
        let advised = self.base.advise(0, len, libc::MADV_RANDOM);
        advised.map_err(|source| MemoryError::Map { bytes: len, source })
    }

    fn window(shape: &MemoryShape) -> Result<Option<Mapping>, MemoryError> {
        if shape.hotplug == 0 {
            Ok(None)
        } else {
            Mapping::reserve(shape.hotplug).map(Some)
        }
    }

    /// Shows the mappings to a VM.
    pub fn attach(self, vm: Arc<VmFd>) -> Result<Arc<Memory>, MemoryError> {
        let slots = Slots {
            lens: if self.shape.usable > 0 {
                vec![self.shape.usable]
            } else {
                Vec::new()
            },
            usable: self.shape.usable,
            from_file: if self.from_file { self.shape.usable } else { 0 },
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

fn regions(
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

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_slot(
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
            userspace_addr: mapping.start.as_ptr() as u64 + at,
        };
        // SAFETY: callers pass `at + len` inside `mapping`, which stays mapped for the life of the process,
        // and nothing but the guest and vm-memory's volatile accessors use the bytes.
        unsafe { self.vm.set_user_memory_region(region) }
            .map_err(|source| MemoryError::Slot { gpa, source })
    }
}

impl HotplugRegion for Memory {
    fn base(&self) -> u64 {
        layout::hotplug_base(self.shape.ram)
    }

    fn len(&self) -> u64 {
        self.shape.hotplug
    }

    fn block_size(&self) -> u64 {
        HOTPLUG_BLOCK
    }

    fn set_usable(&self, bytes: u64) -> io::Result<()> {
        let Some(window) = &self.window else {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "there is no hot-plug window",
            ));
        };
        if bytes > self.shape.hotplug || !bytes.is_multiple_of(HOTPLUG_BLOCK) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{bytes} bytes do not fit a window of {}",
                    self.shape.hotplug
                ),
            ));
        }
        let mut slots = self.slots();
        let mut covered: u64 = slots.lens.iter().sum();
        // Take away whole slots behind the new end, last first; devices lose sight of them before KVM does.
        let mut keep = slots.lens.len();
        let mut kept = covered;
        while let Some(last) = keep.checked_sub(1).and_then(|i| slots.lens.get(i).copied()) {
            if kept - last < bytes {
                break;
            }
            keep -= 1;
            kept -= last;
        }
        if kept < covered {
            let map =
                regions(&self.shape, &self.base, Some(window), kept).map_err(io::Error::other)?;
            self.replace_map(map);
            while slots.lens.len() > keep {
                let len = slots.lens.pop().unwrap_or_default();
                covered -= len;
                let id = slot_id(slots.lens.len());
                self.set_slot(id, self.base() + covered, 0, window, covered)
                    .map_err(io::Error::other)?;
            }
        }
        if bytes > covered {
            let id = slot_id(slots.lens.len());
            self.set_slot(id, self.base() + covered, bytes - covered, window, covered)
                .map_err(io::Error::other)?;
            slots.lens.push(bytes - covered);
            let map =
                regions(&self.shape, &self.base, Some(window), bytes).map_err(io::Error::other)?;
            self.replace_map(map);
        } else if bytes < slots.usable {
            let from_file = slots.from_file;
            Self::drop_pages(window, bytes, slots.usable - bytes, from_file)?;
        }
        slots.usable = bytes;
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let Some(window) = &self.window else {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "there is no hot-plug window",
            ));
        };
        let from_file = self.slots().from_file;
        Self::drop_pages(window, offset, len, from_file)
    }
}

impl Memory {
    fn replace_map(&self, map: GuestMemoryMmap<()>) {
        match self.ram.lock() {
            Ok(guard) => guard.replace(map),
            // Only a panic while holding it poisons the lock, and a panic ends the process.
            Err(poisoned) => poisoned.into_inner().replace(map),
        }
    }

    fn drop_pages(window: &Mapping, offset: u64, len: u64, from_file: u64) -> io::Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > window.len)
            || !offset.is_multiple_of(PAGE)
            || !len.is_multiple_of(PAGE)
        {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        // Dropping pages of a private file mapping would bring the file's contents back: put zero pages there.
        let file_len = from_file.saturating_sub(offset).min(len);
        window.replace(offset, file_len, None)?;
        let (offset, len) = (offset + file_len, len - file_len);
        if len == 0 {
            return Ok(());
        }
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let (at, bytes) = (
            usize::try_from(offset).map_err(invalid)?,
            usize::try_from(len).map_err(invalid)?,
        );
        // SAFETY: the range lies inside the window (checked above), whose pages belong to the guest alone; after
        // MADV_DONTNEED they read as zero.
        let rc = unsafe {
            libc::madvise(
                window.start.as_ptr().add(at).cast(),
                bytes,
                libc::MADV_DONTNEED,
            )
        };
        if rc == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

fn slot_id(index: usize) -> u32 {
    // A window has far fewer slots than KVM's 32764: each is at least one block and most are gigabytes.
    SLOT_WINDOW + u32::try_from(index).unwrap_or(u32::MAX - SLOT_WINDOW)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::{Bytes, GuestAddressSpace};

    #[test]
    fn discarded_file_pages_read_as_zero() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7u8; 2 << 20]).unwrap();
        let window = Mapping::reserve(4 << 20).unwrap();
        window.replace(0, 2 << 20, Some((&file, 0))).unwrap();
        assert_eq!(window.bytes(0, 1).unwrap(), [7]);
        Memory::drop_pages(&window, 0, 4 << 20, 2 << 20).unwrap();
        assert_eq!(window.bytes(0, 4 << 20).unwrap().iter().max(), Some(&0));
    }

    #[test]
    fn writes_to_a_private_file_view_stay_out_of_the_file() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(16 << 20).unwrap();
        let shape = MemoryShape {
            ram: 16 << 20,
            hotplug: 0,
            usable: 0,
        };
        let host = HostMemory::from_file(shape, &file, &[]).unwrap();
        let map = regions(&shape, &host.base, None, 0).unwrap();
        let ram = GuestRam::new(map);
        ram.memory().write_obj(1u64, GuestAddress(0x1000)).unwrap();
        let mut byte = [0u8; 8];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, 0x1000).unwrap();
        assert_eq!(byte, [0; 8]);
    }

    #[test]
    fn whole_huge_pages_without_data_are_no_longer_the_files() {
        use std::os::unix::fs::FileExt;
        let file = tempfile::tempfile().unwrap();
        file.set_len(16 << 20).unwrap();
        for at in [0, (6 << 20) + 4096, (16 << 20) - 1] {
            file.write_all_at(&[7], at).unwrap();
        }
        let holes = [(2 << 20, 6 << 20), (8 << 20, 14 << 20)];
        let mapping = Mapping::private_file(&file, 0, 16 << 20).unwrap();
        assert_eq!(mapping.start.as_ptr().align_offset(2 << 20), 0);
        for bad in [(0, 18 << 20), (4 << 20, 2 << 20), (4096, 2 << 20)] {
            assert!(mapping.free_holes(&[bad]).is_err(), "{bad:?}");
        }
        mapping.free_holes(&holes).unwrap();
        let bytes = mapping.bytes(0, 16 << 20).unwrap();
        let data: Vec<_> = bytes.iter().zip(0..).filter(|(b, _)| **b != 0).collect();
        let at: Vec<usize> = data.into_iter().map(|(_, at)| at).collect();
        assert_eq!(at, [0, (6 << 20) + 4096, (16 << 20) - 1]);
    }

    #[test]
    fn ram_past_the_mmio_hole_continues_at_4g() {
        let ram = 4 << 30;
        assert_eq!(layout::split_ram(ram), (3 << 30, 1 << 30));
        assert_eq!(layout::hotplug_base(ram), 0x1_4000_0000);
        assert_eq!(layout::hotplug_base(256 << 20), 0x1_0000_0000);
    }
}
