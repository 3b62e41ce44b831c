//! What a machine's pages hold when there is no VM yet: zeroes, or what a machine was saved with.
//!
//! Whoever else can tell what a saved machine's pages hold stands beside [`FileSource`] and fills the same mappings.

use std::fs::File;
use std::io;

use super::mapping::Mapping;
use super::{HUGE_PAGE, MemoryError, MemoryShape};

/// A saved machine's memory in one file: base RAM, then the usable part of the hot-plug window.
#[derive(Debug)]
pub struct FileSource<'a> {
    /// The file, as long as [`MemoryShape::file_len`] says. Pages past its end would end the process when touched.
    pub file: &'a File,
    /// Whole huge pages of base RAM that hold no data, as ranges from start to end.
    pub holes: &'a [(u64, u64)],
    /// Whether no page of base RAM is read but those that are touched, so that the page cache tells afterwards which ones
    /// were.
    pub singly: bool,
}

impl FileSource<'_> {
    /// Shows the file in fresh mappings: reads see it, writes stay in this process. Takes as long for a large file as for
    /// a small one.
    fn fill(
        &self,
        shape: &MemoryShape,
        base: &Mapping,
        window: Option<&Mapping>,
    ) -> Result<(), MemoryError> {
        let failed = |bytes| move |source| MemoryError::Map { bytes, source };
        base.replace(0, shape.ram, Some((self.file, 0)))
            .map_err(failed(shape.ram))?;
        for (start, end) in self.holes {
            let len = end.checked_sub(*start);
            let len = len.filter(|_| *start % HUGE_PAGE == 0 && *end <= shape.ram);
            let len = len.ok_or(MemoryError::Damaged("list of empty pages"))?;
            free_hole(base, *start, len).map_err(failed(len))?;
        }
        if let Some(window) = window {
            window
                .replace(0, shape.usable, Some((self.file, shape.ram)))
                .map_err(failed(shape.usable))?;
        }
        if self.singly {
            base.advise(0, shape.ram, libc::MADV_RANDOM)
                .map_err(failed(shape.ram))?;
        }
        Ok(())
    }
}

/// Puts zero pages in the place of a large hole of a file. The first touch of a page of a file's hole
/// takes the kernel two pages and a copy, and each page is one touch; this way it takes a huge page for all
/// of them. Small holes stay: every replacement is one more mapping.
fn free_hole(base: &Mapping, start: u64, len: u64) -> io::Result<()> {
    base.replace(start, len, None)?;
    // A kernel without huge pages refuses it, and small ones do as well.
    let _ = base.advise(start, len, libc::MADV_HUGEPAGE);
    Ok(())
}

/// Host mappings, made before there is a VM to show them to.
#[derive(Debug)]
pub struct HostMemory {
    pub(super) shape: MemoryShape,
    pub(super) base: Mapping,
    pub(super) window: Option<Mapping>,
    /// Bytes at the window's start whose pages come back with what they were saved with when they are dropped.
    pub(super) window_from_file: u64,
}

impl HostMemory {
    /// Zeroed memory for a machine that boots.
    pub fn fresh(shape: MemoryShape) -> Result<Self, MemoryError> {
        shape.check()?;
        Self::reserve(shape)
    }

    /// The memory of a machine that was saved.
    pub fn from_file(shape: MemoryShape, source: &FileSource<'_>) -> Result<Self, MemoryError> {
        let damaged = |_| MemoryError::Damaged("memory size");
        shape.check().map_err(damaged)?;
        let mut memory = Self::reserve(shape)?;
        source.fill(&shape, &memory.base, memory.window.as_ref())?;
        memory.window_from_file = shape.usable;
        Ok(memory)
    }

    fn reserve(shape: MemoryShape) -> Result<Self, MemoryError> {
        let window = match shape.hotplug {
            0 => None,
            len => Some(Mapping::reserve(len)?),
        };
        Ok(Self {
            shape,
            base: Mapping::reserve(shape.ram)?,
            window,
            window_from_file: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use vm_memory::{Bytes, GuestAddress};

    use crate::memory::slots::regions;

    const RAM: u64 = 16 << 20;

    fn shape() -> MemoryShape {
        MemoryShape {
            ram: RAM,
            hotplug: 0,
            usable: 0,
        }
    }

    fn from_file(file: &File, holes: &[(u64, u64)]) -> Result<HostMemory, MemoryError> {
        let source = FileSource {
            file,
            holes,
            singly: true,
        };
        HostMemory::from_file(shape(), &source)
    }

    #[test]
    fn writes_to_a_private_file_view_stay_out_of_the_file() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(RAM).unwrap();
        let host = from_file(&file, &[]).unwrap();
        let ram = regions(&shape(), &host.base, None, 0).unwrap();
        ram.write_obj(1u64, GuestAddress(0x1000)).unwrap();
        let mut byte = [0u8; 8];
        file.read_exact_at(&mut byte, 0x1000).unwrap();
        assert_eq!(byte, [0; 8]);
    }

    #[test]
    fn whole_huge_pages_without_data_are_no_longer_the_files() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(RAM).unwrap();
        for at in [0, (6 << 20) + 4096, RAM - 1] {
            file.write_all_at(&[7], at).unwrap();
        }
        let host = from_file(&file, &[(2 << 20, 6 << 20), (8 << 20, 14 << 20)]).unwrap();
        assert_eq!(host.base.address(0) % HUGE_PAGE, 0);
        // What is written to the file from now on shows where the file still does.
        for at in [(4 << 20) + 4096, (6 << 20) + 8192, 10 << 20] {
            file.write_all_at(&[9], at).unwrap();
        }
        let bytes = host.base.bytes(0, RAM).unwrap();
        let data = bytes.iter().zip(0u64..).filter(|(byte, _)| **byte != 0);
        let at: Vec<u64> = data.map(|(_, at)| at).collect();
        assert_eq!(at, [0, (6 << 20) + 4096, (6 << 20) + 8192, RAM - 1]);
    }

    #[test]
    fn sizes_and_holes_that_can_not_have_been_saved_are_damage() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(RAM).unwrap();
        for hole in [(0, RAM + HUGE_PAGE), (4 << 20, 2 << 20), (4096, 2 << 20)] {
            let error = from_file(&file, &[hole]).unwrap_err();
            assert!(matches!(error, MemoryError::Damaged(_)), "{hole:?}");
        }
        let shape = MemoryShape {
            ram: RAM + 1,
            ..shape()
        };
        let source = FileSource {
            file: &file,
            holes: &[],
            singly: false,
        };
        let error = HostMemory::from_file(shape, &source).unwrap_err();
        assert!(matches!(error, MemoryError::Damaged(_)), "{error:?}");
    }

    #[test]
    fn window_follows_base_ram_in_the_file() {
        let shape = MemoryShape {
            ram: RAM,
            hotplug: 1 << 30,
            usable: 4 << 20,
        };
        let file = tempfile::tempfile().unwrap();
        file.set_len(shape.file_len()).unwrap();
        file.write_all_at(&[7], RAM + 4096).unwrap();
        let source = FileSource {
            file: &file,
            holes: &[],
            singly: false,
        };
        let host = HostMemory::from_file(shape, &source).unwrap();
        let window = host.window.unwrap();
        assert_eq!(window.bytes(4096, 1).unwrap(), [7]);
        assert_eq!(window.bytes(shape.usable, 4096).unwrap(), [0; 4096]);
    }
}
