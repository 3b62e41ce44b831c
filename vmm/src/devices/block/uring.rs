//! File I/O through io_uring.
//!
//! A ring is restricted, before it is enabled, to the four operations a disk needs: what the VMM's
//! system call filter refuses can't be had through the ring either. Rings are made before that filter is
//! installed, which forbids making them, and lent to disks: a ring knows no file until a request names one.

use std::fmt::{self, Debug};
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use io_uring::register::Restriction;
use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::backend::{BlockOp, BlockRequest, Completion, Submitted};
use super::file::{MAX_IOVECS, fallocate_mode, fill_zero_iovecs};

/// Requests in flight at once; one queue's worth.
const ENTRIES: u32 = 128;

/// Rings that no disk uses now.
#[derive(Clone, Default)]
pub struct Rings(Arc<Mutex<Vec<IoUring>>>);

impl Rings {
    /// Makes `count` rings, or none where the host does not allow them.
    pub fn new(count: usize) -> Self {
        let made: io::Result<Vec<IoUring>> = (0..count).map(|_| ring()).collect();
        let rings = made.unwrap_or_else(|e| {
            tracing::debug!("no io_uring, disks get threads: {e}");
            Vec::new()
        });
        Self(Arc::new(Mutex::new(rings)))
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.lock().len()
    }

    /// A ring for requests on `file`, which must stay open as long as the ring is used.
    pub(super) fn lend(&self, file: RawFd) -> Option<Uring> {
        let ring = self.lock().pop()?;
        Some(Uring::new(ring, file, self.clone()))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<IoUring>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Debug for Rings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Rings").field(&self.count()).finish()
    }
}

/// Makes a ring that can do nothing but what disks need.
fn ring() -> io::Result<IoUring> {
    let ring = IoUring::builder().setup_r_disabled().build(ENTRIES)?;
    let submitter = ring.submitter();
    submitter.register_restrictions(&mut [
        Restriction::sqe_op(opcode::Readv::CODE),
        Restriction::sqe_op(opcode::Writev::CODE),
        Restriction::sqe_op(opcode::Fsync::CODE),
        Restriction::sqe_op(opcode::Fallocate::CODE),
    ])?;
    submitter.register_enable_rings()?;
    Ok(ring)
}

/// One request in the kernel's hands.
struct Operation {
    request: BlockRequest,
    /// Points into `request.buffers` or at a static run of zeroes.
    iovecs: Vec<libc::iovec>,
    /// Bytes done so far: the kernel may do less than it was asked for.
    done: u64,
    /// Zeroing by writing, after the file system declined to do it for us.
    writing_zeroes: bool,
}

// SAFETY: the raw pointers in `iovecs` refer to guest memory, which `request.buffers` keeps mapped, or to
// a static. Both are valid from any thread, and nothing dereferences them in this process.
unsafe impl Send for Operation {}

/// A ring that is lent to a disk, and what is in flight on it.
pub(super) struct Uring {
    ring: ManuallyDrop<IoUring>,
    file: RawFd,
    /// Indexed by the entries' user data.
    operations: Vec<Option<Operation>>,
    free: Vec<usize>,
    in_flight: usize,
    home: Rings,
}

impl Uring {
    fn new(ring: IoUring, file: RawFd, home: Rings) -> Self {
        let slots = ENTRIES as usize;
        Uring {
            ring: ManuallyDrop::new(ring),
            file,
            operations: (0..slots).map(|_| None).collect(),
            free: (0..slots).rev().collect(),
            in_flight: 0,
            home,
        }
    }

    pub(super) fn fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    pub(super) fn submit(&mut self, request: BlockRequest) -> Submitted {
        let Some(slot) = self.free.pop() else {
            return Submitted::Busy(request);
        };
        let mut operation = Operation {
            request,
            iovecs: Vec::new(),
            done: 0,
            writing_zeroes: false,
        };
        let tag = operation.request.tag;
        let entry = match prepare(&mut operation, self.file, slot) {
            Ok(entry) => entry,
            Err(e) => {
                self.free.push(slot);
                return Submitted::Done(Completion {
                    tag,
                    result: Err(e),
                });
            }
        };
        if let Some(place) = self.operations.get_mut(slot) {
            *place = Some(operation);
        }
        self.in_flight += 1;
        if let Err(e) = self.push(&entry) {
            self.retire(slot);
            return Submitted::Done(Completion {
                tag,
                result: Err(e),
            });
        }
        Submitted::Pending
    }

