//! What a hostile guest, or a hostile user of the node, tries.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::text::say;

/// Who has seen enough makes this file.
const STOP: &str = "/stop";

fn goes_on(until: Instant) -> bool {
    Instant::now() < until && !Path::new(STOP).exists()
}

/// For `seconds`, puts links to `targets` in the place of each numbered entry of `dir`, as soon as it is there. Says how
/// many it swapped, and how often it was refused.
pub(crate) fn swap(dir: &Path, seconds: f64, targets: &[String]) -> Result<()> {
    let until = Instant::now() + Duration::from_secs_f64(seconds);
    let (mut swapped, mut refused) = (BTreeSet::new(), 0u64);
    let mut last = 0;
    say("ready")?;
    while goes_on(until) {
        let Some(target) = targets.get(swapped.len() % targets.len().max(1)) else {
            break;
        };
        let link = dir.join(format!("link-{}", swapped.len()));
        if fs::symlink_metadata(&link).is_err() && symlink(target, &link).is_err() {
            refused += 1;
            std::thread::sleep(Duration::from_millis(1));
            continue;
        }
        last = highest(dir).unwrap_or(last);
        for number in [last, last + 1] {
            if !swapped.contains(&number) && exchange(&link, &dir.join(number.to_string())).is_ok()
            {
                swapped.insert(number);
                break;
            }
        }
    }
    say(&format!("swapped {} refused {refused}", swapped.len()))
}

/// For `seconds`, tries to write to the file `name` of each numbered entry of `dir`. Says how many times it could, and how
/// often it was refused.
pub(crate) fn scribble(dir: &Path, name: &str, seconds: f64) -> Result<()> {
    let until = Instant::now() + Duration::from_secs_f64(seconds);
    let (mut written, mut refused) = (0u64, 0u64);
    say("ready")?;
    while goes_on(until) {
        let last = highest(dir).unwrap_or(0);
        for number in last.saturating_sub(8)..=last + 1 {
            let path = dir.join(number.to_string()).join(name);
            match OpenOptions::new().write(true).open(path) {
                Ok(mut file) => {
                    if file.write_all(b"owned\n").is_ok() {
                        written += 1;
                    }
                }
                Err(error) if error.raw_os_error() == Some(libc::EROFS) => refused += 1,
                Err(_) => {}
            }
        }
    }
    say(&format!("written {written} refused {refused}"))
}

fn highest(dir: &Path) -> Option<u64> {
    let names = fs::read_dir(dir).ok()?.flatten();
    names
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .max()
}

fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    let path = |path: &Path| CString::new(path.as_os_str().as_bytes());
    let (a, b) = (path(a)?, path(b)?);
    // SAFETY: both paths are NUL-terminated and live through the call.
    let result = unsafe {
        libc::renameat2(
            libc::AT_FDCWD,
            a.as_ptr(),
            libc::AT_FDCWD,
            b.as_ptr(),
            libc::RENAME_EXCHANGE,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// For `seconds`, locks everything below `dir` that it may open, in each of the ways there are, and keeps it. Says what it got.
pub(crate) fn locks(dir: &Path, seconds: f64) -> Result<()> {
    let until = Instant::now() + Duration::from_secs_f64(seconds);
    let mut held: Vec<(PathBuf, File)> = Vec::new();
    say("ready")?;
    while Instant::now() < until {
        let mut left = vec![dir.to_owned()];
        while let Some(path) = left.pop() {
            if let Ok(entries) = fs::read_dir(&path) {
                left.extend(entries.flatten().map(|entry| entry.path()));
            }
            if held.iter().any(|(known, _)| *known == path) {
                continue;
            }
            let options = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&path);
            if let Ok(file) = options {
                lock(&file);
                say(&format!("holds {}", path.display()))?;
                held.push((path, file));
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    say(&format!("held {}", held.len()))
}

/// What can't be had is left.
fn lock(file: &File) {
    // SAFETY: all zeroes is a valid `flock`, of the whole file.
    let mut whole: libc::flock = unsafe { std::mem::zeroed() };
    whole.l_type = libc::F_RDLCK as i16;
    // SAFETY: an open descriptor; the structure lives through the call.
    unsafe {
        libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB);
        libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const whole);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_changed_is_changed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("3")).unwrap();
        fs::write(dir.path().join("3/file"), "as it was").unwrap();
        scribble(dir.path(), "file", 0.05).unwrap();
        let text = fs::read_to_string(dir.path().join("3/file")).unwrap();
        assert!(text.starts_with("owned\n"));
        swap(dir.path(), 0.05, &["/nowhere".to_owned()]).unwrap();
        let link = fs::read_link(dir.path().join("3")).unwrap();
        assert_eq!(link, Path::new("/nowhere"));
        assert!(dir.path().join("link-0/file").exists());
    }
}
