//! The step into the background.

use std::fs::{self, File, OpenOptions};
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::AsRawFd;

use nix::unistd::{ForkResult, Pid, fork, getppid, setsid};

/// Which side of the fork this is.
#[derive(Debug)]
pub enum Fork {
    /// `start`, which answers and ends.
    Starter {
        /// The daemon's process id.
        daemon: i32,
        /// What the daemon says of its beginning.
        told: PipeReader,
        /// Where to say that the answer was given.
        answered: PipeWriter,
    },
    /// The shim itself, detached from containerd's pipes.
    Daemon {
        /// Ends without a word if `start` was killed before it had answered: then nobody knows of this shim.
        starter: PipeReader,
        /// Where to say how the beginning went.
        tell: PipeWriter,
    },
}

/// Splits the shim off from `start`.
///
/// The daemon is a fork without an exec: the program is the same, mapped already, and every exec is
/// time on a pod's start.
///
/// # Safety
///
/// The process must have one thread only: no runtime, no logger thread may have been started.
pub unsafe fn fork_daemon() -> io::Result<Fork> {
    // Opened before the fork, so that the daemon can't fail half-way with containerd's pipes open.
    let null = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    let (starter, answered) = io::pipe()?;
    let (told, tell) = io::pipe()?;
    // SAFETY: the caller promises that this is the only thread, so no lock can be held by another
    // one in the child's copy of the memory.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(Fork::Starter {
            daemon: child.as_raw(),
            told,
            answered,
        }),
        ForkResult::Child => {
            drop((answered, told));
            setsid()?;
            detach_stdio(&null)?;
            Ok(Fork::Daemon { starter, tell })
        }
    }
}

/// containerd waits until nobody holds the pipes of `start`'s output.
fn detach_stdio(null: &File) -> io::Result<()> {
    for fd in 0..=2 {
        // SAFETY: dup2 on a descriptor we own and on the three standard numbers; what they
        // referred to before belongs to this process alone.
        if unsafe { libc::dup2(null.as_raw_fd(), fd) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Makes the shim a little likelier to be killed than containerd when memory runs out, as
/// containerd's own shims do.
pub fn adjust_oom_score(pid: i32) -> io::Result<()> {
    let score = fs::read_to_string(format!("/proc/{}/oom_score_adj", parent()))?;
    let score: i32 = score.trim().parse().map_err(io::Error::other)?;
    let wanted = (score + 1).min(1000);
    fs::write(format!("/proc/{pid}/oom_score_adj"), wanted.to_string())
}

fn parent() -> Pid {
    getppid()
}
