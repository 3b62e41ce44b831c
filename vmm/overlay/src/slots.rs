//! Which chunk-sized places of the spill file are free, and how much disk the file takes.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::file::SpillFile;
use crate::sectors::{CHUNK_SIZE, PAGE_SIZE, Pages};
use crate::table::SpillSlot;

/// Free runs shorter than this are left alone while the file may grow: a hole costs no disk, and
/// writing in long runs is what disks are quick at.
const LONG_RUN: u32 = 16;
/// Slots up to which the file grows before short runs are used: 4 TiB, below what any file system
/// that holds μVMs refuses.
const GROW_TO: u32 = 1 << 26;

/// The spill file and its slots.
#[derive(Debug)]
pub(crate) struct Spill {
    pub(crate) file: Box<dyn SpillFile>,
    slots: Mutex<Slots>,
    /// Pages of disk in use, given-up slots included until their space is given back.
    held: AtomicU64,
    /// The file system can't punch holes.
    unpunchable: AtomicBool,
}

#[derive(Debug, Default)]
struct Slots {
    end: u32,
    /// Free runs below `end`, by their first slot.
    free: BTreeMap<u32, u32>,
    /// Given up, with the pages that still take up disk.
    garbage: Vec<(SpillSlot, Pages)>,
    /// Free slots that take up disk because it can't be given back.
    stranded: BTreeMap<u32, Pages>,
}

impl Slots {
    fn take(&mut self, first: u32, slot: u32) {
        let Some(len) = self.free.remove(&first) else {
            return;
        };
        if slot > first {
            self.free.insert(first, slot - first);
        }
        if slot + 1 < first + len {
            self.free.insert(slot + 1, first + len - slot - 1);
        }
    }

    fn alloc(&mut self, after: Option<SpillSlot>) -> Option<u32> {
        if let Some(next) = after.and_then(|slot| slot.0.checked_add(1))
            && let Some((&first, &len)) = self.free.range(..=next).next_back()
            && next < first + len
        {
            self.take(first, next);
            return Some(next);
        }
        let long = self.free.iter().find(|(_, len)| **len >= LONG_RUN);
        if let Some((&first, _)) = long {
            self.take(first, first);
            return Some(first);
        }
        if self.end < GROW_TO {
            self.end += 1;
            return Some(self.end - 1);
        }
        let (&first, _) = self.free.first_key_value()?;
        self.take(first, first);
        Some(first)
    }

    fn add_free(&mut self, slot: u32) {
        let mut first = slot;
        let mut len = 1;
        if let Some((&before, &before_len)) = self.free.range(..slot).next_back()
            && before + before_len == slot
        {
            self.free.remove(&before);
            first = before;
            len += before_len;
        }
        if let Some(after) = self.free.remove(&(slot + 1)) {
            len += after;
        }
        if first + len == self.end {
            self.end = first;
        } else {
            self.free.insert(first, len);
        }
    }
}

impl Spill {
    pub(crate) fn new(file: Box<dyn SpillFile>) -> Self {
        Spill {
            file,
            slots: Mutex::default(),
            held: AtomicU64::new(0),
            unpunchable: AtomicBool::new(false),
        }
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A slot, right behind `after` if that can be, and the pages of it that take up disk already.
    pub(crate) fn alloc(&self, after: Option<SpillSlot>) -> Option<(SpillSlot, Pages)> {
        let mut slots = self.slots();
        let slot = slots.alloc(after)?;
        let held = slots.stranded.remove(&slot).unwrap_or_default();
        Some((SpillSlot(slot), held))
    }

    /// Gives a slot up. Its disk is given back by [`Spill::collect`].
    pub(crate) fn free(&self, slot: SpillSlot, held: Pages) {
        self.slots().garbage.push((slot, held));
    }

    /// Bytes of disk in use.
    pub(crate) fn held_bytes(&self) -> u64 {
        self.held.load(Ordering::Relaxed) * PAGE_SIZE as u64
    }

    /// Takes `pages` more on the account, if with them it stays within `limit` bytes.
    pub(crate) fn hold(&self, pages: Pages, limit: u64) -> bool {
        let limit = limit / PAGE_SIZE as u64;
        self.held
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |held| {
                Some(held + pages.count()).filter(|sum| *sum <= limit)
            })
            .is_ok()
    }

    pub(crate) fn unhold(&self, pages: Pages) {
        self.held.fetch_sub(pages.count(), Ordering::Relaxed);
    }

    /// Whether there is disk to be given back.
    pub(crate) fn has_garbage(&self) -> bool {
        !self.slots().garbage.is_empty()
    }

