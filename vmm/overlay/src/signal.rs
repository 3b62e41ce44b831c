//! How workers sleep and are woken: one futex word, local or in the node's budget, where other
//! processes can wake them, and change nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::budget::Membership;

/// A counter to sleep on.
#[derive(Debug)]
pub(crate) struct Signal {
    local: AtomicU32,
    shared: Option<Arc<Membership>>,
    stop: AtomicBool,
}

impl Signal {
    pub(crate) fn new(shared: Option<Arc<Membership>>) -> Self {
        Signal {
            local: AtomicU32::new(0),
            shared,
            stop: AtomicBool::new(false),
        }
    }

    fn word(&self) -> &AtomicU32 {
        self.shared
            .as_ref()
            .map_or(&self.local, |member| member.wake_word())
    }

    /// What to give to [`Signal::wait`], to be asked before looking for work.
    pub(crate) fn now(&self) -> u32 {
        self.word().load(Ordering::SeqCst)
    }

    /// Ends every `wait`, also the next one if it was prepared before.
    pub(crate) fn notify(&self) {
        self.word().fetch_add(1, Ordering::SeqCst);
        wake(self.word());
    }

    /// Sleeps until there was a `notify` since `now` gave `seen`, or another process woke it; sometimes less long.
    pub(crate) fn wait(&self, seen: u32) {
        // SAFETY: the word lives as long as `self`; no timeout. Not a private futex, since other
        // processes may wake it.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.word().as_ptr(),
                libc::FUTEX_WAIT,
                seen,
                std::ptr::null::<libc::timespec>(),
            );
        }
    }

    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.notify();
    }

    pub(crate) fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }
}

/// Wakes everyone who sleeps on the word, which may be in read-only memory.
pub(crate) fn wake(word: &AtomicU32) {
    // SAFETY: the word is borrowed for the call, which does not write to it.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}
