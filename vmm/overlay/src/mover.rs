//! Moving chunks: out to the spill file, back to RAM, and giving back what they leave behind.
//!
//! No chunk's lock is held during I/O. A chunk to be spilled is copied under its lock and marked busy;
//! it stays readable and writable where it is. Only when the copy is in the file, and the chunk is
//! still what was copied, its RAM is given up. So a failed or late write loses nothing.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use crate::arena::{Owner, Seen};
use crate::bounce::{BOUNCE_LEN, Bounce, with_bounce};
use crate::file::{read_all, write_all};
use crate::overlay::Disk;
use crate::pool::Inner;
use crate::sectors::{CHUNK_SIZE, PAGE_SIZE, PAGES, Pages, SECTOR_SIZE, Sectors};
use crate::slots::{Spill, offset_of};
use crate::table::{Chunk, SpillSlot};

/// Chunks moved by one I/O at best.
const BATCH: usize = BOUNCE_LEN / CHUNK_SIZE;
/// Victims chosen by one scan: at most 64 MiB.
const MOST_VICTIMS: usize = 1024;

/// What became of a try to spill.
#[derive(Debug)]
pub(crate) enum Moved {
    /// RAM was given up, or may have been by now.
    Some,
    /// There was nothing to be moved.
    Nothing,
    /// The spill file could not take it.
    Failed(Arc<io::Error>),
}

/// A chunk whose copy is on its way to the file.
#[derive(Debug)]
struct Staged {
    disk: Arc<Disk>,
    chunk: u32,
    spill: SpillSlot,
    /// Where in the bounce buffer its first page is, or would be.
    at: usize,
    /// The sectors to be written for,
    dirty: Sectors,
    /// the pages they are in,
    pages: Pages,
    /// and what else in these pages only the file has.
    keep: Sectors,
    version: u32,
    failed: Option<Arc<io::Error>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// Give up RAM; chunks in use since they were chosen are spared, unless someone waits.
    Spill { spare: bool },
    /// Have everything in the file, and keep it in RAM too.
    WriteBack,
}

#[derive(Debug, Default)]
struct Outcome {
    /// Chunks that gave up RAM, or were written back.
    moved: usize,
    /// Chunks in somebody else's hands.
    busy: usize,
    /// Chunks that were spared.
    spared: usize,
    failed: Option<Arc<io::Error>>,
}

/// Spills some of the coldest chunks.
pub(crate) fn spill(pool: &Inner) -> Moved {
    let Some(spill) = &pool.spill else {
        return Moved::Nothing;
    };
    let mut batch = choose(pool);
    if batch.is_empty() {
        return Moved::Nothing;
    }
    batch.sort_unstable_by_key(|seen| seen.owner);
    let spare = !pool.pressed();
    let outcome = move_batch(pool, spill, &batch, Purpose::Spill { spare });
    match outcome.failed {
        Some(e) if outcome.moved == 0 => Moved::Failed(e),
        _ if outcome.moved + outcome.spared > 0 => Moved::Some,
        _ if outcome.busy == batch.len() => Moved::Nothing,
        _ => Moved::Some,
    }
}

/// The next of the coldest chunks.
fn choose(pool: &Inner) -> Vec<Seen> {
    let mut victims = pool.victims.lock().unwrap_or_else(PoisonError::into_inner);
    if victims.is_empty() {
        let mut seen = pool.arena.scan();
        let excess = pool.used().saturating_sub(pool.marks().low);
        let wanted = usize::try_from(excess / PAGES as u64)
            .unwrap_or(usize::MAX)
            .clamp(BATCH, MOST_VICTIMS);
        if seen.len() > wanted {
            seen.select_nth_unstable(wanted);
            seen.truncate(wanted);
        }
        seen.sort_unstable_by(|a, b| b.cmp(a));
        *victims = seen;
    }
    let rest = victims.len().saturating_sub(BATCH);
    victims.split_off(rest)
}

/// Writes everything of one disk that the file does not have yet, and makes it durable.
pub(crate) fn write_back(pool: &Inner, disk: u32) -> Result<(), Arc<io::Error>> {
    let Some(spill) = &pool.spill else {
        return Ok(());
    };
    pool.until_unhindered(|| {
        let mut all = pool.arena.scan();
        all.retain(|seen| seen.owner.disk == disk);
        all.sort_unstable_by_key(|seen| seen.owner);
        let mut busy = 0;
        for batch in all.chunks(BATCH) {
            let outcome = move_batch(pool, spill, batch, Purpose::WriteBack);
            busy += outcome.busy;
            if let Some(e) = outcome.failed {
                return Err(e);
            }
        }
        Ok(busy == 0)
    })?;
    spill.file.sync().map_err(Arc::new)
}

