//! What the guest is offered at its mount, beyond what the server offers by itself.
//!
//! The server's file system leaves out large requests, and the library then promises writes of one page
//! each. It can serve them all the same: its buffers take a mebibyte. So the answer to `FUSE_INIT` is
//! completed before the guest sees it, by what the guest has said it can do.

use fuse_backend_rs::abi::fuse_abi::FsOptions;
use vm_memory_fs::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::view::Span;

/// `FUSE_INIT` in the request's header.
const OPCODE: u32 = 26;
// Offsets in the request: `fuse_in_header` (40 bytes), then `fuse_init_in`.
const OPCODE_AT: usize = 4;
const CAPABLE_AT: usize = 40 + 12;
// Offsets in the answer: `fuse_out_header` (16 bytes), then `fuse_init_out`.
const ERROR_AT: usize = 4;
const FLAGS_AT: usize = 16 + 12;
const MAX_WRITE_AT: usize = 16 + 20;
const MAX_PAGES_AT: usize = 16 + 28;
/// An answer with all of these fields.
const WHOLE: usize = MAX_PAGES_AT + 2;

/// Pages of a request: a mebibyte, which is what the library's buffers take.
const PAGES: u16 = 256;
const MAX_WRITE: u32 = 1 << 20;

/// Where the byte at an offset of the buffers lies, if `len` bytes from there are in one buffer.
fn find(spans: &[Span], mut at: usize, len: usize) -> Option<GuestAddress> {
    for span in spans {
        let length = span.len as usize;
        if at < length {
            let fits = at + len <= length;
            return fits.then(|| GuestAddress((span.addr + at) as u64));
        }
        at -= length;
    }
    None
}

fn read(memory: &GuestMemoryMmap, spans: &[Span], at: usize) -> Option<u32> {
    let mut bytes = [0; 4];
    memory.read_slice(&mut bytes, find(spans, at, 4)?).ok()?;
    Some(u32::from_le_bytes(bytes))
}

/// Completes the answer to a request of `written` bytes, if it is one to `FUSE_INIT` that succeeded.
pub(crate) fn complete(
    memory: &GuestMemoryMmap,
    readable: &[Span],
    writable: &[Span],
    written: usize,
) -> Option<()> {
    if read(memory, readable, OPCODE_AT)? != OPCODE
        || written < WHOLE
        || read(memory, writable, ERROR_AT)? != 0
    {
        return None;
    }
    let offered = FsOptions::BIG_WRITES
        | FsOptions::MAX_PAGES
        | FsOptions::ASYNC_READ
        | FsOptions::PARALLEL_DIROPS;
    // All of these are in the lower half, which is the field that always was there.
    let capable = u64::from(read(memory, readable, CAPABLE_AT)?);
    let added = u32::try_from(offered.bits() & capable).ok()?;
    let write = |at: usize, bytes: &[u8]| {
        let address = find(writable, at, bytes.len())?;
        memory.write_slice(bytes, address).ok()
    };
    let large = FsOptions::BIG_WRITES | FsOptions::MAX_PAGES;
    if u64::from(added) & large.bits() == large.bits() {
        write(MAX_WRITE_AT, &MAX_WRITE.to_le_bytes())?;
        write(MAX_PAGES_AT, &PAGES.to_le_bytes())?;
    }
    let flags = read(memory, writable, FLAGS_AT)? | added;
    write(FLAGS_AT, &flags.to_le_bytes())
}
