//! Which pages of a memory file a guest needs, found by letting it resume.
//!
//! Pages that it writes get copies of its VMM's own, which the VMM's page table shows. Pages that it only reads are read from
//! the file, which the page cache shows, if it had none of them before and none are read ahead
//! ([`Request::Resume`](kiln_vmm_control::Request::Resume) with `one_by_one`).

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::ptr::null_mut;

use kiln_store::WorkingSet;

const PAGE: u64 = 4096;
/// Bytes of a page's entry in a page table's file.
const ENTRY: u64 = 8;
/// Bits of an entry: the page is in memory, or swapped out; it is the file's own, not a copy.
const THERE: u64 = (1 << 63) | (1 << 62);
const OF_THE_FILE: u64 = 1 << 61;

/// A memory file whose use is watched.
#[derive(Debug)]
pub struct Watch {
    file: File,
    /// Pages that the page cache did not let go, and that tell nothing therefore.
    stayed: Vec<bool>,
}

impl Watch {
    /// Begins to watch: before the guest is resumed.
    pub fn begin(file: File) -> io::Result<Watch> {
        // Only what is on the disk can be let go.
        file.sync_data()?;
        // SAFETY: the call takes numbers only.
        let failed =
            unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        if failed != 0 {
            return Err(io::Error::from_raw_os_error(failed));
        }
        let stayed = cached(&file)?;
        Ok(Watch { file, stayed })
    }

    /// The pages that the guest of the VMM with this process id has touched.
    pub fn end(self, pid: u32) -> io::Result<WorkingSet> {
        let written = written(pid, &self.file)?;
        let pages = cached(&self.file)?
            .into_iter()
            .zip(self.stayed.into_iter().chain(std::iter::repeat(false)))
            .zip(written.into_iter().chain(std::iter::repeat(false)));
        let pages = (0u32..)
            .zip(pages)
            .filter_map(|(page, ((now, before), written))| {
                (written || now && !before).then_some((page, written))
            });
        Ok(pages.collect())
    }
}

/// For each page of a file, whether it is in the page cache.
fn cached(file: &File) -> io::Result<Vec<bool>> {
    let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    if length == 0 {
        return Ok(Vec::new());
    }
    let mut states = vec![0u8; length.div_ceil(PAGE as usize)];
    // SAFETY: a new mapping, of which nothing is read; `states` has a byte for each of its pages; it is unmapped at the end.
    unsafe {
        let start = libc::mmap(
            null_mut(),
            length,
            libc::PROT_READ,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        );
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let failed = libc::mincore(start, length, states.as_mut_ptr());
        let error = io::Error::last_os_error();
        libc::munmap(start, length);
        if failed != 0 {
            return Err(error);
        }
    }
    Ok(states.into_iter().map(|state| state & 1 == 1).collect())
}

/// A mapping: its addresses, and where in the file it begins.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    offset: u64,
}

/// For each page of a file, as far as the process maps it, whether the process has written its own copy of it.
fn written(pid: u32, file: &File) -> io::Result<Vec<bool>> {
    let inode = file.metadata()?.ino();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let table = File::open(format!("/proc/{pid}/pagemap"))?;
    let mut written = Vec::new();
    for mapping in mappings(&maps, inode) {
        let number = |bytes: u64| usize::try_from(bytes / PAGE).map_err(io::Error::other);
        let (first, pages) = (
            number(mapping.offset)?,
            number(mapping.end - mapping.start)?,
        );
        let mut entries = vec![0; pages * ENTRY as usize];
        table.read_exact_at(&mut entries, mapping.start / PAGE * ENTRY)?;
        if written.len() < first + pages {
            written.resize(first + pages, false);
        }
        for (page, entry) in written[first..].iter_mut().zip(entries.as_chunks::<8>().0) {
            let entry = u64::from_le_bytes(*entry);
            *page |= entry & THERE != 0 && entry & OF_THE_FILE == 0;
        }
    }
    Ok(written)
}

/// The mappings of the file with this inode. (The device is left out: some file systems name another one here
/// than in a file's attributes.)
fn mappings(maps: &str, inode: u64) -> Vec<Mapping> {
    let parse = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let offset = fields.nth(1)?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        let own = fields.nth(1)?.parse() == Ok(inode);
        own.then_some(Mapping {
            start: number(start)?,
            end: number(end)?,
            offset: number(offset)?,
        })
    };
    maps.lines().filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_found_by_inode() {
        let maps = "7f0000000000-7f0000004000 rw-p 00002000 fe:01 4711   /store/memory\n\
                    7f0000004000-7f0000005000 rw-p 00000000 00:00 0 \n";
        let expected = Mapping {
            start: 0x7f00_0000_0000,
            end: 0x7f00_0000_4000,
            offset: 0x2000,
        };
        assert_eq!(mappings(maps, 4711), [expected]);
        assert!(mappings(maps, 1).is_empty());
    }

    #[test]
    fn pages_that_were_written_or_read_singly_are_told_apart_from_all_others() {
        const PAGES: usize = 256;
        // Beside the code: a temporary file's file system may have nothing but its page cache.
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.write_all_at(&vec![7; PAGES * PAGE as usize], 0)
            .unwrap();
        let watch = Watch::begin(file.try_clone().unwrap()).unwrap();
        assert!(
            !watch.stayed.contains(&true),
            "the page cache let nothing go"
        );
        // SAFETY: a new private mapping of a file that nobody cuts, used within its length, unmapped at the end.
        let set = unsafe {
            let length = PAGES * PAGE as usize;
            let start = libc::mmap(
                null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE,
                file.as_raw_fd(),
                0,
            );
            assert_ne!(start, libc::MAP_FAILED);
            libc::madvise(start, length, libc::MADV_RANDOM);
            let page = |number: usize| start.cast::<u8>().add(number * PAGE as usize);
            page(10).write_volatile(1);
            page(200).write_volatile(1);
            assert_eq!(page(100).read_volatile(), 7);
            let set = watch.end(std::process::id()).unwrap();
            libc::munmap(start, length);
            set
        };
        let exactly: WorkingSet = [(10, true), (100, false), (200, true)]
            .into_iter()
            .collect();
        assert_eq!(set, exactly);
    }
}
