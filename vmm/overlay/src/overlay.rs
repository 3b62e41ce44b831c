//! One disk of a pod: the requests that change it.

use std::ops::Range;
use std::sync::{Arc, Weak};

use crate::arena::Owner;
use crate::base::Base;
use crate::buffers::{Source, Target};
use crate::error::Error;
use crate::mover::{drop_ram, give_up_spill, write_back};
use crate::pool::{FlushPolicy, Inner, Pool};
use crate::sectors::{CHUNK_SIZE, SECTOR_SHIFT, SECTOR_SIZE, Sectors};
use crate::stats::{DiskCounters, OverlayStats};
use crate::table::{Cell, Chunk, LEAF_CHUNKS, Table};

/// Garbage is left to be collected with the next move, until this many chunks were given up.
const GARBAGE_WORTH_WAKING: u32 = 64;

/// What became of a request that must not wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Attempt {
    /// It is done.
    Done,
    /// It would have to wait for a disk. It may be done in part; do all of it where waiting is fine.
    WouldWait,
}

/// A writable disk over a read-only one.
///
/// Any number of threads may use it at once. Requests that overlap in time and place leave each
/// sector as one of them would; a sector is never torn. Locks are per chunk, so requests meet only
/// where they touch the same 64 KiB.
#[derive(Debug)]
pub struct Overlay(pub(crate) Arc<Disk>);

#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) id: u32,
    pub(crate) capacity: u64,
    pub(crate) table: Table,
    pub(crate) base: Option<Box<dyn Base>>,
    pub(crate) pool: Arc<Inner>,
    pub(crate) counters: DiskCounters,
}

/// The part of a request that lies in one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) chunk: u32,
    /// First sector in the chunk, and the one after the last.
    pub(crate) first: usize,
    pub(crate) end: usize,
    /// Bytes of the request before this piece.
    pub(crate) at: u64,
}

impl Piece {
    pub(crate) fn sectors(self) -> Sectors {
        Sectors::range(self.first, self.end)
    }

    pub(crate) fn bytes(self) -> Range<usize> {
        self.first * SECTOR_SIZE..self.end * SECTOR_SIZE
    }
}

/// Where a chunk begins on the disk.
pub(crate) fn start_of(chunk: u32) -> u64 {
    u64::from(chunk) * CHUNK_SIZE as u64
}

impl Overlay {
    /// Makes a disk of `capacity` bytes, whole sectors. What was not written reads as what `base` has
    /// there, and as zeroes where it has nothing.
    pub fn new(pool: &Pool, capacity: u64, base: Option<Box<dyn Base>>) -> Result<Self, Error> {
        let chunks = u32::try_from(capacity.div_ceil(CHUNK_SIZE as u64));
        let (true, Ok(chunks)) = (capacity.is_multiple_of(SECTOR_SIZE as u64), chunks) else {
            return Err(Error::Misaligned {
                offset: 0,
                len: capacity,
            });
        };
        let id = pool.0.add_disk();
        let disk = Arc::new(Disk {
            id,
            capacity,
            table: Table::new(chunks),
            base,
            pool: pool.0.clone(),
            counters: DiskCounters::default(),
        });
        pool.0.register(id, &disk);
        Ok(Overlay(disk))
    }

    /// Size in bytes.
    pub fn capacity(&self) -> u64 {
        self.0.capacity
    }

    /// The pool it draws on.
    pub fn pool(&self) -> Pool {
        Pool(self.0.pool.clone())
    }

    /// Fills `target` from the bytes at `offset`, waiting for disks as need be.
    pub fn read<T: Target + ?Sized>(&self, offset: u64, target: &mut T) -> Result<(), Error> {
        self.0.read(offset, target, true).map(drop)
    }

    /// Like [`Overlay::read`], but gives up where a disk would have to be read.
    pub fn try_read<T: Target + ?Sized>(
        &self,
        offset: u64,
        target: &mut T,
    ) -> Result<Attempt, Error> {
        self.0.read(offset, target, false)
    }

