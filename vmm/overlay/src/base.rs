//! What lies below the overlay and is never written.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::sectors::SECTOR_SIZE;

/// A disk to be read. Its content never changes.
pub trait Base: Send + Sync + Debug {
    /// Whether there is data at `offset`, and up to where (beyond `offset`) that is so. Where there is
    /// none the disk reads as zeroes. Beyond the end there is none, up to `u64::MAX`.
    fn extent(&self, offset: u64) -> (bool, u64);

    /// Reads data; the range lies within what `extent` said is data.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
}

/// Extents beyond this count are not told apart: it bounds the time and memory of looking for them.
const MAX_EXTENTS: usize = 1 << 16;

/// A file or a block device: an EROFS image, or a template with a file system already on it.
#[derive(Debug)]
pub struct FileBase {
    file: File,
    /// Start and end of data, in order; whole sectors.
    extents: Vec<(u64, u64)>,
}

impl FileBase {
    /// Takes an open file, and finds out where it has holes: those read as zeroes without being read,
    /// and cost nothing to discard.
    pub fn new(file: File) -> io::Result<Self> {
        let fd = file.as_raw_fd();
        let seek = |offset: u64, whence| -> io::Result<Option<u64>> {
            let offset = i64::try_from(offset).map_err(io::Error::other)?;
            // SAFETY: a system call on a descriptor, without pointers.
            let at = unsafe { libc::lseek64(fd, offset, whence) };
            if at >= 0 {
                return Ok(Some(at.unsigned_abs()));
            }
            match io::Error::last_os_error() {
                e if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
                e => Err(e),
            }
        };
        let size = seek(0, libc::SEEK_END)?.unwrap_or(0);
        let mut extents: Vec<(u64, u64)> = Vec::new();
        let mut at = 0;
        while at < size {
            let found = if extents.len() < MAX_EXTENTS {
                seek(at, libc::SEEK_DATA)
            } else {
                Ok(Some(at))
            };
            let start = match found {
                Ok(Some(start)) => start,
                Ok(None) => break,
                // A block device, or a file system that knows of no holes: all of it is data.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => at,
                Err(e) => return Err(e),
            };
            let end = if extents.len() < MAX_EXTENTS {
                seek(start, libc::SEEK_HOLE).ok().flatten().unwrap_or(size)
            } else {
                size
            };
            let sector = SECTOR_SIZE as u64;
            extents.push((start - start % sector, end.next_multiple_of(sector)));
            at = end.max(at + 1);
        }
        Ok(FileBase { file, extents })
    }
}

impl Base for FileBase {
    fn extent(&self, offset: u64) -> (bool, u64) {
        extent_in(&self.extents, offset)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match self.file.read_at(&mut buf[done..], offset + done as u64) {
                // The rest of the last sector.
                Ok(0) => {
                    if buf.len() - done >= SECTOR_SIZE {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    buf[done..].fill(0);
                    return Ok(());
                }
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// What [`Base::extent`] says, given sorted, disjoint extents.
pub(crate) fn extent_in(extents: &[(u64, u64)], offset: u64) -> (bool, u64) {
    let after = extents.partition_point(|(_, end)| *end <= offset);
    match extents.get(after) {
        Some((start, end)) if *start <= offset => (true, *end),
        Some((start, _)) => (false, *start),
        None => (false, u64::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_known_and_the_last_part_of_a_sector_is_padded() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 100], 1 << 20).unwrap();
        let base = FileBase::new(file).unwrap();
        assert_eq!(base.extent(0), (false, 1 << 20));
        assert_eq!(base.extent(1 << 20), (true, (1 << 20) + 512));
        assert_eq!(base.extent((1 << 20) + 512), (false, u64::MAX));
        let mut sector = [9; 512];
        base.read_at(&mut sector, 1 << 20).unwrap();
        assert!(sector[..100].iter().all(|b| *b == 1) && sector[100..].iter().all(|b| *b == 0));
    }

    #[test]
    fn file_cut_short_is_an_error_not_zeroes() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 4096], 0).unwrap();
        let base = FileBase::new(file.try_clone().unwrap()).unwrap();
        file.set_len(1024).unwrap();
        assert!(base.read_at(&mut [0; 4096], 0).is_err());
    }
}
