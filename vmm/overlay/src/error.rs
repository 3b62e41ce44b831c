//! What can go wrong with a request, and what a guest is told of it.

use std::io;

use thiserror::Error;

use crate::buffers::BufferError;

/// Why a request failed. After a failed write each sector of its range holds what it held before or
/// what the write brought; every other sector is as it was.
#[derive(Debug, Error)]
pub enum Error {
    /// The range is not on the disk.
    #[error("range {offset:#x}+{len:#x} is not on the disk of {capacity:#x} bytes")]
    OutOfRange {
        /// Where the range begins.
        offset: u64,
        /// How long it is.
        len: u64,
        /// The size of the disk.
        capacity: u64,
    },
    /// The range is not made of whole sectors.
    #[error("range {offset:#x}+{len:#x} is not made of sectors of 512 bytes")]
    Misaligned {
        /// Where the range begins.
        offset: u64,
        /// How long it is.
        len: u64,
    },
    /// RAM is full, and nothing can be moved to disk: there is no spill file, its limit is reached, or
    /// its file system is full. Free space there, delete files in the guest, or raise the limit.
    #[error("overlay is full: its RAM is used up and the spill file can't take more")]
    NoSpace,
    /// RAM is full, and moving some of it to disk failed.
    #[error("overlay's RAM is used up and its spill file can't be written")]
    SpillWrite(#[source] io::Error),
    /// What was asked for lies in the spill file, which can't be read.
    #[error("overlay's spill file can't be read")]
    SpillRead(#[source] io::Error),
    /// What was asked for lies in the disk below, which can't be read.
    #[error("disk below the overlay can't be read")]
    BaseRead(#[source] io::Error),
    /// The file that the content is saved to can't be written.
    #[error("overlay's content can't be saved")]
    Save(#[source] io::Error),
    /// The system gave no memory.
    #[error("no memory for the overlay")]
    Memory(#[source] io::Error),
    /// The caller's buffers could not be used.
    #[error("request's buffers can't be used")]
    Buffers(#[source] BufferError),
}

impl Error {
    /// The error number that says it best.
    pub fn errno(&self) -> i32 {
        match self {
            Error::OutOfRange { .. } | Error::Misaligned { .. } => libc::EINVAL,
            Error::NoSpace => libc::ENOSPC,
            Error::SpillWrite(e) if e.raw_os_error() == Some(libc::ENOSPC) => libc::ENOSPC,
            Error::Memory(_) => libc::ENOMEM,
            Error::Save(e) => e.raw_os_error().unwrap_or(libc::EIO),
            Error::SpillWrite(_) | Error::SpillRead(_) | Error::BaseRead(_) => libc::EIO,
            Error::Buffers(_) => libc::EFAULT,
        }
    }
}

impl From<Error> for io::Error {
    fn from(e: Error) -> Self {
        let kind = io::Error::from_raw_os_error(e.errno()).kind();
        io::Error::new(kind, e)
    }
}