    /// Replaces the bytes at `offset` by `source`, waiting while RAM is full and can be emptied.
    pub fn write<S: Source + ?Sized>(&self, offset: u64, source: &S) -> Result<(), Error> {
        self.0.write(offset, source, true).map(drop)
    }

    /// Like [`Overlay::write`], but gives up where RAM is full. It then may have written a part.
    pub fn try_write<S: Source + ?Sized>(&self, offset: u64, source: &S) -> Result<Attempt, Error> {
        self.0.write(offset, source, false)
    }

    /// Makes a range read as zeroes and gives back the RAM and the disk it took. Never waits for I/O:
    /// the disk is given back soon after.
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.0.discard(offset, len)
    }

    /// Makes a range read as zeroes: the same as [`Overlay::discard`].
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.0.discard(offset, len)
    }

    /// Makes what was written as durable as the pool's policy says.
    pub fn flush(&self) -> Result<(), Error> {
        let disk = &self.0;
        disk.counters.flushes.add(1);
        match disk.pool.flush {
            FlushPolicy::Memory => Ok(()),
            FlushPolicy::Disk => write_back(&disk.pool, disk.id).map_err(|e| {
                if e.raw_os_error() == Some(libc::ENOSPC) {
                    Error::NoSpace
                } else {
                    Error::SpillWrite(std::io::Error::new(e.kind(), e))
                }
            }),
        }
    }

    /// Whether a flush is free, so that it may be done in place.
    pub fn flush_is_free(&self) -> bool {
        self.0.pool.flush == FlushPolicy::Memory
    }

    /// The figures of now.
    pub fn stats(&self) -> OverlayStats {
        self.0.stats()
    }

    /// Tells the figures later, without keeping the disk.
    pub fn watch(&self) -> Watch {
        Watch(Arc::downgrade(&self.0))
    }
}

/// A look at a disk that may be gone.
#[derive(Debug, Clone)]
pub struct Watch(Weak<Disk>);

impl Watch {
    /// The figures of now; `None` when the disk is gone.
    pub fn stats(&self) -> Option<OverlayStats> {
        Some(self.0.upgrade()?.stats())
    }
}

impl Disk {
    fn stats(&self) -> OverlayStats {
        let counters = &self.counters;
        OverlayStats {
            table_bytes: self.table.bytes(),
            written: counters.written.get(),
            discarded: counters.discarded.get(),
            read_ram: counters.read_ram.get(),
            read_spill: counters.read_spill.get(),
            read_base: counters.read_base.get(),
            read_zero: counters.read_zero.get(),
            flushes: counters.flushes.get(),
        }
    }
}

impl Disk {
    /// Checks a range.
    pub(crate) fn check(&self, offset: u64, len: u64) -> Result<(), Error> {
        let sector = SECTOR_SIZE as u64;
        if !offset.is_multiple_of(sector) || !len.is_multiple_of(sector) {
            return Err(Error::Misaligned { offset, len });
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.capacity => Ok(()),
            _ => Err(Error::OutOfRange {
                offset,
                len,
                capacity: self.capacity,
            }),
        }
    }

    /// Cuts a checked range at the borders of chunks.
    pub(crate) fn pieces(offset: u64, len: u64) -> impl Iterator<Item = Piece> {
        let chunk_size = CHUNK_SIZE as u64;
        let end = offset + len;
        let mut next = offset;
        std::iter::from_fn(move || {
            if next == end {
                return None;
            }
            let start = next;
            let begin = start - start % chunk_size;
            let stop = end.min(begin + chunk_size);
            next = stop;
            // A checked range lies in the table, and places in a chunk fit anything.
            Some(Piece {
                chunk: (begin / chunk_size) as u32,
                first: ((start - begin) >> SECTOR_SHIFT) as usize,
                end: ((stop - begin) >> SECTOR_SHIFT) as usize,
                at: start - offset,
            })
        })
    }

