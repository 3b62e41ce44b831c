//! The device thread: one epoll loop that runs all devices.
//!
//! A watch names a device, a token and a file descriptor. The loop locks the device and calls
//! [`VirtioDevice::event`](crate::virtio::VirtioDevice::event), or for a kick
//! [`VirtioDevice::queue_event`](crate::virtio::VirtioDevice::queue_event). It has no timer and never polls:
//! an idle machine's device thread sleeps in `epoll_wait`.

use std::collections::BTreeMap;
use std::fmt::{self, Debug};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Something that reacts to readiness on the device thread.
pub trait Subscriber: Send + Sync {
    /// Called on the device thread. May be spurious.
    fn ready(&self, token: u32, events: EventSet);
}

struct Watch {
    fd: RawFd,
    token: u32,
    subscriber: Arc<dyn Subscriber>,
}

struct Shared {
    epoll: Epoll,
    watches: Mutex<BTreeMap<u64, Watch>>,
    next: AtomicU64,
    gate: Mutex<Gate>,
    gate_changed: Condvar,
    stop: EventFd,
    nudge: EventFd,
}

/// Who may run devices: the loop, or whoever holds them still.
#[derive(Default)]
struct Gate {
    /// Someone holds (or is about to hold) the devices still.
    held: bool,
    /// A thread is in [`EventLoop::run`].
    running: bool,
    /// That thread waits at the gate.
    parked: bool,
    /// What it had fetched from epoll when it came to the gate. Edge-triggered events come only once, so
    /// whoever drains must see these too.
    fetched: Vec<EpollEvent>,
}

/// Keys of the loop's own events; watches count from after them.
const STOP: u64 = 0;
const NUDGE: u64 = 1;
/// Upper bound of rounds [`Stillness::drain`] takes before it lets a busy device be.
const DRAIN_ROUNDS: usize = 64;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic aborts the process, so a poisoned lock is never seen outside unit tests.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait<'a, T>(changed: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// A handle to the device thread's loop.
#[derive(Clone)]
pub struct EventLoop(Arc<Shared>);

/// Devices stand still as long as this is held.
#[derive(Debug)]
pub struct Stillness(EventLoop);

impl EventLoop {
    /// Makes a loop; nothing happens until a thread enters [`run`](Self::run).
    pub fn new() -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let nudge = EventFd::new(EFD_NONBLOCK)?;
        for (fd, key) in [(&stop, STOP), (&nudge, NUDGE)] {
            let own = EpollEvent::new(EventSet::IN, key);
            epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), own)?;
        }
        Ok(Self(Arc::new(Shared {
            epoll,
            watches: Mutex::default(),
            next: AtomicU64::new(NUDGE + 1),
            gate: Mutex::default(),
            gate_changed: Condvar::new(),
            stop,
            nudge,
        })))
    }

    /// A registrar whose events go to `subscriber`.
    pub fn watches(&self, subscriber: Arc<dyn Subscriber>) -> Watches {
        Watches {
            events: self.clone(),
            subscriber,
        }
    }

    /// Runs until [`stop`](Self::stop).
    pub fn run(&self) -> io::Result<()> {
        lock(&self.0.gate).running = true;
        let result = self.run_until_stopped();
        lock(&self.0.gate).running = false;
        self.0.gate_changed.notify_all();
        result
    }

    fn run_until_stopped(&self) -> io::Result<()> {
        loop {
            let mut ready = [EpollEvent::default(); 32];
            let n = match self.0.epoll.wait(-1, &mut ready) {
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            let mut fetched = ready.get(..n).unwrap_or_default().to_vec();
            let mut gate = lock(&self.0.gate);
            if gate.held {
                gate.fetched = fetched;
                gate.parked = true;
                self.0.gate_changed.notify_all();
                while gate.held {
                    gate = wait(&self.0.gate_changed, gate);
                }
                gate.parked = false;
                fetched = std::mem::take(&mut gate.fetched);
            }
            drop(gate);
            if !self.dispatch(&fetched) {
                return Ok(());
            }
        }
    }

    /// Makes [`run`](Self::run) return.
    pub fn stop(&self) {
        // The counter can only be full if a stop is pending already.
        let _ = self.0.stop.write(1);
    }

    /// Waits until no device is being run and keeps it so until the guard is dropped. Not for the device
    /// thread itself.
    pub fn still(&self) -> Stillness {
        let mut gate = lock(&self.0.gate);
        while gate.held {
            gate = wait(&self.0.gate_changed, gate);
        }
        gate.held = true;
        let _ = self.0.nudge.write(1);
        while gate.running && !gate.parked {
            gate = wait(&self.0.gate_changed, gate);
        }
        drop(gate);
        Stillness(self.clone())
    }

    /// See [`Stillness::drain`].
    pub fn drain(&self, still: &Stillness) -> io::Result<bool> {
        still.drain()
    }

    /// Returns `false` if the loop has to stop.
    fn dispatch(&self, ready: &[EpollEvent]) -> bool {
        for event in ready {
            match event.data() {
                STOP => return false,
                NUDGE => {
                    let _ = self.0.nudge.read();
                    continue;
                }
                _ => {}
            }
            // Looked up one by one: handling one event may have removed the watch of a later one.
            let target = lock(&self.0.watches)
                .get(&event.data())
                .map(|w| (w.subscriber.clone(), w.token));
            if let Some((subscriber, token)) = target {
                subscriber.ready(token, event.event_set());
            }
        }
        true
    }

    fn add(
        &self,
        subscriber: Arc<dyn Subscriber>,
        fd: RawFd,
        token: u32,
        events: EventSet,
    ) -> io::Result<u64> {
        let id = self.0.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.0.watches).insert(
            id,
            Watch {
                fd,
                token,
                subscriber,
            },
        );
        if let Err(e) = self
            .0
            .epoll
            .ctl(ControlOperation::Add, fd, EpollEvent::new(events, id))
        {
            lock(&self.0.watches).remove(&id);
            return Err(e);
        }
        Ok(id)
    }
}

