//! A pod's RAM and spill file: the account of what is used, and who waits for room.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::arena::{Arena, Owner, Seen};
use crate::budget::Membership;
use crate::error::Error;
use crate::file::SpillFile;
use crate::overlay::Disk;
use crate::sectors::{CHUNK_SIZE, PAGE_SIZE, PAGES};
use crate::signal::Signal;
use crate::slots::Spill;
use crate::stats::{PoolCounters, PoolStats};
use crate::worker;

/// Less RAM than this a pool can't be given: a limit below it means this much.
pub const LEAST_RAM: u64 = 1 << 20;
const LEAST_PAGES: u64 = LEAST_RAM / PAGE_SIZE as u64;
/// The distance between full, high and low is an eighth of the limit, but not more than 64 MiB.
const MOST_MARGIN: u64 = (64 << 20) / PAGE_SIZE as u64;
/// Steps in which RAM is taken on and off the node's account.
const GRANULE: u64 = (1 << 20) / PAGE_SIZE as u64;
/// Hot chunks that may queue to be brought back.
const MOST_RETURNS: usize = 256;

/// What a flush does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FlushPolicy {
    /// Nothing: what was written lasts as long as the pod, and flushing does not change that.
    #[default]
    Memory,
    /// Writes everything to the spill file and makes that durable: what a disk would do. For
    /// comparing.
    Disk,
}

/// What a pool is made of.
#[derive(Debug)]
pub struct PoolConfig {
    /// Most bytes of RAM; [`LEAST_RAM`] if less.
    pub ram_limit: u64,
    /// Most bytes of disk the spill file may take up.
    pub spill_limit: u64,
    /// Where chunks spill to. With none, a full RAM is a full disk.
    pub spill: Option<Box<dyn SpillFile>>,
    /// The pool's place in the node's budget.
    pub budget: Option<Membership>,
    /// What a flush does.
    pub flush: FlushPolicy,
    /// Threads that move chunks, started when first there is something to move. With two, one copies
    /// while the other's I/O is under way.
    pub workers: u8,
}

impl PoolConfig {
    /// RAM only, without a budget.
    pub fn new(ram_limit: u64) -> Self {
        PoolConfig {
            ram_limit,
            spill_limit: u64::MAX,
            spill: None,
            budget: None,
            flush: FlushPolicy::Memory,
            workers: 2,
        }
    }
}

/// A pod's RAM and spill file. Clones are the same pool.
#[derive(Debug, Clone)]
pub struct Pool(pub(crate) Arc<Inner>);

impl Pool {
    /// Makes a pool. Until something is written it takes next to no memory, and no threads.
    pub fn new(config: PoolConfig) -> Self {
        let budget = config.budget.map(Arc::new);
        Pool(Arc::new_cyclic(|me| Inner {
            me: me.clone(),
            arena: Arena::new(),
            spill: config.spill.map(Spill::new),
            flush: config.flush,
            limit: AtomicU64::new(pages_of(config.ram_limit)),
            spill_limit: AtomicU64::new(config.spill_limit),
            granted: AtomicU64::new(if budget.is_some() { 0 } else { u64::MAX }),
            share: AtomicU64::new(u64::MAX),
            used: AtomicU64::new(0),
            gate: Mutex::default(),
            room: Condvar::new(),
            waiters: AtomicU32::new(0),
            flushers: AtomicU32::new(0),
            moved: Condvar::new(),
            spilling: AtomicBool::new(false),
            failing: AtomicBool::new(false),
            victims: Mutex::default(),
            returns: Mutex::default(),
            trims: Mutex::default(),
            given_up: AtomicU32::new(0),
            disks: RwLock::default(),
            next_disk: AtomicU32::new(0),
            signal: Arc::new(Signal::new(budget.clone())),
            budget,
            grants: Mutex::default(),
            started: AtomicBool::new(false),
            workers: Mutex::new(Workers {
                wanted: config.workers,
                threads: Vec::new(),
            }),
            counters: PoolCounters::default(),
        }))
    }

    /// Changes the limits. Less RAM than is in use is reached as fast as chunks can be moved; less
    /// disk than is in use only stops more from being taken.
    pub fn set_limits(&self, ram: u64, spill: u64) {
        let inner = &self.0;
        inner.limit.store(pages_of(ram), Ordering::SeqCst);
        inner.spill_limit.store(spill, Ordering::SeqCst);
        inner.failing.store(false, Ordering::SeqCst);
        inner.news();
        if inner.used() > inner.marks().high {
            inner.kick();
        }
    }

