//! The file that chunks spill to: the seam where a disk can be full, slow or broken.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Storage for spilled chunks. Offsets, lengths and the addresses of buffers are multiples of 4096.
pub trait SpillFile: Send + Sync + Debug {
    /// Writes some of `buf`, and tells how much.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize>;

    /// Reads some of `buf`, and tells how much.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Gives the disk space of a range back. What the range then reads as does not matter.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes what was written survive a power failure.
    fn sync(&self) -> io::Result<()>;
}

/// Whether the spill file goes through the host's page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Caching {
    /// Past it, if the file system can: a byte that left the overlay's RAM is in no RAM.
    #[default]
    Direct,
    /// Through it, but written back at once and dropped from it after [`WINDOW`] bytes more.
    Window,
}

/// How much of the spill file [`Caching::Window`] leaves in the page cache.
pub const WINDOW: u64 = 16 << 20;

/// A regular file as spill file.
#[derive(Debug)]
pub struct DiskFile {
    file: File,
    direct: AtomicBool,
    /// Written and not yet dropped from the page cache.
    window: Mutex<Window>,
}

#[derive(Debug, Default)]
struct Window {
    parts: VecDeque<(u64, u64)>,
    len: u64,
}

impl DiskFile {
    /// Takes an open, empty file. Nobody else should use its description: its flags are changed.
    pub fn new(file: File, caching: Caching) -> Self {
        let direct = caching == Caching::Direct && set_direct(file.as_raw_fd(), true).is_ok();
        DiskFile {
            file,
            direct: AtomicBool::new(direct),
            window: Mutex::default(),
        }
    }

    /// Makes a file without a name in an open directory: it vanishes with the process, whatever ends
    /// it.
    pub fn unlinked_in(directory: RawFd, caching: Caching) -> io::Result<Self> {
        let flags = libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC;
        // SAFETY: the path is a static string.
        let fd = unsafe { libc::openat(directory, c".".as_ptr(), flags, 0o600) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and is nobody else's.
        Ok(Self::new(unsafe { File::from_raw_fd(fd) }, caching))
    }

    /// Whether the page cache is left out.
    pub fn is_direct(&self) -> bool {
        self.direct.load(Ordering::Relaxed)
    }

    /// What to do with an error: a file system may take the flag and refuse the I/O.
    fn without_direct(&self, e: &io::Error) -> bool {
        e.raw_os_error() == Some(libc::EINVAL)
            && self.direct.swap(false, Ordering::Relaxed)
            && set_direct(self.file.as_raw_fd(), false).is_ok()
    }

    fn pass_through_window(&self, offset: u64, len: u64) {
        let fd = self.file.as_raw_fd();
        let sync = |(offset, len): (u64, u64), flags| {
            // Offsets of a file fit. Advice: an error will be met again where it matters.
            // SAFETY: a system call on a descriptor, without pointers.
            unsafe { libc::sync_file_range(fd, offset as i64, len as i64, flags) };
        };
        sync((offset, len), libc::SYNC_FILE_RANGE_WRITE);
        let mut old = Vec::new();
        {
            let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
            window.parts.push_back((offset, len));
            window.len += len;
            while window.len > WINDOW {
                let Some(part) = window.parts.pop_front() else {
                    break;
                };
                window.len -= part.1;
                old.push(part);
            }
        }
        for part in old {
            sync(
                part,
                libc::SYNC_FILE_RANGE_WAIT_BEFORE
                    | libc::SYNC_FILE_RANGE_WRITE
                    | libc::SYNC_FILE_RANGE_WAIT_AFTER,
            );
            // SAFETY: as above.
            unsafe {
                libc::posix_fadvise64(fd, part.0 as i64, part.1 as i64, libc::POSIX_FADV_DONTNEED);
            }
        }
    }
}

fn set_direct(fd: RawFd, on: bool) -> io::Result<()> {
    // SAFETY: `F_GETFL` takes no argument and touches no memory.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    let flags = if on {
        flags | libc::O_DIRECT
    } else {
        flags & !libc::O_DIRECT
    };
    // SAFETY: `F_SETFL` takes an integer and touches no memory.
    if unsafe { libc::fcntl(fd, libc::F_SETFL, flags) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

impl SpillFile for DiskFile {
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        let written = match self.file.write_at(buf, offset) {
            Err(e) if self.without_direct(&e) => self.file.write_at(buf, offset)?,
            result => result?,
        };
        if !self.is_direct() {
            self.pass_through_window(offset, written as u64);
        }
        Ok(written)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        match self.file.read_at(buf, offset) {
            Err(e) if self.without_direct(&e) => self.file.read_at(buf, offset),
            result => result,
        }
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let (offset, len) = (
            i64::try_from(offset).map_err(io::Error::other)?,
            i64::try_from(len).map_err(io::Error::other)?,
        );
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: a system call on a descriptor, without pointers.
        if unsafe { libc::fallocate64(self.file.as_raw_fd(), mode, offset, len) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// Writes all of `buf`.
pub(crate) fn write_all(file: &dyn SpillFile, buf: &[u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match file.write_at(&buf[done..], offset + done as u64) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            // Going on amid a page is no longer aligned: that page is written again.
            Ok(n) => {
                let next = done + n;
                let aligned = next - next % crate::sectors::PAGE_SIZE;
                if next < buf.len() && aligned == done {
                    return Err(io::ErrorKind::WriteZero.into());
                }
                done = if next < buf.len() { aligned } else { next };
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Reads all of `buf`.
pub(crate) fn read_all(file: &dyn SpillFile, buf: &mut [u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], offset + done as u64) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                let next = done + n;
                let aligned = next - next % crate::sectors::PAGE_SIZE;
                if next < buf.len() && aligned == done {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                done = if next < buf.len() { aligned } else { next };
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bounce::Bounce;

    #[test]
    fn both_ways_of_caching_write_read_and_give_back() {
        let dir = tempfile::tempdir().unwrap();
        let dir = File::open(dir.path()).unwrap();
        for caching in [Caching::Direct, Caching::Window] {
            let file = DiskFile::unlinked_in(dir.as_raw_fd(), caching).unwrap();
            let mut bounce = Bounce::new(1 << 20);
            bounce.bytes_mut().fill(5);
            for i in 0..24 {
                write_all(&file, bounce.bytes(), i << 20).unwrap();
            }
            bounce.bytes_mut().fill(0);
            read_all(&file, bounce.bytes_mut(), 3 << 20).unwrap();
            assert!(bounce.bytes().iter().all(|b| *b == 5));
            file.sync().unwrap();
            let blocks = || std::os::unix::fs::MetadataExt::blocks(&file.file.metadata().unwrap());
            let before = blocks();
            file.punch(0, 24 << 20).unwrap();
            assert!(blocks() < before);
        }
    }
}
