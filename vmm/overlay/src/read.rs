//! Reading: from RAM under a chunk's lock, from disks without any.

use std::io;

use crate::arena::Owner;
use crate::bounce::{BOUNCE_LEN, with_bounce};
use crate::buffers::Target;
use crate::error::Error;
use crate::file::read_all;
use crate::overlay::{Attempt, Disk, Piece, start_of};
use crate::sectors::{PAGE_SIZE, SECTOR_SIZE};
use crate::slots::offset_of;
use crate::table::{Cell, Chunk};

/// Reads of one chunk without its lock before it is read under it.
const UNLOCKED_TRIES: u32 = 3;
/// Reads from the spill file that make a chunk hot.
const HOT: u32 = 2;

static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Where a run of sectors is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Ram,
    Spill,
    Zero,
    Below,
}

/// A run of bytes that has to come from a disk.
#[derive(Debug, Clone, Copy)]
struct Miss {
    /// Bytes of the request before it.
    at: u64,
    len: usize,
    from: From,
}

#[derive(Debug, Clone, Copy)]
enum From {
    /// Offset in the base.
    Base(u64),
    /// Offset in the spill file; where the chunk's slot was when its version was this.
    Spill {
        offset: u64,
        piece: Piece,
        slot_version: u32,
    },
}

impl Miss {
    /// Whether `next` goes on where this ends, in the request and on the same disk.
    fn joins(&self, next: &Miss) -> bool {
        let len = self.len as u64;
        self.at + len == next.at
            && match (self.from, next.from) {
                (From::Base(a), From::Base(b)) => a + len == b,
                (From::Spill { offset: a, .. }, From::Spill { offset: b, .. }) => a + len == b,
                _ => false,
            }
    }
}

impl Chunk {
    fn place(&self, from: usize, end: usize) -> (Place, usize) {
        let mut len = end - from;
        for (set, place) in [
            (self.ram, Place::Ram),
            (self.disk, Place::Spill),
            (self.zero, Place::Zero),
        ] {
            let (inside, run) = set.run(from, from + len);
            if inside {
                return (place, run);
            }
            len = run;
        }
        (Place::Below, len)
    }
}

impl Disk {
    pub(crate) fn read<T: Target + ?Sized>(
        &self,
        offset: u64,
        target: &mut T,
        wait: bool,
    ) -> Result<Attempt, Error> {
        let len = target.len();
        self.check(offset, len)?;
        let mut misses = Vec::new();
        for piece in Self::pieces(offset, len) {
            self.read_piece(piece, target, &mut misses)?;
            if !wait && !misses.is_empty() {
                return Ok(Attempt::WouldWait);
            }
        }
        let mut tries = 0;
        while !misses.is_empty() {
            let moved = self.fetch(&misses, target)?;
            misses.clear();
            tries += 1;
            for piece in moved {
                if tries < UNLOCKED_TRIES {
                    self.read_piece(piece, target, &mut misses)?;
                } else {
                    self.read_locked(piece, target)?;
                }
            }
        }
        Ok(Attempt::Done)
    }

    /// Reads what needs no disk, and lists what does.
    fn read_piece<T: Target + ?Sized>(
        &self,
        piece: Piece,
        target: &mut T,
        misses: &mut Vec<Miss>,
    ) -> Result<(), Error> {
        match self.table.get(piece.chunk) {
            Some(cell) => self.read_chunk(&cell.read(), piece, target, misses),
            None => self.read_below(piece, target, misses),
        }
    }

    fn read_chunk<T: Target + ?Sized>(
        &self,
        chunk: &Chunk,
        piece: Piece,
        target: &mut T,
        misses: &mut Vec<Miss>,
    ) -> Result<(), Error> {
        let mut from = piece.first;
        while from < piece.end {
            let (place, run) = chunk.place(from, piece.end);
            let part = Piece {
                first: from,
                end: from + run,
                at: piece.at + ((from - piece.first) * SECTOR_SIZE) as u64,
                ..piece
            };
            let len = part.bytes().len();
            match (place, &chunk.slot, chunk.spill) {
                (Place::Ram, Some(slot), _) => {
                    self.pool.arena.touch(slot);
                    let bytes = &self.pool.arena.bytes(slot)[part.bytes()];
                    target.write(part.at, bytes).map_err(Error::Buffers)?;
                    self.counters.read_ram.add(len as u64);
                }
                (Place::Spill, _, Some(slot)) => misses.push(Miss {
                    at: part.at,
                    len,
                    from: From::Spill {
                        offset: offset_of(slot) + part.bytes().start as u64,
                        piece: part,
                        slot_version: chunk.slot_version,
                    },
                }),
                (Place::Zero, ..) => self.zero(part.at, len, target)?,
                (Place::Below, ..) => self.read_below(part, target, misses)?,
                (Place::Ram, None, _) | (Place::Spill, _, None) => {
                    unreachable!("valid sectors without the place they are in")
                }
            }
            from += run;
        }
        Ok(())
    }

