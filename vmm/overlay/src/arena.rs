//! The RAM that chunks live in: slots of one chunk each, cut from large anonymous mappings.
//!
//! A page costs memory from its first touch until it is released, and so it is charged to whoever
//! touches it: the pod's own process. A [`RamSlot`] is the right to use one slot, there is only one of
//! each, and so borrowing the slot's bytes follows from borrowing it.

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use crate::sectors::{CHUNK_SIZE, PAGE_SIZE, Pages};

/// Slots in one mapping: 32 MiB of address space.
const REGION_SLOTS: usize = 512;
/// Mappings in a group, and groups: 1 TiB altogether.
const GROUP_REGIONS: usize = 512;
const GROUPS: usize = 64;
const MAX_SLOTS: usize = REGION_SLOTS * GROUP_REGIONS * GROUPS;

/// Fresh pages from which asking for them at once beats one page fault after the other.
const POPULATE_FROM: u64 = 4;

const FREE: u64 = u64::MAX;

/// Which chunk of which disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Owner {
    pub(crate) disk: u32,
    pub(crate) chunk: u32,
}

impl Owner {
    fn pack(self) -> u64 {
        u64::from(self.disk) << 32 | u64::from(self.chunk)
    }

    fn unpack(raw: u64) -> Self {
        Owner {
            disk: (raw >> 32) as u32,
            // The low half is what is meant.
            chunk: raw as u32,
        }
    }
}

/// The right to use one slot. It is a chunk's as long as the chunk has something in RAM.
#[derive(Debug)]
pub(crate) struct RamSlot(u32);

/// A slot in use, as a scan found it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Seen {
    pub(crate) last_use: u64,
    pub(crate) owner: Owner,
}

#[derive(Debug)]
struct Meta {
    owner: AtomicU64,
    last_use: AtomicU64,
}

#[derive(Debug)]
struct Region {
    memory: NonNull<u8>,
    meta: Box<[Meta]>,
}

// SAFETY: the pointer is to a private mapping that lives as long as the region; who may touch which
// part of it is settled by `RamSlot`s.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    const LEN: usize = REGION_SLOTS * CHUNK_SIZE;

    fn map() -> io::Result<Self> {
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                Self::LEN,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = NonNull::new(memory.cast::<u8>())
            .ok_or_else(|| io::Error::other("memory was mapped at address 0"))?;
        // A huge page would be charged as a whole at the first touch of any of it, and would not be
        // given back before the last. Neither advice can do harm if it is refused.
        for advice in [libc::MADV_NOHUGEPAGE, libc::MADV_DONTDUMP] {
            // SAFETY: advice on a mapping that is ours; it changes no contents.
            unsafe { libc::madvise(memory.as_ptr().cast(), Self::LEN, advice) };
        }
        let meta = (0..REGION_SLOTS).map(|_| Meta {
            owner: AtomicU64::new(FREE),
            last_use: AtomicU64::new(0),
        });
        Ok(Region {
            memory,
            meta: meta.collect(),
        })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this length, and every borrow of it has ended
        // since each borrows the arena.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), Self::LEN) };
    }
}

#[derive(Debug, Default)]
struct Free {
    list: Vec<u32>,
    /// Slots from here on were never given out.
    fresh: usize,
}

type Group = Box<[OnceLock<Region>]>;

/// Slots for chunks.
#[derive(Debug)]
pub(crate) struct Arena {
    groups: Box<[OnceLock<Group>]>,
    free: Mutex<Free>,
    /// Counts the slots given out: the time by which chunks are old or young.
    clock: AtomicU64,
}

impl Arena {
    pub(crate) fn new() -> Self {
        Arena {
            groups: (0..GROUPS).map(|_| OnceLock::new()).collect(),
            free: Mutex::default(),
            clock: AtomicU64::new(1),
        }
    }