    fn cell(&self, chunk: u32) -> Result<&Cell, Error> {
        self.table.get_or_make(chunk).ok_or(Error::OutOfRange {
            offset: start_of(chunk),
            len: CHUNK_SIZE as u64,
            capacity: self.capacity,
        })
    }

    fn write<S: Source + ?Sized>(
        &self,
        offset: u64,
        source: &S,
        wait: bool,
    ) -> Result<Attempt, Error> {
        let len = source.len();
        self.check(offset, len)?;
        for piece in Self::pieces(offset, len) {
            if self.write_piece(piece, source, wait)? == Attempt::WouldWait {
                return Ok(Attempt::WouldWait);
            }
        }
        self.counters.written.add(len);
        Ok(Attempt::Done)
    }

    fn write_piece<S: Source + ?Sized>(
        &self,
        piece: Piece,
        source: &S,
        wait: bool,
    ) -> Result<Attempt, Error> {
        let cell = self.cell(piece.chunk)?;
        let pages = piece.sectors().pages();
        let mut reserved = 0;
        let result = loop {
            let mut chunk = cell.write();
            let fresh = pages.minus(chunk.resident).count();
            if fresh > reserved {
                if self.pool.try_reserve(fresh - reserved) {
                    reserved = fresh;
                } else {
                    drop(chunk);
                    if !wait {
                        break Ok(Attempt::WouldWait);
                    }
                    match self.pool.reserve(fresh - reserved) {
                        Ok(()) => reserved = fresh,
                        Err(e) => break Err(e),
                    }
                    // The chunk may have been spilled meanwhile, and need more.
                    continue;
                }
            }
            let stored = self.store(&mut chunk, piece, source);
            if let Some(slot) = &chunk.slot
                && stored.is_ok()
            {
                self.pool.arena.touch(slot);
            }
            // What `store` has made resident is paid for, also if it failed half way.
            let now = pages.minus(chunk.resident).count();
            reserved -= fresh - now;
            break stored.map(|()| Attempt::Done);
        };
        self.pool.unreserve(reserved);
        if self.pool.pressed() {
            // Someone who found nothing to be moved may find this.
            self.pool.kick();
        }
        result
    }

    /// Puts a piece into RAM, for which room is reserved.
    fn store<S: Source + ?Sized>(
        &self,
        chunk: &mut Chunk,
        piece: Piece,
        source: &S,
    ) -> Result<(), Error> {
        let arena = &self.pool.arena;
        let sectors = piece.sectors();
        let pages = sectors.pages();
        let owner = Owner {
            disk: self.id,
            chunk: piece.chunk,
        };
        let new_slot = match chunk.slot.take() {
            Some(slot) => (slot, false),
            None => (arena.alloc(owner).map_err(Error::Memory)?, true),
        };
        let (mut slot, new) = new_slot;
        arena.populate(&mut slot, pages.minus(chunk.resident));
        let bytes = &mut arena.bytes_mut(&mut slot)[piece.bytes()];
        let result = source.read(piece.at, bytes).map_err(Error::Buffers);
        if result.is_err() && new {
            arena.release(&mut slot, pages);
            arena.free(slot);
            return result;
        }
        chunk.slot = Some(slot);
        chunk.resident = chunk.resident.plus(pages);
        chunk.version = chunk.version.wrapping_add(1);
        // Even after an error: part of the old content may be gone from RAM.
        chunk.ram = chunk.ram.plus(sectors);
        chunk.zero = chunk.zero.minus(sectors);
        self.leave_spill(chunk, sectors);
        result
    }

