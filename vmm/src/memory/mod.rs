//! Guest memory: base RAM, the hot-plug window, and the KVM slots that show them to the guest.
//!
//! All `mmap` calls for guest memory are here (`mapping`). Base RAM is one host mapping, whatever holes the guest
//! sees; offset in that mapping = offset in a memory file. The hot-plug window is reserved behind its own
//! mapping, and in a memory file it follows base RAM. Neither mapping ever moves or goes away.
//!
//! What the pages hold at first is decided once, before there is a VM (`source`); from then on they are shown to
//! the guest and the devices (`slots`), and grow and shrink (`hotplug`).

mod hotplug;
mod mapping;
mod slots;
mod source;

use std::io;

use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::layout;

pub use hotplug::HotplugRegion;
pub use slots::Memory;
pub use source::{FileSource, HostMemory};

/// Guest memory, shared and replaceable: hot-plug swaps the map, readers keep the one they hold.
pub type GuestRam = GuestMemoryAtomic<GuestMemoryMmap<()>>;

/// Page size of guest and host.
pub const PAGE: u64 = 4096;
/// Size of a huge page, and so of the holes worth a mapping of their own.
pub const HUGE_PAGE: u64 = 2 << 20;
/// Plugging granularity of the hot-plug window.
pub const HOTPLUG_BLOCK: u64 = 2 << 20;

/// Why guest memory could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A size that can't be.
    #[error("memory size of {bytes} bytes is not a multiple of {of} or too large")]
    Size {
        /// The size asked for.
        bytes: u64,
        /// What it must be a multiple of.
        of: u64,
    },
    /// A saved machine's memory can't be as its state says.
    #[error("the state file's {0} can't be; bake again")]
    Damaged(&'static str),
    /// The kernel refused a mapping.
    #[error("mapping {bytes} bytes of guest memory failed")]
    Map {
        /// Length of the mapping.
        bytes: u64,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The pieces do not form a map.
    #[error("guest memory map is inconsistent: {0}")]
    Regions(String),
    /// KVM refused a memory slot.
    #[error("KVM refused the memory slot at {gpa:#x}")]
    Slot {
        /// Guest address of the slot.
        gpa: u64,
        /// KVM's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// Sizes that define a machine's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryShape {
    /// Base RAM in bytes.
    pub ram: u64,
    /// Length of the hot-plug window in bytes; 0 for none.
    pub hotplug: u64,
    /// How much of the window the guest can reach now, as consecutive slot lengths.
    pub usable: u64,
}

impl MemoryShape {
    pub(crate) fn check(&self) -> Result<(), MemoryError> {
        const MAX: u64 = 1 << 42;
        for (bytes, of) in [
            (self.ram, PAGE),
            (self.hotplug, layout::HOTPLUG_ALIGN),
            (self.usable, HOTPLUG_BLOCK),
        ] {
            if bytes % of != 0 || bytes > MAX {
                return Err(MemoryError::Size { bytes, of });
            }
        }
        // The kernel and its boot structures need some room.
        if self.ram < 16 << 20 {
            return Err(MemoryError::Size {
                bytes: self.ram,
                of: 16 << 20,
            });
        }
        if self.usable > self.hotplug {
            return Err(MemoryError::Size {
                bytes: self.usable,
                of: HOTPLUG_BLOCK,
            });
        }
        Ok(())
    }

    /// Length of the machine's memory file. A shape that a damaged file names may be of any size.
    pub fn file_len(&self) -> u64 {
        self.ram.saturating_add(self.usable)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_past_the_mmio_hole_continues_at_4g() {
        let ram = 4 << 30;
        assert_eq!(layout::split_ram(ram), (3 << 30, 1 << 30));
        assert_eq!(layout::hotplug_base(ram), 0x1_4000_0000);
        assert_eq!(layout::hotplug_base(256 << 20), 0x1_0000_0000);
    }
}