fn move_batch(pool: &Inner, spill: &Spill, batch: &[Seen], purpose: Purpose) -> Outcome {
    let limit = pool.spill_limit.load(Ordering::SeqCst);
    if spill.held_bytes().saturating_add(BOUNCE_LEN as u64) > limit && spill.has_garbage() {
        spill.collect();
    }
    let mut outcome = Outcome::default();
    let mut staged = Vec::with_capacity(batch.len());
    with_bounce(|bounce| {
        for (seen, at) in batch.iter().zip((0..).step_by(CHUNK_SIZE)) {
            let buffer = &mut bounce[at..at + CHUNK_SIZE];
            let after = staged.last().map(|staged: &Staged| staged.spill);
            match stage(pool, spill, *seen, purpose, (buffer, at), after) {
                Ok(Some(one)) => staged.push(one),
                Ok(None) => outcome.moved += 1,
                Err(Passed::Busy) => outcome.busy += 1,
                Err(Passed::Spared) => outcome.spared += 1,
                Err(Passed::Gone) => {}
                Err(Passed::Full) => {
                    let full = io::Error::from_raw_os_error(libc::ENOSPC);
                    outcome.failed = Some(Arc::new(full));
                    break;
                }
            }
        }
        for one in staged.iter_mut().filter(|one| !one.keep.is_empty()) {
            one.failed = merge(spill, one, bounce).err().map(Arc::new);
        }
        write(spill, &mut staged, bounce);
    });
    for one in staged {
        if let Some(e) = one.failed.clone() {
            outcome.failed.get_or_insert(e);
        } else {
            let bytes = one.pages.count() * PAGE_SIZE as u64;
            pool.counters.spilled_bytes.add(bytes);
            outcome.moved += 1;
        }
        finish(pool, spill, &one, purpose);
    }
    pool.move_ended();
    outcome
}

/// Why a chunk was not staged.
enum Passed {
    Busy,
    Spared,
    Gone,
    Full,
}

/// Copies what the file has to be given of a chunk. `None` if it has all and RAM was given up.
fn stage(
    pool: &Inner,
    spill: &Spill,
    seen: Seen,
    purpose: Purpose,
    (buffer, at): (&mut [u8], usize),
    after: Option<SpillSlot>,
) -> Result<Option<Staged>, Passed> {
    let disk = pool.disk(seen.owner.disk).ok_or(Passed::Gone)?;
    let cell = disk.table.get(seen.owner.chunk).ok_or(Passed::Gone)?;
    let mut guard = cell.write();
    let chunk = &mut *guard;
    if chunk.busy {
        return Err(Passed::Busy);
    }
    let ram = chunk.slot.as_ref().ok_or(Passed::Gone)?;
    let used_since = pool.arena.last_use(ram) != seen.last_use;
    if used_since && purpose == (Purpose::Spill { spare: true }) {
        return Err(Passed::Spared);
    }
    let dirty = chunk.ram.minus(chunk.disk);
    if dirty.is_empty() {
        if purpose == Purpose::WriteBack {
            return Err(Passed::Gone);
        }
        let pages = drop_ram(pool, chunk);
        drop(guard);
        pool.unreserve(pages);
        pool.counters.dropped_chunks.add(1);
        return Ok(None);
    }
    let pages = dirty.pages();
    let (slot, held) = match chunk.spill {
        Some(slot) => (slot, chunk.held),
        None => spill.alloc(after).ok_or(Passed::Full)?,
    };
    let limit = pool.spill_limit.load(Ordering::SeqCst);
    if !spill.hold(pages.minus(held), limit) {
        if chunk.spill.is_none() {
            spill.free(slot, held);
        }
        return Err(Passed::Full);
    }
    let bytes = pool.arena.bytes(ram);
    for (first, end) in pages.runs() {
        let range = first * PAGE_SIZE..end * PAGE_SIZE;
        buffer[range.clone()].copy_from_slice(&bytes[range]);
    }
    chunk.spill = Some(slot);
    chunk.held = held.plus(pages);
    chunk.busy = true;
    chunk.slot_version = chunk.slot_version.wrapping_add(1);
    let keep = chunk.disk.minus(chunk.ram).and(pages.sectors());
    let version = chunk.version;
    drop(guard);
    Ok(Some(Staged {
        disk,
        chunk: seen.owner.chunk,
        spill: slot,
        at,
        dirty,
        pages,
        keep,
        version,
        failed: None,
    }))
}