    /// Notes that `sectors` are no longer what the spill file has. Tells whether that gave its slot up.
    fn leave_spill(&self, chunk: &mut Chunk, sectors: Sectors) -> bool {
        if chunk.spill.is_none() {
            return false;
        }
        chunk.disk = chunk.disk.minus(sectors);
        if let Some(spill) = &self.pool.spill {
            give_up_spill(spill, chunk);
        }
        if chunk.spill.is_none() {
            let given_up = self
                .pool
                .given_up
                .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            if given_up % GARBAGE_WORTH_WAKING == GARBAGE_WORTH_WAKING - 1 {
                self.pool.kick();
            }
        }
        chunk.spill.is_none()
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.check(offset, len)?;
        let mut freed = 0;
        let mut disk_freed = false;
        let mut skip_to = 0;
        for piece in Self::pieces(offset, len) {
            if piece.chunk < skip_to {
                continue;
            }
            let below = self.below(piece);
            let cell = match self.table.get(piece.chunk) {
                Some(cell) => cell,
                None if below.is_empty() => {
                    skip_to = self.next_of_interest(piece.chunk);
                    continue;
                }
                None => self.cell(piece.chunk)?,
            };
            let mut chunk = cell.write();
            freed += self.empty(&mut chunk, piece, below);
            let empty_pages = chunk.held.minus(chunk.disk.pages());
            if chunk.spill.is_some() && !empty_pages.is_empty() {
                drop(chunk);
                self.pool.want_trim(Owner {
                    disk: self.id,
                    chunk: piece.chunk,
                });
                disk_freed = true;
            } else if let Some(spill) = &self.pool.spill {
                drop(chunk);
                disk_freed |= spill.has_garbage();
            }
        }
        self.counters.discarded.add(len);
        self.pool.unreserve(freed);
        if disk_freed {
            self.pool.kick();
        }
        Ok(())
    }

    /// Makes a piece of a chunk zeroes. Returns how many pages of RAM that freed.
    fn empty(&self, chunk: &mut Chunk, piece: Piece, below: Sectors) -> u64 {
        let sectors = piece.sectors();
        chunk.version = chunk.version.wrapping_add(1);
        chunk.ram = chunk.ram.minus(sectors);
        chunk.zero = chunk.zero.minus(sectors).plus(below);
        self.leave_spill(chunk, sectors);
        if chunk.ram.is_empty() {
            return drop_ram(&self.pool, chunk);
        }
        let unused = chunk.resident.minus(chunk.ram.pages());
        if let Some(slot) = &mut chunk.slot {
            self.pool.arena.release(slot, unused);
        }
        chunk.resident = chunk.resident.minus(unused);
        unused.count()
    }

    /// The sectors of a piece for which there is data below the overlay.
    pub(crate) fn below(&self, piece: Piece) -> Sectors {
        let mut found = Sectors::NONE;
        let Some(base) = &self.base else {
            return found;
        };
        let start = start_of(piece.chunk);
        let mut at = piece.first;
        while at < piece.end {
            let (data, end) = base.extent(start + (at * SECTOR_SIZE) as u64);
            let end = end.saturating_sub(start).div_ceil(SECTOR_SIZE as u64);
            let end = usize::try_from(end).unwrap_or(usize::MAX);
            let end = end.clamp(at + 1, piece.end);
            if data {
                found = found.plus(Sectors::range(at, end));
            }
            at = end;
        }
        found
    }

    /// After a chunk that is not in the table and has nothing below: the next that may be either.
    fn next_of_interest(&self, chunk: u32) -> u32 {
        let leaf_end = (chunk / LEAF_CHUNKS + 1).saturating_mul(LEAF_CHUNKS);
        let Some(base) = &self.base else {
            return leaf_end;
        };
        match base.extent(start_of(chunk)) {
            (false, end) => u32::try_from(end / CHUNK_SIZE as u64)
                .unwrap_or(u32::MAX)
                .clamp(chunk + 1, leaf_end.max(chunk + 1)),
            (true, _) => chunk + 1,
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.pool.forget(self.id);
        let mut freed = 0;
        for chunk in self.table.iter_mut() {
            freed += drop_ram(&self.pool, chunk);
            if let Some(spill) = &self.pool.spill {
                chunk.disk = Sectors::NONE;
                give_up_spill(spill, chunk);
            }
        }
        self.pool.unreserve(freed);
        if self
            .pool
            .spill
            .as_ref()
            .is_some_and(|spill| spill.has_garbage())
        {
            self.pool.kick();
        }
    }
}
