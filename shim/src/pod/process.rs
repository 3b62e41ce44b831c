//! One process of a container, from containerd's point of view.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kiln_agent_api::proto;
use kiln_agent_api::stream::{Header, Kind, TOKEN_LEN};
use kiln_uvm::guest::Guest;
use kiln_uvm::random;
use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::events::Exit;
use crate::stdio::{Input, Outputs, StdioPaths, open_input, open_output};

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Made, not started.
    Created,
    /// Running.
    Running,
    /// Frozen.
    Paused,
    /// Ended.
    Stopped,
}

/// A container's first process or an exec.
pub struct Process {
    container: String,
    exec: String,
    stdio: StdioPaths,
    token: [u8; TOKEN_LEN],
    phase: Mutex<Phase>,
    exit: watch::Sender<Option<Exit>>,
    outputs: Outputs,
    input: Mutex<Option<Input>>,
    /// Held by whoever starts, ends or deletes the process, so that their events can't overtake
    /// one another: an exit seen while `start` is under way is told after the start.
    pub(super) step: tokio::sync::Mutex<()>,
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Process")
            .field("container", &self.container)
            .field("exec", &self.exec)
            .field("phase", &self.phase())
            .finish_non_exhaustive()
    }
}

impl Process {
    pub(super) fn new(container: &str, exec: &str, stdio: StdioPaths) -> Result<Self> {
        let token =
            random::bytes().map_err(|e| Error::failed("get random bytes from the kernel", e))?;
        Ok(Self {
            container: container.to_owned(),
            exec: exec.to_owned(),
            stdio,
            token,
            phase: Mutex::new(Phase::Created),
            exit: watch::channel(None).0,
            outputs: Outputs::default(),
            input: Mutex::new(None),
            step: tokio::sync::Mutex::default(),
        })
    }

    /// The exec's id; empty for the container's first process.
    pub fn exec_id(&self) -> &str {
        &self.exec
    }

    /// Its streams.
    pub fn stdio(&self) -> &StdioPaths {
        &self.stdio
    }

    /// Where it is in its life.
    pub fn phase(&self) -> Phase {
        *self.lock_phase()
    }

    pub(super) fn set_phase(&self, phase: Phase) {
        *self.lock_phase() = phase;
    }

    fn lock_phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        // The sender lives in `self`, so waiting can't fail; were it otherwise, the process is gone.
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.unwrap_or_else(Exit::killed_now),
            Err(_) => Exit::killed_now(),
        }
    }

    /// Records the end. False if it was recorded before. The caller holds `step`.
    pub(super) fn set_exit(&self, exit: Exit) -> bool {
        let first = self.exit.send_if_modified(|known| {
            let first = known.is_none();
            if first {
                *known = Some(exit);
            }
            first
        });
        if first {
            self.set_phase(Phase::Stopped);
            if let Some(input) = self.lock_input().take() {
                input.stop();
            }
        }
        first
    }

    fn lock_input(&self) -> MutexGuard<'_, Option<Input>> {
        self.input.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which streams the agent is to offer.
    pub(super) fn agent_stdio(&self) -> proto::Stdio {
        proto::Stdio {
            stdin: !self.stdio.stdin.is_empty(),
            stdout: !self.stdio.stdout.is_empty(),
            stderr: self.has_stderr(),
            token: self.token.to_vec(),
            ..Default::default()
        }
    }

    /// A terminal has one output only.
    fn has_stderr(&self) -> bool {
        !self.stdio.terminal && !self.stdio.stderr.is_empty()
    }

    /// Connects the streams of the process, which the agent must know by now.
    pub(super) async fn connect(&self, guest: &dyn Guest) -> Result<()> {
        let failed = |e| Error::failed(format!("connect the streams of {}", self.name()), e);
        // Opened before any stream: a FIFO that isn't there fails the call with nothing to undo.
        let stdout = open_output(&self.stdio.stdout).await.map_err(failed)?;
        let stderr_uri = if self.has_stderr() {
            self.stdio.stderr.as_str()
        } else {
            ""
        };
        let stderr = open_output(stderr_uri).await.map_err(failed)?;
        let stdin = open_input(&self.stdio.stdin).map_err(failed)?;
        if let Some(target) = stdout {
            self.outputs.add(
                "stdout",
                guest.stream(&self.header(Kind::Stdout)).await?,
                target,
            );
        }
        if let Some(target) = stderr {
            self.outputs.add(
                "stderr",
                guest.stream(&self.header(Kind::Stderr)).await?,
                target,
            );
        }
        if let Some(source) = stdin {
            let stream = guest.stream(&self.header(Kind::Stdin)).await?;
            *self.lock_input() = Some(Input::start(source, stream));
        }
        Ok(())
    }

    fn header(&self, kind: Kind) -> Header {
        Header {
            kind,
            token: self.token,
            container_id: self.container.clone(),
            exec_id: self.exec.clone(),
        }
    }

    /// `CloseIO`.
    pub(super) fn close_stdin(&self) {
        if let Some(input) = self.lock_input().as_ref() {
            input.close();
        }
    }

    /// Waits for the rest of the output, at most so long.
    pub(super) async fn drain(&self, limit: Duration) {
        if !self.outputs.drain(limit).await {
            tracing::warn!(process = %self.name(), "output cut off: its reader stopped reading");
        }
    }

    /// For messages.
    pub(super) fn name(&self) -> String {
        if self.exec.is_empty() {
            format!("container {}", self.container)
        } else {
            format!("exec {} of container {}", self.exec, self.container)
        }
    }
}
