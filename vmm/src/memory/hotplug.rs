//! The hot-plug window: what of it the guest can reach, and pages that it gives back.

use std::fmt::Debug;
use std::io;

use super::mapping::Mapping;
use super::slots::{Memory, SLOT_WINDOW, regions};
use super::{HOTPLUG_BLOCK, PAGE};
use crate::layout;

/// What a memory device may do to the hot-plug region; the machine implements it.
///
/// The region lies at a fixed guest address, is reserved in the host's address space for its full
/// length from the start (costing nothing) and is visible to the guest and to devices only up to what
/// [`set_usable`](Self::set_usable) allowed.
pub trait HotplugRegion: Send + Sync + Debug {
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
    /// Makes at least the first `bytes` (a multiple of the block size) accessible to the guest and
    /// devices. Growing waits for a KVM grace period. Shrinking hides whole slots only, so that memory
    /// still in use is never taken away from under the guest; pages behind `bytes` are given back.
    fn set_usable(&self, bytes: u64) -> io::Result<()>;
    /// Gives the pages of `[offset, offset + len)` back to the host; they read as zero afterwards.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;
}

impl HotplugRegion for Memory {
    fn base(&self) -> u64 {
        layout::hotplug_base(self.shape.ram)
    }

    fn len(&self) -> u64 {
        self.shape.hotplug
    }

    fn block_size(&self) -> u64 {
        HOTPLUG_BLOCK
    }

    fn set_usable(&self, bytes: u64) -> io::Result<()> {
        let Some(window) = &self.window else {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "there is no hot-plug window",
            ));
        };
        if bytes > self.shape.hotplug || !bytes.is_multiple_of(HOTPLUG_BLOCK) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{bytes} bytes do not fit a window of {}",
                    self.shape.hotplug
                ),
            ));
        }
        let mut slots = self.slots();
        let mut covered: u64 = slots.lens.iter().sum();
        // Take away whole slots behind the new end, last first; devices lose sight of them before KVM does.
        let mut keep = slots.lens.len();
        let mut kept = covered;
        while let Some(last) = keep.checked_sub(1).and_then(|i| slots.lens.get(i).copied()) {
            if kept - last < bytes {
                break;
            }
            keep -= 1;
            kept -= last;
        }
        if kept < covered {
            let map =
                regions(&self.shape, &self.base, Some(window), kept).map_err(io::Error::other)?;
            self.replace_map(map);
            while slots.lens.len() > keep {
                let len = slots.lens.pop().unwrap_or_default();
                covered -= len;
                let id = slot_id(slots.lens.len());
                self.set_slot(id, self.base() + covered, 0, window, covered)
                    .map_err(io::Error::other)?;
            }
        }
        if bytes > covered {
            let id = slot_id(slots.lens.len());
            self.set_slot(id, self.base() + covered, bytes - covered, window, covered)
                .map_err(io::Error::other)?;
            slots.lens.push(bytes - covered);
            let map =
                regions(&self.shape, &self.base, Some(window), bytes).map_err(io::Error::other)?;
            self.replace_map(map);
        } else if bytes < slots.usable {
            let from_file = slots.from_file;
            drop_pages(window, bytes, slots.usable - bytes, from_file)?;
        }
        slots.usable = bytes;
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let Some(window) = &self.window else {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "there is no hot-plug window",
            ));
        };
        let from_file = self.slots().from_file;
        drop_pages(window, offset, len, from_file)
    }
}

/// Gives pages of the window back; they read as zero afterwards. So many bytes at its start show a file.
fn drop_pages(window: &Mapping, offset: u64, len: u64, from_file: u64) -> io::Result<()> {
    if offset.checked_add(len).is_none_or(|end| end > window.len())
        || !offset.is_multiple_of(PAGE)
        || !len.is_multiple_of(PAGE)
    {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    // Dropping pages of a private file mapping would bring the file's contents back: put zero pages there.
    let file_len = from_file.saturating_sub(offset).min(len);
    window.replace(offset, file_len, None)?;
    let (offset, len) = (offset + file_len, len - file_len);
    window.drop_pages(offset, len)
}

fn slot_id(index: usize) -> u32 {
    // A window has far fewer slots than KVM's 32764: each is at least one block and most are gigabytes.
    SLOT_WINDOW + u32::try_from(index).unwrap_or(u32::MAX - SLOT_WINDOW)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn discarded_file_pages_read_as_zero() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7u8; 2 << 20]).unwrap();
        let window = Mapping::reserve(4 << 20).unwrap();
        window.replace(0, 2 << 20, Some((&file, 0))).unwrap();
        assert_eq!(window.bytes(0, 1).unwrap(), [7]);
        drop_pages(&window, 0, 4 << 20, 2 << 20).unwrap();
        assert_eq!(window.bytes(0, 4 << 20).unwrap().iter().max(), Some(&0));
    }
}
