//! Makes a container with libcontainer.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;

use anyhow::{Context, bail};
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::{SyscallType, create_syscall};
use nix::fcntl::OFlag;
use nix::unistd::pipe2;

use super::fault::Fault;
use super::program::Program;
use super::{CreateJob, MAX_REPLY, Made};
use crate::sys;

/// Runs in a worker.
pub(super) fn run(job: &CreateJob, fds: Vec<OwnedFd>) -> anyhow::Result<Made> {
    let mut fds = fds.into_iter();
    let Some(status) = fds.next() else {
        bail!("the job lacks its status pipe")
    };
    for limit in &job.rlimits {
        create_syscall()
            .set_rlimit(limit)
            .with_context(|| format!("set {:?}", limit.typ()))?;
    }
    // Not waited for: the process that it is told by may live on.
    let (told, validation) =
        pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).context("make the pipe of the validation")?;
    let mut builder = ContainerBuilder::new(job.name.clone(), SyscallType::default())
        .with_root_path(&job.state)?
        .with_executor(Program {
            validation: validation.as_raw_fd(),
            status: status.as_raw_fd(),
        });
    let console = if job.terminal {
        let path = job.bundle.join("console.sock");
        let listener = UnixListener::bind(&path).context("bind the console socket")?;
        builder = builder.with_console_socket(Some(path));
        Some(listener)
    } else {
        let (Some(stdin), Some(stdout), Some(stderr)) = (fds.next(), fds.next(), fds.next()) else {
            bail!("the job lacks a standard stream");
        };
        builder = builder
            .with_stdin(stdin)
            .with_stdout(stdout)
            .with_stderr(stderr);
        None
    };
    let container = builder
        .as_init(&job.bundle)
        .with_systemd(false)
        .with_detach(true)
        .build()
        .map_err(|error| validated(told).unwrap_or_else(|| cause(&error.to_string())))?;
    let Some(pid) = container.pid() else {
        bail!("libcontainer made a container without a process")
    };
    // The first process has sent its terminal before it reported itself ready.
    let terminal = console
        .map(|listener| receive_terminal(&listener))
        .transpose()?;
    Ok(Made {
        pid: pid.as_raw(),
        terminal,
    })
}

/// What the first process found wrong with its program, if that is why there is no container.
fn validated(told: OwnedFd) -> Option<anyhow::Error> {
    let mut bytes = vec![0; MAX_REPLY];
    let length = File::from(told).read(&mut bytes).ok()?;
    Some(Fault::told(bytes.get(..length)?)?.into())
}

/// What the first process said of itself, if it was that which failed, else all of `error`.
/// libcontainer has it as text only, behind what its own layers say.
fn cause(error: &str) -> anyhow::Error {
    const BEFORE: &str = "error in executing process : ";
    let own = error
        .rfind(BEFORE)
        .and_then(|at| error.get(at + BEFORE.len()..));
    anyhow::anyhow!("{}", own.unwrap_or(error))
}

fn receive_terminal(listener: &UnixListener) -> anyhow::Result<OwnedFd> {
    let (socket, _) = listener.accept().context("accept on the console socket")?;
    let mut name = [0; 64];
    let (_, mut fds) = sys::receive_with_fds(socket.as_fd(), &mut name)?;
    fds.pop().context("the container sent no terminal")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_program_is_all_that_is_told() {
        let whole = "exec process failed with error error in executing process : exec: \"x\": gone";
        assert_eq!(cause(whole).to_string(), "exec: \"x\": gone");
        assert_eq!(cause("no cgroup").to_string(), "no cgroup");
    }
}
