//! A disk that is a file or a block device of the host, handed over as an open descriptor.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;

use thiserror::Error;

use super::backend::{
    BlockBackend, BlockOp, BlockRequest, Completion, Content, SECTOR_SIZE, Submitted,
};
use super::uring::{Rings, Uring};
use super::worker::{Worker, execute};

/// Vectors the kernel takes in one call (`UIO_MAXIOV`); the rest follows in the next.
pub(super) const MAX_IOVECS: usize = 1024;

/// What disks without a quick way to zero a range are written with.
pub(super) static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// `BLKGETSIZE64`: `_IOR(0x12, 114, size_t)`.
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
const _: () = assert!(
    BLKGETSIZE64 == (2 << 30) | ((size_of::<usize>() as libc::c_ulong) << 16) | (0x12 << 8) | 114
);

/// Why a descriptor can't be a disk.
#[derive(Debug, Error)]
pub enum FileError {
    /// The descriptor's properties could not be read.
    #[error("can't find out the disk's {what}")]
    Inspect {
        /// What was asked for.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("the descriptor is neither a regular file nor a block device; pass one of these")]
    Kind,
    /// It was opened in a way that does not allow what is wanted.
    #[error("the descriptor is not open for reading{0}; open it so")]
    Access(&'static str),
}

/// How the I/O is done. Made by [`FileBackend::start`]; at the first request, it is a thread.
#[derive(Debug)]
enum Engine {
    NotYet,
    Uring(Box<Uring>),
    Worker(Worker),
}

/// A disk that is a file.
#[derive(Debug)]
pub struct FileBackend {
    // Before `file`: its drop waits for I/O on the descriptor.
    engine: Engine,
    file: File,
    capacity: u64,
    read_only: bool,
}

impl FileBackend {
    /// Makes a disk of an open file or block device; a last part of a sector is not seen.
    pub fn new(file: File, read_only: bool) -> Result<Self, FileError> {
        let inspect = |what, source| FileError::Inspect { what, source };
        let kind = file.metadata().map_err(|e| inspect("type", e))?;
        // SAFETY: `F_GETFL` takes no argument and touches no memory.
        let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
        if flags < 0 {
            return Err(inspect("access mode", io::Error::last_os_error()));
        }
        match flags & libc::O_ACCMODE {
            libc::O_RDWR => {}
            libc::O_RDONLY if read_only => {}
            libc::O_RDONLY => return Err(FileError::Access(" and writing")),
            _ => return Err(FileError::Access("")),
        }
        let size = if kind.file_type().is_file() {
            kind.len()
        } else if kind.file_type().is_block_device() {
            let mut size = 0u64;
            // SAFETY: the ioctl writes one `u64` to the pointer, which is to a local of that type.
            let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut size) };
            if result < 0 {
                return Err(inspect("size", io::Error::last_os_error()));
            }
            size
        } else {
            return Err(FileError::Kind);
        };
        Ok(FileBackend {
            engine: Engine::NotYet,
            file,
            capacity: size - size % SECTOR_SIZE,
            read_only,
        })
    }

    /// Takes a ring, or makes a thread if there is none left.
    pub fn start(&mut self, rings: &Rings) -> io::Result<()> {
        if !matches!(self.engine, Engine::NotYet) {
            return Ok(());
        }
        let fd: RawFd = self.file.as_raw_fd();
        self.engine = match rings.lend(fd) {
            Some(ring) => Engine::Uring(Box::new(ring)),
            None => Engine::Worker(Worker::new(move |request| execute(fd, request))?),
        };
        Ok(())
    }

    /// Whether it has a ring.
    pub fn has_ring(&self) -> bool {
        matches!(self.engine, Engine::Uring(_))
    }
}

impl BlockBackend for FileBackend {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn submit(&mut self, request: BlockRequest) -> Submitted {
        if let Err(e) = self.start(&Rings::default()) {
            return Submitted::Done(Completion {
                tag: request.tag,
                result: Err(e),
            });
        }
        match &mut self.engine {
            Engine::Uring(ring) => ring.submit(request),
            Engine::Worker(worker) => worker.submit(request),
            Engine::NotYet => Submitted::Busy(request),
        }
    }

    fn kick(&mut self) -> io::Result<()> {
        match &mut self.engine {
            Engine::Uring(ring) => ring.kick(),
            Engine::Worker(_) | Engine::NotYet => Ok(()),
        }
    }

    fn completion_fd(&self) -> Option<RawFd> {
        match &self.engine {
            Engine::Uring(ring) => Some(ring.fd()),
            Engine::Worker(worker) => Some(worker.fd()),
            Engine::NotYet => None,
        }
    }

    fn completions(&mut self, done: &mut Vec<Completion>) -> io::Result<()> {
        match &mut self.engine {
            Engine::Uring(ring) => ring.completions(done),
            Engine::Worker(worker) => {
                worker.completions(done);
                Ok(())
            }
            Engine::NotYet => Ok(()),
        }
    }

    fn drain(&mut self, done: &mut Vec<Completion>) -> io::Result<()> {
        match &mut self.engine {
            Engine::Uring(ring) => ring.drain(done),
            Engine::Worker(worker) => {
                worker.drain(done);
                Ok(())
            }
            Engine::NotYet => Ok(()),
        }
    }

    fn save(&self, _: &File) -> io::Result<Content> {
        Ok(Content::Elsewhere)
    }
}

/// How `fallocate` is asked for the range operations.
pub(super) fn fallocate_mode(op: BlockOp) -> i32 {
    match op {
        BlockOp::WriteZeroes { unmap: false } => {
            libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE
        }
        _ => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
    }
}

/// Vectors over `len` zero bytes, or as many as one call takes.
pub(super) fn fill_zero_iovecs(iovecs: &mut Vec<libc::iovec>, len: u64) {
    iovecs.clear();
    let mut left = len;
    while left > 0 && iovecs.len() < MAX_IOVECS {
        let now = left.min(ZEROES.len() as u64);
        iovecs.push(libc::iovec {
            iov_base: ZEROES.as_ptr().cast_mut().cast(),
            // At most the length of `ZEROES`.
            iov_len: now as usize,
        });
        left -= now;
    }
}
