//! A process that the host started: a container's first, an exec's, or one in the guest itself.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;

use kiln_agent_api::proto;
use kiln_agent_api::stream::TOKEN_LEN;
use protobuf::EnumOrUnknown;

use super::Phase;
use crate::error::AgentError;
use crate::reaper::{Exit, ExitReceiver, exit_of};
use crate::stdio::{Stdio, Wanted};
use crate::sys;

/// One process.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) container: String,
    /// Empty for a container's first process.
    pub(crate) exec: String,
    pub(crate) pid: i32,
    /// The master, to resize it.
    terminal: Option<OwnedFd>,
    pub(crate) stdio: Stdio,
    exit: ExitReceiver,
    /// Whether its container had run out of memory when it ended; set before anybody is told.
    oom_killed: OnceLock<bool>,
}

impl Process {
    pub(crate) fn new(
        (container, exec): (&str, &str),
        pid: i32,
        terminal: Option<OwnedFd>,
        stdio: Stdio,
        exit: ExitReceiver,
    ) -> Self {
        Self {
            container: container.to_owned(),
            exec: exec.to_owned(),
            pid,
            terminal,
            stdio,
            exit,
            oom_killed: OnceLock::new(),
        }
    }

    /// How it ended, if it has.
    pub(crate) fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for its end.
    pub(crate) async fn ended(&self) -> Exit {
        exit_of(self.exit.clone()).await
    }

    /// Remembers whether memory was the reason.
    pub(crate) fn set_oom_killed(&self, killed: bool) {
        let _first = self.oom_killed.set(killed);
    }

    /// Its end, for the host.
    pub(crate) fn status(&self, exit: Exit) -> proto::ExitStatus {
        proto::ExitStatus {
            exit_code: exit.code,
            exited_at_ns: exit.at_ns,
            oom_killed: self.oom_killed.get().copied().unwrap_or(false),
            ..Default::default()
        }
    }

    /// What the host may know; `phase` is the container's.
    pub(crate) fn state(&self, phase: Phase) -> proto::ProcessState {
        let exit = self.exit();
        let phase = match (exit, phase) {
            (Some(_), _) => proto::Phase::PHASE_STOPPED,
            (None, Phase::Created) if self.exec.is_empty() => proto::Phase::PHASE_CREATED,
            (None, Phase::Paused) => proto::Phase::PHASE_PAUSED,
            _ => proto::Phase::PHASE_RUNNING,
        };
        proto::ProcessState {
            container_id: self.container.clone(),
            exec_id: self.exec.clone(),
            pid: self.pid.cast_unsigned(),
            phase: EnumOrUnknown::new(phase),
            terminal: self.terminal.is_some(),
            exit: exit.map(|exit| self.status(exit)).into(),
            ..Default::default()
        }
    }

    /// Sends it a signal. Its number can't be another's: the reaper runs on this thread, so a process
    /// without an exit has not been collected.
    pub(crate) fn kill(&self, signal: i32) -> Result<(), AgentError> {
        if self.exit().is_some() {
            return Err(AgentError::NotFound("process already finished".to_owned()));
        }
        match sys::process::kill(self.pid, signal) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {
                Err(AgentError::NotFound("process already finished".to_owned()))
            }
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                Err(AgentError::Invalid(format!("{signal} is not a signal")))
            }
            Err(source) => Err(AgentError::Io {
                action: format!("signal process {}", self.pid),
                source,
            }),
            Ok(()) => Ok(()),
        }
    }

    /// Sets its terminal's size.
    pub(crate) fn resize(&self, width: u32, height: u32) -> Result<(), AgentError> {
        let Some(terminal) = &self.terminal else {
            return Err(AgentError::State("the process has no terminal".to_owned()));
        };
        resize(terminal, width, height)
    }
}

/// Sets a terminal's size; zero leaves it as it is.
pub(crate) fn resize(terminal: &OwnedFd, width: u32, height: u32) -> Result<(), AgentError> {
    let Some((width, height)) = size(width, height) else {
        return Ok(());
    };
    sys::set_terminal_size(terminal.as_fd(), width, height).map_err(|source| AgentError::Io {
        action: "resize the terminal".to_owned(),
        source,
    })
}

/// A size as the kernel counts; `None` if it was not given.
pub(crate) fn size(width: u32, height: u32) -> Option<(u16, u16)> {
    let cells = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
    (width > 0 && height > 0).then(|| (cells(width), cells(height)))
}

/// Which streams a request wants.
pub(crate) fn wanted(stdio: Option<&proto::Stdio>) -> Result<Wanted, AgentError> {
    let Some(stdio) = stdio else {
        return Ok(Wanted::default());
    };
    let any = stdio.stdin || stdio.stdout || stdio.stderr;
    let token = match <[u8; TOKEN_LEN]>::try_from(stdio.token.as_slice()) {
        Ok(token) => token,
        Err(_) if !any => [0; TOKEN_LEN],
        Err(_) => {
            let given = stdio.token.len();
            return Err(AgentError::Invalid(format!(
                "a stdio token has {TOKEN_LEN} bytes, this one {given}"
            )));
        }
    };
    Ok(Wanted {
        stdin: stdio.stdin,
        stdout: stdio.stdout,
        stderr: stdio.stderr,
        token,
    })
}
