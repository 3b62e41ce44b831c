//! Memory that is written all the time, whether a copy of it is whole, and how long a guest stood still.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::text::say;

const PAGE: usize = 4096;

/// Pages of a file, each of which begins with a number.
struct Pages {
    start: *const u8,
    count: usize,
}

impl Pages {
    fn map(file: &File) -> Result<Pages> {
        let length = usize::try_from(file.metadata()?.len())?;
        ensure!(length >= PAGE, "the file has no page");
        // SAFETY: a new mapping of a file that nobody cuts; it stays until the process ends.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        ensure!(
            start != libc::MAP_FAILED,
            "{}",
            std::io::Error::last_os_error()
        );
        Ok(Pages {
            start: start.cast(),
            count: length / PAGE,
        })
    }

    fn at(&self, number: u64) -> &AtomicU64 {
        let page = number as usize % self.count;
        // SAFETY: within the mapping, which is never removed; an atomic number can be looked at by all.
        unsafe { AtomicU64::from_ptr(self.start.add(page * PAGE).cast_mut().cast()) }
    }
}

/// Writes 1, 2, 3, … to the pages of a file in turn, as long as each page still holds what was written to it last.
pub(crate) fn churn(path: &str, mib: u64) -> Result<()> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .with_context(|| format!("cannot open {path}"))?;
    file.set_len(mib << 20)?;
    let pages = Pages::map(&file)?;
    say("churning")?;
    let mut number = 0u64;
    loop {
        number += 1;
        let last = number.saturating_sub(pages.count as u64);
        let found = pages.at(number).swap(number, Ordering::SeqCst);
        ensure!(found == last, "where {last} was written is {found}");
    }
}

/// Fails unless the pages are as they were at one moment of that, and prints the last number.
pub(crate) fn churned(path: &str) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let pages = Pages::map(&file)?;
    let all = || (0..pages.count as u64).map(|page| pages.at(page).load(Ordering::SeqCst));
    let last = all().max().unwrap_or_default();
    ensure!(last > 0, "nothing was written");
    let oldest = last.saturating_sub(pages.count as u64 - 1).max(1);
    for number in oldest..=last {
        let found = pages.at(number).load(Ordering::SeqCst);
        ensure!(
            found == number,
            "the last number is {last}, and where {number} should be is {found}"
        );
    }
    say(&format!("whole {last}"))
}

/// Looks at the clock each millisecond for so long; prints the most microseconds that lay between two looks.
pub(crate) fn beat(milliseconds: u64) -> Result<()> {
    const BEAT: Duration = Duration::from_millis(1);
    let begun = Instant::now();
    let (mut before, mut longest) = (begun, Duration::ZERO);
    while before - begun < Duration::from_millis(milliseconds) {
        std::thread::sleep(BEAT);
        let now = Instant::now();
        longest = longest.max(now - before);
        before = now;
    }
    say(&longest.as_micros().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn pages_of_two_moments_are_not_whole() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap();
        let write = |numbers: [u64; 4]| {
            for (page, number) in numbers.into_iter().enumerate() {
                let at = (page * PAGE) as u64;
                file.as_file()
                    .write_all_at(&number.to_ne_bytes(), at)
                    .unwrap();
            }
            file.as_file().set_len(4 * PAGE as u64).unwrap();
        };
        for whole in [[0, 1, 0, 0], [8, 5, 6, 7], [4, 1, 2, 3]] {
            write(whole);
            churned(path).unwrap();
        }
        for mixed in [[0, 0, 0, 0], [8, 5, 2, 7], [8, 9, 6, 3]] {
            write(mixed);
            churned(path).unwrap_err();
        }
    }
}