    /// The figures of now.
    pub fn stats(&self) -> PoolStats {
        let inner = &self.0;
        let counters = &inner.counters;
        PoolStats {
            ram_bytes: inner.used() * PAGE_SIZE as u64,
            ram_limit: inner.cap() * PAGE_SIZE as u64,
            spill_bytes: inner.spill.as_ref().map_or(0, Spill::held_bytes),
            spill_limit: inner.spill_limit.load(Ordering::Relaxed),
            spilled_bytes: counters.spilled_bytes.get(),
            spilled_chunks: counters.spilled_chunks.get(),
            dropped_chunks: counters.dropped_chunks.get(),
            returned_chunks: counters.returned_chunks.get(),
            stalls: counters.stalls.get(),
            stall_nanos: counters.stall_nanos.get(),
            spill_errors: counters.spill_errors.get(),
        }
    }
}

fn pages_of(limit: u64) -> u64 {
    (limit / PAGE_SIZE as u64).max(LEAST_PAGES)
}

/// Levels of RAM use, in pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Marks {
    /// From here on chunks are spilled in the background,
    pub(crate) high: u64,
    /// down to here.
    pub(crate) low: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Gate {
    /// How often spilling has failed.
    failures: u64,
    last: Option<Arc<io::Error>>,
    /// How often a move has ended while someone waited for that.
    moves: u64,
}

#[derive(Debug)]
struct Workers {
    wanted: u8,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    /// For the workers, who must not keep the pool alive.
    me: Weak<Inner>,
    pub(crate) arena: Arena,
    pub(crate) spill: Option<Spill>,
    pub(crate) flush: FlushPolicy,
    /// Pages the pod allows.
    limit: AtomicU64,
    pub(crate) spill_limit: AtomicU64,
    /// Pages taken on the node's account.
    granted: AtomicU64,
    /// Pages that are this pool's share when the node's budget is short.
    share: AtomicU64,
    /// Pages with memory, or about to get some.
    used: AtomicU64,
    gate: Mutex<Gate>,
    room: Condvar,
    waiters: AtomicU32,
    /// Those who wait for moves to end, and how they are told.
    flushers: AtomicU32,
    moved: Condvar,
    /// RAM use has passed the high mark and not come down to the low one since.
    pub(crate) spilling: AtomicBool,
    /// The last try to spill failed; until a writer needs room there is none.
    pub(crate) failing: AtomicBool,
    /// The coldest chunks at some moment, coldest last.
    pub(crate) victims: Mutex<Vec<Seen>>,
    pub(crate) returns: Mutex<VecDeque<Owner>>,
    /// Chunks with disk to give back inside their slots.
    pub(crate) trims: Mutex<Vec<Owner>>,
    /// Spill slots given up by writes and discards so far.
    pub(crate) given_up: AtomicU32,
    disks: RwLock<HashMap<u32, Weak<Disk>>>,
    next_disk: AtomicU32,
    pub(crate) signal: Arc<Signal>,
    budget: Option<Arc<Membership>>,
    /// Held while the node's account is changed.
    grants: Mutex<()>,
    /// The workers have been started, or there are none to be had.
    started: AtomicBool,
    workers: Mutex<Workers>,
    pub(crate) counters: PoolCounters,
}