/// Fetches what only the file has from the pages about to be overwritten.
fn merge(spill: &Spill, one: &Staged, bounce: &mut [u8]) -> io::Result<()> {
    let mut old = Bounce::new(CHUNK_SIZE);
    for (first, end) in one.keep.pages().runs() {
        let range = first * PAGE_SIZE..end * PAGE_SIZE;
        let offset = offset_of(one.spill) + range.start as u64;
        read_all(&*spill.file, &mut old.bytes_mut()[range], offset)?;
    }
    for (first, end) in one.keep.runs() {
        let range = first * SECTOR_SIZE..end * SECTOR_SIZE;
        bounce[one.at..][range.clone()].copy_from_slice(&old.bytes()[range]);
    }
    Ok(())
}

/// A run of pages that is one in the file and in the bounce buffer.
#[derive(Debug, Clone, Copy)]
struct Run {
    one: usize,
    offset: u64,
    at: usize,
    len: usize,
}

/// Writes everything staged, in as few pieces as it can be.
fn write(spill: &Spill, staged: &mut [Staged], bounce: &[u8]) {
    let mut runs = Vec::new();
    for (number, one) in staged.iter().enumerate() {
        if one.failed.is_none() {
            runs.extend(one.pages.runs().map(|(first, end)| Run {
                one: number,
                offset: offset_of(one.spill) + (first * PAGE_SIZE) as u64,
                at: one.at + first * PAGE_SIZE,
                len: (end - first) * PAGE_SIZE,
            }));
        }
    }
    let joins = |a: &Run, b: &Run| a.offset + a.len as u64 == b.offset && a.at + a.len == b.at;
    let mut full = None;
    for together in runs.chunk_by(joins) {
        let Some(first) = together.first() else {
            continue;
        };
        let len = together.iter().map(|run| run.len).sum::<usize>();
        let whole = write_all(
            &*spill.file,
            &bounce[first.at..first.at + len],
            first.offset,
        );
        if whole.is_ok() {
            continue;
        }
        // Some of it may still find its place.
        for run in together {
            let result = match &full {
                Some(e) => Err(Arc::clone(e)),
                None => write_all(&*spill.file, &bounce[run.at..run.at + run.len], run.offset)
                    .map_err(Arc::new),
            };
            if let Err(e) = result {
                if e.raw_os_error() == Some(libc::ENOSPC) {
                    full = Some(e.clone());
                }
                staged[run.one].failed = Some(e);
            }
        }
    }
}

/// Settles a chunk after its copy has been written, or has not.
fn finish(pool: &Inner, spill: &Spill, one: &Staged, purpose: Purpose) {
    let Some(cell) = one.disk.table.get(one.chunk) else {
        return;
    };
    let mut guard = cell.write();
    let chunk = &mut *guard;
    chunk.busy = false;
    let mut freed = 0;
    match &one.failed {
        None if chunk.version == one.version => {
            chunk.disk = chunk.disk.plus(one.dirty);
            if let Purpose::Spill { .. } = purpose {
                freed = drop_ram(pool, chunk);
                cell.cool();
                pool.counters.spilled_chunks.add(1);
            }
        }
        // A place that can't be written is not tried again.
        Some(e) if e.raw_os_error() == Some(libc::EIO) && chunk.disk.is_empty() => {
            chunk.spill = None;
            spill.unhold(std::mem::take(&mut chunk.held));
        }
        _ => {}
    }
    give_up_spill(spill, chunk);
    drop(guard);
    pool.unreserve(freed);
}

/// Gives up a chunk's RAM. Returns how many pages that were.
pub(crate) fn drop_ram(pool: &Inner, chunk: &mut Chunk) -> u64 {
    chunk.ram = Sectors::NONE;
    let resident = std::mem::take(&mut chunk.resident);
    if let Some(mut slot) = chunk.slot.take() {
        pool.arena.release(&mut slot, resident);
        pool.arena.free(slot);
    }
    resident.count()
}

