//! Ranges of this process's address space that hold guest memory.

use std::fmt::{self, Debug};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestRegionMmap};

use super::{HUGE_PAGE, MemoryError, PAGE};

/// A host mapping that lives as long as the process.
#[derive(Clone, Copy)]
pub(super) struct Mapping {
    start: NonNull<u8>,
    len: u64,
}

// SAFETY: a Mapping is an address range that is mapped for the rest of the process's life; it owns no
// thread-bound state, and all access to its bytes goes through vm-memory's volatile operations.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:p}+{:#x}", self.start, self.len)
    }
}

impl Mapping {
    /// Reserves `len` bytes of zero pages, aligned for huge ones. They cost nothing until touched.
    pub(super) fn reserve(len: u64) -> Result<Self, MemoryError> {
        let reserved = Self::reserve_anywhere(len.saturating_add(HUGE_PAGE))?;
        let start = reserved.start.as_ptr();
        let huge = usize::try_from(HUGE_PAGE).unwrap_or(1);
        let start = start.wrapping_add(start.align_offset(huge));
        Self::from_mmap(start.cast(), len)
    }

    fn reserve_anywhere(len: u64) -> Result<Self, MemoryError> {
        let bytes = usize::try_from(len).map_err(|_| MemoryError::Size {
            bytes: len,
            of: PAGE,
        })?;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        Self::from_mmap(start, len)
    }

    /// Gives the kernel an advice that leaves contents as they are.
    pub(super) fn advise(&self, at: u64, len: u64, advice: libc::c_int) -> io::Result<()> {
        let (at, len) = self.range(at, len)?;
        // SAFETY: the range is in this mapping, and whatever the advice, its bytes stay what they are.
        let failed = unsafe { libc::madvise(self.start.as_ptr().add(at).cast(), len, advice) };
        if failed == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Gives the pages of `[at, at + len)` back to the host. Where the mapping shows a file, that comes back.
    pub(super) fn drop_pages(&self, at: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let (at, len) = self.range(at, len)?;
        // SAFETY: the range lies inside this mapping (checked above), whose pages belong to the guest alone; they stay
        // mapped, and reads see zeroes or the file.
        let failed =
            unsafe { libc::madvise(self.start.as_ptr().add(at).cast(), len, libc::MADV_DONTNEED) };
        if failed == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Place and length of a range that has to be in this mapping.
    fn range(&self, at: u64, len: u64) -> io::Result<(usize, usize)> {
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok((
            usize::try_from(at).map_err(invalid)?,
            usize::try_from(len).map_err(invalid)?,
        ))
    }

    fn from_mmap(start: *mut libc::c_void, len: u64) -> Result<Self, MemoryError> {
        if start == libc::MAP_FAILED {
            return Err(MemoryError::Map {
                bytes: len,
                source: io::Error::last_os_error(),
            });
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| MemoryError::Map {
            bytes: len,
            source: io::Error::from_raw_os_error(libc::ENOMEM),
        })?;
        Ok(Self { start, len })
    }

    /// Puts other pages in the place of `[at, at + len)` of this mapping: a private view of `file`, or zero pages.
    pub(super) fn replace(&self, at: u64, len: u64, file: Option<(&File, u64)>) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let (at, bytes) = self.range(at, len)?;
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let (fd, offset, anon) = match file {
            Some((f, o)) => (f.as_raw_fd(), libc::off_t::try_from(o).map_err(invalid)?, 0),
            None => (-1, 0, libc::MAP_ANONYMOUS),
        };
        // SAFETY: the range was checked to lie inside this mapping, which is ours alone; MAP_FIXED replaces its
        // pages in one step, so the address stays mapped throughout for devices and KVM that use it.
        let got = unsafe {
            libc::mmap(
                self.start.as_ptr().add(at).cast(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED | anon,
                fd,
                offset,
            )
        };
        if got == libc::MAP_FAILED {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// A vm-memory region over `[at, at + len)`.
    pub(super) fn region(
        &self,
        at: u64,
        len: u64,
        gpa: u64,
    ) -> Result<GuestRegionMmap<()>, MemoryError> {
        let bad = |e: &dyn fmt::Display| MemoryError::Regions(e.to_string());
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(MemoryError::Regions(format!(
                "{len:#x} bytes at {at:#x} are too many"
            )));
        }
        let at = usize::try_from(at).map_err(|e| bad(&e))?;
        let bytes = usize::try_from(len).map_err(|e| bad(&e))?;
        // SAFETY: `at + len` was checked against the mapping, which stays for the life of the process; a
        // region made from a raw pointer does not unmap it.
        let region = unsafe {
            MmapRegionBuilder::<()>::new(bytes)
                .with_raw_mmap_pointer(self.start.as_ptr().add(at))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .build()
        }
        .map_err(|e| bad(&e))?;
        GuestRegionMmap::new(region, GuestAddress(gpa))
            .ok_or_else(|| MemoryError::Regions(format!("region at {gpa:#x} overflows")))
    }

    /// Where `at` is in this process's address space.
    pub(super) fn address(&self, at: u64) -> u64 {
        self.start.as_ptr() as u64 + at
    }

    /// Its length.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// The bytes `[at, at + len)` as the snapshot writer reads them.
    pub(super) fn bytes(&self, at: u64, len: u64) -> Option<&[u8]> {
        let end = at.checked_add(len)?;
        if end > self.len {
            return None;
        }
        let (at, len) = (usize::try_from(at).ok()?, usize::try_from(len).ok()?);
        // SAFETY: in range of a live mapping, as just checked. The caller holds the machine still (vCPUs
        // stopped, devices paused), so nothing writes the bytes while the slice is in use.
        Some(unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(at), len) })
    }
}