impl Inner {
    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::SeqCst)
    }

    /// Pages this pool should not pass at present.
    fn cap(&self) -> u64 {
        let share = self.share.load(Ordering::SeqCst).max(LEAST_PAGES);
        self.limit.load(Ordering::SeqCst).min(share)
    }

    pub(crate) fn marks(&self) -> Marks {
        let cap = self.cap();
        let margin = (cap / 8).min(MOST_MARGIN);
        Marks {
            high: cap - margin,
            low: cap - 2 * margin,
        }
    }

    /// Takes `pages` on the account, if there is room.
    pub(crate) fn try_reserve(&self, pages: u64) -> bool {
        let mut used = self.used();
        let now = loop {
            let next = used + pages;
            if next > self.limit.load(Ordering::SeqCst) {
                self.kick_if_idle();
                return false;
            }
            if next > self.granted.load(Ordering::SeqCst) && !self.grow(next) {
                self.kick_if_idle();
                return false;
            }
            match self
                .used
                .compare_exchange_weak(used, next, Ordering::SeqCst, Ordering::SeqCst)
            {
                Ok(_) => break next,
                Err(other) => used = other,
            }
        };
        if now > self.marks().high {
            self.kick_if_idle();
        }
        true
    }

    /// Wakes the workers if the background work has not begun yet.
    fn kick_if_idle(&self) {
        if self.spill.is_some()
            && !self.failing.load(Ordering::SeqCst)
            && !self.spilling.swap(true, Ordering::SeqCst)
        {
            self.kick();
        }
    }

    /// Takes more on the node's account.
    fn grow(&self, to: u64) -> bool {
        let Some(budget) = &self.budget else {
            return true;
        };
        let _held = self.grants.lock().unwrap_or_else(PoisonError::into_inner);
        let limit = self.limit.load(Ordering::SeqCst);
        let page = PAGE_SIZE as u64;
        for want in [to.next_multiple_of(GRANULE), to] {
            if self.granted.load(Ordering::SeqCst) >= to {
                return true;
            }
            if budget.grow(want * page, limit * page) {
                self.granted.store(want, Ordering::SeqCst);
                if !self.started.load(Ordering::SeqCst) {
                    // They are who hears that others need their share.
                    self.start_workers();
                }
                return true;
            }
        }
        self.share
            .store(budget.allowance() / page, Ordering::SeqCst);
        false
    }

    /// Learns this pool's share of the node's budget, and takes off the account what is not used. Tells
    /// whether the share is smaller than it was.
    pub(crate) fn settle(&self) -> bool {
        let Some(budget) = &self.budget else {
            return false;
        };
        let _held = self.grants.lock().unwrap_or_else(PoisonError::into_inner);
        let page = PAGE_SIZE as u64;
        let keep = (self.used() + GRANULE).next_multiple_of(GRANULE);
        let content = self.waiters.load(Ordering::SeqCst) == 0;
        if self.granted.load(Ordering::SeqCst) > keep {
            // Before the account goes down, nobody may count on the difference.
            self.granted.store(keep, Ordering::SeqCst);
            let keep = keep.max(self.used());
            self.granted.store(keep, Ordering::SeqCst);
            budget.shrink(keep * page, content);
        } else if content {
            budget.shrink(budget.used(), true);
        }
        let share = budget.allowance() / page;
        self.share.swap(share, Ordering::SeqCst) > share
    }

    /// Takes `pages` off the account.
    pub(crate) fn unreserve(&self, pages: u64) {
        if pages == 0 {
            return;
        }
        let before = self.used.fetch_sub(pages, Ordering::SeqCst);
        self.news();
        if self.budget.is_some()
            && before - pages + 4 * GRANULE < self.granted.load(Ordering::SeqCst)
        {
            self.settle();
        }
    }

    /// Wakes those who wait, if any, to look again.
    pub(crate) fn news(&self) {
        if self.waiters.load(Ordering::SeqCst) > 0 {
            drop(self.gate());
            self.room.notify_all();
        }
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether someone waits for room.
    pub(crate) fn pressed(&self) -> bool {
        self.waiters.load(Ordering::SeqCst) > 0
    }

    /// Takes `pages` on the account, waiting until there is room or none can be made.
    pub(crate) fn reserve(&self, pages: u64) -> Result<(), Error> {
        if self.try_reserve(pages) {
            return Ok(());
        }
        if self.spill.is_none() {
            return Err(Error::NoSpace);
        }
        let since = Instant::now();
        self.counters.stalls.add(1);
        self.waiters.fetch_add(1, Ordering::SeqCst);
        let result = self.wait_for_room(pages);
        self.waiters.fetch_sub(1, Ordering::SeqCst);
        let waited = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.counters.stall_nanos.add(waited);
        result
    }

    fn wait_for_room(&self, pages: u64) -> Result<(), Error> {
        let seen = self.gate().failures;
        loop {
            let mut gate = self.gate();
            if self.try_reserve(pages) {
                return Ok(());
            }
            if gate.failures != seen {
                return Err(match &gate.last {
                    Some(e) if e.raw_os_error() != Some(libc::ENOSPC) => {
                        Error::SpillWrite(io::Error::new(e.kind(), e.clone()))
                    }
                    _ => Error::NoSpace,
                });
            }
            if self.kick() {
                gate = self.room.wait(gate).unwrap_or_else(PoisonError::into_inner);
                drop(gate);
            } else {
                // No thread can be had: the one who needs the room makes it.
                drop(gate);
                worker::make_room(self);
            }
        }
    }

    /// Tells those who wait that nothing can be moved.
    pub(crate) fn report_failure(&self, e: &Arc<io::Error>) {
        self.counters.spill_errors.add(1);
        if !self.failing.swap(true, Ordering::SeqCst) {
            tracing::warn!("the overlay can't spill, and will be full when its RAM is: {e}");
        }
        let mut gate = self.gate();
        gate.failures += 1;
        gate.last = Some(e.clone());
        drop(gate);
        self.room.notify_all();
    }

    /// Calls `pass` until it says that no chunk was in the way of it by being moved.
    pub(crate) fn until_unhindered<E>(
        &self,
        mut pass: impl FnMut() -> Result<bool, E>,
    ) -> Result<(), E> {
        self.flushers.fetch_add(1, Ordering::SeqCst);
        let result = loop {
            let seen = self.gate().moves;
            match pass() {
                Ok(false) => {}
                Ok(true) => break Ok(()),
                Err(e) => break Err(e),
            }
            let mut gate = self.gate();
            while gate.moves == seen {
                gate = self
                    .moved
                    .wait(gate)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        };
        self.flushers.fetch_sub(1, Ordering::SeqCst);
        result
    }

    /// Tells those who wait for it that chunks have stopped being moved.
    pub(crate) fn move_ended(&self) {
        if self.flushers.load(Ordering::SeqCst) > 0 {
            self.gate().moves += 1;
            self.moved.notify_all();
        }
    }

    /// Has the workers look for work. `false` if there are none to be had.
    pub(crate) fn kick(&self) -> bool {
        let any = self.start_workers();
        if any {
            self.signal.notify();
        }
        any
    }

    /// Starts the workers, if they have not been. `false` if there are none to be had.
    fn start_workers(&self) -> bool {
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..std::mem::take(&mut workers.wanted) {
            match worker::start(self.me.clone(), self.signal.clone()) {
                Ok(thread) => workers.threads.push(thread),
                Err(e) => {
                    tracing::warn!("the overlay spills without a thread of its own: {e}");
                    break;
                }
            }
        }
        self.started.store(true, Ordering::SeqCst);
        !workers.threads.is_empty()
    }

    /// Queues a chunk to be brought back.
    pub(crate) fn want_back(&self, owner: Owner) {
        let mut returns = self.returns.lock().unwrap_or_else(PoisonError::into_inner);
        if returns.len() < MOST_RETURNS && !returns.contains(&owner) {
            returns.push_back(owner);
            drop(returns);
            self.kick();
        }
    }

    /// Queues a chunk for giving back disk inside its slot.
    pub(crate) fn want_trim(&self, owner: Owner) {
        self.trims
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(owner);
    }

    /// Whether there is room for a whole chunk to come back without others having to leave.
    pub(crate) fn has_room_for_return(&self) -> bool {
        self.used() + PAGES as u64 <= self.marks().high
    }

    /// How far apart, in the arena's time, two reads of a spilled chunk may be for it to be hot: as
    /// many chunks as RAM holds, since what is read less often would be the coldest there.
    pub(crate) fn heat_window(&self) -> u32 {
        let chunks = self.cap() / (CHUNK_SIZE / PAGE_SIZE) as u64;
        u32::try_from(chunks / 2).unwrap_or(u32::MAX)
    }

    pub(crate) fn add_disk(&self) -> u32 {
        self.next_disk.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn register(&self, id: u32, disk: &Arc<Disk>) {
        self.disks
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(id, Arc::downgrade(disk));
    }

    pub(crate) fn forget(&self, id: u32) {
        self.disks
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&id);
    }

    pub(crate) fn disk(&self, id: u32) -> Option<Arc<Disk>> {
        self.disks
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&id)?
            .upgrade()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.signal.stop();
        let workers = self
            .workers
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        for thread in workers.threads.drain(..) {
            // The last one to hold the pool may be a worker, which ends by itself.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}
