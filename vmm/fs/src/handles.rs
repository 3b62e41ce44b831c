//! What the guest has open: files and folders, each by a number that is never given twice.
//!
//! Not trusted: the numbers that the guest gives. One counts only together with the node it was given for.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use crate::host::{Answer, Errno};

#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) node: u64,
    pub(crate) fd: OwnedFd,
    pub(crate) folder: bool,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    /// Something was written by it since it was last flushed.
    pub(crate) written: bool,
    /// Of a folder: where the host goes on reading it.
    pub(crate) position: i64,
    /// It has, or had, a lock on the whole file.
    pub(crate) locked: bool,
    /// Owners of locks that were made by it.
    pub(crate) owners: Vec<u64>,
}

impl Handle {
    /// Of a file that was opened with these flags.
    pub(crate) fn file(node: u64, fd: OwnedFd, flags: i32) -> Self {
        let access = flags & libc::O_ACCMODE;
        Handle {
            node,
            fd,
            folder: false,
            readable: access != libc::O_WRONLY,
            writable: access != libc::O_RDONLY,
            written: false,
            position: 0,
            locked: false,
            owners: Vec::new(),
        }
    }

    pub(crate) fn folder(node: u64, fd: OwnedFd) -> Self {
        Handle {
            folder: true,
            ..Self::file(node, fd, libc::O_RDONLY)
        }
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

#[derive(Debug, Default)]
pub(crate) struct Handles {
    by_number: HashMap<u64, Handle>,
    last: u64,
}

impl Handles {
    pub(crate) fn add(&mut self, handle: Handle) -> u64 {
        self.last += 1;
        self.by_number.insert(self.last, handle);
        self.last
    }

    fn any(&mut self, number: u64, node: u64, folder: bool) -> Answer<&mut Handle> {
        let handle = self.by_number.get_mut(&number);
        handle
            .filter(|handle| handle.node == node && handle.folder == folder)
            .ok_or(Errno(libc::EBADF))
    }

    /// An open file of that node.
    pub(crate) fn file(&mut self, number: u64, node: u64) -> Answer<&mut Handle> {
        self.any(number, node, false)
    }

    /// An open folder that is that node.
    pub(crate) fn folder(&mut self, number: u64, node: u64) -> Answer<&mut Handle> {
        self.any(number, node, true)
    }

    pub(crate) fn remove(&mut self, number: u64, node: u64, folder: bool) -> Answer<Handle> {
        self.any(number, node, folder)?;
        self.by_number.remove(&number).ok_or(Errno(libc::EBADF))
    }

    pub(crate) fn clear(&mut self) {
        self.by_number.clear();
    }
}