    /// Puts an entry on the ring, making room if needed.
    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        for _ in 0..2 {
            // SAFETY: the buffers and vectors that the entry points to are owned by the operation in
            // the slot it names, which stays there until its completion is seen.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.enter(0)?;
        }
        Err(io::Error::other("io_uring's submission queue stays full"))
    }

    pub(super) fn kick(&mut self) -> io::Result<()> {
        if self.ring.submission().is_empty() {
            Ok(())
        } else {
            self.enter(0)
        }
    }

    /// Submits, and waits for `want` completions.
    fn enter(&mut self, want: usize) -> io::Result<()> {
        let mut patience = 100;
        loop {
            match self.ring.submit_and_wait(want) {
                Ok(_) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // The kernel is short of memory for the moment.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && patience > 0 => {
                    patience -= 1;
                    std::thread::yield_now();
                }
                Err(e) => return Err(e),
            }
        }
    }

    pub(super) fn completions(&mut self, done: &mut Vec<Completion>) -> io::Result<()> {
        loop {
            // One at a time: going on with a short transfer needs the ring.
            let next = self.ring.completion().next();
            let Some(event) = next else { break };
            self.finish(&event, done);
        }
        self.kick()
    }

    pub(super) fn drain(&mut self, done: &mut Vec<Completion>) -> io::Result<()> {
        while self.in_flight > 0 {
            self.enter(1)?;
            self.completions(done)?;
        }
        Ok(())
    }

    fn finish(&mut self, event: &cqueue::Entry, done: &mut Vec<Completion>) {
        let Ok(slot) = usize::try_from(event.user_data()) else {
            return;
        };
        let Some(Some(operation)) = self.operations.get_mut(slot) else {
            return;
        };
        let tag = operation.request.tag;
        let result = match advance(operation, event.result()) {
            Progress::Done(result) => result,
            Progress::Again => match prepare(operation, self.file, slot) {
                Ok(entry) => match self.push(&entry) {
                    Ok(()) => return,
                    Err(e) => Err(e),
                },
                Err(e) => Err(e),
            },
        };
        self.retire(slot);
        done.push(Completion { tag, result });
    }

    fn retire(&mut self, slot: usize) {
        if let Some(place) = self.operations.get_mut(slot) {
            *place = None;
        }
        self.free.push(slot);
        self.in_flight -= 1;
    }
}

enum Progress {
    Done(io::Result<()>),
    Again,
}

/// Takes in what the kernel says about an operation.
fn advance(operation: &mut Operation, result: i32) -> Progress {
    let moves_data =
        matches!(operation.request.op, BlockOp::Read | BlockOp::Write) || operation.writing_zeroes;
    if result < 0 {
        let error = io::Error::from_raw_os_error(-result);
        if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) {
            return Progress::Again;
        }
        let unsupported = matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS));
        if unsupported && !moves_data {
            if matches!(operation.request.op, BlockOp::WriteZeroes { .. }) {
                operation.writing_zeroes = true;
                return Progress::Again;
            }
            return Progress::Done(Err(io::ErrorKind::Unsupported.into()));
        }
        return Progress::Done(Err(error));
    }
    if !moves_data {
        return Progress::Done(Ok(()));
    }
    operation.done = operation
        .done
        .saturating_add(u64::from(result.unsigned_abs()));
    if operation.done >= operation.request.len {
        Progress::Done(Ok(()))
    } else if result == 0 {
        // The file is shorter than the disk: it was cut after it was attached.
        Progress::Done(Err(io::ErrorKind::UnexpectedEof.into()))
    } else {
        Progress::Again
    }
}

