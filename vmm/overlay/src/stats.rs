//! What is counted, and how it is shown.

use std::sync::atomic::{AtomicU64, Ordering};

/// A count that only grows.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a pod's pool holds and has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PoolStats {
    /// Bytes of RAM with data, in whole pages.
    pub ram_bytes: u64,
    /// Bytes of RAM the pool may use: the pod's threshold, or its share of the node's budget if less.
    pub ram_limit: u64,
    /// Bytes of disk the spill file takes up.
    pub spill_bytes: u64,
    /// Bytes of disk it may take up.
    pub spill_limit: u64,
    /// Bytes written to the spill file so far.
    pub spilled_bytes: u64,
    /// Chunks moved to the spill file so far.
    pub spilled_chunks: u64,
    /// Chunks whose RAM was given back without writing, the spill file having the same.
    pub dropped_chunks: u64,
    /// Chunks brought back to RAM because they were hot.
    pub returned_chunks: u64,
    /// Writes that had to wait for room.
    pub stalls: u64,
    /// How long they waited together.
    pub stall_nanos: u64,
    /// Failures of the spill file so far.
    pub spill_errors: u64,
}

/// What one disk holds and has done. Bytes read are told by where they came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OverlayStats {
    /// Bytes of memory for knowing where each chunk is.
    pub table_bytes: u64,
    /// Bytes written.
    pub written: u64,
    /// Bytes discarded or zeroed.
    pub discarded: u64,
    /// Bytes read that were in RAM.
    pub read_ram: u64,
    /// Bytes read that were in the spill file.
    pub read_spill: u64,
    /// Bytes read that came from below the overlay.
    pub read_base: u64,
    /// Bytes read that are zeroes everywhere.
    pub read_zero: u64,
    /// Flushes.
    pub flushes: u64,
}

/// A disk's counters.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct DiskCounters {
    pub(crate) written: Counter,
    pub(crate) discarded: Counter,
    pub(crate) read_ram: Counter,
    pub(crate) read_spill: Counter,
    pub(crate) read_base: Counter,
    pub(crate) read_zero: Counter,
    pub(crate) flushes: Counter,
}

/// A pool's counters.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct PoolCounters {
    pub(crate) spilled_bytes: Counter,
    pub(crate) spilled_chunks: Counter,
    pub(crate) dropped_chunks: Counter,
    pub(crate) returned_chunks: Counter,
    pub(crate) stalls: Counter,
    pub(crate) stall_nanos: Counter,
    pub(crate) spill_errors: Counter,
}
