//! Makes container processes, in a process of its own.
//!
//! `libcontainer` forks without `exec` and so may only run where there is a single thread; the agent
//! has several. At its start, before it has any, the agent therefore runs its own binary once more:
//! the *helper*, a small single-threaded server ([`server`]) that forks one short-lived *worker* per
//! job. A worker makes the process and ends, whereupon the process becomes the agent's child. All of
//! this is in place when the μVM is baked, so that a container's start pays for a fork, not for an
//! exec.
//!
//! | | |
//! |---|---|
//! | agent → helper | one datagram a job; descriptors: reply socket, the [`Job`] as JSON in a memory file, then the job's own |
//! | worker → agent | one [`Reply`] as JSON on the reply socket; descriptor: a terminal's master, if there is one |
//!
//! The agent trusts the helper as itself. What the helper runs in a container is not trusted by
//! either: a worker that dies or hangs costs its job only.

mod child;
mod create;
mod exec;
mod fault;
mod log;
mod program;
mod server;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use libcontainer::oci_spec::runtime::{LinuxSeccomp, PosixRlimit, Process};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub(crate) use self::fault::{Fault, FaultKind};
pub(crate) use self::server::serve;
use crate::sys;

/// The argument that turns the agent's binary into the helper.
pub(crate) const HELPER_ARGUMENT: &str = "--helper";

/// Most bytes of a reply; what libcontainer logs about a failure is cut to fit.
const MAX_REPLY: usize = 64 * 1024;

/// What a worker shall do.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Job {
    /// Make a container's first process, up to the point where it waits to be started. Descriptors:
    /// where it tells of a failing `exec`, then stdin, stdout, stderr unless there is a terminal.
    Create(CreateJob),
    /// Run one more process in a container, or in the guest itself. Descriptors: stdin, stdout,
    /// stderr unless there is a terminal.
    Exec(Box<ExecJob>),
    /// Make the first process of a PID namespace that a pod's containers share, in the user namespace that is this file,
    /// if they have one.
    PodInit(Option<PathBuf>),
}

/// See [`Job::Create`].
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct CreateJob {
    /// Short name of the container, also of its folder below `state`.
    pub(crate) name: String,
    /// The folder with `config.json`.
    pub(crate) bundle: PathBuf,
    /// Where libcontainer keeps its state.
    pub(crate) state: PathBuf,
    /// The process has a terminal.
    pub(crate) terminal: bool,
    /// Limits that take more rights than there are in the container's user namespace.
    pub(crate) rlimits: Vec<PosixRlimit>,
}

/// See [`Job::Exec`].
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ExecJob {
    /// What to run.
    pub(crate) process: Process,
    /// The container's filter, which an exec gets too.
    pub(crate) seccomp: Option<LinuxSeccomp>,
    /// The container's first process, whose namespaces are entered. `None`: the guest's own.
    pub(crate) container_pid: Option<i32>,
    /// `CLONE_NEW*` of the namespaces to enter.
    pub(crate) namespaces: i32,
    /// Columns and rows of its terminal, set before the program runs.
    pub(crate) terminal_size: Option<(u16, u16)>,
    /// The cgroup to run in.
    pub(crate) cgroup: PathBuf,
}

impl ExecJob {
    /// Whether the container has a user namespace.
    fn has_users(&self) -> bool {
        self.namespaces & libc::CLONE_NEWUSER != 0
    }
}

/// What came of a job.
#[derive(Debug, Serialize, Deserialize)]
struct Reply {
    /// The new process.
    result: Result<i32, Fault>,
    /// What was logged on the way, if it failed.
    log: String,
}

/// Why there is no process.
#[derive(Debug, Error)]
pub(crate) enum HelperError {
    /// The helper could not be started or spoken to.
    #[error("the agent's helper process cannot be reached: {0}")]
    Unreachable(#[source] io::Error),
    /// The worker ended without a word: killed, out of memory, or a bug.
    #[error(
        "the worker that was to make the process died; the container or the μVM may be out of memory"
    )]
    Died,
    /// The worker says why.
    #[error(transparent)]
    Failed(#[from] Fault),
}

