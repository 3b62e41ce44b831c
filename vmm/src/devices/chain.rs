//! Descriptor chains, copied once and checked, so that a device never looks at a descriptor twice.
//!
//! The driver may rewrite its descriptor table while a device works on it. A [`Chain`] therefore
//! holds the addresses and lengths as they were read, proven to lie in guest memory and to be in the
//! order the specification asks for (virtio 1.2 §2.7.4.2: readable before writable). What the
//! buffers *contain* stays the guest's to change at any time: read it once, into host memory, before
//! deciding anything by it.

use thiserror::Error;
use virtio_queue::DescriptorChain;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, Permissions};

/// Why a chain was refused.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
pub enum ChainError {
    /// The chain loops, runs out of its table, or has a broken indirect table.
    #[error("descriptor chain {head} does not end: it loops or leaves its table")]
    Unterminated { head: u16 },
    /// A readable descriptor came after a writable one.
    #[error("descriptor chain {head} has a readable buffer after a writable one")]
    Order { head: u16 },
    /// A buffer is not (wholly) in guest memory.
    #[error("buffer {addr:#x}+{len:#x} of descriptor chain {head} is outside guest memory")]
    OutsideMemory { head: u16, addr: u64, len: u32 },
    /// The device needs more bytes than the chain has.
    #[error("descriptor chain is too short: {wanted} bytes wanted at offset {offset}")]
    TooShort { offset: u64, wanted: u64 },
}

/// A piece of guest memory inside one chain; never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    pub addr: GuestAddress,
    pub len: u32,
}

/// A list of segments read or written as one run of bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Segments {
    list: Vec<Segment>,
    len: u64,
}

impl Segments {
    /// How many bytes the segments hold together.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is not a single byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The segments in order.
    pub fn iter(&self) -> impl Iterator<Item = Segment> + '_ {
        self.list.iter().copied()
    }

    /// Empties the list, keeping its allocation.
    pub fn clear(&mut self) {
        self.list.clear();
        self.len = 0;
    }

    /// Appends a piece; empty ones are dropped.
    pub fn push(&mut self, segment: Segment) {
        if segment.len > 0 {
            self.len += u64::from(segment.len);
            self.list.push(segment);
        }
    }

    /// The `len` bytes at `offset`, as segments of their own.
    pub fn range(&self, offset: u64, len: u64) -> Result<Segments, ChainError> {
        let mut out = Segments::default();
        self.visit(offset, len, |segment| {
            out.push(segment);
            Ok(())
        })?;
        Ok(out)
    }

    /// Fills `buf` from the bytes at `offset`.
    pub fn read<M: GuestMemory>(
        &self,
        mem: &M,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), ChainError> {
        let mut rest = buf;
        let wanted = rest.len() as u64;
        self.visit(offset, wanted, |segment| {
            let (now, later) = std::mem::take(&mut rest).split_at_mut(segment.len as usize);
            rest = later;
            mem.read_slice(now, segment.addr)
                .map_err(|_| outside(segment))
        })
    }

    /// Writes `buf` over the bytes at `offset`.
    pub fn write<M: GuestMemory>(
        &self,
        mem: &M,
        offset: u64,
        buf: &[u8],
    ) -> Result<(), ChainError> {
        let mut rest = buf;
        self.visit(offset, rest.len() as u64, |segment| {
            let (now, later) = rest.split_at(segment.len as usize);
            rest = later;
            mem.write_slice(now, segment.addr)
                .map_err(|_| outside(segment))
        })
    }

    /// Appends host I/O vectors for all bytes to `out`.
    ///
    /// The vectors point into guest memory: they are good for as long as the mapping behind `mem`
    /// stays, and what they point to changes under the host's hands. Hand them to the kernel only.
    pub fn iovecs<M: GuestMemory>(
        &self,
        mem: &M,
        out: &mut Vec<libc::iovec>,
    ) -> Result<(), ChainError> {
        for segment in self.iter() {
            let slices = mem
                .get_slices(segment.addr, segment.len as usize, Permissions::ReadWrite)
                .map_err(|_| outside(segment))?;
            for slice in slices {
                let slice = slice.map_err(|_| outside(segment))?;
                out.push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
        }
        Ok(())
    }

    /// Calls `f` for each piece of the `len` bytes at `offset`, after checking that they are there.
    fn visit(
        &self,
        offset: u64,
        len: u64,
        mut f: impl FnMut(Segment) -> Result<(), ChainError>,
    ) -> Result<(), ChainError> {
        let end = offset.checked_add(len).filter(|end| *end <= self.len);
        if end.is_none() {
            return Err(ChainError::TooShort {
                offset,
                wanted: len,
            });
        }
        let (mut skip, mut left) = (offset, len);
        for segment in &self.list {
            if left == 0 {
                break;
            }
            let size = u64::from(segment.len);
            if skip >= size {
                skip -= size;
                continue;
            }
            let take = (size - skip).min(left);
            // `take` is at most `segment.len`, a `u32`.
            f(Segment {
                addr: segment.addr.unchecked_add(skip),
                len: take as u32,
            })?;
            left -= take;
            skip = 0;
        }
        Ok(())
    }
}

fn outside(segment: Segment) -> ChainError {
    ChainError::OutsideMemory {
        head: 0,
        addr: segment.addr.raw_value(),
        len: segment.len,
    }
}

/// One descriptor chain: what the device may read, then what it may write.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chain {
    /// Index to give back in the used ring.
    pub head: u16,
    /// What the driver sends.
    pub readable: Segments,
    /// Where the driver wants the answer.
    pub writable: Segments,
}

impl Chain {
    /// Copies and checks the chain of `raw`. Nothing of the guest's tables is read afterwards.
    pub fn parse<M: GuestMemory>(
        mem: &M,
        mut raw: DescriptorChain<&M>,
    ) -> Result<Chain, ChainError> {
        let head = raw.head_index();
        let mut chain = Chain {
            head,
            ..Chain::default()
        };
        let mut ended = false;
        // `DescriptorChain` bounds the number of descriptors and the sum of their lengths, but ends
        // a broken chain in the same way as a whole one: the last descriptor's flag tells.
        for descriptor in raw.by_ref() {
            ended = !descriptor.has_next();
            let segment = Segment {
                addr: descriptor.addr(),
                len: descriptor.len(),
            };
            if segment.len > 0
                && !mem.check_range(segment.addr, segment.len as usize, Permissions::ReadWrite)
            {
                return Err(ChainError::OutsideMemory {
                    head,
                    addr: segment.addr.raw_value(),
                    len: segment.len,
                });
            }
            if descriptor.is_write_only() {
                chain.writable.push(segment);
            } else if chain.writable.is_empty() {
                chain.readable.push(segment);
            } else {
                return Err(ChainError::Order { head });
            }
        }
        if ended {
            Ok(chain)
        } else {
            Err(ChainError::Unterminated { head })
        }
    }
}
