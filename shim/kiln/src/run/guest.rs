//! What is asked of the guest's agent, and how its refusals are told to a person.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use kiln_agent_api::client::{ConnectError, Vsock};
use kiln_agent_api::proto::{self, AgentClient};
use kiln_agent_api::stream::{Header, Kind, TOKEN_LEN};
use kiln_agent_api::{GUEST_FILES, GUEST_LAYERS, GUEST_STATE_DIR, RefusalKind, slots};
use kiln_uvm::share::guest_mount_point;
use kiln_vmm_control::ScratchLimits;
use tokio::net::UnixStream;
use ttrpc::context::{Context as Deadline, with_duration};

/// No call but the wait for a process may take longer.
const CALL_LIMIT: Duration = Duration::from_secs(60);
/// How often a guest that does not answer in time is asked again.
const CONNECT_RETRIES: u32 = 10;
/// How long the guest waits for the disk of the root file system.
const DISK_WAIT_MS: u32 = 5000;
/// The container in the guest; there is one.
pub(crate) const CONTAINER: &str = "main";

/// A connection to the agent.
#[derive(Clone)]
pub(crate) struct Guest {
    vsock: Vsock,
    agent: AgentClient,
}

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

fn refused(what: &'static str) -> impl FnOnce(ttrpc::Error) -> anyhow::Error {
    move |error| match kiln_agent_api::refusal(&error) {
        Some(refusal) => anyhow!("the guest cannot {what}: {}", refusal.text),
        None => anyhow!("the guest is gone ({what}: {error})"),
    }
}

fn not_started(error: ttrpc::Error) -> anyhow::Error {
    let refusal = kiln_agent_api::refusal(&error);
    let exit_code = |kind| match kind {
        RefusalKind::REFUSAL_PROGRAM_NOT_FOUND => Some(127),
        RefusalKind::REFUSAL_PROGRAM_NOT_EXECUTABLE => Some(126),
        _ => None,
    };
    match refusal.and_then(|refusal| Some((exit_code(refusal.kind)?, refusal.text))) {
        Some((code, text)) => NotStarted { text, code }.into(),
        None => refused("start the command")(error),
    }
}

fn deadline() -> Deadline {
    with_duration(CALL_LIMIT)
}

impl Guest {
    pub(crate) async fn connect(socket: &Path) -> Result<Guest> {
        let vsock = Vsock::new(socket);
        let mut tries = 0;
        let agent = loop {
            match vsock.agent().await {
                // Among many that are resumed at once, one may have to wait for its turn.
                Err(ConnectError::Timeout { .. }) if tries < CONNECT_RETRIES => tries += 1,
                result => break result.context("the guest's agent cannot be reached")?,
            }
        };
        Ok(Guest { vsock, agent })
    }

    /// Makes the guest one of its own.
    pub(crate) async fn set_identity(
        &self,
        hostname: &str,
        scratch: ScratchLimits,
        network: proto::Network,
    ) -> Result<proto::SetIdentityResponse> {
        let mut request = kiln_bake::identity("giving the guest its identity")?;
        request.scratch_limit_bytes = scratch.content();
        request.hostname = hostname.to_owned();
        request.network = Some(network).into();
        let generation = request.generation.clone();
        let answer = self
            .agent
            .set_identity(deadline(), &request)
            .await
            .map_err(refused("take its identity"))?;
        if answer.generation != generation {
            return Err(anyhow!(
                "the guest took another identity than the one it was given"
            ));
        }
        Ok(answer)
    }

    /// Takes plugged CPUs into use; memory comes by itself.
    pub(crate) async fn set_cpus(&self, cpus: u32) -> Result<proto::ResourceState> {
        let request = proto::Resources {
            cpus,
            ..Default::default()
        };
        self.agent
            .set_resources(deadline(), &request)
            .await
            .map_err(refused("take its CPUs and memory into use"))
    }

    /// The files that are bound over the image's.
    pub(crate) async fn write_files(&self, hostname: &str, resolv_conf: String) -> Result<()> {
        let hosts = format!(
            "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{hostname}\n"
        );
        for (name, text) in [
            ("hosts", hosts),
            ("hostname", format!("{hostname}\n")),
            ("resolv.conf", resolv_conf),
        ] {
            let request = proto::WriteFileRequest {
                path: format!("{GUEST_FILES}/{name}"),
                data: text.into_bytes(),
                mode: 0o644,
                ..Default::default()
            };
            self.agent
                .write_file(deadline(), &request)
                .await
                .map_err(refused("write its files"))?;
        }
        Ok(())
    }

    /// Makes the container and starts its process.
    pub(crate) async fn start(
        &self,
        spec: &serde_json::Value,
        process: &Process,
        mounts: Vec<proto::Mount>,
        (width, height): (u32, u32),
    ) -> Result<proto::CreateContainerResponse> {
        let request = proto::CreateContainerRequest {
            container_id: CONTAINER.to_owned(),
            spec: serde_json::to_vec(spec)?,
            stdio: Some(process.stdio()).into(),
            mounts,
            rootfs: rootfs(),
            tty_width: width,
            tty_height: height,
            start: true,
            ..Default::default()
        };
        self.agent
            .create_container(deadline(), &request)
            .await
            .map_err(not_started)
    }

