//! What `kiln run` and `kiln exec` ask of the guest's agent, and how its refusals are told to a person.

use std::time::{Duration, Instant};

use anyhow::Result;
use kiln_agent_api::stream::{Header, Kind, TOKEN_LEN};
use kiln_agent_api::{GUEST_FILES, RefusalKind, proto};
use kiln_uvm::disks::GuestDisk;
use kiln_uvm::guest::{Guest, GuestError};
use kiln_uvm::root;
use kiln_uvm::timeline::Timeline;
use tokio::net::UnixStream;

/// The container in the guest; there is one.
pub(crate) const CONTAINER: &str = "main";

/// A process in the guest, and the right to its streams. An empty id is the container's first.
#[derive(Debug, Clone)]
pub(crate) struct Process {
    pub(crate) exec: String,
    pub(crate) token: [u8; TOKEN_LEN],
    pub(crate) stdin: bool,
    pub(crate) terminal: bool,
}

/// A failure to start a process, which has an exit code of its own: 127 for a command that is not
/// there, 126 for one that cannot be run.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub(crate) struct NotStarted {
    text: String,
    pub(crate) code: u8,
}

fn not_started(error: GuestError) -> anyhow::Error {
    match error {
        GuestError::Refused {
            kind: RefusalKind::REFUSAL_PROGRAM_NOT_FOUND,
            text,
            ..
        } => NotStarted { text, code: 127 }.into(),
        GuestError::Refused {
            kind: RefusalKind::REFUSAL_PROGRAM_NOT_EXECUTABLE,
            text,
            ..
        } => NotStarted { text, code: 126 }.into(),
        other => other.into(),
    }
}

/// The files that are bound over the image's.
pub(crate) async fn write_files(
    guest: &dyn Guest,
    hostname: &str,
    resolv_conf: String,
) -> Result<()> {
    let hosts = format!(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{hostname}\n"
    );
    for (name, text) in [
        ("hosts", hosts),
        ("hostname", format!("{hostname}\n")),
        ("resolv.conf", resolv_conf),
    ] {
        guest
            .write_file(format!("{GUEST_FILES}/{name}"), text)
            .await?;
    }
    Ok(())
}

/// Makes the container, with its root on the disk, and starts its process.
pub(crate) async fn start(
    guest: &dyn Guest,
    spec: &serde_json::Value,
    process: &Process,
    disk: &GuestDisk,
    (width, height): (u32, u32),
    timeline: &Timeline,
) -> Result<()> {
    let disks = std::slice::from_ref(disk);
    let request = proto::CreateContainerRequest {
        container_id: CONTAINER.to_owned(),
        spec: serde_json::to_vec(spec)?,
        stdio: Some(process.stdio()).into(),
        mounts: root::layered(CONTAINER, disks, "erofs", false),
        rootfs: root::path(CONTAINER),
        tty_width: width,
        tty_height: height,
        start: true,
        ..Default::default()
    };
    let created = guest.create(request, timeline).await;
    created.map_err(not_started)
}

/// Starts another process in the container.
pub(crate) async fn exec(
    guest: &dyn Guest,
    spec: &serde_json::Value,
    process: &Process,
    (width, height): (u32, u32),
) -> Result<()> {
    let request = proto::ExecRequest {
        container_id: CONTAINER.to_owned(),
        exec_id: process.exec.clone(),
        process: serde_json::to_vec(spec)?,
        stdio: Some(process.stdio()).into(),
        tty_width: width,
        tty_height: height,
        ..Default::default()
    };
    guest.exec(request).await.map_err(not_started)
}

/// How long a guest may take to notice that whoever had a stream before is gone, and how often it is asked.
const TAKEN: (Duration, Duration) = (Duration::from_secs(10), Duration::from_millis(20));

/// Connects a stream of a process. A guest that has just been resumed may not know yet that nobody has it.
pub(crate) async fn stream(guest: &dyn Guest, process: &Process, kind: Kind) -> Result<UnixStream> {
    let header = Header {
        kind,
        token: process.token,
        container_id: CONTAINER.to_owned(),
        exec_id: process.exec.clone(),
    };
    let begun = Instant::now();
    loop {
        match guest.stream(&header).await {
            Err(GuestError::StreamTaken) if begun.elapsed() < TAKEN.0 => {
                tokio::time::sleep(TAKEN.1).await;
            }
            result => return Ok(result?),
        }
    }
}

impl Process {
    fn stdio(&self) -> proto::Stdio {
        proto::Stdio {
            stdin: self.stdin,
            stdout: true,
            // A terminal has one output.
            stderr: !self.terminal,
            token: self.token.to_vec(),
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_that_can_not_run_has_an_exit_code_of_its_own() {
        let code = |kind| {
            let error = not_started(GuestError::Refused {
                what: "start it".to_owned(),
                kind,
                // The text says something else.
                text: "not found: permission denied".to_owned(),
            });
            error.downcast_ref().map(|error: &NotStarted| error.code)
        };
        assert_eq!(code(RefusalKind::REFUSAL_PROGRAM_NOT_FOUND), Some(127));
        assert_eq!(code(RefusalKind::REFUSAL_PROGRAM_NOT_EXECUTABLE), Some(126));
        assert_eq!(code(RefusalKind::REFUSAL_NOT_FOUND), None);
        assert_eq!(code(RefusalKind::REFUSAL_FAILED), None);
    }
}