    fn free_list(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A slot none of whose pages has memory.
    pub(crate) fn alloc(&self, owner: Owner) -> io::Result<RamSlot> {
        let now = self.clock.fetch_add(1, Ordering::Relaxed) + 1;
        let number = {
            let mut free = self.free_list();
            if let Some(number) = free.list.pop() {
                number
            } else {
                let fresh = free.fresh;
                if fresh == MAX_SLOTS {
                    return Err(io::ErrorKind::OutOfMemory.into());
                }
                self.map(fresh / REGION_SLOTS)?;
                free.fresh += 1;
                u32::try_from(fresh).map_err(io::Error::other)?
            }
        };
        let slot = RamSlot(number);
        if let Some(meta) = self.meta(number) {
            meta.last_use.store(now, Ordering::Relaxed);
            meta.owner.store(owner.pack(), Ordering::Release);
        }
        Ok(slot)
    }

    /// Takes a slot back. The caller has released its pages.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "giving the right up is the point"
    )]
    pub(crate) fn free(&self, slot: RamSlot) {
        let RamSlot(number) = slot;
        if let Some(meta) = self.meta(number) {
            meta.owner.store(FREE, Ordering::Release);
        }
        self.free_list().list.push(number);
    }

    fn map(&self, region: usize) -> io::Result<()> {
        let Some(group) = self.groups.get(region / GROUP_REGIONS) else {
            return Err(io::ErrorKind::OutOfMemory.into());
        };
        let group = group.get_or_init(|| (0..GROUP_REGIONS).map(|_| OnceLock::new()).collect());
        if let Some(place) = group.get(region % GROUP_REGIONS)
            && place.get().is_none()
        {
            // The free list's lock is held, so nobody else is doing the same.
            let _ = place.set(Region::map()?);
        }
        Ok(())
    }

    fn region(&self, number: u32) -> Option<&Region> {
        let region = number as usize / REGION_SLOTS;
        let group = self.groups.get(region / GROUP_REGIONS)?.get()?;
        group.get(region % GROUP_REGIONS)?.get()
    }

    fn meta(&self, number: u32) -> Option<&Meta> {
        self.region(number)?
            .meta
            .get(number as usize % REGION_SLOTS)
    }

    fn memory(&self, number: u32) -> NonNull<u8> {
        let Some(region) = self.region(number) else {
            unreachable!("slot {number} was given out, so its region is mapped");
        };
        // SAFETY: the slot's place inside the region; the sum stays inside the mapping.
        unsafe {
            region
                .memory
                .add(number as usize % REGION_SLOTS * CHUNK_SIZE)
        }
    }

    /// The slot's bytes.
    pub(crate) fn bytes<'a>(&'a self, slot: &'a RamSlot) -> &'a [u8] {
        // SAFETY: `CHUNK_SIZE` bytes of an anonymous mapping, always initialised, unmapped only with
        // the arena. The only `RamSlot` of this number is borrowed, so nobody can write to them.
        unsafe { std::slice::from_raw_parts(self.memory(slot.0).as_ptr(), CHUNK_SIZE) }
    }

    /// The slot's bytes, to be changed.
    pub(crate) fn bytes_mut<'a>(&'a self, slot: &'a mut RamSlot) -> &'a mut [u8] {
        // SAFETY: as in `bytes`, and the only `RamSlot` of this number is borrowed mutably, so nobody
        // else can read or write them.
        unsafe { std::slice::from_raw_parts_mut(self.memory(slot.0).as_ptr(), CHUNK_SIZE) }
    }

    /// Gives fresh pages memory in one go, if there are enough of them for that to pay.
    pub(crate) fn populate(&self, slot: &mut RamSlot, pages: Pages) {
        if pages.count() >= POPULATE_FROM {
            // Where the kernel can't (before 5.14), the pages come with the first touch.
            self.advise(slot, pages, libc::MADV_POPULATE_WRITE);
        }
    }

    /// Gives the pages' memory back. They read as zeroes afterwards.
    pub(crate) fn release(&self, slot: &mut RamSlot, pages: Pages) {
        self.advise(slot, pages, libc::MADV_DONTNEED);
    }

    fn advise(&self, slot: &mut RamSlot, pages: Pages, advice: i32) {
        for (first, end) in pages.runs() {
            // SAFETY: pages of a slot that is borrowed mutably, so no reference to their contents is
            // alive. The advice leaves contents alone or makes them zeroes.
            unsafe {
                let start = self.memory(slot.0).add(first * PAGE_SIZE);
                libc::madvise(start.as_ptr().cast(), (end - first) * PAGE_SIZE, advice);
            }
        }
    }

    /// Notes that the slot is in use.
    pub(crate) fn touch(&self, slot: &RamSlot) {
        let now = self.now();
        if let Some(meta) = self.meta(slot.0)
            && meta.last_use.load(Ordering::Relaxed) != now
        {
            meta.last_use.store(now, Ordering::Relaxed);
        }
    }

    /// When the slot was last in use.
    pub(crate) fn last_use(&self, slot: &RamSlot) -> u64 {
        self.meta(slot.0)
            .map_or(0, |meta| meta.last_use.load(Ordering::Relaxed))
    }

    /// The present, as [`Arena::last_use`] counts.
    pub(crate) fn now(&self) -> u64 {
        self.clock.load(Ordering::Relaxed)
    }

    /// Slots in use.
    #[cfg(test)]
    pub(crate) fn in_use(&self) -> usize {
        let free = self.free_list();
        free.fresh - free.list.len()
    }

    /// All slots in use, roughly: others come and go meanwhile.
    pub(crate) fn scan(&self) -> Vec<Seen> {
        let fresh = self.free_list().fresh;
        // At most `MAX_SLOTS`, which fits.
        let mut seen = Vec::with_capacity(fresh);
        for number in 0..fresh as u32 {
            if let Some(meta) = self.meta(number) {
                let owner = meta.owner.load(Ordering::Acquire);
                if owner != FREE {
                    seen.push(Seen {
                        last_use: meta.last_use.load(Ordering::Relaxed),
                        owner: Owner::unpack(owner),
                    });
                }
            }
        }
        seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sectors::Sectors;

    const OWNER: Owner = Owner { disk: 1, chunk: 2 };

    #[test]
    fn released_pages_read_as_zeroes_and_the_slot_is_used_again() {
        let arena = Arena::new();
        let mut slot = arena.alloc(OWNER).unwrap();
        let pages = Sectors::range(0, 128).pages();
        arena.populate(&mut slot, pages);
        arena.bytes_mut(&mut slot).fill(7);
        let second = Sectors::range(8, 16).pages();
        arena.release(&mut slot, second);
        let bytes = arena.bytes(&slot);
        assert!(bytes[..4096].iter().all(|b| *b == 7));
        assert!(bytes[4096..8192].iter().all(|b| *b == 0));
        assert!(bytes[8192..].iter().all(|b| *b == 7));
        let number = slot.0;
        arena.release(&mut slot, pages);
        arena.free(slot);
        assert_eq!(arena.in_use(), 0);
        assert_eq!(arena.alloc(OWNER).unwrap().0, number);
    }

    #[test]
    fn scan_finds_owners_and_their_age() {
        let arena = Arena::new();
        let slots: Vec<_> = (0..REGION_SLOTS as u32 + 3)
            .map(|chunk| arena.alloc(Owner { disk: 9, chunk }).unwrap())
            .collect();
        arena.touch(&slots[0]);
        let mut seen = arena.scan();
        assert_eq!(seen.len(), slots.len());
        seen.sort_unstable();
        assert_eq!(seen[0].owner, Owner { disk: 9, chunk: 1 });
        let last: Vec<_> = seen[seen.len() - 2..]
            .iter()
            .map(|s| s.owner.chunk)
            .collect();
        assert!(last.contains(&0));
    }
}
