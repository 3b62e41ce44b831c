//! Locks on files, which count between guests and the host.
//!
//! A lock by ranges (`fcntl`) belongs to an owner that the guest names. Here it belongs to an open file of its own, kept
//! for each owner and file: so owners exclude each other, and closing that file gives up all an owner has. A lock on the
//! whole file (`flock`) belongs to the guest's open file, and so to the handle's descriptor.
//!
//! A guest's kernel tells nobody here that what waits was interrupted; its agent does (`kiln_lockwatch`).
//!
//! Nobody is waited for. What is taken is tried again: whenever this server gives something up, and after a while.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use crate::handles::Handle;
use crate::host::{Answer, Errno, Numbers, done};
use crate::view::Span;
use kiln_lockwatch::Wait;

/// When a lock that is taken is tried again: at first, and at last.
const SOON: Duration = Duration::from_millis(1);
const LATE: Duration = Duration::from_millis(50);

/// Who waits so long is told of to who watches.
const LONG: Duration = Duration::from_millis(100);

/// What the kernel says of a lock that somebody else has.
pub(crate) const TAKEN: Errno = Errno(libc::EAGAIN);

/// A part of a file, and what is wanted with it: `F_RDLCK`, `F_WRLCK` or `F_UNLCK`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Range {
    pub(crate) kind: i32,
    pub(crate) start: i64,
    /// 0 for all that is there or may come.
    pub(crate) len: i64,
}

impl Range {
    /// As the guest says it: first and last byte.
    pub(crate) fn new(start: u64, end: u64, kind: i32) -> Answer<Self> {
        const INVALID: Errno = Errno(libc::EINVAL);
        if ![libc::F_RDLCK, libc::F_WRLCK, libc::F_UNLCK].contains(&kind) {
            return Err(INVALID);
        }
        let start = i64::try_from(start).map_err(|_| INVALID)?;
        let end = i64::try_from(end).map_err(|_| INVALID)?;
        let len = match end {
            i64::MAX => 0,
            end => {
                end.checked_sub(start)
                    .filter(|more| *more >= 0)
                    .ok_or(INVALID)?
                    + 1
            }
        };
        Ok(Range { kind, start, len })
    }

    /// The last byte, as the guest is told it.
    pub(crate) fn end(&self) -> i64 {
        match self.len {
            0 => i64::MAX,
            len => self.start.saturating_add(len - 1),
        }
    }

    fn call(&mut self, fd: RawFd, command: i32) -> Answer<()> {
        // SAFETY: all-zero is a valid flock.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        // One of three small numbers.
        lock.l_type = self.kind as libc::c_short;
        lock.l_start = self.start;
        lock.l_len = self.len;
        // SAFETY: the kernel reads and writes one flock.
        done(unsafe { libc::fcntl(fd, command, &raw mut lock) })?;
        *self = Range {
            kind: lock.l_type.into(),
            start: lock.l_start,
            len: lock.l_len,
        };
        Ok(())
    }
}

/// An open file that locks belong to.
#[derive(Debug)]
struct Holder {
    fd: OwnedFd,
    readable: bool,
    writable: bool,
}

/// What a request waits for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Wanted {
    Range { owner: u64, range: Range },
    Whole { operation: i32 },
}

/// A request that waits for a lock.
#[derive(Debug)]
pub(crate) struct Waiter {
    pub(crate) unique: u64,
    pub(crate) thread: u32,
    pub(crate) since: Instant,
    /// What the caller knows the request by.
    pub(crate) ticket: usize,
    pub(crate) node: u64,
    pub(crate) handle: u64,
    pub(crate) wanted: Wanted,
    /// Where the answer goes.
    pub(crate) writable: Vec<Span>,
    /// It waits no longer, and is answered so.
    pub(crate) ended: Option<Errno>,
}

/// The agent's request, which is answered when somebody has waited long.
#[derive(Debug)]
pub(crate) struct Watcher {
    pub(crate) unique: u64,
    pub(crate) ticket: usize,
    pub(crate) writable: Vec<Span>,
    pub(crate) ended: bool,
}

#[derive(Debug)]
pub(crate) struct Locks {
    holders: HashMap<(u64, u64), Vec<Holder>>,
    pub(crate) waiting: Vec<Waiter>,
    pub(crate) watcher: Option<Watcher>,
    /// Of those who have waited long, who is told of first.
    turn: usize,
    next_try: Instant,
    pause: Duration,
}

impl Locks {
    pub(crate) fn new() -> Self {
        Locks {
            holders: HashMap::new(),
            waiting: Vec::new(),
            watcher: None,
            turn: 0,
            next_try: Instant::now(),
            pause: SOON,
        }
    }

    /// Locks or unlocks a part of the file that a handle has open.
    pub(crate) fn set(
        &mut self,
        numbers: &Numbers,
        handle: &mut Handle,
        owner: u64,
        range: Range,
    ) -> Answer<()> {
        let key = (handle.node, owner);
        if range.kind == libc::F_UNLCK {
            for holder in self.holders.get(&key).into_iter().flatten() {
                range
                    .clone()
                    .call(holder.fd.as_raw_fd(), libc::F_OFD_SETLK)?;
            }
            return Ok(());
        }
        let at = self.holder(numbers, handle, owner, range.kind)?;
        if !handle.owners.contains(&owner) {
            handle.owners.push(owner);
        }
        let holders = self
            .holders
            .get(&key)
            .map(Vec::as_slice)
            .unwrap_or_default();
        let Some(fd) = holders.get(at).map(|holder| holder.fd.as_raw_fd()) else {
            return Err(Errno(libc::EBADF));
        };
        match range.clone().call(fd, libc::F_OFD_SETLK) {
            // It may be the owner's own, made while it had the file open for less.
            Err(TAKEN) if holders.len() > 1 => {
                for (other, holder) in holders.iter().enumerate() {
                    if other != at {
                        let mut nothing = range;
                        nothing.kind = libc::F_UNLCK;
                        nothing.call(holder.fd.as_raw_fd(), libc::F_OFD_SETLK)?;
                    }
                }
                range.clone().call(fd, libc::F_OFD_SETLK)
            }
            other => other,
        }
    }

