//! Collects the exit of every process that ends up as the agent's child.
//!
//! As PID 1 (or as a subreaper) the agent becomes the parent of whatever loses its own: container
//! processes, whose creator exits on purpose, and strays. One loop waits for all of them, so nobody
//! else in the agent may call `wait`; who wants an exit asks here. A container's process can end
//! before the agent has learned its number from the helper: exits that nobody claims are kept while
//! a [`Launch`] is open.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::sys;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// As a shell has it: 128 + signal for a process that a signal ended.
    pub(crate) code: u32,
    /// Wall clock.
    pub(crate) at_ns: i64,
}

/// Where an exit will appear.
pub(crate) type ExitReceiver = watch::Receiver<Option<Exit>>;

#[derive(Debug, Default)]
struct Table {
    wanted: BTreeMap<i32, watch::Sender<Option<Exit>>>,
    /// Exits of processes that nobody has asked for, kept while somebody may.
    unclaimed: BTreeMap<i32, Exit>,
    launches: usize,
}

/// The table of exits; cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reaper {
    table: Arc<Mutex<Table>>,
}

/// While one exists, exits of unknown processes are remembered.
#[derive(Debug)]
pub(crate) struct Launch {
    reaper: Reaper,
}

impl Launch {
    /// Asks for a process that the launch has made, which may have ended already.
    pub(crate) fn claim(&self, pid: i32) -> ExitReceiver {
        let mut table = self.reaper.lock();
        if let Some(exit) = table.unclaimed.remove(&pid) {
            return watch::channel(Some(exit)).1;
        }
        let (sender, receiver) = watch::channel(None);
        table.wanted.insert(pid, sender);
        receiver
    }
}

impl Drop for Launch {
    fn drop(&mut self) {
        let mut table = self.reaper.lock();
        table.launches -= 1;
        if table.launches == 0 {
            table.unclaimed.clear();
        }
    }
}

impl Reaper {
    /// Announces that processes are about to be made.
    pub(crate) fn launch(&self) -> Launch {
        self.lock().launches += 1;
        Launch {
            reaper: self.clone(),
        }
    }

    /// Waits for children for ever. Must run before the first launch.
    pub(crate) async fn run(self) -> io::Result<()> {
        let mut children = signal(SignalKind::child())?;
        loop {
            self.collect()?;
            if children.recv().await.is_none() {
                return Err(io::Error::other("the runtime stopped delivering SIGCHLD"));
            }
        }
    }

    /// Collects what has ended so far.
    fn collect(&self) -> io::Result<()> {
        while let Some((pid, code)) = sys::process::wait_any()? {
            self.ended(pid, code);
        }
        Ok(())
    }

    fn ended(&self, pid: i32, code: u32) {
        let exit = Exit {
            code,
            at_ns: sys::now_ns(),
        };
        let mut table = self.lock();
        if let Some(sender) = table.wanted.remove(&pid) {
            sender.send_replace(Some(exit));
        } else if table.launches > 0 {
            table.unclaimed.insert(pid, exit);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for an exit.
pub(crate) async fn exit_of(mut receiver: ExitReceiver) -> Exit {
    match receiver.wait_for(Option::is_some).await.map(|exit| *exit) {
        Ok(Some(exit)) => exit,
        // The sender is only dropped after it has sent; a process that vanished from the table
        // without that counts as killed.
        _ => Exit {
            code: 255,
            at_ns: sys::now_ns(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(reaper: &Reaper, pid: i32, code: u32) {
        reaper.ended(pid, code);
    }

    #[tokio::test]
    async fn an_exit_reaches_who_claimed_the_process() {
        let reaper = Reaper::default();
        let receiver = reaper.launch().claim(10);
        ended(&reaper, 11, 1);
        ended(&reaper, 10, 7);
        assert_eq!(exit_of(receiver).await.code, 7);
    }

    #[tokio::test]
    async fn a_process_that_ended_before_it_was_claimed_is_not_lost() {
        let reaper = Reaper::default();
        let launch = reaper.launch();
        ended(&reaper, 10, 137);
        assert_eq!(exit_of(launch.claim(10)).await.code, 137);
    }

    #[tokio::test]
    async fn an_exit_from_before_the_launch_is_not_mistaken_for_one_of_it() {
        let reaper = Reaper::default();
        drop(reaper.launch());
        ended(&reaper, 10, 1);
        let launch = reaper.launch();
        assert!(launch.claim(10).borrow().is_none());
    }

    #[test]
    fn strays_are_forgotten_when_no_launch_is_open() {
        let reaper = Reaper::default();
        let (one, two) = (reaper.launch(), reaper.launch());
        ended(&reaper, 10, 0);
        drop(one);
        assert_eq!(reaper.lock().unclaimed.len(), 1);
        drop(two);
        assert!(reaper.lock().unclaimed.is_empty());
    }
}