    fn read_below<T: Target + ?Sized>(
        &self,
        piece: Piece,
        target: &mut T,
        misses: &mut Vec<Miss>,
    ) -> Result<(), Error> {
        let data = self.below(piece);
        let mut from = piece.first;
        while from < piece.end {
            let (inside, run) = data.run(from, piece.end);
            let at = piece.at + ((from - piece.first) * SECTOR_SIZE) as u64;
            let len = run * SECTOR_SIZE;
            if inside {
                misses.push(Miss {
                    at,
                    len,
                    from: From::Base(start_of(piece.chunk) + (from * SECTOR_SIZE) as u64),
                });
            } else {
                self.zero(at, len, target)?;
            }
            from += run;
        }
        Ok(())
    }

    fn zero<T: Target + ?Sized>(&self, at: u64, len: usize, target: &mut T) -> Result<(), Error> {
        // A piece is no longer than a chunk.
        target.write(at, &ZEROES[..len]).map_err(Error::Buffers)?;
        self.counters.read_zero.add(len as u64);
        Ok(())
    }

    /// Reads what is on disks. Returns the pieces that were moved away meanwhile.
    fn fetch<T: Target + ?Sized>(
        &self,
        misses: &[Miss],
        target: &mut T,
    ) -> Result<Vec<Piece>, Error> {
        let mut moved = Vec::new();
        let mut rest = misses;
        while let Some(first) = rest.first() {
            let mut count = 1;
            let mut len = first.len;
            while let Some([a, b]) = rest.get(count - 1..=count)
                && a.joins(b)
                && len + b.len + 2 * PAGE_SIZE <= BOUNCE_LEN
            {
                len += b.len;
                count += 1;
            }
            let (together, others) = rest.split_at(count);
            rest = others;
            with_bounce(|bounce| self.fetch_run(together, len, bounce, target, &mut moved))?;
        }
        Ok(moved)
    }

    fn fetch_run<T: Target + ?Sized>(
        &self,
        together: &[Miss],
        len: usize,
        bounce: &mut [u8],
        target: &mut T,
        moved: &mut Vec<Piece>,
    ) -> Result<(), Error> {
        let Some(first) = together.first() else {
            return Ok(());
        };
        let offset = match first.from {
            From::Base(offset) => {
                let data = &mut bounce[..len];
                self.read_base(data, offset)?;
                self.counters.read_base.add(len as u64);
                return target.write(first.at, data).map_err(Error::Buffers);
            }
            From::Spill { offset, .. } => offset,
        };
        let result = self.read_spill(bounce, offset, len);
        let data = result.as_ref().ok().copied().unwrap_or_default();
        for miss in together {
            let From::Spill {
                piece,
                slot_version,
                ..
            } = miss.from
            else {
                continue;
            };
            let Some(cell) = self.table.get(piece.chunk) else {
                continue;
            };
            if cell.read().slot_version != slot_version {
                moved.push(piece);
                continue;
            }
            // Only the failure of what is still wanted counts.
            if let Err(e) = &result {
                return Err(Error::SpillRead(io::Error::new(e.kind(), e.to_string())));
            }
            // No longer than the run.
            let from = (miss.at - first.at) as usize;
            target
                .write(miss.at, &data[from..from + miss.len])
                .map_err(Error::Buffers)?;
            self.counters.read_spill.add(miss.len as u64);
            self.note_heat(cell, piece.chunk);
        }
        Ok(())
    }

    fn note_heat(&self, cell: &Cell, chunk: u32) {
        let heat = cell.heat(self.pool.arena.now(), self.pool.heat_window());
        if heat >= HOT && self.pool.has_room_for_return() {
            self.pool.want_back(Owner {
                disk: self.id,
                chunk,
            });
        }
    }

    fn read_base(&self, data: &mut [u8], offset: u64) -> Result<(), Error> {
        match &self.base {
            Some(base) => base.read_at(data, offset).map_err(Error::BaseRead),
            None => {
                data.fill(0);
                Ok(())
            }
        }
    }

    /// Reads whole pages, as the file may insist on, and returns the part that is wanted.
    fn read_spill<'a>(
        &self,
        bounce: &'a mut [u8],
        offset: u64,
        len: usize,
    ) -> io::Result<&'a [u8]> {
        let Some(spill) = &self.pool.spill else {
            return Err(io::ErrorKind::NotFound.into());
        };
        // Less than a page.
        let before = (offset % PAGE_SIZE as u64) as usize;
        let whole = (before + len).next_multiple_of(PAGE_SIZE);
        read_all(&*spill.file, &mut bounce[..whole], offset - before as u64)?;
        Ok(&bounce[before..before + len])
    }

    /// Reads a piece while nothing can happen to it.
    fn read_locked<T: Target + ?Sized>(&self, piece: Piece, target: &mut T) -> Result<(), Error> {
        let Some(cell) = self.table.get(piece.chunk) else {
            return Ok(());
        };
        let chunk = cell.read();
        let mut misses = Vec::new();
        self.read_chunk(&chunk, piece, target, &mut misses)?;
        for miss in misses {
            with_bounce(|bounce| {
                let data = match miss.from {
                    From::Base(offset) => {
                        let data = &mut bounce[..miss.len];
                        self.read_base(data, offset)?;
                        self.counters.read_base.add(miss.len as u64);
                        &*data
                    }
                    From::Spill { offset, .. } => {
                        self.counters.read_spill.add(miss.len as u64);
                        self.read_spill(bounce, offset, miss.len)
                            .map_err(Error::SpillRead)?
                    }
                };
                target.write(miss.at, data).map_err(Error::Buffers)
            })?;
        }
        Ok(())
    }
}