    /// Which of an owner's open files has the access that a lock needs. One is opened if there is none.
    fn holder(
        &mut self,
        numbers: &Numbers,
        handle: &Handle,
        owner: u64,
        kind: i32,
    ) -> Answer<usize> {
        let writes = kind == libc::F_WRLCK;
        let holders = self.holders.entry((handle.node, owner)).or_default();
        let fits = |holder: &Holder| {
            if writes {
                holder.writable
            } else {
                holder.readable
            }
        };
        if let Some(at) = holders.iter().position(fits) {
            return Ok(at);
        }
        let (readable, writable) = (handle.readable, handle.writable);
        let flags = match (readable, writable) {
            (true, true) => libc::O_RDWR,
            (false, true) => libc::O_WRONLY,
            _ => libc::O_RDONLY,
        };
        let opened = if writes && !writable || !writes && !readable {
            Err(Errno(libc::EBADF))
        } else {
            numbers.open(handle.fd(), flags)
        };
        match opened {
            Ok(fd) => {
                holders.push(Holder {
                    fd,
                    readable,
                    writable,
                });
                Ok(holders.len() - 1)
            }
            Err(error) => {
                if holders.is_empty() {
                    self.holders.remove(&(handle.node, owner));
                }
                Err(error)
            }
        }
    }

    /// What is in the way of a lock: `F_UNLCK` if nothing is.
    pub(crate) fn get(
        &mut self,
        numbers: &Numbers,
        handle: &Handle,
        owner: u64,
        mut range: Range,
    ) -> Answer<Range> {
        let known = self.holders.get(&(handle.node, owner));
        match known.and_then(|holders| holders.first()) {
            Some(holder) => range.call(holder.fd.as_raw_fd(), libc::F_OFD_GETLK)?,
            None => {
                // Asking takes an open file that holds nothing itself.
                let fd = numbers.open(handle.fd(), libc::O_RDONLY)?;
                range.call(fd.as_raw_fd(), libc::F_OFD_GETLK)?;
            }
        }
        Ok(range)
    }

    /// Gives up all that an owner has of a file.
    pub(crate) fn give_up(&mut self, node: u64, owner: u64) {
        if self.holders.remove(&(node, owner)).is_some() {
            self.hurry();
        }
    }

    /// Has those who wait try again at once.
    pub(crate) fn hurry(&mut self) {
        self.next_try = Instant::now();
        self.pause = SOON;
    }

    pub(crate) fn wait(&mut self, waiter: Waiter) {
        self.waiting.push(waiter);
        self.next_try = Instant::now() + SOON;
        self.pause = SOON;
    }

    /// Whether it is time to try again.
    pub(crate) fn is_due(&self) -> bool {
        Instant::now() >= self.next_try
    }

    /// The next try is a longer while away.
    pub(crate) fn put_off(&mut self) {
        self.next_try = Instant::now() + self.pause;
        self.pause = (2 * self.pause).min(LATE);
    }

    /// How long until the next try, if anybody waits.
    pub(crate) fn until_due(&self) -> Option<Duration> {
        if self.watcher.as_ref().is_some_and(|watcher| watcher.ended) {
            return Some(Duration::ZERO);
        }
        if self.waiting.is_empty() {
            return None;
        }
        if self.waiting.iter().any(|waiter| waiter.ended.is_some()) {
            return Some(Duration::ZERO);
        }
        Some(self.next_try.saturating_duration_since(Instant::now()))
    }

    /// Who has waited long.
    pub(crate) fn long_waits(&mut self) -> Vec<Wait> {
        let mut waiting: Vec<&Waiter> = self.waiting.iter().collect();
        waiting.retain(|waiter| waiter.ended.is_none() && waiter.since.elapsed() >= LONG);
        // Each has its turn when there are more than are told of at once.
        if waiting.len() > kiln_lockwatch::MOST {
            self.turn = (self.turn + kiln_lockwatch::MOST) % waiting.len();
            waiting.rotate_left(self.turn);
        }
        let wait = |waiter: &Waiter| Wait {
            unique: waiter.unique,
            thread: waiter.thread,
        };
        waiting.into_iter().map(wait).collect()
    }

    /// A request waits no longer. `false` if it does not wait.
    pub(crate) fn interrupt(&mut self, unique: u64) -> bool {
        if let Some(watcher) = &mut self.watcher
            && watcher.unique == unique
        {
            watcher.ended = true;
            return true;
        }
        let mut waiters = self.waiting.iter_mut();
        let found = waiters.find(|waiter| waiter.unique == unique);
        found
            .map(|waiter| waiter.ended = Some(Errno(libc::EINTR)))
            .is_some()
    }

    /// Gives up all locks. Those who wait are answered.
    pub(crate) fn clear(&mut self) {
        self.holders.clear();
        if let Some(watcher) = &mut self.watcher {
            watcher.ended = true;
        }
        for waiter in &mut self.waiting {
            waiter.ended = Some(Errno(libc::EINTR));
        }
    }
}

/// Locks the whole file that is open, or unlocks it.
pub(crate) fn whole(fd: RawFd, operation: i32) -> Answer<()> {
    // SAFETY: numbers only.
    done(unsafe { libc::flock(fd, operation | libc::LOCK_NB) })
}