/// A process that a worker has made.
#[derive(Debug)]
pub(crate) struct Made {
    /// Its number in the agent's PID namespace.
    pub(crate) pid: i32,
    /// The master of its terminal.
    pub(crate) terminal: Option<OwnedFd>,
}

/// The agent's side of the helper.
#[derive(Debug)]
pub(crate) struct Helper {
    socket: Mutex<OwnedFd>,
}

impl Helper {
    /// Starts the helper. Its exit, should it ever come, is the reaper's to collect.
    pub(crate) fn start() -> Result<Self, HelperError> {
        let socket = spawn().map_err(HelperError::Unreachable)?;
        Ok(Self {
            socket: Mutex::new(socket),
        })
    }

    /// Creates a container.
    pub(crate) async fn create(
        &self,
        job: CreateJob,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Made, HelperError> {
        self.run(&Job::Create(job), fds).await
    }

    /// Runs a process in a container or in the guest.
    pub(crate) async fn exec(
        &self,
        job: ExecJob,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Made, HelperError> {
        self.run(&Job::Exec(Box::new(job)), fds).await
    }

    /// Makes a PID namespace with a first process that only collects its children.
    pub(crate) async fn pod_init(&self, users: Option<PathBuf>) -> Result<Made, HelperError> {
        self.run(&Job::PodInit(users), &[]).await
    }

    async fn run(&self, job: &Job, fds: &[BorrowedFd<'_>]) -> Result<Made, HelperError> {
        let reply = self.submit(job, fds).map_err(HelperError::Unreachable)?;
        let reply = sys::watch(reply).map_err(HelperError::Unreachable)?;
        let mut buffer = vec![0; MAX_REPLY];
        let (length, mut fds) = loop {
            let mut ready = reply.readable().await.map_err(HelperError::Unreachable)?;
            let received = ready.try_io(|fd| sys::receive_with_fds(fd.as_fd(), &mut buffer));
            match received {
                Ok(Ok(message)) => break message,
                Ok(Err(error)) if error.raw_os_error() == Some(libc::ECONNRESET) => {
                    return Err(HelperError::Died);
                }
                Ok(Err(error)) => return Err(HelperError::Unreachable(error)),
                Err(_would_block) => {}
            }
        };
        if length == 0 {
            return Err(HelperError::Died);
        }
        let reply: Reply = serde_json::from_slice(&buffer[..length])
            .map_err(|error| Fault::other(format!("unreadable reply: {error}")))?;
        match reply.result {
            Ok(pid) => Ok(Made {
                pid,
                terminal: fds.pop(),
            }),
            Err(mut fault) => {
                // Most of what is logged is the error again, once for each layer it went through.
                if !reply.log.is_empty() && !reply.log.contains(&fault.text) {
                    fault.text = format!("{} ({})", fault.text, reply.log.trim_end());
                }
                Err(fault.into())
            }
        }
    }

    /// Sends a job; returns where the reply will come.
    fn submit(&self, job: &Job, fds: &[BorrowedFd<'_>]) -> io::Result<OwnedFd> {
        let payload = sys::memory_file("kiln-job", &serde_json::to_vec(job)?)?;
        let (ours, theirs) = pair()?;
        sys::set_nonblocking(&ours)?;
        let mut raw = vec![theirs.as_raw_fd(), payload.as_raw_fd()];
        raw.extend(fds.iter().map(AsRawFd::as_raw_fd));
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = sys::send_with_fds(socket.as_fd(), b"j", &raw) {
            // Only a helper that has died refuses; the next one may live.
            tracing::error!(%error, "the helper is gone; starting another");
            *socket = spawn()?;
            sys::send_with_fds(socket.as_fd(), b"j", &raw)?;
        }
        Ok(ours)
    }
}

fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?)
}

fn spawn() -> io::Result<OwnedFd> {
    let (ours, theirs) = pair()?;
    // The handle is dropped without a wait: the reaper collects every child.
    let _child = Command::new("/proc/self/exe")
        .arg0("kiln-agent-helper")
        .arg(HELPER_ARGUMENT)
        .env_clear()
        .stdin(Stdio::from(theirs))
        .spawn()?;
    Ok(ours)
}
