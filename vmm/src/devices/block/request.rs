//! virtio-blk requests: from a descriptor chain to something a backend can be asked for.

use thiserror::Error;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::backend::{BlockOp, SECTOR_SIZE};
use crate::devices::chain::{Chain, ChainError, Segments};
use crate::devices::ring::Mem;

/// Most ranges one discard request may name.
pub(super) const MAX_DISCARD_SEGMENTS: u32 = 32;
/// Most sectors one discarded range may have.
pub(super) const MAX_DISCARD_SECTORS: u32 = 0x40_0000;
/// Most sectors one zeroed range may have; bounds the work a backend without a quick way has.
pub(super) const MAX_WRITE_ZEROES_SECTORS: u32 = 0x1_0000;

const HEADER_LEN: usize = 16;
const RANGE_LEN: usize = 16;

/// The status byte at the end of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    IoError,
    Unsupported,
}

impl Status {
    /// As it goes to the guest.
    pub(super) fn byte(self) -> u8 {
        // The three constants are 0, 1 and 2.
        match self {
            Status::Ok => VIRTIO_BLK_S_OK as u8,
            Status::IoError => VIRTIO_BLK_S_IOERR as u8,
            Status::Unsupported => VIRTIO_BLK_S_UNSUPP as u8,
        }
    }
}

/// What can be wrong with a request.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum RequestError {
    /// No room for even a status byte: nothing can be answered.
    #[error("request has no status byte")]
    NoStatus,
    /// The request is answered with an I/O error.
    #[error("bad request: {0}")]
    Bad(&'static str),
    /// The request is answered as unsupported.
    #[error("unsupported request: {0}")]
    Unsupported(&'static str),
    /// A buffer could not be used.
    #[error(transparent)]
    Chain(#[from] ChainError),
}

impl RequestError {
    /// What the guest is told.
    pub(super) fn status(&self) -> Status {
        match self {
            RequestError::Unsupported(_) => Status::Unsupported,
            _ => Status::IoError,
        }
    }
}

/// A byte range of the disk to be discarded or zeroed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) op: BlockOp,
}

/// What a request asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Move data between the disk at `offset` and `data`.
    Transfer {
        op: BlockOp,
        offset: u64,
        data: Segments,
    },
    /// Make what was written durable.
    Flush,
    /// Discard or zero ranges; at least one.
    Ranges(Vec<Range>),
    /// Put the disk's name into `data`.
    GetId { data: Segments },
}

/// The disk as a request is checked against.
#[derive(Debug, Clone, Copy)]
pub(super) struct Geometry {
    /// Bytes.
    pub(super) capacity: u64,
    pub(super) read_only: bool,
}

/// Where the status byte of a chain goes.
pub(super) fn status_segment(chain: &Chain) -> Result<Segments, RequestError> {
    let last = chain
        .writable
        .len()
        .checked_sub(1)
        .ok_or(RequestError::NoStatus)?;
    Ok(chain.writable.range(last, 1)?)
}

/// Reads a request. Its header and ranges are copied from guest memory exactly once.
pub(super) fn parse(mem: &Mem, chain: &Chain, disk: Geometry) -> Result<Command, RequestError> {
    let data_len = chain
        .writable
        .len()
        .checked_sub(1)
        .ok_or(RequestError::NoStatus)?;
    let mut header = [0; HEADER_LEN];
    chain.readable.read(mem, 0, &mut header)?;
    let kind = u32::from_le_bytes(part(&header, 0));
    let sector = u64::from_le_bytes(part(&header, 8));
    let sent = chain.readable.len() - HEADER_LEN as u64;
    match kind {
        VIRTIO_BLK_T_IN => {
            let offset = checked_transfer(sector, data_len, disk)?;
            Ok(Command::Transfer {
                op: BlockOp::Read,
                offset,
                data: chain.writable.range(0, data_len)?,
            })
        }
        VIRTIO_BLK_T_OUT => {
            refuse_if_read_only(disk)?;
            let offset = checked_transfer(sector, sent, disk)?;
            Ok(Command::Transfer {
                op: BlockOp::Write,
                offset,
                data: chain.readable.range(HEADER_LEN as u64, sent)?,
            })
        }
        VIRTIO_BLK_T_FLUSH => Ok(Command::Flush),
        VIRTIO_BLK_T_GET_ID => Ok(Command::GetId {
            data: chain.writable.range(0, data_len)?,
        }),
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            refuse_if_read_only(disk)?;
            ranges(mem, chain, sent, kind == VIRTIO_BLK_T_DISCARD, disk).map(Command::Ranges)
        }
        _ => Err(RequestError::Unsupported("unknown type")),
    }
}