impl Stillness {
    /// Handles what is pending now, on the calling thread. Returns whether nothing is pending any more.
    pub fn drain(&self) -> io::Result<bool> {
        let fetched = std::mem::take(&mut lock(&self.0.0.gate).fetched);
        self.handle(&fetched);
        for _ in 0..DRAIN_ROUNDS {
            let mut ready = [EpollEvent::default(); 32];
            match self.0.0.epoll.wait(0, &mut ready) {
                Ok(0) => return Ok(true),
                Ok(n) => self.handle(ready.get(..n).unwrap_or_default()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(false)
    }

    fn handle(&self, ready: &[EpollEvent]) {
        // A stop stays pending for the loop itself: its descriptor is level-triggered and not read.
        let devices: Vec<EpollEvent> = ready.iter().filter(|e| e.data() != STOP).copied().collect();
        self.0.dispatch(&devices);
    }
}

impl Drop for Stillness {
    fn drop(&mut self) {
        lock(&self.0.0.gate).held = false;
        self.0.0.gate_changed.notify_all();
    }
}

impl Debug for EventLoop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventLoop")
            .field("watches", &lock(&self.0.watches).len())
            .finish()
    }
}

/// Registers file descriptors of one device on the device thread.
#[derive(Clone)]
pub struct Watches {
    events: EventLoop,
    subscriber: Arc<dyn Subscriber>,
}

impl Watches {
    /// Watches `fd` until the returned guard is dropped. The caller keeps `fd` open that long and drops
    /// the guard before closing it. Add `EventSet::EDGE_TRIGGERED` for edge-triggered delivery.
    pub fn watch(&self, fd: RawFd, token: u32, events: EventSet) -> io::Result<WatchGuard> {
        let id = self
            .events
            .add(self.subscriber.clone(), fd, token, events)?;
        Ok(WatchGuard {
            events: self.events.clone(),
            id,
        })
    }
}

impl Debug for Watches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watches")
    }
}

/// Keeps a watch alive. Dropping it ends the watch; an event already fetched is not delivered.
pub struct WatchGuard {
    events: EventLoop,
    id: u64,
}

impl WatchGuard {
    /// Changes what readiness is waited for; an empty set mutes the watch (errors and hang-ups excepted).
    pub fn modify(&self, events: EventSet) -> io::Result<()> {
        let fd = lock(&self.events.0.watches).get(&self.id).map(|w| w.fd);
        match fd {
            Some(fd) => self.events.0.epoll.ctl(
                ControlOperation::Modify,
                fd,
                EpollEvent::new(events, self.id),
            ),
            None => Err(io::Error::from(io::ErrorKind::NotFound)),
        }
    }
}

impl Drop for WatchGuard {
    fn drop(&mut self) {
        if let Some(watch) = lock(&self.events.0.watches).remove(&self.id) {
            // Fails only if the descriptor was closed first, and then the kernel has removed it.
            let _ =
                self.events
                    .0
                    .epoll
                    .ctl(ControlOperation::Delete, watch.fd, EpollEvent::default());
        }
    }
}

impl Debug for WatchGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WatchGuard").field("id", &self.id).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[derive(Default)]
    struct Counter(AtomicU32);

    impl Subscriber for Counter {
        fn ready(&self, token: u32, _events: EventSet) {
            self.0.fetch_add(token, Ordering::SeqCst);
        }
    }

    #[test]
    fn dropped_watch_delivers_nothing_more() {
        let events = EventLoop::new().unwrap();
        let counter = Arc::new(Counter::default());
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let guard = events
            .watches(counter.clone())
            .watch(fd.as_raw_fd(), 7, edge)
            .unwrap();
        fd.write(1).unwrap();
        assert!(events.still().drain().unwrap());
        assert_eq!(counter.0.load(Ordering::SeqCst), 7);
        drop(guard);
        fd.write(1).unwrap();
        assert!(events.still().drain().unwrap());
        assert_eq!(counter.0.load(Ordering::SeqCst), 7);
    }

    #[test]
    fn loop_stands_still_while_the_gate_is_held() {
        let events = EventLoop::new().unwrap();
        let counter = Arc::new(Counter::default());
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let _guard = events
            .watches(counter.clone())
            .watch(fd.as_raw_fd(), 1, edge)
            .unwrap();
        let still = events.still();
        let thread = std::thread::spawn({
            let events = events.clone();
            move || events.run()
        });
        fd.write(1).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert_eq!(counter.0.load(Ordering::SeqCst), 0);
        drop(still);
        while counter.0.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        events.stop();
        thread.join().unwrap().unwrap();
    }

    /// Events the loop had fetched when it was stopped at the gate used to be invisible to a drain.
    #[test]
    fn drain_sees_every_event_signalled_before_it() {
        let events = EventLoop::new().unwrap();
        let counter = Arc::new(Counter::default());
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let _guard = events
            .watches(counter.clone())
            .watch(fd.as_raw_fd(), 1, edge)
            .unwrap();
        let thread = std::thread::spawn({
            let events = events.clone();
            move || events.run()
        });
        for round in 1..500 {
            fd.write(1).unwrap();
            let still = events.still();
            assert!(still.drain().unwrap());
            assert_eq!(counter.0.load(Ordering::SeqCst), round);
        }
        events.stop();
        thread.join().unwrap().unwrap();
    }
}
