//! Guest memory, copied out of the process of its VMM while the guest goes on.
//!
//! The kernel notes which pages of a process are written (`Soft-dirty` in its documentation): vCPUs' writes, those of the
//! VMM's devices, and those of the kernel for them. Pages that were never written since the guest was resumed are those of
//! the memory file that it was resumed from.
//!
//! Not trusted: the VMM. Where its memory lies is its word; who lies is saved as something else.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, copy_file_range, seek};

const PAGE: u64 = 4096;
const HUGE_PAGE: u64 = 2 << 20;
/// Bytes of a page's entry in a page table's file.
const ENTRY: u64 = 8;
/// Bits of an entry: the page is in memory, or swapped out; it is a file's; it was written since that was forgotten.
const THERE: u64 = (1 << 63) | (1 << 62);
const OF_A_FILE: u64 = 1 << 61;
const WRITTEN: u64 = 1 << 55;
/// How much is read at once.
const PIECE: u64 = 1 << 20;

/// Pages of the memory file, from the first to before the second.
type Pages = Range<u64>;

/// A memory file in the making.
#[derive(Debug)]
pub(super) struct Copying {
    pid: u32,
    most: u64,
    /// Addresses and lengths in the process, in the file's order.
    places: Vec<(u64, u64)>,
    table: File,
    into: File,
    /// What the guest was resumed from.
    baked: Option<File>,
    /// For each page, whether the process has one of its own.
    own: Vec<bool>,
    /// For each page of the file, whether it may hold data.
    data: Vec<bool>,
    /// Whether this kernel notes writes.
    notes_writes: bool,
}

impl Copying {
    /// Copies all that is there, which is no more than `most` bytes. What is written from now on is found.
    pub(super) fn begin(
        pid: u32,
        places: Vec<(u64, u64)>,
        into: File,
        baked: Option<File>,
        most: u64,
    ) -> io::Result<Copying> {
        let table = File::open(format!("/proc/{pid}/pagemap"))?;
        let mut copying = Copying {
            pid,
            most,
            places: Vec::new(),
            table,
            into,
            baked,
            own: Vec::new(),
            data: Vec::new(),
            notes_writes: notes_writes()?,
        };
        copying.restart(places)?;
        Ok(copying)
    }

    /// The same again, of memory that lies elsewhere.
    pub(super) fn anew(mut self, places: Vec<(u64, u64)>) -> io::Result<Copying> {
        self.into.set_len(0)?;
        self.restart(places)?;
        Ok(self)
    }

    fn restart(&mut self, places: Vec<(u64, u64)>) -> io::Result<()> {
        let mut left = self.most;
        for (address, length) in &places {
            let whole = address % PAGE == 0 && length % PAGE == 0;
            let rest = left.checked_sub(*length).filter(|_| whole);
            left = match (rest, address.checked_add(*length)) {
                (Some(rest), Some(_)) => rest,
                _ => return Err(io::Error::other("the VMM names memory that no guest has")),
            };
        }
        self.places = places;
        let pages = usize::try_from(self.length() / PAGE).map_err(io::Error::other)?;
        (self.own, self.data) = (vec![false; pages], vec![false; pages]);
        self.into.set_len(self.length())?;
        self.forget()?;
        self.copy_baked()?;
        let own = self.entries(is_own)?;
        self.own.clone_from(&own);
        self.copy(runs(&own))?;
        Ok(())
    }

    /// Whether it is worth anything while the guest runs: without, all has to be copied when it stands still.
    pub(super) fn finds_writes(&self) -> bool {
        self.notes_writes
    }

    /// Length of the file.
    pub(super) fn length(&self) -> u64 {
        self.places.iter().map(|(_, length)| length).sum()
    }

    /// Whether the memory lies there still.
    pub(super) fn is_of(&self, places: &[(u64, u64)]) -> bool {
        self.places == places
    }

    /// Pages that differ from what was copied, from now on those that are written later. The machine stands still.
    pub(super) fn find(&mut self) -> io::Result<Vec<Pages>> {
        let mut found = self.entries(|entry| entry & WRITTEN != 0)?;
        let own = self.entries(is_own)?;
        for ((found, before), now) in found.iter_mut().zip(&self.own).zip(&own) {
            // One that was given back is as it was baked.
            *found = (*found && *now) || *before != *now;
        }
        self.own = own;
        self.forget()?;
        Ok(runs(&found))
    }