    /// Starts another process in the container.
    pub(crate) async fn exec(
        &self,
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
        self.agent
            .exec(deadline(), &request)
            .await
            .map_err(not_started)?;
        Ok(())
    }

    /// Ends the books on a process that was started by [`Guest::exec`]; one that still runs is killed.
    pub(crate) async fn delete(&self, process: &Process) -> Result<()> {
        let request = proto::DeleteRequest {
            container_id: CONTAINER.to_owned(),
            exec_id: process.exec.clone(),
            force: true,
            ..Default::default()
        };
        self.agent
            .delete(deadline(), &request)
            .await
            .map_err(refused("forget a process"))?;
        Ok(())
    }

    /// Waits for a process to end.
    pub(crate) async fn wait(&self, process: &Process) -> Result<proto::ExitStatus> {
        let request = proto::WaitRequest {
            container_id: CONTAINER.to_owned(),
            exec_id: process.exec.clone(),
            ..Default::default()
        };
        self.agent
            .wait(Deadline::default(), &request)
            .await
            .map_err(refused("wait for the command"))
    }

    pub(crate) async fn kill(&self, process: &Process, signal: i32) -> Result<()> {
        let request = proto::KillRequest {
            container_id: CONTAINER.to_owned(),
            exec_id: process.exec.clone(),
            signal: signal.unsigned_abs(),
            ..Default::default()
        };
        self.agent
            .kill(deadline(), &request)
            .await
            .map_err(refused("pass the signal on"))?;
        Ok(())
    }

    pub(crate) async fn resize(
        &self,
        process: &Process,
        (width, height): (u32, u32),
    ) -> Result<()> {
        let request = proto::ResizeTtyRequest {
            container_id: CONTAINER.to_owned(),
            exec_id: process.exec.clone(),
            width,
            height,
            ..Default::default()
        };
        self.agent
            .resize_tty(deadline(), &request)
            .await
            .map_err(refused("resize the terminal"))?;
        Ok(())
    }

    pub(crate) async fn stream(&self, process: &Process, kind: Kind) -> Result<UnixStream> {
        let header = Header {
            kind,
            token: process.token,
            container_id: CONTAINER.to_owned(),
            exec_id: process.exec.clone(),
        };
        let stream = self.vsock.stream(&header).await;
        stream.context("the command's streams cannot be connected")
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

fn rootfs() -> String {
    format!("{GUEST_STATE_DIR}/containers/{CONTAINER}/rootfs")
}

/// What the guest mounts before the container is made: the image below, the overlay's disk above.
pub(crate) fn mounts(image_bytes: u64, share: bool) -> Vec<proto::Mount> {
    let base = format!("{GUEST_STATE_DIR}/storage/{CONTAINER}");
    let lower = format!("{base}/lower");
    let rw = format!("{GUEST_LAYERS}/{CONTAINER}");
    let (upper, work) = (format!("{rw}/upper"), format!("{rw}/work"));
    let mount = |source: &str, target: &str, kind: &str, options: Vec<String>| proto::Mount {
        source: source.to_owned(),
        target: target.to_owned(),
        type_: kind.to_owned(),
        options,
        make_target: true,
        target_mode: 0o755,
        ..Default::default()
    };
    let disk = slots::disk_name(slots::FIRST_DISK).unwrap_or_default();
    let mut mounts = vec![proto::Mount {
        wait_ms: DISK_WAIT_MS,
        min_size: image_bytes,
        ..mount(&disk, &lower, "erofs", vec!["ro".to_owned()])
    }];
    if share {
        let target = guest_mount_point();
        mounts.push(mount(slots::FS_TAG, &target, "virtiofs", Vec::new()));
    }
    mounts.push(proto::Mount {
        make_directories: vec![rw, upper.clone(), work.clone()],
        ..mount(
            "overlay",
            &rootfs(),
            "overlay",
            vec![
                format!("lowerdir={lower}"),
                format!("upperdir={upper}"),
                format!("workdir={work}"),
            ],
        )
    });
    mounts
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_agent_api::Refusal;

    #[test]
    fn command_that_can_not_run_has_an_exit_code_of_its_own() {
        let code = |kind| {
            // The text says something else.
            let text = "not found: permission denied".to_owned();
            let error = not_started(Refusal { kind, text }.into());
            error.downcast_ref().map(|error: &NotStarted| error.code)
        };
        assert_eq!(code(RefusalKind::REFUSAL_PROGRAM_NOT_FOUND), Some(127));
        assert_eq!(code(RefusalKind::REFUSAL_PROGRAM_NOT_EXECUTABLE), Some(126));
        assert_eq!(code(RefusalKind::REFUSAL_NOT_FOUND), None);
        assert_eq!(code(RefusalKind::REFUSAL_FAILED), None);
    }
}
