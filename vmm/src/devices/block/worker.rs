//! File I/O on a thread of its own, for hosts whose kernel has no io_uring to offer.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::backend::{BlockOp, BlockRequest, Completion, Submitted};
use super::file::{MAX_IOVECS, fallocate_mode, fill_zero_iovecs};

#[derive(Debug)]
struct Shared {
    finished: Mutex<Vec<Completion>>,
    changed: Condvar,
    event: EventFd,
}

impl Shared {
    fn finished(&self) -> MutexGuard<'_, Vec<Completion>> {
        self.finished.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread that does one request after the other.
#[derive(Debug)]
pub(super) struct Worker {
    requests: Option<Sender<BlockRequest>>,
    shared: Arc<Shared>,
    in_flight: usize,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a thread that does each request by `execute`.
    pub(super) fn new(
        execute: impl FnMut(&BlockRequest) -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            finished: Mutex::default(),
            changed: Condvar::new(),
            event: EventFd::new(EFD_NONBLOCK)?,
        });
        let (requests, incoming) = channel();
        let thread = std::thread::Builder::new().name("disk".to_owned()).spawn({
            let shared = shared.clone();
            move || work(execute, &incoming, &shared)
        })?;
        Ok(Worker {
            requests: Some(requests),
            shared,
            in_flight: 0,
            thread: Some(thread),
        })
    }

    pub(super) fn fd(&self) -> RawFd {
        self.shared.event.as_raw_fd()
    }

    pub(super) fn submit(&mut self, request: BlockRequest) -> Submitted {
        let tag = request.tag;
        match self
            .requests
            .as_ref()
            .map(|requests| requests.send(request))
        {
            Some(Ok(())) => {
                self.in_flight += 1;
                Submitted::Pending
            }
            _ => Submitted::Done(Completion {
                tag,
                result: Err(io::Error::other("the disk's thread is gone")),
            }),
        }
    }

    pub(super) fn completions(&mut self, done: &mut Vec<Completion>) {
        // Nothing to read means nothing has finished since.
        let _ = self.shared.event.read();
        let mut finished = self.shared.finished();
        self.in_flight -= finished.len();
        done.append(&mut finished);
    }

    pub(super) fn drain(&mut self, done: &mut Vec<Completion>) {
        while self.in_flight > 0 {
            let mut finished = self.shared.finished();
            while finished.is_empty() {
                finished = self
                    .shared
                    .changed
                    .wait(finished)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            self.in_flight -= finished.len();
            done.append(&mut finished);
        }
        let _ = self.shared.event.read();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.drain(&mut Vec::new());
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            // It has nothing left to do but to see that the channel is closed.
            let _ = thread.join();
        }
    }
}

fn work(
    mut execute: impl FnMut(&BlockRequest) -> io::Result<()>,
    incoming: &Receiver<BlockRequest>,
    shared: &Shared,
) {
    while let Ok(request) = incoming.recv() {
        let completion = Completion {
            tag: request.tag,
            result: execute(&request),
        };
        drop(request);
        shared.finished().push(completion);
        shared.changed.notify_all();
        // A full counter is readable, which is all that counts.
        let _ = shared.event.write(1);
    }
}

/// Does a request on a file from start to end. The file must be open.
pub(super) fn execute(file: RawFd, request: &BlockRequest) -> io::Result<()> {
    match request.op {
        BlockOp::Read | BlockOp::Write => transfer(file, request, false),
        // SAFETY: a system call on a descriptor, without pointers.
        BlockOp::Flush => check(|| unsafe { libc::fdatasync(file) }.into()).map(drop),
        BlockOp::Discard | BlockOp::WriteZeroes { .. } => {
            let (offset, len) = (signed(request.offset)?, signed(request.len)?);
            let mode = fallocate_mode(request.op);
            // SAFETY: a system call on a descriptor, without pointers.
            let result =
                check(|| unsafe { libc::fallocate64(file, mode, offset, len) }.into()).map(drop);
            match result {
                Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {
                    if request.op == BlockOp::Discard {
                        Err(io::ErrorKind::Unsupported.into())
                    } else {
                        transfer(file, request, true)
                    }
                }
                result => result,
            }
        }
    }
}

fn transfer(file: RawFd, request: &BlockRequest, zeroes: bool) -> io::Result<()> {
    let mut iovecs = Vec::new();
    let mut done = 0;
    while done < request.len {
        if zeroes {
            fill_zero_iovecs(&mut iovecs, request.len - done);
        } else {
            request
                .buffers
                .iovecs(done, &mut iovecs)
                .map_err(io::Error::other)?;
            iovecs.truncate(MAX_IOVECS);
        }
        // At most `MAX_IOVECS`.
        let count = iovecs.len() as i32;
        let offset = signed(request.offset.saturating_add(done))?;
        let moved = check(|| {
            if request.op == BlockOp::Read {
                // SAFETY: the vectors point into guest memory that `request.buffers` keeps mapped.
                unsafe { libc::preadv64(file, iovecs.as_ptr(), count, offset) as i64 }
            } else {
                // SAFETY: as above, or they point at a static; the kernel only reads from them.
                unsafe { libc::pwritev64(file, iovecs.as_ptr(), count, offset) as i64 }
            }
        })?;
        if moved == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        done += moved.unsigned_abs();
    }
    Ok(())
}

fn signed(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(io::Error::other)
}

/// Runs a system call until no signal interrupts it.
fn check(mut call: impl FnMut() -> i64) -> io::Result<i64> {
    loop {
        let result = call();
        if result >= 0 {
            return Ok(result);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