    /// Copies pages; tells how many bytes.
    pub(super) fn copy(&mut self, pages: Vec<Pages>) -> io::Result<u64> {
        let mut buffer = vec![0; PIECE as usize];
        let mut copied = 0;
        for run in pages {
            let mut at = run.start * PAGE;
            while at < run.end * PAGE {
                let piece = self.piece(at, run.end * PAGE)?;
                let bytes = &mut buffer[..(piece.end - piece.start) as usize];
                self.read(&piece, bytes)?;
                self.write(piece.start, bytes)?;
                copied += bytes.len() as u64;
                at = piece.end;
            }
        }
        Ok(copied)
    }

    /// Whole huge pages without data of what the guest booted with, as ranges from start to end.
    pub(super) fn holes(&self) -> Vec<(u64, u64)> {
        let ram = self.places.first().map_or(0, |(_, length)| *length);
        let whole = |start: &u64| {
            let pages = start / PAGE..(start + HUGE_PAGE) / PAGE;
            let data = self.data.get(pages.start as usize..pages.end as usize);
            data.is_some_and(|data| !data.contains(&true))
        };
        let mut holes: Vec<(u64, u64)> = Vec::new();
        let starts = (0..ram / HUGE_PAGE).map(|number| number * HUGE_PAGE);
        for start in starts.filter(whole) {
            match holes.last_mut() {
                Some((_, end)) if *end == start => *end += HUGE_PAGE,
                _ => holes.push((start, start + HUGE_PAGE)),
            }
        }
        holes
    }

    /// From now on the kernel notes anew which pages are written.
    fn forget(&self) -> io::Result<()> {
        fs::write(format!("/proc/{}/clear_refs", self.pid), "4")
    }

    /// What the page table says of each page.
    fn entries(&self, what: impl Fn(u64) -> bool) -> io::Result<Vec<bool>> {
        let mut all = Vec::with_capacity(self.own.len());
        let mut buffer = vec![0; (PIECE / PAGE * ENTRY) as usize];
        for (address, length) in &self.places {
            let mut at = address / PAGE * ENTRY;
            let end = (address + length) / PAGE * ENTRY;
            while at < end {
                let size = (end - at).min(buffer.len() as u64) as usize;
                self.table.read_exact_at(&mut buffer[..size], at)?;
                let entries = buffer[..size].as_chunks::<8>().0.iter();
                all.extend(entries.map(|entry| what(u64::from_le_bytes(*entry))));
                at += size as u64;
            }
        }
        Ok(all)
    }

    /// What the guest was resumed from, as far as that is data.
    fn copy_baked(&mut self) -> io::Result<()> {
        let Some(baked) = &self.baked else {
            return Ok(());
        };
        let end = baked.metadata()?.len().min(self.length());
        let mut at = 0;
        while at < end {
            let from = match seek(baked, SeekFrom::Data(at)) {
                Ok(from) if from < end => from,
                Ok(_) | Err(rustix::io::Errno::NXIO) => break,
                Err(error) => return Err(error.into()),
            };
            at = seek(baked, SeekFrom::Hole(from))?.min(end);
            copy_range(baked, &self.into, from..at)?;
            let pages = (from / PAGE) as usize..at.div_ceil(PAGE) as usize;
            if let Some(data) = self.data.get_mut(pages) {
                data.fill(true);
            }
        }
        Ok(())
    }

    /// The longest piece from `at` on, of pages that come from one place.
    fn piece(&self, at: u64, end: u64) -> io::Result<Range<u64>> {
        let gone = || io::Error::other("a page that is none");
        let own = |at: u64| self.own.get((at / PAGE) as usize).copied();
        let first = own(at).ok_or_else(gone)?;
        let (_, rest) = self.place(at).ok_or_else(gone)?;
        let most = end.min(at + rest).min(at + PIECE);
        let mut until = at + PAGE;
        while until < most && own(until) == Some(first) {
            until += PAGE;
        }
        Ok(at..until)
    }

    /// The address of a place in the file, and how much lies behind it.
    fn place(&self, at: u64) -> Option<(u64, u64)> {
        let mut from = at;
        for (address, length) in &self.places {
            if from < *length {
                return Some((address + from, length - from));
            }
            from -= length;
        }
        None
    }

