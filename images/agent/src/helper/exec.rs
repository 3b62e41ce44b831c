//! Runs one more process in a container, or in the guest itself.
//!
//! libcontainer has this too (its "tenant" builder), but in 0.7 an exec made by it has neither the
//! container's seccomp filter nor its user namespace, and it goes through the file system and three
//! processes. Here a worker enters the namespaces at once through the first process's pidfd and
//! forks the new process, which narrows itself down and executes; the pipe between the two closes at
//! a successful `exec` and carries the reason of a failing one.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, bail};
use libcontainer::capabilities;
use libcontainer::oci_spec::runtime::Process;
use libcontainer::seccomp;
use libcontainer::syscall::syscall::create_syscall;
use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{ForkResult, Gid, Uid, dup2_stderr, dup2_stdin, dup2_stdout, fork, pipe2};

use super::fault::Fault;
use super::{ExecJob, Made, child, program};
use crate::sys;

/// Runs in a worker.
pub(super) fn run(job: &ExecJob, fds: Vec<OwnedFd>) -> anyhow::Result<Made> {
    let process = &job.process;
    let terminal = process.terminal().unwrap_or(false);
    if !terminal && fds.len() != 3 {
        bail!("the job lacks a standard stream");
    }
    // Opened with the agent's rights and view, written by the new process.
    let cgroup = std::fs::OpenOptions::new()
        .write(true)
        .open(job.cgroup.join("cgroup.procs"))
        .with_context(|| format!("open the cgroup {}", job.cgroup.display()))?;
    let score = process.oom_score_adj().unwrap_or(0);
    std::fs::write("/proc/self/oom_score_adj", score.to_string()).context("set oom_score_adj")?;
    if let Some(pid) = job.container_pid {
        let target = sys::pidfd_open(pid).context("find the container's first process")?;
        if job.has_users() {
            // The namespace's root may not raise them any more.
            set_limits(process)?;
        }
        setns(&target, CloneFlags::from_bits_retain(job.namespaces))
            .context("enter the container's namespaces")?;
        if job.has_users() {
            // So far it is nobody there, and what it makes couldn't be given to anybody.
            sys::process::become_user(0, 0).context("become the user namespace's root")?;
        }
    }
    let (status, status_in_child) = pipe2(OFlag::O_CLOEXEC).context("make the status pipe")?;
    let (terminals, terminals_in_child) = super::pair().context("make the terminal's socket")?;
    // SAFETY: workers have one thread.
    match unsafe { fork() }.context("fork the new process")? {
        ForkResult::Child => {
            drop(status);
            drop(terminals);
            let error = match become_process(job, &cgroup, fds, &terminals_in_child) {
                Ok(never) => match never {},
                Err(error) => error,
            };
            Fault::of(&error).tell(status_in_child.as_raw_fd());
            child::leave(127);
        }
        ForkResult::Parent { child } => {
            drop(status_in_child);
            drop(terminals_in_child);
            let mut told = Vec::new();
            File::from(status)
                .read_to_end(&mut told)
                .context("read the new process's status")?;
            if let Some(fault) = Fault::told(&told) {
                return Err(fault.into());
            }
            let terminal = terminal.then(|| receive_terminal(&terminals)).transpose()?;
            Ok(Made {
                pid: child.as_raw(),
                terminal,
            })
        }
    }
}

fn receive_terminal(socket: &OwnedFd) -> anyhow::Result<OwnedFd> {
    let mut byte = [0; 1];
    let (_, mut fds) = sys::receive_with_fds(socket.as_fd(), &mut byte)?;
    fds.pop().context("the new process sent no terminal")
}

fn set_limits(process: &Process) -> anyhow::Result<()> {
    let kernel = create_syscall();
    for limit in process.rlimits().iter().flatten() {
        kernel
            .set_rlimit(limit)
            .with_context(|| format!("set {:?}", limit.typ()))?;
    }
    Ok(())
}

