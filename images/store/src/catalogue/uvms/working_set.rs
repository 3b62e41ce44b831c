//! The pages that a resumed guest touches first: what they are, and reading them ahead.
//!
//! The file: `kilnws2\n`, then runs of pages as pairs of little-endian numbers of 32 bits: the first page of
//! the memory file; twice how many, and one more if the guest writes them. Runs ascend and do not overlap.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use kiln_vmm_saved::PageRun;

const MAGIC: &[u8; 8] = b"kilnws2\n";
/// Bytes of a page.
const PAGE: u64 = 4096;
/// How many runs are looked at to find out whether the file is in the page cache.
const SAMPLES: usize = 8;

/// Pages of a memory file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WorkingSet {
    runs: Vec<PageRun>,
}

impl FromIterator<(u32, bool)> for WorkingSet {
    /// From numbers of pages, which ascend, and whether the guest writes them.
    fn from_iter<T: IntoIterator<Item = (u32, bool)>>(pages: T) -> Self {
        let mut runs: Vec<PageRun> = Vec::new();
        for (page, written) in pages {
            match runs.last_mut() {
                Some(last)
                    if last.written == written
                        && last.first.checked_add(last.pages) == Some(page) =>
                {
                    last.pages += 1;
                }
                _ => runs.push(PageRun {
                    first: page,
                    pages: 1,
                    written,
                }),
            }
        }
        WorkingSet { runs }
    }
}

impl WorkingSet {
    /// How many pages it has.
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|run| u64::from(run.pages)).sum()
    }

    /// Its pages.
    pub fn into_runs(self) -> Vec<PageRun> {
        self.runs
    }

    /// As it is stored.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        for run in &self.runs {
            bytes.extend(run.first.to_le_bytes());
            // No memory file has as many pages as would be too many for this.
            bytes.extend((run.pages << 1 | u32::from(run.written)).to_le_bytes());
        }
        bytes
    }

    /// Reads what [`WorkingSet::encode`] wrote; `None` if it is something else.
    pub fn decode(bytes: &[u8]) -> Option<WorkingSet> {
        let body = bytes.strip_prefix(MAGIC)?;
        let (pairs, rest) = body.as_chunks::<8>();
        let number = |four: &[u8]| four.try_into().map(u32::from_le_bytes).ok();
        let mut runs = Vec::with_capacity(pairs.len());
        let mut end = 0;
        for pair in pairs {
            let (first, rest) = (number(&pair[..4])?, number(&pair[4..])?);
            let (pages, written) = (rest >> 1, rest & 1 == 1);
            if first < end || pages == 0 {
                return None;
            }
            end = first.checked_add(pages)?;
            runs.push(PageRun {
                first,
                pages,
                written,
            });
        }
        rest.is_empty().then_some(WorkingSet { runs })
    }

    /// Has the kernel read these pages of `memory`, unless the page cache has them. Does not wait for it.
    ///
    /// Returns whether anything was to be read: whether the file was cold.
    pub fn read_ahead(&self, memory: &File) -> io::Result<bool> {
        if self.is_cached(memory)? {
            return Ok(false);
        }
        for run in &self.runs {
            let offset = i64::try_from(u64::from(run.first) * PAGE).map_err(io::Error::other)?;
            let length = i64::try_from(u64::from(run.pages) * PAGE).map_err(io::Error::other)?;
            let advice = libc::POSIX_FADV_WILLNEED;
            // SAFETY: the call takes numbers only.
            match unsafe { libc::posix_fadvise(memory.as_raw_fd(), offset, length, advice) } {
                0 => {}
                number => return Err(io::Error::from_raw_os_error(number)),
            }
        }
        Ok(true)
    }

    /// Whether some pages from all over it can be read without waiting for a disk.
    fn is_cached(&self, memory: &File) -> io::Result<bool> {
        let step = self.runs.len().div_ceil(SAMPLES).max(1);
        for run in self.runs.iter().step_by(step) {
            let mut byte = 0u8;
            let part = libc::iovec {
                iov_base: (&raw mut byte).cast(),
                iov_len: 1,
            };
            let offset = i64::try_from(u64::from(run.first) * PAGE).map_err(io::Error::other)?;
            // SAFETY: the one part is a byte that lives through the call.
            let read = unsafe {
                libc::preadv2(
                    memory.as_raw_fd(),
                    &raw const part,
                    1,
                    offset,
                    libc::RWF_NOWAIT,
                )
            };
            if read < 0 {
                return match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
                    // A file system that cannot tell is asked to read.
                    error if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(false),
                    error => Err(error),
                };
            }
        }
        Ok(true)
    }

    /// Reads a working set from its file.
    pub fn read(file: &File) -> io::Result<WorkingSet> {
        let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, 0)?;
        WorkingSet::decode(&bytes)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "this is no list of pages"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn pages_of_a_kind_that_follow_each_other_are_one_run() {
        let written = |page: &u32| (*page, *page > 11);
        let set: WorkingSet = [3, 4, 5, 9, 11, 12].iter().map(written).collect();
        assert_eq!((set.runs.len(), set.pages()), (4, 6));
        assert_eq!(WorkingSet::decode(&set.encode()), Some(set));
    }

    #[test]
    fn what_is_no_list_of_pages_is_refused() {
        let good = [1, 2, 7].map(|page| (page, false));
        let good = good.into_iter().collect::<WorkingSet>().encode();
        let mut cut = good.clone();
        cut.pop();
        let mut empty = good.clone();
        empty[12] = 0;
        let mut backwards = good.clone();
        backwards[16] = 0;
        for bytes in [&cut, &empty, &backwards, &b"other".to_vec()] {
            assert_eq!(WorkingSet::decode(bytes), None);
        }
    }

    #[test]
    fn file_in_the_page_cache_is_not_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        std::fs::write(&path, vec![1; 16 * 4096]).unwrap();
        let file = File::open(&path).unwrap();
        let set: WorkingSet = (0..16).step_by(2).map(|page| (page, false)).collect();
        assert!(!set.read_ahead(&file).unwrap());
        assert!(!WorkingSet::default().read_ahead(&file).unwrap());
        let list = dir.path().join("list");
        std::fs::write(&list, set.encode()).unwrap();
        assert_eq!(WorkingSet::read(&File::open(&list).unwrap()).unwrap(), set);
        assert!(WorkingSet::read(&file).is_err());
    }

    proptest! {
        #[test]
        fn any_pages_come_back(mut pages in proptest::collection::btree_map(0u32..5000, any::<bool>(), 0..200)) {
            pages.insert(u32::MAX - 1, true);
            let set: WorkingSet = pages.iter().map(|(page, written)| (*page, *written)).collect();
            prop_assert_eq!(set.pages(), pages.len() as u64);
            prop_assert_eq!(WorkingSet::decode(&set.encode()), Some(set));
        }
    }
}
