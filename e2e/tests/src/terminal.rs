//! A terminal with somebody in front of it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::process::{Child, Command};

use crate::wait;

/// How long an answer may take.
const STEP: Duration = Duration::from_secs(40);

/// A terminal with somebody in front of it.
pub struct Terminal {
    master: File,
    slave: OwnedFd,
    seen: Arc<Mutex<Vec<u8>>>,
    /// What was waited for already ends here.
    read: usize,
}

impl Terminal {
    /// One of this size.
    pub fn new(columns: u16, rows: u16) -> Result<Self> {
        let (mut master, mut slave) = (-1, -1);
        // SAFETY: openpty writes two descriptors, which nobody else has; the rest may be null.
        let (master, slave) = unsafe {
            let made = libc::openpty(
                &raw mut master,
                &raw mut slave,
                std::ptr::null_mut(),
                std::ptr::null(),
                std::ptr::null(),
            );
            ensure!(made == 0, "openpty: {}", std::io::Error::last_os_error());
            (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave))
        };
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (mut from, into) = (master.try_clone()?, Arc::clone(&seen));
        std::thread::Builder::new()
            .name("screen".to_owned())
            .spawn(move || {
                let mut buffer = [0; 4096];
                // Ends when the last user of the terminal has closed it.
                while let Ok(length @ 1..) = from.read(&mut buffer) {
                    let mut seen = into.lock().unwrap_or_else(PoisonError::into_inner);
                    seen.extend_from_slice(&buffer[..length]);
                }
            })?;
        let terminal = Terminal {
            master,
            slave,
            seen,
            read: 0,
        };
        terminal.resize(columns, rows)?;
        Ok(terminal)
    }

    /// As a window does it; the kernel tells the terminal's foreground processes.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        let size = libc::winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: TIOCSWINSZ reads the winsize it is given.
        let set =
            unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        ensure!(set == 0, "TIOCSWINSZ: {}", std::io::Error::last_os_error());
        Ok(())
    }

    /// How it treats what is typed and printed.
    pub fn modes(&self) -> Result<[u32; 4]> {
        let mut modes = std::mem::MaybeUninit::<libc::termios>::zeroed();
        // SAFETY: tcgetattr fills in the termios it is given; all-zero is a valid one.
        let modes = unsafe {
            let got = libc::tcgetattr(self.slave.as_raw_fd(), modes.as_mut_ptr());
            ensure!(got == 0, "tcgetattr: {}", std::io::Error::last_os_error());
            modes.assume_init()
        };
        Ok([modes.c_iflag, modes.c_oflag, modes.c_cflag, modes.c_lflag])
    }

    /// Starts a program in it, as a login does: a session of its own whose terminal this is.
    pub fn start(&self, mut command: Command) -> Result<Child> {
        let end = || self.slave.try_clone().map(Stdio::from);
        command.stdin(end()?).stdout(end()?).stderr(end()?);
        // SAFETY: between fork and exec only two system calls are made, which take numbers.
        unsafe {
            command.pre_exec(|| {
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        command.spawn().context("the program is not on the PATH")
    }

    /// Types.
    pub fn type_keys(&mut self, keys: &str) -> Result<()> {
        self.master.write_all(keys.as_bytes())?;
        Ok(())
    }

    /// Up to where it was waited for already.
    pub fn read_to(&self) -> usize {
        self.read
    }

    /// What came between such a place and what was waited for last.
    pub fn text_since(&self, place: usize) -> String {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = seen.get(place..self.read).unwrap_or_default();
        String::from_utf8_lossy(bytes).into_owned()
    }

    /// What came after what was waited for.
    pub fn rest(&self) -> String {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(seen.get(self.read..).unwrap_or_default()).into_owned()
    }

    /// Waits until this is printed after what was waited for before.
    pub async fn wait_for(&mut self, text: &str) -> Result<()> {
        let found = wait::until(&format!("{text:?} on the terminal"), STEP, || async {
            let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            let rest = &seen[self.read..];
            let at = rest
                .windows(text.len())
                .position(|part| part == text.as_bytes());
            Ok(at.map(|at| self.read + at + text.len()))
        })
        .await;
        self.read = found.with_context(|| format!("there is {:?}", self.rest()))?;
        Ok(())
    }
}
