//! The file's layout, and mappings of it.
//!
//! ```text
//! page 0     header, then the table of members, 16 bytes each
//! pages 1–4  the rest of the table
//! page 5+N   what the VMM in slot N says
//! ```

use std::fmt;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"kilnBUDG");
/// Also in the file's name, so that kilns of two versions can share a node.
pub(super) const VERSION: u32 = 2;
/// Members a node can have: the kubelet runs 110 pods by default, and large nodes some hundreds.
pub(super) const SLOTS: usize = 1024;
const PAGE: usize = 4096;

#[repr(C, align(64))]
pub(super) struct Header {
    pub(super) magic: AtomicU64,
    pub(super) version: AtomicU32,
    pub(super) slots: AtomicU32,
    pub(super) total: AtomicU64,
    /// No slot from this one on has ever had a member: nobody need look further, nor have pages for them.
    pub(super) in_use: AtomicU32,
}

#[repr(C)]
pub(super) struct Entry {
    /// The most that this member's figures count for.
    pub(super) limit: AtomicU64,
    pub(super) joined: AtomicU32,
    _reserved: u32,
}

/// What only root processes write.
#[repr(C, align(4096))]
pub(super) struct Trusted {
    pub(super) header: Header,
    pub(super) entries: [Entry; SLOTS],
}

/// What one VMM writes.
#[repr(C, align(4096))]
pub(super) struct Page {
    /// What the member's workers sleep on.
    pub(super) wake: AtomicU32,
    /// Bytes on the member's account.
    pub(super) used: AtomicU64,
    /// Bytes the member would like, if that is more.
    pub(super) claim: AtomicU64,
}

#[repr(C)]
pub(super) struct Shared {
    pub(super) trusted: Trusted,
    pub(super) pages: [Page; SLOTS],
}

pub(super) const FILE_LEN: u64 = size_of::<Shared>() as u64;

const _: () = assert!(size_of::<Header>() == 64 && size_of::<Entry>() == 16);
const _: () = assert!(size_of::<Trusted>() == 5 * PAGE && size_of::<Page>() == PAGE);
const _: () = assert!(size_of::<Shared>() == (5 + SLOTS) * PAGE);

/// Where a slot's page is in the file. Its lock is on the page's bytes.
pub(super) fn page_offset(slot: usize) -> i64 {
    (size_of::<Trusted>() + slot * PAGE) as i64
}

/// A part of the file whose every bit pattern is valid and that others change at any time.
///
/// # Safety
///
/// The type consists of atomics, and of padding that nobody reads.
pub(super) unsafe trait Part {}

// SAFETY: all atomics.
unsafe impl Part for Trusted {}
// SAFETY: all atomics.
unsafe impl Part for Page {}
// SAFETY: both of the above.
unsafe impl Part for Shared {}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Then the atomics may be loaded, relaxed, and nothing else.
    Read,
    Write,
}

/// A shared mapping of a part of the file.
pub(super) struct Mapping<T: Part> {
    at: NonNull<T>,
    part: PhantomData<T>,
}

// SAFETY: the pointer is to a shared mapping of nothing but atomics, which lives as long as `self`.
unsafe impl<T: Part> Send for Mapping<T> {}
// SAFETY: as above.
unsafe impl<T: Part> Sync for Mapping<T> {}

impl<T: Part> Mapping<T> {
    /// Maps the part that begins at `offset`, which the file must be long enough for.
    pub(super) fn new(file: &File, offset: i64, access: Access) -> io::Result<Self> {
        let protection = match access {
            Access::Read => libc::PROT_READ,
            Access::Write => libc::PROT_READ | libc::PROT_WRITE,
        };
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<T>(),
                protection,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                offset,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let at = NonNull::new(memory.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Mapping {
            at,
            part: PhantomData,
        })
    }

    /// Whether the kernel would let this process write here. It is then allowed to.
    pub(super) fn can_be_made_writable(&self) -> bool {
        // SAFETY: nothing relies on this memory being read-only to be sound.
        let result = unsafe {
            libc::mprotect(
                self.at.as_ptr().cast(),
                size_of::<T>(),
                libc::PROT_READ | libc::PROT_WRITE,
            )
        };
        result == 0
    }

    #[cfg(test)]
    pub(super) fn address(&self) -> *mut libc::c_void {
        self.at.as_ptr().cast()
    }
}

impl<T: Part> fmt::Debug for Mapping<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Where it is, not the thousands of numbers in it.
        f.debug_tuple("Mapping").field(&self.at).finish()
    }
}

impl<T: Part> Deref for Mapping<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: mapped with this size until `self` is dropped; all atomics, any bits are valid.
        unsafe { self.at.as_ref() }
    }
}

impl<T: Part> Drop for Mapping<T> {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this size; every borrow of it borrows `self`.
        unsafe { libc::munmap(self.at.as_ptr().cast(), size_of::<T>()) };
    }
}
