//! Where each chunk of a disk is. Grows with what the guest has touched, not with the disk's size.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::arena::RamSlot;
use crate::sectors::{Pages, Sectors};

/// Chunks in a leaf; a leaf covers 4 MiB.
pub(crate) const LEAF_CHUNKS: u32 = 64;

/// A chunk-sized place in the spill file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SpillSlot(pub(crate) u32);

/// One chunk. A sector's content is in RAM if `ram` has it, in the spill file if `disk` has it (in
/// both alike if both have it), is zeroes if `zero` has it, and else is what lies below the overlay.
#[derive(Debug, Default)]
pub(crate) struct Chunk {
    /// Valid in the RAM slot.
    pub(crate) ram: Sectors,
    /// Valid in the spill slot.
    pub(crate) disk: Sectors,
    /// Zeroes, though what lies below is not. Never together with `ram` or `disk`.
    pub(crate) zero: Sectors,
    /// Pages of the RAM slot that have memory.
    pub(crate) resident: Pages,
    /// Pages of the spill slot that take up disk.
    pub(crate) held: Pages,
    pub(crate) slot: Option<RamSlot>,
    pub(crate) spill: Option<SpillSlot>,
    /// Changes with every change of content.
    pub(crate) version: u32,
    /// Changes when the spill slot is given up or written to. Content read from the slot without the
    /// lock is good if it is still the same afterwards.
    pub(crate) slot_version: u32,
    /// A worker moves this chunk: nobody else does, and its spill slot is not given up meanwhile.
    pub(crate) busy: bool,
}

/// A chunk behind its lock, with what is counted about it without.
#[derive(Debug, Default)]
pub(crate) struct Cell {
    chunk: RwLock<Chunk>,
    /// Reads from the spill file since `heated`.
    heat: AtomicU32,
    /// The arena's time of the last read from the spill file, cut to 32 bits.
    heated: AtomicU32,
}

impl Cell {
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, Chunk> {
        self.chunk.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, Chunk> {
        self.chunk.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn get_mut(&mut self) -> &mut Chunk {
        self.chunk.get_mut().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a read from the spill file at `now` and tells how many there were with no more than
    /// `window` of the arena's time between one and the next.
    pub(crate) fn heat(&self, now: u64, window: u32) -> u32 {
        // Only differences count.
        let now = now as u32;
        let before = self.heated.swap(now, Ordering::Relaxed);
        if now.wrapping_sub(before) > window {
            self.heat.store(1, Ordering::Relaxed);
            1
        } else {
            self.heat.fetch_add(1, Ordering::Relaxed).saturating_add(1)
        }
    }

    pub(crate) fn cool(&self) {
        self.heat.store(0, Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct Leaf([Cell; LEAF_CHUNKS as usize]);

/// The chunks of one disk.
#[derive(Debug)]
pub(crate) struct Table {
    leaves: Box<[OnceLock<Box<Leaf>>]>,
    made: AtomicU64,
}

impl Table {
    pub(crate) fn new(chunks: u32) -> Self {
        Table {
            leaves: (0..chunks.div_ceil(LEAF_CHUNKS))
                .map(|_| OnceLock::new())
                .collect(),
            made: AtomicU64::new(0),
        }
    }

    fn leaf(&self, chunk: u32) -> Option<&OnceLock<Box<Leaf>>> {
        self.leaves.get((chunk / LEAF_CHUNKS) as usize)
    }

    /// The chunk, if anything near it was ever written.
    pub(crate) fn get(&self, chunk: u32) -> Option<&Cell> {
        let leaf = self.leaf(chunk)?.get()?;
        leaf.0.get((chunk % LEAF_CHUNKS) as usize)
    }

    /// The chunk, about to be written. `None` only beyond the end.
    pub(crate) fn get_or_make(&self, chunk: u32) -> Option<&Cell> {
        let leaf = self.leaf(chunk)?.get_or_init(|| {
            self.made.fetch_add(1, Ordering::Relaxed);
            Box::new(Leaf(std::array::from_fn(|_| Cell::default())))
        });
        leaf.0.get((chunk % LEAF_CHUNKS) as usize)
    }

    /// Every chunk that may hold something, with its number.
    #[cfg(test)]
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Cell)> {
        self.leaves
            .iter()
            .zip((0..).step_by(LEAF_CHUNKS as usize))
            .filter_map(|(leaf, first)| Some((leaf.get()?, first)))
            .flat_map(|(leaf, first): (_, u32)| {
                leaf.0
                    .iter()
                    .zip(0..)
                    .map(move |(cell, i)| (first + i, cell))
            })
    }

    /// Every chunk, when nobody else is there any more.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Chunk> {
        self.leaves
            .iter_mut()
            .filter_map(OnceLock::get_mut)
            .flat_map(|leaf| leaf.0.iter_mut().map(Cell::get_mut))
    }

    /// Bytes of memory the table takes.
    pub(crate) fn bytes(&self) -> u64 {
        let leaf = size_of::<Leaf>() as u64;
        self.made.load(Ordering::Relaxed) * leaf + size_of_val(&*self.leaves) as u64
    }
}

// About 0.2 % of what it describes.
const _: () = assert!(size_of::<Cell>() <= 128);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_nobody_wrote_take_no_memory() {
        let table = Table::new(1000);
        let empty = table.bytes();
        assert!(table.get(999).is_none());
        assert!(table.get_or_make(999).is_some());
        assert!(table.get(960).is_some() && table.get(959).is_none());
        assert!(table.get_or_make(1024).is_none());
        assert_eq!(table.bytes(), empty + size_of::<Leaf>() as u64);
        assert_eq!(table.iter().count(), LEAF_CHUNKS as usize);
        assert_eq!(table.iter().next().unwrap().0, 960);
    }

    #[test]
    fn heat_counts_reads_that_are_close_together() {
        let cell = Cell::default();
        assert_eq!(cell.heat(1000, 10), 1);
        assert_eq!(cell.heat(1010, 10), 2);
        assert_eq!(cell.heat(1021, 10), 1);
        cell.cool();
        assert_eq!(cell.heat(1021, 10), 1);
    }
}