    /// Gives the disk of given-up slots back.
    pub(crate) fn collect(&self) {
        let mut garbage = std::mem::take(&mut self.slots().garbage);
        if garbage.is_empty() {
            return;
        }
        garbage.sort_unstable_by_key(|(slot, _)| *slot);
        let mut done = 0;
        while let Some((first, _)) = garbage.get(done) {
            let run = garbage[done..]
                .iter()
                .zip(first.0..)
                .take_while(|((slot, _), expected)| slot.0 == *expected)
                .count();
            let all = &garbage[done..done + run];
            done += run;
            let held = all.iter().any(|(_, held)| !held.is_empty());
            let punched = !held
                || self
                    .punch(offset_of(*first), (run * CHUNK_SIZE) as u64)
                    .is_ok();
            let mut slots = self.slots();
            for (slot, held) in all {
                if punched {
                    self.unhold(*held);
                } else {
                    slots.stranded.insert(slot.0, *held);
                }
                slots.add_free(slot.0);
            }
        }
    }

    /// Gives back the disk of a range.
    pub(crate) fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.unpunchable.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let result = self.file.punch(offset, len);
        if let Err(e) = &result {
            if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) {
                self.unpunchable.store(true, Ordering::Relaxed);
            }
            tracing::debug!("the overlay's spill file keeps disk it does not need: {e}");
        }
        result
    }
}

/// Where a slot begins in the file.
pub(crate) fn offset_of(slot: SpillSlot) -> u64 {
    u64::from(slot.0) * CHUNK_SIZE as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sectors::Sectors;

    #[derive(Debug, Default)]
    struct Punched(std::sync::Arc<Mutex<Vec<(u64, u64)>>>, bool);

    impl SpillFile for Punched {
        fn write_at(&self, buf: &[u8], _: u64) -> io::Result<usize> {
            Ok(buf.len())
        }
        fn read_at(&self, buf: &mut [u8], _: u64) -> io::Result<usize> {
            Ok(buf.len())
        }
        fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
            if self.1 {
                return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
            }
            self.0.lock().unwrap().push((offset, len));
            Ok(())
        }
        fn sync(&self) -> io::Result<()> {
            Ok(())
        }
    }

    fn fill(spill: &Spill, count: u32) -> Vec<SpillSlot> {
        let mut after = None;
        (0..count)
            .map(|_| {
                let (slot, _) = spill.alloc(after).unwrap();
                after = Some(slot);
                slot
            })
            .collect()
    }

    #[test]
    fn given_up_slots_are_punched_in_long_runs_and_used_in_long_runs() {
        let file = Punched::default();
        let punched = file.0.clone();
        let spill = Spill::new(Box::new(file));
        let page = Sectors::range(0, 8).pages();
        let slots = fill(&spill, 100);
        assert!(slots.iter().all(|_| spill.hold(page, u64::MAX)));
        for slot in slots[20..40].iter().rev().chain([&slots[50]]) {
            spill.free(*slot, page);
        }
        assert!(spill.has_garbage());
        spill.collect();
        let chunk = CHUNK_SIZE as u64;
        assert_eq!(
            *punched.lock().unwrap(),
            [(20 * chunk, 20 * chunk), (50 * chunk, chunk)]
        );
        assert_eq!(spill.held_bytes(), 79 * 4096);
        // The long run first, to its end; then the file grows past the short hole.
        let next: Vec<_> = fill(&spill, 21).iter().map(|slot| slot.0).collect();
        let expected: Vec<_> = (20..40).chain([100]).collect();
        // A run that has become short is left when it is not continued.
        assert_eq!(next, expected);
    }

    #[test]
    fn freed_tail_makes_the_file_shorter() {
        let spill = Spill::new(Box::new(Punched::default()));
        for slot in &fill(&spill, 10)[4..] {
            spill.free(*slot, Pages::NONE);
        }
        spill.collect();
        let slots = spill.slots();
        assert_eq!((slots.end, slots.free.len()), (4, 0));
    }

    #[test]
    fn limit_counts_pages_not_slots() {
        let spill = Spill::new(Box::new(Punched::default()));
        let three = Sectors::range(0, 24).pages();
        assert!(spill.hold(three, 5 * 4096));
        assert!(!spill.hold(three, 5 * 4096));
        spill.unhold(three);
        assert!(spill.hold(three, 5 * 4096));
    }

    #[test]
    fn disk_that_can_not_be_given_back_stays_on_the_account_once() {
        let spill = Spill::new(Box::new(Punched(Default::default(), true)));
        let page = Sectors::range(0, 8).pages();
        for _ in 0..3 {
            let (slot, held) = spill.alloc(None).unwrap();
            assert!(spill.hold(page.minus(held), u64::MAX));
            spill.free(slot, page);
            spill.collect();
            assert_eq!(spill.held_bytes(), 4096);
        }
    }
}
