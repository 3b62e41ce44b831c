//! The terminal that `kiln run -t` lends to the container.

use std::io;
use std::mem::MaybeUninit;

/// Whether a standard stream is a terminal.
pub(crate) fn is_terminal(fd: i32) -> bool {
    // SAFETY: isatty looks at a number.
    unsafe { libc::isatty(fd) == 1 }
}

/// Columns and rows of the terminal on standard input, or of a standard one.
pub(crate) fn size() -> (u32, u32) {
    let mut size = MaybeUninit::<libc::winsize>::zeroed();
    // SAFETY: TIOCGWINSZ fills in the winsize it is given; all-zero is a valid one.
    let size = unsafe {
        libc::ioctl(0, libc::TIOCGWINSZ, size.as_mut_ptr());
        size.assume_init()
    };
    match (size.ws_col, size.ws_row) {
        (0, _) | (_, 0) => (80, 24),
        (columns, rows) => (columns.into(), rows.into()),
    }
}

/// Keys go to the container as they are typed, until this is dropped.
pub(crate) struct Raw(libc::termios);

impl Raw {
    /// Takes the terminal on standard input.
    pub(crate) fn take() -> io::Result<Raw> {
        let mut before = MaybeUninit::<libc::termios>::zeroed();
        // SAFETY: tcgetattr fills in the termios it is given; all-zero is a valid one.
        let before = unsafe {
            if libc::tcgetattr(0, before.as_mut_ptr()) != 0 {
                return Err(io::Error::last_os_error());
            }
            before.assume_init()
        };
        let mut raw = before;
        // SAFETY: both calls read or write the termios they are given.
        let set = unsafe {
            libc::cfmakeraw(&raw mut raw);
            libc::tcsetattr(0, libc::TCSANOW, &raw const raw)
        };
        if set != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Raw(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // SAFETY: tcsetattr reads the termios it is given, which tcgetattr filled in. A terminal that is
        // gone needs no settings.
        unsafe {
            libc::tcsetattr(0, libc::TCSADRAIN, &raw const self.0);
        }
    }
}
