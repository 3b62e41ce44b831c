//! Writes guest memory to a sparse file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::SnapshotError;
use crate::memory::{HUGE_PAGE, PAGE};

/// What was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryStats {
    /// Pages with data.
    pub data_pages: u64,
    /// Pages left out because they are zero.
    pub zero_pages: u64,
    /// Whole huge pages of the first part without data, next to each other as one range from start to end.
    pub holes: Vec<(u64, u64)>,
}

/// Longest run that goes into one write.
const MAX_RUN: usize = 1 << 20;

fn is_zero(page: &[u8]) -> bool {
    // SAFETY: any bit pattern is a valid u64; the unaligned ends are handed out separately.
    let (head, words, tail) = unsafe { page.align_to::<u64>() };
    head.iter().chain(tail).all(|b| *b == 0) && words.iter().all(|w| *w == 0)
}

/// Writes `parts` one after the other into an empty file, skipping zero pages. The file becomes as long as they are.
pub fn write_memory(file: &File, parts: &[&[u8]]) -> Result<MemoryStats, SnapshotError> {
    let io = |source: io::Error| SnapshotError::Io {
        action: "writing the memory file",
        source,
    };
    let total: u64 = parts.iter().map(|p| p.len() as u64).sum();
    super::check_empty(file, "memory file")?;
    if let Some(last) = total.checked_sub(1) {
        // The file's length, without a call that could also cut other files short.
        file.write_all_at(&[0], last).map_err(io)?;
    }
    let mut stats = MemoryStats::default();
    let mut base = 0u64;
    for part in parts {
        let first = base == 0;
        let mut data_ends = 0;
        let mut run: Option<(usize, usize)> = None;
        for (i, page) in part.chunks(PAGE as usize).enumerate() {
            let at = i * PAGE as usize;
            if is_zero(page) {
                stats.zero_pages += 1;
                flush(file, base, part, run.take()).map_err(io)?;
                continue;
            }
            stats.data_pages += 1;
            if first {
                stats.holes.extend(hole(data_ends, at));
                data_ends = at + page.len();
            }
            let end = at + page.len();
            run = match run {
                Some((start, _)) if end - start <= MAX_RUN => Some((start, end)),
                full => {
                    flush(file, base, part, full).map_err(io)?;
                    Some((at, end))
                }
            };
        }
        flush(file, base, part, run).map_err(io)?;
        if first {
            stats.holes.extend(hole(data_ends, part.len()));
        }
        base += part.len() as u64;
    }
    file.sync_data().map_err(io)?;
    Ok(stats)
}

/// The whole huge pages from one place to another, if there are any.
fn hole(from: usize, to: usize) -> Option<(u64, u64)> {
    let (from, to) = (from as u64, to as u64);
    let (start, end) = (from.next_multiple_of(HUGE_PAGE), to - to % HUGE_PAGE);
    (start < end).then_some((start, end))
}

fn flush(file: &File, base: u64, part: &[u8], run: Option<(usize, usize)>) -> io::Result<()> {
    match run.and_then(|(start, end)| Some((start, part.get(start..end)?))) {
        Some((start, bytes)) => file.write_all_at(bytes, base + start as u64),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn an_end_of_zeroes_counts_and_a_file_with_content_is_refused() {
        let file = tempfile::tempfile().unwrap();
        write_memory(&file, &[&[1; 4096], &[0; 8192]]).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 12288);
        assert!(matches!(
            write_memory(&file, &[&[1; 4096]]),
            Err(SnapshotError::NotEmpty("memory file"))
        ));
    }

    #[test]
    fn zero_pages_take_no_room_and_everything_reads_back() {
        let mut a = vec![0u8; 8 << 20];
        a[3 * 4096..3 * 4096 + 5].copy_from_slice(b"hello");
        a[5 << 20] = 1;
        // A hole in it, but not a huge page of one.
        let mut b = vec![9u8; 3 << 20];
        b[4096..2 << 20].fill(0);
        let mut file = tempfile::tempfile().unwrap();
        let stats = write_memory(&file, &[&a, &b]).unwrap();
        assert_eq!(
            stats,
            MemoryStats {
                data_pages: 2 + 1 + 256,
                zero_pages: 2046 + 511,
                holes: vec![(2 << 20, 4 << 20), (6 << 20, 8 << 20)],
            }
        );
        let mut back = Vec::new();
        std::io::Seek::rewind(&mut file).unwrap();
        file.read_to_end(&mut back).unwrap();
        assert_eq!(back.len(), 11 << 20);
        assert!(back[..8 << 20] == a && back[8 << 20..] == b);
        assert!(file.metadata().unwrap().blocks() * 512 < 4 << 20);
    }
}
