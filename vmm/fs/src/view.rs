//! Guest memory and a private descriptor table, as the older crates want them.

use std::ptr::NonNull;

use thiserror::Error;
use virtio_queue_fs::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory_fs::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// Entries of the private table, and so the most buffers a request can have.
const TABLE_SIZE: u16 = 1024;
const DESCRIPTOR_LEN: usize = 16;
const AVAILABLE_AT: usize = TABLE_SIZE as usize * DESCRIPTOR_LEN;
const USED_AT: usize = AVAILABLE_AT + 4096;
const TABLE_LEN: usize = USED_AT + 12 * 1024;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Why a view could not be made, or a request not be put into it.
#[derive(Debug, Error)]
pub enum ViewError {
    /// The regions overlap, are not aligned to pages, or there is no memory for the table.
    #[error("guest memory can't be viewed: {0}")]
    Regions(String),
    /// The request has more buffers than fit.
    #[error("the request has {0} buffers; at most {TABLE_SIZE} are possible")]
    TooMany(usize),
    /// The private table could not be written or read: a bug.
    #[error("the private descriptor table is unusable: {0}")]
    Table(String),
}

/// A buffer in host memory. One that is not in the view is found out when it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Host address.
    pub addr: usize,
    /// Length in bytes.
    pub len: u32,
}

/// Guest memory under host addresses, with a descriptor table beside it.
#[derive(Debug)]
pub struct View {
    memory: GuestMemoryMmap,
    table: GuestAddress,
}

impl View {
    /// Views these regions: page-aligned start and length in host memory.
    ///
    /// # Safety
    ///
    /// Each region must be mapped, readable and writable, for as long as the view lives, and must not be
    /// accessed through references by anybody: the guest writes to it at any time.
    pub unsafe fn new(regions: &[(NonNull<u8>, usize)]) -> Result<Self, ViewError> {
        let wrong = |e: &dyn std::fmt::Display| ViewError::Regions(e.to_string());
        let own = MmapRegion::new(TABLE_LEN).map_err(|e| wrong(&e))?;
        let table = GuestAddress(own.as_ptr() as u64);
        let mut parts = vec![(own, table)];
        for (start, len) in regions {
            // SAFETY: the caller vouches for the mapping. The region does not own it: `build_raw` never
            // unmaps.
            let region = unsafe {
                MmapRegion::build_raw(
                    start.as_ptr(),
                    *len,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_NORESERVE,
                )
            };
            let region = region.map_err(|e| wrong(&e))?;
            parts.push((region, GuestAddress(start.as_ptr() as u64)));
        }
        let mut mapped = Vec::new();
        for (region, start) in parts {
            mapped.push(
                GuestRegionMmap::new(region, start)
                    .ok_or_else(|| wrong(&"a region ends beyond the address space"))?,
            );
        }
        mapped.sort_by_key(|region| vm_memory_fs::GuestMemoryRegion::start_addr(region).0);
        let memory = GuestMemoryMmap::from_regions(mapped).map_err(|e| wrong(&e))?;
        Ok(View { memory, table })
    }

    /// Puts a request into the table. Gives it as the server wants it.
    pub(crate) fn chain(
        &mut self,
        readable: &[Span],
        writable: &[Span],
    ) -> Result<(&GuestMemoryMmap, DescriptorChain<&GuestMemoryMmap>), ViewError> {
        let count = readable.len() + writable.len();
        if count > usize::from(TABLE_SIZE) {
            return Err(ViewError::TooMany(count));
        }
        let wrong = |e: &dyn std::fmt::Display| ViewError::Table(e.to_string());
        let spans = readable
            .iter()
            .map(|s| (s, 0))
            .chain(writable.iter().map(|s| (s, WRITE)));
        for ((span, flags), i) in spans.zip(0u16..) {
            let last = usize::from(i) + 1 == count;
            let mut raw = [0; DESCRIPTOR_LEN];
            raw[..8].copy_from_slice(&(span.addr as u64).to_le_bytes());
            raw[8..12].copy_from_slice(&span.len.to_le_bytes());
            let flags = flags | if last { 0 } else { NEXT };
            raw[12..14].copy_from_slice(&flags.to_le_bytes());
            raw[14..].copy_from_slice(&(i + 1).to_le_bytes());
            let at = GuestAddress(self.table.0 + u64::from(i) * DESCRIPTOR_LEN as u64);
            self.memory.write_slice(&raw, at).map_err(|e| wrong(&e))?;
        }
        // Flags 0, index 1, and the first entry names descriptor 0.
        let available = GuestAddress(self.table.0 + AVAILABLE_AT as u64);
        self.memory
            .write_slice(&[0, 0, 1, 0, 0, 0], available)
            .map_err(|e| wrong(&e))?;
        let mut queue = Queue::new(TABLE_SIZE).map_err(|e| wrong(&e))?;
        queue
            .try_set_desc_table_address(self.table)
            .map_err(|e| wrong(&e))?;
        queue
            .try_set_avail_ring_address(available)
            .map_err(|e| wrong(&e))?;
        queue
            .try_set_used_ring_address(GuestAddress(self.table.0 + USED_AT as u64))
            .map_err(|e| wrong(&e))?;
        queue.set_ready(true);
        let chain = queue
            .iter(&self.memory)
            .map_err(|e| wrong(&e))?
            .next()
            .ok_or_else(|| wrong(&"it is empty"))?;
        Ok((&self.memory, chain))
    }
}
