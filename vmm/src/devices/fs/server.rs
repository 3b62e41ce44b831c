//! The thread that does the file system calls. It takes requests off the device's queues and puts the answers there
//! itself, for each wake of another thread costs more than most requests. Only interrupts take another's hands: it has
//! no descriptor of the machine's, by which they are made.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kiln_vmm_fs::{Outcome, Server, ServerError, Span, View};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::lines::{Answer, Lines};
use crate::devices::chain::{Chain, Segments};
use crate::devices::ring::Mem;
use crate::virtio::SavedQueue;

/// What the thread is told to do, besides what the guest asks for.
#[derive(Debug, Clone, Copy)]
enum Order {
    /// To answer what is in the queues, and from then on nothing, not even what waits for a lock.
    Hold,
    /// To end the session and all requests, and to give the queues up.
    End,
    /// To end itself.
    Quit,
}

#[derive(Debug, Default)]
struct Orders {
    /// Whoever gives one waits until it is taken away.
    given: Option<Order>,
    held: bool,
}

/// The device has stopped because of its driver: beside the queues' bits in what is told.
const BROKEN: u32 = 1 << 31;

#[derive(Debug)]
struct Shared {
    /// Wakes the thread: the driver's kicks, and orders.
    bell: Arc<EventFd>,
    orders: Mutex<Orders>,
    obeyed: Condvar,
    /// The queues while the device is in operation. Held by the thread as long as it serves them.
    lines: Mutex<Option<Lines>>,
    /// Wakes the device's thread, for interrupts.
    event: EventFd,
    /// Queues to be interrupted for, a bit each.
    told: AtomicU32,
    broken: Mutex<Option<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn tell(&self, bits: u32) {
        // Who set the others has written the event, and they have not been looked at since.
        if self.told.fetch_or(bits, Ordering::SeqCst) == 0 {
            // A full counter is readable, which is all that counts.
            let _ = self.event.write(1);
        }
    }

    fn interrupt(&self, queue: u16) {
        self.tell(1u32.checked_shl(queue.into()).unwrap_or(0));
    }

    fn ring(&self) {
        // A full counter wakes the thread, too.
        let _ = self.bell.write(1);
    }

    /// Does something with the queues, if there are any and their rings can be used.
    fn with_lines(
        &self,
        work: impl FnOnce(&mut Lines) -> Result<(), crate::devices::ring::RingError>,
    ) {
        if let Some(Err(e)) = lock(&self.lines).as_mut().map(work) {
            *lock(&self.broken) = Some(e.to_string());
            self.tell(BROKEN);
        }
    }
}

/// A file server on a thread of its own.
#[derive(Debug)]
pub struct FsServer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the device has to pass on.
#[derive(Debug)]
pub(super) struct News {
    queues: u32,
    /// Why the device can't go on.
    pub(super) broken: Option<String>,
}

impl News {
    /// The queues to be interrupted for.
    pub(super) fn queues(&self) -> impl Iterator<Item = u16> + '_ {
        (0..2).filter(|queue| self.queues & 1 << queue != 0)
    }
}

impl FsServer {
    /// Starts the thread and has it make its server by `make`, which runs on it first: that is the place
    /// to confine the thread ([`kiln_vmm_fs::Prepared::enter`]) and to install its system call filter. `make` is told
    /// the descriptors that the thread goes on to use. Waits until that is done.
    pub fn start<T: Send + 'static, E: Send + 'static>(
        make: impl FnOnce(&[RawFd]) -> Result<(Server, T), E> + Send + 'static,
    ) -> io::Result<Result<(Self, T), E>> {
        let shared = Arc::new(Shared {
            bell: Arc::new(EventFd::new(0)?),
            orders: Mutex::default(),
            obeyed: Condvar::new(),
            lines: Mutex::default(),
            event: EventFd::new(EFD_NONBLOCK)?,
            told: AtomicU32::new(0),
            broken: Mutex::default(),
        });
        let (made, ready) = channel();
        let thread = std::thread::Builder::new().name("fs".to_owned()).spawn({
            let shared = shared.clone();
            move || match make(&[shared.bell.as_raw_fd(), shared.event.as_raw_fd()]) {
                Ok((server, more)) => {
                    // Nobody to hear it is nobody to work for: the thread is told to end then.
                    let _ = made.send(Ok(more));
                    Worker::new(server, &shared).work();
                }
                Err(e) => {
                    let _ = made.send(Err(e));
                }
            }
        })?;
        match ready.recv() {
            Ok(Ok(more)) => {
                let thread = Some(thread);
                Ok(Ok((FsServer { shared, thread }, more)))
            }
            Ok(Err(e)) => Ok(Err(e)),
            Err(_) => Err(io::Error::other(
                "the file server's thread ended before it began",
            )),
        }
    }

    /// What is readable when there is [`FsServer::news`].
    pub(super) fn event(&self) -> RawFd {
        self.shared.event.as_raw_fd()
    }

    /// What the driver's kicks are to ring.
    pub(super) fn bell(&self) -> Arc<EventFd> {
        self.shared.bell.clone()
    }

    /// Has the thread look at the queues.
    pub(super) fn ring(&self) {
        self.shared.ring();
    }

