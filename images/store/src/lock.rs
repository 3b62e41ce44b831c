//! Advisory whole-file locks (`flock`), which the kernel drops when their holder dies.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

fn flock(file: &File, operation: libc::c_int) -> io::Result<bool> {
    loop {
        // SAFETY: a system call on an open descriptor; no memory is involved.
        if unsafe { libc::flock(file.as_raw_fd(), operation) } == 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock => return Ok(false),
            _ => return Err(error),
        }
    }
}

/// Waits until no other file description holds the lock.
pub(crate) fn exclusive(file: &File) -> io::Result<()> {
    flock(file, libc::LOCK_EX).map(|_| ())
}

/// Takes the lock unless another file description holds it; says whether it did.
pub(crate) fn try_exclusive(file: &File) -> io::Result<bool> {
    flock(file, libc::LOCK_EX | libc::LOCK_NB)
}

/// Takes a lock that others may share, unless one holds it exclusively; says whether it did.
pub(crate) fn try_shared(file: &File) -> io::Result<bool> {
    flock(file, libc::LOCK_SH | libc::LOCK_NB)
}
