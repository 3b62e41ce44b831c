//! What libcontainer logs while it works on a job, so that a failure can be told in full.
//!
//! The forks of a job share a memory file for it. Nothing is ever written to stdout or stderr, which
//! in a container's process are the container's own by then.

use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tracing::Level;

use crate::sys;

/// How much of a log is passed on.
const MAX_LOG: usize = 8 * 1024;

/// The job's log; set once in a worker, never in the helper itself.
static LOG: OnceLock<OwnedFd> = OnceLock::new();

/// Sends what is logged in this process and its forks to the job's log.
pub(super) fn install() {
    let installed = tracing_subscriber::fmt()
        .with_max_level(Level::ERROR)
        .without_time()
        .with_level(false)
        .with_target(false)
        .with_ansi(false)
        .with_writer(|| JobLog)
        .try_init();
    // It fails only if a subscriber is there already, which is as good.
    drop(installed);
}

/// Opens the log of this worker's job.
pub(super) fn start() -> io::Result<()> {
    let file = sys::memory_file("kiln-job-log", b"")?;
    fcntl(&file, FcntlArg::F_SETFL(OFlag::O_APPEND))?;
    drop(LOG.set(file));
    Ok(())
}

/// The log so far.
pub(super) fn text() -> String {
    let mut bytes = Vec::new();
    if let Some(copy) = LOG.get().and_then(|log| log.try_clone().ok()) {
        let mut file = std::fs::File::from(copy);
        if file.rewind().is_ok() {
            // What can't be read is left out: the error itself is reported anyway.
            drop(file.take(MAX_LOG as u64).read_to_end(&mut bytes));
        }
    }
    String::from_utf8_lossy(&bytes)
        .trim_end()
        .replace('\n', "; ")
}

struct JobLog;

impl JobLog {
    fn target() -> Option<BorrowedFd<'static>> {
        LOG.get().map(AsFd::as_fd)
    }
}

impl Write for JobLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match Self::target() {
            Some(log) => Ok(nix::unistd::write(log, bytes)?),
            None => io::stderr().write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
