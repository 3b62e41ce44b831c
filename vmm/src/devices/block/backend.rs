//! What a disk is made of: the seam between the virtio-blk device and whatever stores the sectors.
//!
//! A backend is driven by one thread. A request may finish at once or later; later ones are announced
//! through a file descriptor and collected in one go, so that a batch of completions costs the guest
//! one interrupt.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use crate::devices::chain::{ChainError, Segments};
use crate::devices::ring::Mem;

/// virtio-blk counts in these units whatever the disk's block size is (virtio 1.2 §5.2.4).
pub const SECTOR_SIZE: u64 = 512;

/// The device's name for a request in flight; unique among the ones in flight of one backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RequestTag(pub u64);

/// What to do with the bytes `offset .. offset + len`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockOp {
    /// Copy them into the request's buffers.
    Read,
    /// Replace them by the request's buffers.
    Write,
    /// Make every write that was completed before durable. Offset and length mean nothing.
    Flush,
    /// Forget them. They read as anything, and their storage may be given back.
    Discard,
    /// Make them read as zeroes. With `unmap`, their storage may be given back.
    WriteZeroes { unmap: bool },
}

/// One request. The device has checked that the range lies inside the capacity and is made of whole
/// sectors, and that the buffers hold exactly `len` bytes for a read or write and none otherwise.
#[derive(Debug)]
pub struct BlockRequest {
    pub tag: RequestTag,
    pub op: BlockOp,
    pub offset: u64,
    pub len: u64,
    pub buffers: IoBuffers,
}

/// The guest's buffers of one request. Owning a share of guest memory, they stay valid wherever the
/// request goes, even when it outlives the device.
#[derive(Debug, Clone)]
pub struct IoBuffers {
    mem: Arc<Mem>,
    segments: Segments,
}

impl IoBuffers {
    /// Buffers over `segments` of `mem`.
    pub fn new(mem: Arc<Mem>, segments: Segments) -> Self {
        IoBuffers { mem, segments }
    }

    /// How many bytes there are.
    pub fn len(&self) -> u64 {
        self.segments.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// Copies `data` to the guest, starting `offset` bytes into the buffers.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), ChainError> {
        self.segments.write(&*self.mem, offset, data)
    }

    /// Fills `data` from the guest, starting `offset` bytes into the buffers.
    pub fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<(), ChainError> {
        self.segments.read(&*self.mem, offset, data)
    }

    /// The part of `len` bytes at `offset`, for a backend that splits a request.
    pub fn range(&self, offset: u64, len: u64) -> Result<IoBuffers, ChainError> {
        Ok(IoBuffers {
            mem: self.mem.clone(),
            segments: self.segments.range(offset, len)?,
        })
    }

    /// I/O vectors over the bytes from `offset` to the end, for the kernel to read or write. They
    /// are valid as long as any clone of these buffers lives.
    pub fn iovecs(&self, offset: u64, out: &mut Vec<libc::iovec>) -> Result<(), ChainError> {
        out.clear();
        if offset == 0 {
            self.segments.iovecs(&*self.mem, out)
        } else {
            let rest = self
                .segments
                .range(offset, self.len().saturating_sub(offset))?;
            rest.iovecs(&*self.mem, out)
        }
    }
}

/// How a request ended. The buffers of a successful read are filled.
#[derive(Debug)]
pub struct Completion {
    pub tag: RequestTag,
    pub result: io::Result<()>,
}

/// What became of a request handed to a backend.
#[derive(Debug)]
pub enum Submitted {
    /// It is done.
    Done(Completion),
    /// Its completion will be collected later.
    Pending,
    /// The backend has no room; offer it again after some completions. Never the answer while
    /// nothing is in flight.
    Busy(BlockRequest),
}

/// A disk.
///
/// Calling order: any number of `submit`s, then one `kick`, then `completions`, as often as wished.
/// `drain` may come at any time and leaves nothing in flight. Dropping a backend waits for what is in
/// flight, since the kernel may still be writing to guest memory.
///
/// An operation that the storage cannot do ends with [`io::ErrorKind::Unsupported`], which the guest
/// is told as such (it then stops asking); every other error is an I/O error to the guest.
pub trait BlockBackend: Send + Debug {
    /// Size in bytes, a whole number of sectors. Constant for the life of the backend.
    fn capacity(&self) -> u64;

    /// Whether writes are to be refused before they reach the backend.
    fn read_only(&self) -> bool;

    /// Starts a request.
    fn submit(&mut self, request: BlockRequest) -> Submitted;

    /// Passes on what `submit` has gathered.
    fn kick(&mut self) -> io::Result<()>;

    /// Readable whenever `completions` has something to give. `None` until the first request that
    /// did not finish at once; from then on constant.
    fn completion_fd(&self) -> Option<RawFd>;

    /// Appends what has finished since the last call, without waiting.
    fn completions(&mut self, done: &mut Vec<Completion>) -> io::Result<()>;

    /// Waits until nothing is in flight, appending what finishes.
    fn drain(&mut self, done: &mut Vec<Completion>) -> io::Result<()>;

    /// Writes the content into an empty file, if it is nowhere but in this process. Nothing is in flight. Each backend
    /// answers for itself: content that one forgot would be lost in silence.
    fn save(&self, into: &File) -> io::Result<Content>;
}

/// Where a disk's content is once its machine was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// In a file or device of its own.
    Elsewhere,
    /// In the file it was to be saved into, as so many bytes of data.
    Saved(u64),
}