    /// Hands the queues over.
    pub(super) fn begin(&self, lines: Lines) {
        *lock(&self.shared.lines) = Some(lines);
    }

    /// What has happened since the last call.
    pub(super) fn news(&self) -> News {
        let bits = self.shared.told.swap(0, Ordering::SeqCst);
        News {
            queues: bits & !BROKEN,
            broken: (bits & BROKEN != 0)
                .then(|| lock(&self.shared.broken).take())
                .flatten(),
        }
    }

    /// Has what is in the queues answered, and from then on nothing before [`FsServer::release`].
    pub(super) fn hold(&self) {
        self.order(Order::Hold);
    }

    /// Has requests answered again.
    pub(super) fn release(&self) {
        if std::mem::take(&mut lock(&self.shared.orders).held) {
            self.ring();
        }
    }

    /// Ends the session, and all requests: none of them is answered after this.
    pub(super) fn end(&self) {
        self.order(Order::End);
        // Of queues that are no more.
        drop(self.news());
    }

    /// Whether any request has not been answered. To be asked while the server is held.
    pub(super) fn is_busy(&self) -> bool {
        lock(&self.shared.lines)
            .as_ref()
            .is_some_and(Lines::is_busy)
    }

    /// The queues as they are. To be asked while the server is held.
    pub(super) fn queues(&self) -> Vec<SavedQueue> {
        let lines = lock(&self.shared.lines);
        lines.as_ref().map(Lines::save).unwrap_or_default()
    }

    fn order(&self, order: Order) {
        let mut orders = lock(&self.shared.orders);
        orders.given = Some(order);
        self.ring();
        while orders.given.is_some() {
            orders = self
                .shared
                .obeyed
                .wait(orders)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for FsServer {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.order(Order::Quit);
            // It has nothing left to do.
            let _ = thread.join();
        }
    }
}

/// The thread's own.
struct Worker<'a> {
    server: Server,
    shared: &'a Shared,
    /// Guest memory as it was last seen.
    seen: Option<(Arc<Mem>, View)>,
}

impl<'a> Worker<'a> {
    fn new(server: Server, shared: &'a Shared) -> Self {
        Worker {
            server,
            shared,
            seen: None,
        }
    }

    fn work(&mut self) {
        loop {
            let (given, held) = {
                let orders = lock(&self.shared.orders);
                (orders.given, orders.held)
            };
            match given {
                Some(order) => {
                    if matches!(order, Order::Hold) && !held {
                        // The driver stands still: there is an end to what it has asked for.
                        self.serve(|| true);
                    }
                    self.obey(order);
                    if matches!(order, Order::Quit) {
                        return;
                    }
                }
                None if held => self.wait(None),
                None => {
                    self.serve(|| lock(&self.shared.orders).given.is_none());
                    self.answer_waiters();
                    self.wait(self.server.wait());
                }
            }
        }
    }

    fn obey(&mut self, order: Order) {
        if matches!(order, Order::End) {
            self.server.forget_all();
            *lock(&self.shared.lines) = None;
        }
        let mut orders = lock(&self.shared.orders);
        orders.held = matches!(order, Order::Hold);
        orders.given = None;
        drop(orders);
        self.shared.obeyed.notify_all();
    }

    fn serve(&mut self, go_on: impl Fn() -> bool) {
        let (server, seen, shared) = (&mut self.server, &mut self.seen, self.shared);
        shared.with_lines(|lines| {
            lines.turn(
                go_on,
                |queue| shared.interrupt(queue),
                |mem, number, chain| match handle(server, seen, number, mem, chain) {
                    Ok(Outcome::Done(len)) => Answer::Written(len),
                    Ok(Outcome::Later) => Answer::Later,
                    Err(e) => Answer::Failed(e),
                },
            )
        });
    }

    /// Answers requests that have what they waited for.
    fn answer_waiters(&mut self) {
        let Some((_, view)) = &self.seen else {
            return;
        };
        for finished in self.server.finished(view) {
            let answer = match finished.result {
                Ok(len) => Answer::Written(len),
                Err(e) => Answer::Failed(e.to_string()),
            };
            let interrupt = |queue| self.shared.interrupt(queue);
            self.shared
                .with_lines(|lines| lines.answer(finished.ticket, answer, interrupt));
        }
    }

    /// Waits for the bell, for so long at most.
    fn wait(&self, time: Option<Duration>) {
        if let Some(time) = time {
            let mut bell = libc::pollfd {
                fd: self.shared.bell.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // Rounded up, for a wait of none would be a loop without one.
            let time = i32::try_from(time.as_millis().saturating_add(1)).unwrap_or(i32::MAX);
            // SAFETY: one `pollfd`, which outlives the call.
            if unsafe { libc::poll(&raw mut bell, 1, time) } < 1 {
                return;
            }
        }
        // A signal ends it early, which is a turn for nothing.
        let _ = self.shared.bell.read();
    }
}

fn handle(
    server: &mut Server,
    seen: &mut Option<(Arc<Mem>, View)>,
    number: usize,
    mem: &Arc<Mem>,
    chain: &Chain,
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
    let readable = spans(mem, &chain.readable)?;
    let writable = spans(mem, &chain.writable)?;
    server
        .handle(view, number, &readable, &writable)
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
