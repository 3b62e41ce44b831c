//! The host's sides of a machine's devices, with their descriptors: nobody numbers descriptors by hand.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;

use kiln_overlay::Seat;
use kiln_vmm_control::{BudgetSeat, End, FdIndex, Flush, Overlay, OverlayPool};

/// Descriptors of a request, and their numbers in it.
#[derive(Debug, Default)]
pub(crate) struct Descriptors<'a>(Vec<BorrowedFd<'a>>);

impl<'a> Descriptors<'a> {
    pub(crate) fn add(&mut self, fd: &'a impl AsFd) -> FdIndex {
        self.add_fd(fd.as_fd())
    }

    fn add_fd(&mut self, fd: BorrowedFd<'a>) -> FdIndex {
        self.0.push(fd);
        // A request has a handful; the wire refuses more than it can number.
        FdIndex::try_from(self.0.len() - 1).unwrap_or(FdIndex::MAX)
    }

    pub(crate) fn all(&self) -> &[BorrowedFd<'a>] {
        &self.0
    }
}

/// RAM and spill file that all overlays of a machine draw on.
#[derive(Debug)]
pub struct Pool<'a> {
    /// Most bytes of RAM.
    pub ram: u64,
    /// Where what has no room in RAM goes, and the most bytes of it.
    pub spill: Option<(&'a File, u64)>,
    /// The place in the node's budget of RAM.
    pub seat: Option<&'a Seat>,
    /// What a guest's flush does.
    pub flush: Flush,
}

/// Sides of devices, by their slots.
#[derive(Debug, Default)]
pub struct Ends<'a> {
    pub(crate) fds: Descriptors<'a>,
    pub(crate) by_slot: Vec<(u8, End)>,
    pub(crate) rings: u8,
}

impl<'a> Ends<'a> {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    fn put(&mut self, slot: u8, end: End) {
        self.by_slot.push((slot, end));
    }

    /// A listening, non-blocking socket in front of a vsock device.
    pub fn listener(&mut self, slot: u8, listener: &'a UnixListener) {
        let end = End::Listener(self.fds.add(listener));
        self.put(slot, end);
    }

    /// The folder that a guest sees by virtio-fs.
    pub fn directory(&mut self, slot: u8, directory: &'a File) {
        let end = End::Directory(self.fds.add(directory));
        self.put(slot, end);
    }

    /// A tap behind a network card.
    pub fn tap(&mut self, slot: u8, tap: &'a impl AsFd) {
        let end = End::Tap(vec![self.fds.add(tap)]);
        self.put(slot, end);
    }

    /// A disk image or block device.
    pub fn disk(&mut self, slot: u8, disk: &'a File, read_only: bool) {
        let fd = self.fds.add(disk);
        self.put(slot, End::Disk { fd, read_only });
        self.disks_later(1);
    }

    /// So many disks are going to be attached. A VMM makes the rings for their I/O before it runs a guest or never; each
    /// takes 16 KiB and six system calls of the start. A disk without one is served by threads.
    pub fn disks_later(&mut self, count: u8) {
        self.rings = self.rings.saturating_add(count);
    }

    /// A writable disk of `size` bytes over a base that never changes. The first overlay brings the pool.
    pub fn overlay(
        &mut self,
        slot: u8,
        base: Option<&'a File>,
        size: u64,
        pool: Option<&Pool<'a>>,
    ) {
        let overlay = overlay(&mut self.fds, base, size, pool);
        self.put(slot, End::Overlay(overlay));
    }
}

pub(crate) fn overlay<'a>(
    fds: &mut Descriptors<'a>,
    base: Option<&'a File>,
    size: u64,
    pool: Option<&Pool<'a>>,
) -> Overlay {
    Overlay {
        base: base.map(|base| fds.add(base)),
        size,
        pool: pool.map(|pool| OverlayPool {
            ram: pool.ram,
            spill: pool.spill.map(|(file, _)| fds.add(file)),
            spill_limit: pool.spill.map_or(0, |(_, limit)| limit),
            budget: pool.seat.map(|seat| BudgetSeat {
                view: fds.add_fd(seat.view()),
                page: fds.add_fd(seat.page()),
                number: seat.number(),
            }),
            flush: pool.flush,
        }),
    }
}
