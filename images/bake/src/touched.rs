//! Which pages of a memory file a process that maps it has touched, by the process's page table.
//!
//! The kernel maps neighbours of a page that is read if they are in the page cache, sixteen at a time: a list
//! made of a file that was just written is that much coarser.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use kiln_store::WorkingSet;

const PAGE: u64 = 4096;
/// Bytes of a page's entry.
const ENTRY: u64 = 8;
/// Bits of an entry: the page is in memory, or swapped out.
const THERE: u64 = (1 << 63) | (1 << 62);

/// A mapping: its addresses, and where in the file it begins.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    offset: u64,
}

/// The pages of `file` that process `pid` has touched.
pub(crate) fn pages(pid: u32, file: &File) -> io::Result<WorkingSet> {
    let inode = file.metadata()?.ino();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let table = File::open(format!("/proc/{pid}/pagemap"))?;
    let mut touched = Vec::new();
    for mapping in mappings(&maps, inode) {
        let pages = (mapping.end - mapping.start) / PAGE;
        let length = usize::try_from(pages * ENTRY).map_err(io::Error::other)?;
        let mut entries = vec![0; length];
        table.read_exact_at(&mut entries, mapping.start / PAGE * ENTRY)?;
        for (number, entry) in (mapping.offset / PAGE..).zip(entries.as_chunks::<8>().0) {
            if u64::from_le_bytes(*entry) & THERE != 0 {
                touched.push(u32::try_from(number).map_err(io::Error::other)?);
            }
        }
    }
    touched.sort_unstable();
    touched.dedup();
    Ok(touched.into_iter().collect())
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
    fn pages_that_this_process_wrote_are_among_those_it_touched() {
        const PAGES: usize = 256;
        let file = tempfile::tempfile().unwrap();
        file.set_len(PAGES as u64 * PAGE).unwrap();
        // SAFETY: a new private mapping of a file that nobody cuts, written within its length, unmapped at the end.
        let set = unsafe {
            let length = PAGES * PAGE as usize;
            let start = libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE,
                std::os::fd::AsRawFd::as_raw_fd(&file),
                0,
            );
            assert_ne!(start, libc::MAP_FAILED);
            for page in [10, 200] {
                start.cast::<u8>().add(page * PAGE as usize).write(1);
            }
            let set = pages(std::process::id(), &file).unwrap();
            libc::munmap(start, length);
            set
        };
        let exactly: WorkingSet = [10, 200].into_iter().collect();
        assert_eq!(set, exactly);
    }
}
