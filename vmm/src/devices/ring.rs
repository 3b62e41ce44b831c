//! Working through a virtqueue: the loop every device shares, and what ends it.
//!
//! The loop is bounded: at most one queue's worth of chains is handled a turn, whatever the driver adds
//! meanwhile. A chain that is malformed is given back unused and logged; a ring that cannot be
//! worked with any more is an error, for which the caller stops the device.

use std::fmt::Display;
use std::sync::atomic::Ordering;

use thiserror::Error;
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::chain::{Chain, ChainError};
use crate::virtio::{ActiveQueue, Interrupt};

/// Guest memory as one consistent view.
pub type Mem = GuestMemoryMmap<()>;

/// Why a ring can't be used any more.
#[derive(Debug, Error)]
pub enum RingError {
    /// An index or a ring address is impossible.
    #[error("queue {queue}: {source}")]
    Broken {
        /// The queue's number.
        queue: u16,
        /// What the ring code found.
        #[source]
        source: virtio_queue::Error,
    },
    /// The ring says that there is work and gives none.
    #[error("queue {queue}: the available ring can't be read")]
    Stuck {
        /// The queue's number.
        queue: u16,
    },
}

/// What a device did with a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handled {
    /// Finished; so many bytes were written to it.
    Used(u32),
    /// Taken; the device puts it on the used ring later.
    Kept,
    /// Not now. The chain stays available and the turn ends.
    NoRoom,
}

/// Why a turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TurnEnd {
    /// The driver has nothing more; it will kick when it has.
    Empty,
    /// The device has no room for more.
    NoRoom,
    /// One turn's share is used up; the queue has been kicked again on its own behalf.
    Share,
}

/// Things a driver did wrong, logged ever more seldom so that it can't flood the log.
#[derive(Debug)]
pub struct Complaints {
    device: &'static str,
    seen: u64,
}

impl Complaints {
    /// For a device of this kind.
    pub fn new(device: &'static str) -> Self {
        Complaints { device, seen: 0 }
    }

    /// Logs the 1st, 2nd, 4th, 8th... complaint.
    pub fn add(&mut self, what: impl Display) {
        self.seen = self.seen.saturating_add(1);
        if self.seen.is_power_of_two() {
            tracing::warn!(
                device = self.device,
                count = self.seen,
                "driver error: {what}"
            );
        }
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.seen
    }
}

/// Hands the available chains to `handle` for one turn. Does not interrupt the driver: see [`notify`].
pub fn turn(
    active: &mut ActiveQueue,
    mem: &Mem,
    complaints: &mut Complaints,
    mut handle: impl FnMut(Chain, &mut Complaints) -> Result<Handled, RingError>,
) -> Result<TurnEnd, RingError> {
    let mut share = active.queue.size();
    loop {
        active
            .queue
            .disable_notification(mem)
            .map_err(|e| broken(active.index, e))?;
        while let Some(chain) = next_chain(active, mem)? {
            if share == 0 {
                active.queue.go_to_previous_position();
                active.rekick();
                return Ok(TurnEnd::Share);
            }
            share -= 1;
            let handled = match chain {
                Ok(chain) => {
                    let head = chain.head;
                    (head, handle(chain, complaints)?)
                }
                Err((head, error)) => {
                    complaints.add(error);
                    (head, Handled::Used(0))
                }
            };
            match handled {
                (head, Handled::Used(len)) => add_used(active, mem, head, len)?,
                (_, Handled::Kept) => {}
                (_, Handled::NoRoom) => {
                    active.queue.go_to_previous_position();
                    return Ok(TurnEnd::NoRoom);
                }
            }
        }
        if !active
            .queue
            .enable_notification(mem)
            .map_err(|e| broken(active.index, e))?
        {
            return Ok(TurnEnd::Empty);
        }
    }
}

/// Takes the next available chain off the ring, for a device that pulls buffers when it has something
/// to put in. Gives `None` when there is none; then the driver's next kick is asked for.
pub fn pull(
    active: &mut ActiveQueue,
    mem: &Mem,
    complaints: &mut Complaints,
) -> Result<Option<Chain>, RingError> {
    for _ in 0..active.queue.size() {
        match next_chain(active, mem)? {
            Some(Ok(chain)) => return Ok(Some(chain)),
            Some(Err((head, error))) => {
                complaints.add(error);
                add_used(active, mem, head, 0)?;
            }
            None => {
                if !active
                    .queue
                    .enable_notification(mem)
                    .map_err(|e| broken(active.index, e))?
                {
                    return Ok(None);
                }
            }
        }
    }
    // A ring full of malformed chains: let the other devices have a turn.
    active.rekick();
    Ok(None)
}

/// Gives the last pulled chain back to the available ring.
pub fn put_back(active: &mut ActiveQueue) {
    active.queue.go_to_previous_position();
}

/// Returns a chain to the driver.
pub fn add_used(active: &mut ActiveQueue, mem: &Mem, head: u16, len: u32) -> Result<(), RingError> {
    active
        .queue
        .add_used(mem, head, len)
        .map_err(|e| broken(active.index, e))
}

/// Interrupts the driver if chains were used since the used position was `since`, and it wants to hear
/// of them.
pub fn notify(
    active: &mut ActiveQueue,
    mem: &Mem,
    interrupt: &Interrupt,
    since: u16,
) -> Result<(), RingError> {
    if wants_to_hear(active, mem, since)? {
        interrupt.signal_queue(active.index);
    }
    Ok(())
}

/// Whether chains were used since the used position was `since`, and the driver wants to hear of them.
pub fn wants_to_hear(active: &mut ActiveQueue, mem: &Mem, since: u16) -> Result<bool, RingError> {
    if active.queue.next_used() == since {
        return Ok(false);
    }
    active
        .queue
        .needs_notification(mem)
        .map_err(|e| broken(active.index, e))
}

type Pulled = Result<Chain, (u16, ChainError)>;

fn next_chain(active: &mut ActiveQueue, mem: &Mem) -> Result<Option<Pulled>, RingError> {
    let index = active.index;
    // The iterator ends in the same way on an empty ring and on an unreadable entry. An empty one has
    // its index where we are; a second look covers an index that moved between the two.
    for _ in 0..2 {
        // `iter` also refuses an available index that is more than a queue ahead.
        if let Some(raw) = active.queue.iter(mem).map_err(|e| broken(index, e))?.next() {
            let head = raw.head_index();
            return Ok(Some(Chain::parse(mem, raw).map_err(|error| (head, error))));
        }
        let available = active
            .queue
            .avail_idx(mem, Ordering::Relaxed)
            .map_err(|e| broken(index, e))?;
        if available.0 == active.queue.next_avail() {
            return Ok(None);
        }
    }
    Err(RingError::Stuck { queue: index })
}

fn broken(queue: u16, source: virtio_queue::Error) -> RingError {
    RingError::Broken { queue, source }
}