/// Gives up a chunk's spill slot if there is nothing in it and nobody is moving the chunk.
pub(crate) fn give_up_spill(spill: &Spill, chunk: &mut Chunk) {
    if chunk.disk.is_empty()
        && !chunk.busy
        && let Some(slot) = chunk.spill.take()
    {
        chunk.slot_version = chunk.slot_version.wrapping_add(1);
        spill.free(slot, std::mem::take(&mut chunk.held));
    }
}

/// Reads a hot chunk back to RAM, keeping it in the file too.
pub(crate) fn bring_back(pool: &Inner, owner: Owner) {
    let (Some(spill), Some(disk)) = (&pool.spill, pool.disk(owner.disk)) else {
        return;
    };
    let Some(cell) = disk.table.get(owner.chunk) else {
        return;
    };
    let (slot, wanted, version) = {
        let mut chunk = cell.write();
        let wanted = chunk.disk.minus(chunk.ram);
        let Some(slot) = chunk.spill.filter(|_| !chunk.busy && !wanted.is_empty()) else {
            return;
        };
        chunk.busy = true;
        (slot, wanted, chunk.version)
    };
    let pages = wanted.pages();
    let reserved = pages.count();
    let freed = with_bounce(|bounce| {
        let buffer = &mut bounce[..CHUNK_SIZE];
        let read = pages.runs().try_for_each(|(first, end)| {
            let range = first * PAGE_SIZE..end * PAGE_SIZE;
            let offset = offset_of(slot) + range.start as u64;
            read_all(&*spill.file, &mut buffer[range], offset)
        });
        // A chunk that can't be read stays where it is; who asks for it will be told.
        let room = read.is_ok() && pool.try_reserve(reserved);
        let mut chunk = cell.write();
        chunk.busy = false;
        let mut spare = if room { reserved } else { 0 };
        if room && chunk.version == version {
            spare -= install(pool, owner, &mut chunk, wanted, buffer);
        }
        give_up_spill(spill, &mut chunk);
        spare
    });
    cell.cool();
    pool.unreserve(freed);
    pool.move_ended();
}

/// Puts sectors that were read back into RAM. Returns how many pages that took.
fn install(pool: &Inner, owner: Owner, chunk: &mut Chunk, wanted: Sectors, buffer: &[u8]) -> u64 {
    if chunk.slot.is_none() {
        chunk.slot = pool.arena.alloc(owner).ok();
    }
    let Some(slot) = &mut chunk.slot else {
        return 0;
    };
    let fresh = wanted.pages().minus(chunk.resident);
    pool.arena.populate(slot, fresh);
    let bytes = pool.arena.bytes_mut(slot);
    for (first, end) in wanted.runs() {
        let range = first * SECTOR_SIZE..end * SECTOR_SIZE;
        bytes[range.clone()].copy_from_slice(&buffer[range]);
    }
    pool.arena.touch(slot);
    chunk.ram = chunk.ram.plus(wanted);
    chunk.resident = chunk.resident.plus(fresh);
    pool.counters.returned_chunks.add(1);
    fresh.count()
}

/// Gives back the disk of pages inside slots that hold nothing any more.
pub(crate) fn trim(pool: &Inner) {
    let Some(spill) = &pool.spill else { return };
    let owners = std::mem::take(&mut *pool.trims.lock().unwrap_or_else(PoisonError::into_inner));
    for owner in owners {
        let Some(disk) = pool.disk(owner.disk) else {
            continue;
        };
        let Some(cell) = disk.table.get(owner.chunk) else {
            continue;
        };
        let (slot, empty) = {
            let mut chunk = cell.write();
            let empty = chunk.held.minus(chunk.disk.pages());
            let Some(slot) = chunk.spill.filter(|_| !chunk.busy && !empty.is_empty()) else {
                continue;
            };
            chunk.busy = true;
            (slot, empty)
        };
        let mut gone = Pages::NONE;
        for (first, end) in empty.runs() {
            let offset = offset_of(slot) + (first * PAGE_SIZE) as u64;
            if spill
                .punch(offset, ((end - first) * PAGE_SIZE) as u64)
                .is_ok()
            {
                gone = gone.plus(empty.and(Sectors::range(first * 8, end * 8).pages()));
            }
        }
        let mut chunk = cell.write();
        chunk.busy = false;
        chunk.held = chunk.held.minus(gone);
        spill.unhold(gone);
        give_up_spill(spill, &mut chunk);
        drop(chunk);
        pool.move_ended();
    }
}
