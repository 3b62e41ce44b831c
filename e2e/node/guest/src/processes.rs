//! One reaper for all children, ours and orphans, so that PID 1 leaves no zombie and loses no exit code.

use std::collections::HashMap;
use std::io;
use std::process::{Child, Command};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};

/// Who waits for the exit code of which process.
type Waiters = HashMap<i32, Sender<i32>>;

#[derive(Clone, Default)]
pub(crate) struct Processes {
    // Spawning and dispatching exclude each other, or a quick child could end unknown.
    waiters: Arc<(Mutex<Waiters>, Condvar)>,
}

impl Processes {
    pub(crate) fn start() -> Processes {
        let processes = Processes::default();
        let reaper = processes.clone();
        std::thread::spawn(move || reaper.reap());
        processes
    }

    /// Starts a command; its exit code (128 + the signal, if one killed it) comes through the channel.
    pub(crate) fn spawn(&self, command: &mut Command) -> io::Result<(Child, Receiver<i32>)> {
        let (sender, receiver) = channel();
        let (waiters, spawned) = &*self.waiters;
        let mut waiters = waiters.lock().unwrap_or_else(PoisonError::into_inner);
        let child = command.spawn()?;
        waiters.insert(child.id().cast_signed(), sender);
        spawned.notify_one();
        Ok((child, receiver))
    }

    fn reap(&self) {
        let (waiters, spawned) = &*self.waiters;
        loop {
            let (pid, code) = match waitpid(None, None) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, code),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 128 + signal as i32),
                Err(Errno::ECHILD) => {
                    let waiters = waiters.lock().unwrap_or_else(PoisonError::into_inner);
                    if waiters.is_empty() {
                        // No child at all: sleep until one is started.
                        drop(spawned.wait(waiters));
                    }
                    continue;
                }
                _ => continue,
            };
            let waiter = waiters
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&pid.as_raw());
            if let Some(waiter) = waiter {
                // The asker may have gone; then nobody wants to know.
                let _ = waiter.send(code);
            }
        }
    }
}
