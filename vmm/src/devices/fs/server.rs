//! The thread that does the file system calls.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kiln_vmm_fs::{Server, ServerError, Span, View};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::devices::chain::Segments;
use crate::devices::ring::Mem;

/// One request, or the end of the session.
pub(super) enum Job {
    Request {
        tag: usize,
        mem: Arc<Mem>,
        readable: Segments,
        writable: Segments,
    },
    ForgetAll,
}

/// How a request ended: bytes written, or why it was not answered.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) tag: usize,
    pub(super) result: Result<usize, String>,
}

#[derive(Debug)]
struct Shared {
    done: Mutex<Vec<Done>>,
    changed: Condvar,
    event: EventFd,
}

impl Shared {
    fn done(&self) -> MutexGuard<'_, Vec<Done>> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A file server on a thread of its own.
#[derive(Debug)]
pub struct FsServer {
    jobs: Option<Sender<Job>>,
    shared: Arc<Shared>,
    in_flight: usize,
    thread: Option<JoinHandle<()>>,
}

impl FsServer {
    /// Starts the thread and has it make its server by `make`, which runs on it first: that is the place
    /// to confine the thread ([`kiln_vmm_fs::Prepared::enter`]) and to install its system call filter. `make` is told
    /// the descriptor that the thread goes on to use. Waits until that is done.
    pub fn start<T: Send + 'static, E: Send + 'static>(
        make: impl FnOnce(RawFd) -> Result<(Server, T), E> + Send + 'static,
    ) -> io::Result<Result<(Self, T), E>> {
        let shared = Arc::new(Shared {
            done: Mutex::default(),
            changed: Condvar::new(),
            event: EventFd::new(EFD_NONBLOCK)?,
        });
        let (jobs, incoming) = channel();
        let (made, ready) = channel();
        let thread = std::thread::Builder::new().name("fs".to_owned()).spawn({
            let shared = shared.clone();
            move || match make(shared.event.as_raw_fd()) {
                Ok((server, more)) => {
                    // Nobody to hear it is nobody to work for: the jobs' channel is closed then.
                    let _ = made.send(Ok(more));
                    work(&server, &incoming, &shared);
                }
                Err(e) => {
                    let _ = made.send(Err(e));
                }
            }
        })?;
        match ready.recv() {
            Ok(Ok(more)) => {
                let server = FsServer {
                    jobs: Some(jobs),
                    shared,
                    in_flight: 0,
                    thread: Some(thread),
                };
                Ok(Ok((server, more)))
            }
            Ok(Err(e)) => Ok(Err(e)),
            Err(_) => Err(io::Error::other(
                "the file server's thread ended before it began",
            )),
        }
    }

    pub(super) fn fd(&self) -> RawFd {
        self.shared.event.as_raw_fd()
    }

    /// Hands a job over. `false` when the thread is gone.
    pub(super) fn submit(&mut self, job: Job) -> bool {
        let counts = matches!(job, Job::Request { .. });
        let sent = self
            .jobs
            .as_ref()
            .is_some_and(|jobs| jobs.send(job).is_ok());
        if sent && counts {
            self.in_flight += 1;
        }
        sent
    }

    /// What has finished since the last call.
    pub(super) fn finished(&mut self) -> Vec<Done> {
        // Nothing to read means that nothing has finished since.
        let _ = self.shared.event.read();
        let done = std::mem::take(&mut *self.shared.done());
        self.in_flight -= done.len();
        done
    }

    /// Waits until all has finished.
    pub(super) fn drain(&mut self) -> Vec<Done> {
        let mut all = Vec::new();
        while self.in_flight > 0 {
            let mut done = self.shared.done();
            while done.is_empty() {
                done = self
                    .shared
                    .changed
                    .wait(done)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            self.in_flight -= done.len();
            all.append(&mut done);
        }
        let _ = self.shared.event.read();
        all
    }
}

impl Drop for FsServer {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // It ends when it has seen that no more jobs can come.
            let _ = thread.join();
        }
    }
}

fn work(server: &Server, incoming: &Receiver<Job>, shared: &Shared) {
    let mut seen: Option<(Arc<Mem>, View)> = None;
    while let Ok(job) = incoming.recv() {
        let Job::Request {
            tag,
            mem,
            readable,
            writable,
        } = job
        else {
            server.forget_all();
            continue;
        };
        let result = handle(server, &mut seen, &mem, &readable, &writable);
        shared.done().push(Done { tag, result });
        shared.changed.notify_all();
        // A full counter is readable, which is all that counts.
        let _ = shared.event.write(1);
    }
}

fn handle(
    server: &Server,
    seen: &mut Option<(Arc<Mem>, View)>,
    mem: &Arc<Mem>,
    readable: &Segments,
    writable: &Segments,
) -> Result<usize, String> {
    // Hot-plug makes a new map; until then the view is good.
    if seen
        .as_ref()
        .is_none_or(|(known, _)| !Arc::ptr_eq(known, mem))
    {
        *seen = Some((mem.clone(), view(mem).map_err(|e| e.to_string())?));
    }
    let Some((_, view)) = seen else {
        return Err("guest memory can't be viewed".to_owned());
    };
    let readable = spans(mem, readable)?;
    let writable = spans(mem, writable)?;
    server
        .handle(view, &readable, &writable)
        .map_err(|e| e.to_string())
}

fn view(mem: &Mem) -> Result<View, ServerError> {
    let regions: Vec<_> = mem
        .iter()
        .filter_map(|region| {
            let len = usize::try_from(region.len()).ok()?;
            Some((NonNull::new(region.as_ptr())?, len))
        })
        .collect();
    // SAFETY: guest memory's host mapping stays for the life of the process, and nobody holds references
    // into it.
    Ok(unsafe { View::new(&regions) }?)
}

/// A chain's buffers as the server finds them: host addresses, split where regions meet.
fn spans(mem: &Mem, segments: &Segments) -> Result<Vec<Span>, String> {
    let mut iovecs = Vec::new();
    segments
        .iovecs(mem, &mut iovecs)
        .map_err(|e| e.to_string())?;
    iovecs
        .iter()
        .map(|vector| {
            let len = u32::try_from(vector.iov_len).map_err(|e| e.to_string())?;
            Ok(Span {
                addr: vector.iov_base as usize,
                len,
            })
        })
        .collect()
}
