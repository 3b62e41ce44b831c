//! Being, and having, child processes.

use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::signals::Signals;
use crate::text::say;

/// Waits for TERM or INT, collecting children that end meanwhile: what a pod's first process does.
pub(crate) fn pause() -> Result<ExitCode> {
    wait_for_end()?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn wait_for_end() -> Result<()> {
    let signals = Signals::new(&[libc::SIGTERM, libc::SIGINT, libc::SIGCHLD])?;
    loop {
        reap();
        if signals.next()? != libc::SIGCHLD {
            return Ok(());
        }
    }
}

/// The effective user id, in the words that Kubernetes' tests of `allowPrivilegeEscalation` look for.
pub(crate) fn effective_user() -> String {
    // SAFETY: geteuid takes nothing and cannot fail.
    format!("Effective uid: {}", unsafe { libc::geteuid() })
}

fn reap() {
    // SAFETY: waitpid with a null status pointer writes to no memory of ours.
    while unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) } > 0 {}
}

/// The microseconds that a command took, which has to end well.
pub(crate) fn timed(command: &[String]) -> Result<u128> {
    let (program, arguments) = command.split_first().context("no command to time")?;
    let begin = Instant::now();
    let status = Command::new(program)
        .args(arguments)
        .status()
        .with_context(|| format!("cannot run {program}"))?;
    let took = begin.elapsed();
    ensure!(status.success(), "{command:?} ended with {status}");
    Ok(took.as_micros())
}

/// Starts `count` children that sleep, prints their pids in one line, and pauses. If one can't be
/// started, the others are ended.
pub(crate) fn spawn(count: usize) -> Result<ExitCode> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut children = Vec::with_capacity(count);
    for number in 1..=count {
        // Children that outlive this process must not hold its streams open.
        let child = Command::new(&program)
            .arg("pause")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start child {number} of {count}"));
        match child {
            Ok(child) => children.push(child),
            Err(error) => {
                for child in &mut children {
                    child.kill().context("cannot end a child")?;
                    child.wait().context("cannot wait for a child")?;
                }
                return Err(error);
            }
        }
    }
    let pids: Vec<String> = children
        .iter()
        .map(|child| child.id().to_string())
        .collect();
    say(&format!("spawned {}", pids.join(" ")))?;
    pause()
}

/// Leaves a grandchild behind whose parent is gone: it becomes a child of the container's (or the
/// pod's) first process, which has to collect it when it ends a moment later.
pub(crate) fn orphan() -> Result<()> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let child = Command::new(program)
        .args(["sleep", "0.2"])
        .spawn()
        .context("cannot start a child")?;
    say(&format!("orphan {}", child.id()))
}