/// The ring entry for what is left of an operation.
fn prepare(operation: &mut Operation, file: RawFd, slot: usize) -> io::Result<squeue::Entry> {
    let fd = types::Fd(file);
    let request = &operation.request;
    let offset = request.offset.saturating_add(operation.done);
    let entry = match request.op {
        BlockOp::Read | BlockOp::Write => {
            request
                .buffers
                .iovecs(operation.done, &mut operation.iovecs)
                .map_err(io::Error::other)?;
            operation.iovecs.truncate(MAX_IOVECS);
            vectored(operation, fd, offset)
        }
        BlockOp::WriteZeroes { .. } if operation.writing_zeroes => {
            fill_zero_iovecs(
                &mut operation.iovecs,
                request.len.saturating_sub(operation.done),
            );
            vectored(operation, fd, offset)
        }
        BlockOp::Flush => opcode::Fsync::new(fd)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        BlockOp::Discard | BlockOp::WriteZeroes { .. } => opcode::Fallocate::new(fd, request.len)
            .offset(request.offset)
            .mode(fallocate_mode(request.op))
            .build(),
    };
    Ok(entry.user_data(slot as u64))
}

fn vectored(operation: &Operation, fd: types::Fd, offset: u64) -> squeue::Entry {
    // At most `MAX_IOVECS`.
    let count = operation.iovecs.len() as u32;
    let first = operation.iovecs.as_ptr();
    if operation.request.op == BlockOp::Read {
        opcode::Readv::new(fd, first, count).offset(offset).build()
    } else {
        opcode::Writev::new(fd, first, count).offset(offset).build()
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        let drained = self.drain(&mut Vec::new());
        // SAFETY: dropped once, here, and not used any more.
        let ring = unsafe { ManuallyDrop::take(&mut self.ring) };
        if drained.is_ok() {
            self.home.lock().push(ring);
            return;
        }
        // The kernel may still write to the buffers of what is in flight: keep them for ever.
        for operation in self.operations.drain(..).flatten() {
            std::mem::forget(operation);
        }
    }
}

impl Debug for Uring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uring")
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddressSpace;

    use super::*;
    use crate::devices::block::{IoBuffers, RequestTag};
    use crate::devices::chain::Segments;

    /// A pool of one ring, and a file.
    fn one_ring() -> Option<(Rings, std::fs::File)> {
        let rings = Rings::new(1);
        if rings.count() == 0 {
            eprintln!("skipped: no io_uring on this host");
            return None;
        }
        Some((rings, tempfile::tempfile().unwrap()))
    }

    #[test]
    fn ring_refuses_what_a_disk_does_not_need() {
        let Some((rings, file)) = one_ring() else {
            return;
        };
        let mut uring = rings.lend(file.as_raw_fd()).unwrap();
        let entry = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/".as_ptr()).build();
        // SAFETY: the path is static.
        unsafe { uring.ring.submission().push(&entry.user_data(u64::MAX)) }.unwrap();
        uring.ring.submit_and_wait(1).unwrap();
        let answer = uring.ring.completion().next().unwrap();
        assert_eq!(answer.result(), -libc::EACCES);
    }

    #[test]
    fn a_ring_is_lent_to_one_disk_at_a_time_and_comes_back_empty() {
        let Some((rings, file)) = one_ring() else {
            return;
        };
        let mut uring = rings.lend(file.as_raw_fd()).unwrap();
        let number = uring.fd();
        assert!(rings.lend(file.as_raw_fd()).is_none());
        let memory = crate::devices::testing::memory(4096).memory().into_inner();
        let flush = BlockRequest {
            tag: RequestTag(1),
            op: BlockOp::Flush,
            offset: 0,
            len: 0,
            buffers: IoBuffers::new(memory, Segments::default()),
        };
        assert!(matches!(uring.submit(flush), Submitted::Pending));
        drop(uring);
        let mut again = rings.lend(file.as_raw_fd()).unwrap();
        assert_eq!(again.fd(), number);
        assert!(again.ring.completion().next().is_none());
        assert!(again.ring.submission().is_empty());
    }
}
