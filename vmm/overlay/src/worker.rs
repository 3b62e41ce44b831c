//! The threads that move chunks, and what they do first.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, Weak};
use std::thread::JoinHandle;

use crate::mover::{self, Moved};
use crate::pool::Inner;
use crate::signal::Signal;

/// Starts a worker. It ends when the pool is gone.
pub(crate) fn start(pool: Weak<Inner>, signal: Arc<Signal>) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name("overlay".to_owned())
        .stack_size(128 << 10)
        .spawn(move || {
            while !signal.stopped() {
                let seen = signal.now();
                let Some(pool) = pool.upgrade() else { break };
                // Another process's wake that comes while there is work is not kept: so it is looked once
                // more whether this pool's share is smaller now.
                let more = work(&pool) || pool.settle();
                drop(pool);
                if !more {
                    signal.wait(seen);
                }
            }
        })
}

/// Does one piece of work. Tells whether there may be more.
fn work(pool: &Inner) -> bool {
    pool.settle();
    let more = if wants_spill(pool) {
        spill(pool)
    } else {
        bring_back(pool)
    };
    mover::trim(pool);
    if let Some(spill) = &pool.spill {
        spill.collect();
    }
    more
}

fn wants_spill(pool: &Inner) -> bool {
    if pool.spill.is_none() {
        return false;
    }
    if pool.pressed() {
        return true;
    }
    let (used, marks) = (pool.used(), pool.marks());
    if used <= marks.low {
        pool.spilling.store(false, Ordering::SeqCst);
    }
    if pool.failing.load(Ordering::SeqCst) {
        return false;
    }
    used > marks.high || (used > marks.low && pool.spilling.load(Ordering::SeqCst))
}

fn spill(pool: &Inner) -> bool {
    pool.spilling.store(true, Ordering::SeqCst);
    match mover::spill(pool) {
        Moved::Some => {
            pool.failing.store(false, Ordering::SeqCst);
            true
        }
        Moved::Nothing => {
            // Whoever fills RAM further will ask again.
            pool.spilling.store(false, Ordering::SeqCst);
            false
        }
        Moved::Failed(e) => {
            pool.spilling.store(false, Ordering::SeqCst);
            pool.report_failure(&e);
            false
        }
    }
}

/// Frees some RAM on the caller's own thread, or reports that it can't be done.
pub(crate) fn make_room(pool: &Inner) {
    if !spill(pool) {
        // Others may be about to store what they have reserved room for.
        std::thread::yield_now();
    }
    if let Some(spill) = &pool.spill {
        spill.collect();
    }
}

fn bring_back(pool: &Inner) -> bool {
    if !pool.has_room_for_return() {
        return false;
    }
    let next = pool
        .returns
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .pop_front();
    let Some(owner) = next else { return false };
    mover::bring_back(pool, owner);
    true
}
