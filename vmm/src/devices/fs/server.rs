//! The thread that does the file system calls.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kiln_vmm_fs::{Outcome, Server, ServerError, Span, View};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::devices::chain::Segments;
use crate::devices::ring::Mem;

/// One request, or what is done with those that wait.
pub(super) enum Job {
    Request {
        tag: usize,
        mem: Arc<Mem>,
        readable: Segments,
        writable: Segments,
    },
    /// The end of the session, and of all requests.
    ForgetAll,
    /// Requests that wait are not answered until they are released.
    Hold,
    Release,
}

/// How a request ended: bytes written, or why it was not answered.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) tag: usize,
    pub(super) result: Result<usize, String>,
}

/// What the thread tells.
#[derive(Debug, Default)]
struct Told {
    done: Vec<Done>,
    /// Requests that wait for a lock: they may do so for as long as somebody has it.
    waiting: usize,
    /// The thread answers none of those now.
    held: bool,
    /// Somebody waits for a change: seldom, and a call of the system each time.
    awaited: bool,
}

#[derive(Debug)]
struct Shared {
    told: Mutex<Told>,
    changed: Condvar,
    event: EventFd,
}

impl Shared {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells something to whoever waits for it, and by the event.
    fn tell(&self, change: impl FnOnce(&mut Told)) {
        let mut told = self.told();
        change(&mut told);
        let awaited = told.awaited;
        drop(told);
        if awaited {
            self.changed.notify_all();
        }
        // A full counter is readable, which is all that counts.
        let _ = self.event.write(1);
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
            told: Mutex::default(),
            changed: Condvar::new(),
            event: EventFd::new(EFD_NONBLOCK)?,
        });
        let (jobs, incoming) = channel();
        let (made, ready) = channel();
        let thread = std::thread::Builder::new().name("fs".to_owned()).spawn({
            let shared = shared.clone();
            move || match make(shared.event.as_raw_fd()) {
                Ok((mut server, more)) => {
                    // Nobody to hear it is nobody to work for: the jobs' channel is closed then.
                    let _ = made.send(Ok(more));
                    work(&mut server, &incoming, &shared);
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
        let done = std::mem::take(&mut self.shared.told().done);
        self.in_flight -= done.len();
        done
    }

    /// Waits until all has finished but what waits for a lock, which is not answered before [`FsServer::release`].
    pub(super) fn drain(&mut self) -> Vec<Done> {
        if !self.submit(Job::Hold) {
            return Vec::new();
        }
        self.collect(|told| told.held)
    }

    /// Answers again what waits for a lock.
    pub(super) fn release(&mut self) {
        // A thread that is gone answers nothing.
        self.submit(Job::Release);
    }

    /// Ends the session, and all requests: none of them is answered after this.
    pub(super) fn end(&mut self) {
        if self.submit(Job::ForgetAll) {
            // Answers nobody waits for any more.
            drop(self.collect(|told| told.waiting == 0));
        }
    }

    /// Waits until what is in flight is what waits for a lock, and what is told is right.
    fn collect(&mut self, is_right: impl Fn(&Told) -> bool) -> Vec<Done> {
        let mut told = self.shared.told();
        told.awaited = true;
        while told.done.len() + told.waiting < self.in_flight || !is_right(&told) {
            told = self
                .shared
                .changed
                .wait(told)
                .unwrap_or_else(PoisonError::into_inner);
        }
        told.awaited = false;
        let done = std::mem::take(&mut told.done);
        drop(told);
        self.in_flight -= done.len();
        let _ = self.shared.event.read();
        done
    }

    /// Whether any request has not been answered.
    pub(super) fn is_busy(&self) -> bool {
        self.in_flight > 0
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

fn work(server: &mut Server, incoming: &Receiver<Job>, shared: &Shared) {
    let mut seen: Option<(Arc<Mem>, View)> = None;
    let mut held = false;
    loop {
        let wait = if held { None } else { server.wait() };
        let job = match wait {
            Some(time) => incoming.recv_timeout(time),
            None => incoming.recv().map_err(RecvTimeoutError::from),
        };
        match job {
            Ok(Job::Request {
                tag,
                mem,
                readable,
                writable,
            }) => match handle(server, &mut seen, tag, &mem, &readable, &writable) {
                Ok(Outcome::Later) => shared.tell(|told| told.waiting += 1),
                Ok(Outcome::Done(len)) => done(shared, tag, Ok(len)),
                Err(e) => done(shared, tag, Err(e)),
            },
            Ok(Job::ForgetAll) => {
                let ended = server.forget_all();
                held = false;
                shared.tell(|told| {
                    told.waiting -= ended.len();
                    told.held = false;
                    told.done.extend(ended.into_iter().map(|tag| Done {
                        tag,
                        result: Err("the session has ended".to_owned()),
                    }));
                });
            }
            Ok(change @ (Job::Hold | Job::Release)) => {
                held = matches!(change, Job::Hold);
                shared.tell(|told| told.held = held);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        if let Some((_, view)) = seen.as_ref().filter(|_| !held) {
            for finished in server.finished(view) {
                let result = finished.result.map_err(|e| e.to_string());
                shared.tell(|told| {
                    told.waiting -= 1;
                    told.done.push(Done {
                        tag: finished.ticket,
                        result,
                    });
                });
            }
        }
    }
}

fn done(shared: &Shared, tag: usize, result: Result<usize, String>) {
    shared.tell(|told| told.done.push(Done { tag, result }));
}

fn handle(
    server: &mut Server,
    seen: &mut Option<(Arc<Mem>, View)>,
    tag: usize,
    mem: &Arc<Mem>,
    readable: &Segments,
    writable: &Segments,
) -> Result<Outcome, String> {
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
        .handle(view, tag, &readable, &writable)
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
