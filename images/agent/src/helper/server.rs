//! The helper's own loop: take a job, fork a worker, take the next.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::{Context, anyhow};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::{ForkResult, dup2_stdin, fork};

use super::fault::Fault;
use super::{Job, Made, Reply, child, create, exec, log};
use crate::sys;

/// Serves jobs from the socket that is stdin, until the agent closes it.
pub(crate) fn serve() -> anyhow::Result<()> {
    let socket = take_stdin().context("move the helper's socket away from stdin")?;
    log::install();
    // Workers are collected by the kernel. Each of them goes back to the default before it makes
    // children of its own.
    set_child_handling(SaFlags::SA_NOCLDWAIT)?;
    let mut byte = [0; 1];
    loop {
        let (length, fds) = sys::receive_with_fds(socket.as_fd(), &mut byte)?;
        if length == 0 {
            return Ok(());
        }
        // SAFETY: this process has exactly one thread (it starts none, and neither does anything it
        // calls), so the child may go on as if nothing had happened.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => {
                drop(socket);
                work(fds);
            }
            Ok(ForkResult::Parent { .. }) => {}
            // The descriptors are dropped, so the agent sees the end of the reply socket.
            Err(error) => tracing::error!(%error, "cannot fork a worker"),
        }
    }
}

/// Does one job and ends the process.
fn work(mut fds: Vec<OwnedFd>) -> ! {
    if fds.len() < 2 {
        child::leave(2);
    }
    let reply_socket = fds.remove(0);
    let payload = fds.remove(0);
    let result = set_child_handling(SaFlags::empty())
        .and_then(|()| child::reset_signals().context("reset signal handlers"))
        .and_then(|()| log::start().context("open the job's log"))
        .and_then(|()| run(payload, fds, &reply_socket));
    let (reply, terminal) = match result {
        Ok(Made { pid, terminal }) => (
            Reply {
                result: Ok(pid),
                log: String::new(),
            },
            terminal,
        ),
        Err(error) => (
            Reply {
                result: Err(Fault::of(&error)),
                log: log::text(),
            },
            None,
        ),
    };
    let raw: Vec<_> = terminal.iter().map(AsRawFd::as_raw_fd).collect();
    let sent = serde_json::to_vec(&reply)
        .map_err(io::Error::from)
        .and_then(|bytes| sys::send_with_fds(reply_socket.as_fd(), &bytes, &raw));
    child::leave(i32::from(sent.is_err()));
}

fn run(payload: OwnedFd, fds: Vec<OwnedFd>, reply_socket: &OwnedFd) -> anyhow::Result<Made> {
    let job: Job =
        serde_json::from_reader(io::BufReader::new(File::from(payload))).context("read the job")?;
    match job {
        Job::Create(job) => create::run(&job, fds),
        Job::Exec(job) => exec::run(&job, fds),
        Job::PodInit(users) => {
            child::pod_init(reply_socket, users.as_deref()).map_err(|error| anyhow!(error))
        }
    }
}

/// Moves the socket out of the way of stdio and puts `/dev/null` in its place.
fn take_stdin() -> io::Result<OwnedFd> {
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    dup2_stdin(File::open("/dev/null")?)?;
    Ok(socket)
}

fn set_child_handling(flags: SaFlags) -> anyhow::Result<()> {
    let action = SigAction::new(SigHandler::SigDfl, flags, SigSet::empty());
    // SAFETY: no handler function is installed, only the default action with another flag.
    unsafe { sigaction(Signal::SIGCHLD, &action) }.context("set the handling of SIGCHLD")?;
    Ok(())
}
