//! Guest memory as the VMM sees it.

use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// Guest memory, shared and replaceable: hot-plug swaps the map, readers keep the one they hold.
pub type GuestRam = GuestMemoryAtomic<GuestMemoryMmap<()>>;

/// What a memory device may do to the hot-plug region; the machine implements it.
///
/// The region lies at a fixed guest address, is reserved in the host's address space for its full
/// length from the start (costing nothing) and is visible to the guest and to devices only up to what
/// [`set_usable`](Self::set_usable) allowed.
pub trait HotplugRegion: Send + Sync + std::fmt::Debug {
    /// Guest physical address of the region.
    fn base(&self) -> u64;
    /// Its full length in bytes.
    fn len(&self) -> u64;
    /// Whether the region has no length: the machine was made without room for hot-plug.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Granularity of plugging, in bytes: a power of two.
    fn block_size(&self) -> u64;
    /// Makes exactly the first `bytes` (a multiple of the block size) accessible to the guest and devices.
    /// Growing waits for a KVM grace period; shrinking also gives the pages behind it back.
    fn set_usable(&self, bytes: u64) -> std::io::Result<()>;
    /// Gives the pages of `[offset, offset + len)` back to the host; they read as zero afterwards.
    fn discard(&self, offset: u64, len: u64) -> std::io::Result<()>;
}