    fn read(&self, piece: &Range<u64>, bytes: &mut [u8]) -> io::Result<()> {
        if self.own.get((piece.start / PAGE) as usize) == Some(&true) {
            let (address, _) = self.place(piece.start).unwrap_or_default();
            return read_memory(self.pid, address, bytes);
        }
        bytes.fill(0);
        let Some(baked) = &self.baked else {
            return Ok(());
        };
        let length = baked.metadata()?.len();
        if let Some(there) = length.checked_sub(piece.start) {
            let there = bytes
                .len()
                .min(usize::try_from(there).unwrap_or(usize::MAX));
            baked.read_exact_at(&mut bytes[..there], piece.start)?;
        }
        Ok(())
    }

    /// Writes what is data, and what is none any more.
    fn write(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let first = (at / PAGE) as usize;
        let pages = bytes.chunks(PAGE as usize);
        let known = self.data.get_mut(first..first + pages.len());
        let known = known.ok_or_else(|| io::Error::other("a page that is none"))?;
        let mut run = 0..0;
        for (number, (page, data)) in pages.zip(known).enumerate() {
            let holds = page.iter().any(|byte| *byte != 0);
            if holds || *data {
                if run.end != number {
                    self.into
                        .write_all_at(part(bytes, &run), at + run.start as u64 * PAGE)?;
                    run = number..number;
                }
                run.end = number + 1;
            }
            *data = holds;
        }
        self.into
            .write_all_at(part(bytes, &run), at + run.start as u64 * PAGE)
    }
}

/// Whether this kernel notes writes (`CONFIG_MEM_SOFT_DIRTY`): then what has just been written counts as such.
fn notes_writes() -> io::Result<bool> {
    let written = std::hint::black_box(vec![1u8; PAGE as usize]);
    let page = written.as_ptr().addr() as u64 / PAGE;
    let mut entry = [0; ENTRY as usize];
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, page * ENTRY)?;
    Ok(u64::from_le_bytes(entry) & WRITTEN != 0)
}

fn part<'b>(bytes: &'b [u8], pages: &Range<usize>) -> &'b [u8] {
    &bytes[pages.start * PAGE as usize..pages.end * PAGE as usize]
}

fn is_own(entry: u64) -> bool {
    entry & THERE != 0 && entry & OF_A_FILE == 0
}

/// Neighbours together.
fn runs(pages: &[bool]) -> Vec<Pages> {
    let mut runs: Vec<Pages> = Vec::new();
    for (page, _) in (0u64..).zip(pages).filter(|(_, wanted)| **wanted) {
        match runs.last_mut() {
            Some(run) if run.end == page => run.end += 1,
            _ => runs.push(page..page + 1),
        }
    }
    runs
}

fn copy_range(from: impl AsFd, into: impl AsFd, mut range: Range<u64>) -> io::Result<()> {
    while range.start < range.end {
        let (mut source, mut target) = (range.start, range.start);
        let most = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        let copied = copy_file_range(&from, Some(&mut source), &into, Some(&mut target), most)?;
        if copied == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        range.start += copied as u64;
    }
    Ok(())
}

