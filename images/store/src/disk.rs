//! The seam between the store and the disk: every change the store makes goes through here, so
//! that tests can let each one fail.

use std::fmt::Debug;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Changes to the disk.
pub(crate) trait Disk: Debug + Send + Sync {
    /// Makes a directory that only its owner may enter. One that exists is an error.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Makes a file with this content. One that exists is an error.
    fn write_new(&self, path: &Path, content: &[u8]) -> io::Result<()>;
    /// Waits until a file's content is on the disk.
    fn sync_file(&self, path: &Path) -> io::Result<()>;
    /// Waits until a directory's entries are on the disk.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Gives a file another name, which it takes from whoever has it.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Removes an empty directory.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
    /// Gives back the disk blocks of a part of a file, which then reads as zeros.
    fn punch_hole(&self, file: &File, offset: u64, length: u64) -> io::Result<()>;
    /// Makes a file read-only, for its owner only.
    fn seal(&self, path: &Path) -> io::Result<()>;
}

/// The real disk.
#[derive(Debug)]
pub(crate) struct RealDisk;

impl Disk for RealDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::DirBuilder::new().mode(0o700).create(path)
    }

    fn write_new(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        file.write_all(content)
    }

    fn sync_file(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }

    fn punch_hole(&self, file: &File, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: a system call on an open descriptor; no memory is involved.
        let result = unsafe {
            libc::fallocate(
                file.as_raw_fd(),
                libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                offset.cast_signed(),
                length.cast_signed(),
            )
        };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        // Room is all that is lost on a file system without holes.
        if error.raw_os_error() == Some(libc::EOPNOTSUPP) {
            Ok(())
        } else {
            Err(error)
        }
    }

    fn seal(&self, path: &Path) -> io::Result<()> {
        fs::set_permissions(path, fs::Permissions::from_mode(0o400))
    }
}