fn refuse_if_read_only(disk: Geometry) -> Result<(), RequestError> {
    if disk.read_only {
        Err(RequestError::Bad("write to a read-only disk"))
    } else {
        Ok(())
    }
}

fn checked_transfer(sector: u64, len: u64, disk: Geometry) -> Result<u64, RequestError> {
    if len == 0 || !len.is_multiple_of(SECTOR_SIZE) {
        return Err(RequestError::Bad("data is not a whole number of sectors"));
    }
    checked_range(sector, len, disk)
}

/// The byte offset of a range, if it lies on the disk.
fn checked_range(sector: u64, len: u64, disk: Geometry) -> Result<u64, RequestError> {
    sector
        .checked_mul(SECTOR_SIZE)
        .filter(|offset| {
            offset
                .checked_add(len)
                .is_some_and(|end| end <= disk.capacity)
        })
        .ok_or(RequestError::Bad("range is not on the disk"))
}

fn ranges(
    mem: &Mem,
    chain: &Chain,
    sent: u64,
    discard: bool,
    disk: Geometry,
) -> Result<Vec<Range>, RequestError> {
    let count = sent / RANGE_LEN as u64;
    let (max_count, max_sectors) = if discard {
        (MAX_DISCARD_SEGMENTS, MAX_DISCARD_SECTORS)
    } else {
        (1, MAX_WRITE_ZEROES_SECTORS)
    };
    if !sent.is_multiple_of(RANGE_LEN as u64) || count == 0 || count > u64::from(max_count) {
        return Err(RequestError::Bad("wrong number of ranges"));
    }
    let mut out = Vec::new();
    for i in 0..count {
        let mut raw = [0; RANGE_LEN];
        chain
            .readable
            .read(mem, HEADER_LEN as u64 + i * RANGE_LEN as u64, &mut raw)?;
        let sector = u64::from_le_bytes(part(&raw, 0));
        let sectors = u32::from_le_bytes(part(&raw, 8));
        let flags = u32::from_le_bytes(part(&raw, 12));
        // Virtio 1.2 §5.2.6.2: unmap means nothing to a discard, and unknown flags are refused.
        let known = if discard {
            0
        } else {
            VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
        };
        if flags & !known != 0 {
            return Err(RequestError::Unsupported("unknown flags"));
        }
        if sectors > max_sectors {
            return Err(RequestError::Bad("range is too long"));
        }
        let len = u64::from(sectors) * SECTOR_SIZE;
        let offset = checked_range(sector, len, disk)?;
        let op = if discard {
            BlockOp::Discard
        } else {
            BlockOp::WriteZeroes { unmap: flags != 0 }
        };
        if len > 0 {
            out.push(Range { offset, len, op });
        }
    }
    Ok(out)
}

/// A fixed-size piece of a fixed-size header.
fn part<const N: usize, const M: usize>(bytes: &[u8; M], at: usize) -> [u8; N] {
    let mut out = [0; N];
    for (to, from) in out.iter_mut().zip(bytes.iter().skip(at)) {
        *to = *from;
    }
    out
}

/// The one byte every request ends with.
pub(super) fn write_status(mem: &Mem, at: &Segments, status: Status) -> Result<(), ChainError> {
    at.write(mem, 0, &[status.byte()])
}
