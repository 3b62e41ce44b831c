//! A number in a file that many count up, each under a lock.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail};

use crate::text::say;

/// Adds one to the number in the file, so many times, each time under a lock that is waited for. Says when it begins.
pub(crate) fn count(path: &str, times: u64, how: &str) -> Result<()> {
    say("counting")?;
    for _ in 0..times {
        let file = File::options()
            .read(true)
            .write(true)
            .open(path)
            .with_context(|| format!("cannot open {path}"))?;
        match how {
            "flock" => file.lock(),
            "fcntl" => lock_range(&file),
            _ => bail!("files are locked by flock or fcntl, not {how:?}"),
        }
        .with_context(|| format!("cannot lock {path}"))?;
        let mut text = [0; 16];
        let len = file.read_at(&mut text, 0)?;
        let text = String::from_utf8_lossy(text.get(..len).unwrap_or_default()).into_owned();
        let number: u64 = text
            .trim()
            .parse()
            .with_context(|| format!("{path} has {text:?}"))?;
        file.write_all_at(format!("{:<15}\n", number + 1).as_bytes(), 0)?;
        // Its end gives the lock back.
    }
    say("counted")
}

fn lock_range(file: &File) -> io::Result<()> {
    // SAFETY: all zeroes is a valid `flock`, of the whole file.
    let mut whole: libc::flock = unsafe { std::mem::zeroed() };
    whole.l_type = libc::F_WRLCK as i16;
    loop {
        // SAFETY: an open descriptor; the structure lives through the call.
        let locked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLKW, &raw const whole) };
        if locked == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