/// Reads another process's memory.
fn read_memory(pid: u32, address: u64, bytes: &mut [u8]) -> io::Result<()> {
    let pid = i32::try_from(pid).map_err(io::Error::other)?;
    let mut done = 0;
    while done < bytes.len() {
        let rest = &mut bytes[done..];
        let local = libc::iovec {
            iov_base: rest.as_mut_ptr().cast(),
            iov_len: rest.len(),
        };
        let remote = libc::iovec {
            iov_base: std::ptr::without_provenance_mut(
                usize::try_from(address + done as u64).map_err(io::Error::other)?,
            ),
            iov_len: rest.len(),
        };
        // SAFETY: the local vector is `rest`; the remote one is only a number to this process.
        let read =
            unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
        match usize::try_from(read) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => done += read,
            Err(_) => return Err(io::Error::last_os_error()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: usize = 1024;
    const MOST: u64 = PAGES as u64 * PAGE;

    /// Memory of this process as a guest's is in a VMM: a private mapping of a file.
    struct Guest {
        start: *mut u8,
        file: File,
    }

    impl Guest {
        fn new() -> Guest {
            let file = tempfile::tempfile().unwrap();
            file.set_len(PAGES as u64 * PAGE).unwrap();
            for page in [1, 2, 700] {
                file.write_all_at(&[7; PAGE as usize], page * PAGE).unwrap();
            }
            // SAFETY: a new private mapping of a file that nobody cuts.
            let start = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    PAGES * PAGE as usize,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE,
                    std::os::fd::AsRawFd::as_raw_fd(&file),
                    0,
                )
            };
            assert_ne!(start, libc::MAP_FAILED);
            Guest {
                start: start.cast(),
                file,
            }
        }

        fn write(&self, page: usize, byte: u8) {
            // SAFETY: within the mapping, which lives as long as this.
            unsafe {
                self.start
                    .add(page * PAGE as usize)
                    .write_bytes(byte, PAGE as usize)
            };
        }

        fn give_back(&self, page: usize) {
            // SAFETY: as above; the page is as the file has it afterwards.
            let done = unsafe {
                let at = self.start.add(page * PAGE as usize).cast();
                libc::madvise(at, PAGE as usize, libc::MADV_DONTNEED)
            };
            assert_eq!(done, 0);
        }

        fn content(&self) -> Vec<u8> {
            // SAFETY: the whole mapping, which nobody writes meanwhile.
            unsafe { std::slice::from_raw_parts(self.start, PAGES * PAGE as usize) }.to_vec()
        }

        fn places(&self) -> Vec<(u64, u64)> {
            let half = PAGES as u64 / 2 * PAGE;
            let start = self.start.addr() as u64;
            vec![(start, half), (start + half, half)]
        }
    }

    impl Drop for Guest {
        fn drop(&mut self) {
            // SAFETY: the mapping is this value's.
            unsafe { libc::munmap(self.start.cast(), PAGES * PAGE as usize) };
        }
    }

    fn content(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; PAGES * PAGE as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn copy_is_what_the_guest_has_whatever_it_did_meanwhile() {
        let guest = Guest::new();
        if !notes_writes().unwrap() {
            eprintln!("skipped: this kernel does not note which pages are written");
            return;
        }
        guest.write(2, 0);
        guest.write(5, 9);
        let file = tempfile::tempfile().unwrap();
        let baked = guest.file.try_clone().unwrap();
        let (pid, into) = (std::process::id(), file.try_clone().unwrap());
        let mut copying = Copying::begin(pid, guest.places(), into, Some(baked), MOST).unwrap();
        assert_eq!(content(&file), guest.content());

        // Written, written again as it was, emptied, given back.
        guest.write(600, 3);
        guest.write(601, 4);
        guest.write(1, 7);
        guest.write(5, 0);
        let found = copying.find().unwrap();
        assert_eq!(found, [1..2, 5..6, 600..602]);
        assert_eq!(copying.copy(found).unwrap(), 4 * PAGE);
        assert_eq!(content(&file), guest.content());
        guest.give_back(2);
        guest.give_back(600);
        let found = copying.find().unwrap();
        assert_eq!(found, [2..3, 600..601]);
        copying.copy(found).unwrap();
        assert_eq!(content(&file), guest.content());
        assert_eq!(copying.find().unwrap(), [], "nothing was written");
    }

    #[test]
    fn huge_pages_without_data_are_holes() {
        let guest = Guest::new();
        let file = tempfile::tempfile().unwrap();
        let places = vec![(guest.start.addr() as u64, PAGES as u64 * PAGE)];
        let copying = Copying::begin(std::process::id(), places, file, None, MOST).unwrap();
        // None of its pages is its own yet.
        assert_eq!(copying.holes(), [(0, 2 * HUGE_PAGE)]);
        guest.write(600, 3);
        let copying = copying
            .anew(vec![(guest.start.addr() as u64, PAGES as u64 * PAGE)])
            .unwrap();
        assert_eq!(copying.holes(), [(0, HUGE_PAGE)]);
    }

    #[test]
    fn memory_that_lies_nowhere_is_refused() {
        let pid = std::process::id();
        for places in [
            vec![(1, PAGE)],
            vec![(PAGE, 1)],
            vec![(u64::MAX - PAGE + 1, PAGE)],
            vec![(0, MOST + PAGE)],
            vec![(0, MOST), (0, PAGE)],
        ] {
            let file = tempfile::tempfile().unwrap();
            Copying::begin(pid, places, file, None, MOST).unwrap_err();
        }
    }
}