/// Narrows this process down to what `job` allows and executes its program.
fn become_process(
    job: &ExecJob,
    mut cgroup: &File,
    stdio: Vec<OwnedFd>,
    terminals: &OwnedFd,
) -> anyhow::Result<std::convert::Infallible> {
    let process = &job.process;
    let kernel = create_syscall();
    cgroup
        .write_all(b"0")
        .context("join the container's cgroup")?;
    nix::unistd::setsid().context("start a session")?;
    if process.terminal().unwrap_or(false) {
        open_terminal(job, terminals)?;
    } else {
        for (position, fd) in stdio.into_iter().enumerate() {
            match position {
                0 => dup2_stdin(fd),
                1 => dup2_stdout(fd),
                _ => dup2_stderr(fd),
            }
            .context("connect a standard stream")?;
        }
    }
    if !job.has_users() {
        set_limits(process)?;
    }
    if let Some(mask) = process.user().umask() {
        umask(Mode::from_bits_truncate(mask));
    }
    // As root first: the user may not be allowed to look where the process shall start.
    let early = nix::unistd::chdir(process.cwd());
    let user = process.user();
    let groups: Vec<Gid> = user
        .additional_gids()
        .iter()
        .flatten()
        .map(|&gid| Gid::from_raw(gid))
        .collect();
    nix::unistd::setgroups(&groups).context("set the supplementary groups")?;
    sys::process::become_user(user.uid(), user.gid())
        .with_context(|| format!("become user {}, group {}", user.uid(), user.gid()))?;
    let no_new_privileges = process.no_new_privileges().unwrap_or(false);
    if no_new_privileges {
        nix::sys::prctl::set_no_new_privs().context("set no_new_privs")?;
    }
    // Close on exec, not now: the status pipe has to outlive this.
    sys::process::close_on_exec_from(3)?;
    let filter = |wanted: bool| match &job.seccomp {
        Some(profile) if wanted => seccomp::initialize_seccomp(profile)
            .map(drop)
            .context("load the seccomp filter"),
        _ => Ok(()),
    };
    // Without no_new_privs the kernel wants CAP_SYS_ADMIN for a filter, so it has to come before the
    // capabilities go.
    filter(!no_new_privileges)?;
    if let Some(wanted) = process.capabilities() {
        capabilities::reset_effective(kernel.as_ref()).context("raise the capabilities")?;
        capabilities::drop_privileges(wanted, kernel.as_ref()).context("drop capabilities")?;
    }
    if early.is_err() {
        nix::unistd::chdir(process.cwd())
            .with_context(|| format!("chdir to cwd ({:?})", process.cwd().display()))?;
    }
    filter(no_new_privileges)?;
    Ok(program::execute(process)?)
}

/// Makes a terminal in the container's own devpts, the standard streams' and the session's, and
/// hands its master to the worker.
fn open_terminal(job: &ExecJob, terminals: &OwnedFd) -> anyhow::Result<()> {
    let master = open_master().context("open /dev/ptmx in the container")?;
    let slave = sys::process::open_slave(&master).context("open the terminal's slave")?;
    nix::unistd::fchown(&slave, Some(Uid::from_raw(job.process.user().uid())), None)
        .context("give the terminal to the process's user")?;
    if let Some((width, height)) = job.terminal_size {
        sys::set_terminal_size(slave.as_fd(), width, height).context("set the terminal's size")?;
    }
    sys::process::make_controlling_terminal(&slave).context("make the terminal controlling")?;
    sys::send_with_fds(terminals.as_fd(), b"t", &[master.as_raw_fd()])
        .context("hand over the terminal")?;
    dup2_stdin(&slave).context("connect stdin")?;
    dup2_stdout(&slave).context("connect stdout")?;
    dup2_stderr(&slave).context("connect stderr")?;
    Ok(())
}

/// The container's image decides what lies at these paths, so what was opened is looked at.
fn open_master() -> io::Result<OwnedFd> {
    const DEVPTS: i64 = 0x1cd1;

    let open = |path: &str| {
        let flags = libc::O_NOCTTY | libc::O_CLOEXEC;
        std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path)
    };
    let master = open("/dev/pts/ptmx").or_else(|_| open("/dev/ptmx"))?;
    let kind = nix::sys::statfs::fstatfs(&master)?.filesystem_type();
    if kind.0 != DEVPTS {
        return Err(io::Error::other(
            "it is not a terminal multiplexer of a devpts",
        ));
    }
    Ok(master.into())
}
