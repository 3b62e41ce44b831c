//! The guest's side of a μVM: calls to its agent.

use std::time::Duration;

use kiln_agent_api::RefusalKind;
use kiln_agent_api::client::{ConnectError, Vsock};
use kiln_agent_api::proto::{self, AgentClient};
use kiln_agent_api::stream::{Header, Status};
use kiln_vmm_control::Flush;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use ttrpc::context::{Context, with_duration};

use super::{GuestEvent, PodSetup};
use crate::error::{Error, Result};
use crate::events::Exit;
use crate::pod::random;
use crate::text::beginning;
use crate::time::UnixNanos;
use crate::timeline::Timeline;

/// No call but `Wait` may take longer; a guest that doesn't answer is broken.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the guest may take to bring online what was plugged.
const GROW_TIMEOUT_MS: u32 = 30_000;
/// Events of the guest that wait for the pod.
const WAITING_EVENTS: usize = 16;
/// No text of the guest's is passed on beyond this.
const LONGEST_TEXT: usize = 1 << 10;
/// Bytes of entropy given at resume: two of the kernel generator's keys.
const ENTROPY: usize = 64;

/// A connection to the agent. Clones share it.
#[derive(Clone)]
pub struct Guest {
    vsock: Vsock,
    agent: AgentClient,
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guest")
            .field("vsock", &self.vsock)
            .finish_non_exhaustive()
    }
}

fn context() -> Context {
    with_duration(CALL_TIMEOUT)
}

/// What the agent says becomes what containerd is told, kind for kind.
fn refused(what: impl Into<String>) -> impl FnOnce(ttrpc::Error) -> Error {
    let what = what.into();
    move |error| {
        let Some(refusal) = kiln_agent_api::refusal(&error) else {
            let why = cut(&error.to_string());
            return Error::Unavailable(format!("the guest is gone ({what}: {why})"));
        };
        let text = cut(&refusal.text);
        match refusal.kind {
            RefusalKind::REFUSAL_NOT_FOUND => Error::NotFound(what),
            RefusalKind::REFUSAL_ALREADY_EXISTS => Error::AlreadyExists(what),
            RefusalKind::REFUSAL_USAGE => Error::InvalidArgument(format!("{what}: {text}")),
            RefusalKind::REFUSAL_STATE => Error::FailedPrecondition(format!("{what}: {text}")),
            RefusalKind::REFUSAL_UNKNOWN_CALL => Error::Unimplemented(format!("{what}: {text}")),
            RefusalKind::REFUSAL_NO_SPACE => Error::ResourceExhausted(format!("{what}: {text}")),
            RefusalKind::REFUSAL_TIMEOUT
            | RefusalKind::REFUSAL_PROGRAM_NOT_FOUND
            | RefusalKind::REFUSAL_PROGRAM_NOT_EXECUTABLE
            | RefusalKind::REFUSAL_FAILED => {
                Error::failed(format!("the guest could not {what}"), text)
            }
        }
    }
}

/// What the guest says, but not more of it than somebody wants to read.
fn cut(text: &str) -> String {
    match beginning(text, LONGEST_TEXT) {
        all if all.len() == text.len() => all.to_owned(),
        part => format!("{part}…"),
    }
}

fn not_connected(error: ConnectError) -> Error {
    match error {
        ConnectError::Stream(Status::NotFound) => Error::NotFound("the process's stream".into()),
        error => Error::Unavailable(crate::error::chain(&error)),
    }
}

impl Guest {
    /// Connects to the agent.
    pub async fn connect(vsock: Vsock) -> Result<Self> {
        let agent = vsock.agent().await.map_err(not_connected)?;
        Ok(Self { vsock, agent })
    }

    /// Makes the guest this pod's: what must be unique is made anew, and the rest of the set-up
    /// goes along in the same call. Nothing of the user's runs before this has returned.
    pub async fn set_identity(
        &self,
        setup: &PodSetup,
        network: Option<proto::Network>,
        mounts: Vec<proto::Mount>,
    ) -> Result<proto::SetIdentityResponse> {
        let mut entropy = vec![0; ENTROPY];
        random(&mut entropy)?;
        let request = proto::SetIdentityRequest {
            generation: uuid()?,
            entropy,
            machine_id: hex(16)?,
            hostname: setup.hostname.clone(),
            network: network.into(),
            sysctls: setup.sysctls.clone().into_iter().collect(),
            mounts,
            scratch_limit_bytes: setup.overlay.content(),
            scratch_flush: setup.overlay_flush == Flush::Disk,
            // Last, for it ages.
            wall_clock_ns: UnixNanos::now().0,
            ..Default::default()
        };
        let response = self
            .agent
            .set_identity(context(), &request)
            .await
            .map_err(refused("take its identity"))?;
        if response.generation != request.generation {
            return Err(Error::failed(
                "give the guest its identity",
                "the agent acknowledged another generation",
            ));
        }
        Ok(response)
    }

    /// Waits until the guest has what was plugged.
    pub async fn set_resources(&self, cpus: u32, memory_bytes: u64) -> Result<()> {
        let request = proto::Resources {
            cpus,
            memory_bytes,
            timeout_ms: GROW_TIMEOUT_MS,
            ..Default::default()
        };
        let what = refused("bring plugged CPUs and memory online");
        self.agent
            .set_resources(context(), &request)
            .await
            .map_err(what)
            .map(|_| ())
    }

    /// See [`Uvm::write_file`](super::Uvm::write_file).
    pub async fn write_file(&self, path: String, text: String) -> Result<()> {
        let what = refused(format!("write {path}"));
        let request = proto::WriteFileRequest {
            path,
            data: text.into_bytes(),
            mode: 0o644,
            ..Default::default()
        };
        self.agent
            .write_file(context(), &request)
            .await
            .map_err(what)
            .map(|_| ())
    }

    /// See [`Uvm::create`](super::Uvm::create).
    pub async fn create(
        &self,
        request: proto::CreateContainerRequest,
        timeline: &Timeline,
    ) -> Result<()> {
        let what = refused(format!("create container {}", request.container_id));
        let (step, asked) = ("guest.create", timeline.now());
        let creating = self.agent.create_container(context(), &request);
        let response = timeline.of(step, creating).await.map_err(what)?;
        timeline.add_guest(step, asked, &response.spans);
        Ok(())
    }

    /// See [`Uvm::start`](super::Uvm::start).
    pub async fn start(&self, container: &str, timeline: &Timeline) -> Result<()> {
        let request = proto::StartContainerRequest {
            container_id: container.into(),
            ..Default::default()
        };
        let what = refused(format!("start container {container}"));
        let (step, asked) = ("guest.start", timeline.now());
        let starting = self.agent.start_container(context(), &request);
        let response = timeline.of(step, starting).await.map_err(what)?;
        timeline.add_guest(step, asked, &response.spans);
        Ok(())
    }

    /// See [`Uvm::exec`](super::Uvm::exec).
    pub async fn exec(&self, request: proto::ExecRequest) -> Result<()> {
        let what = refused(format!(
            "start exec {} in container {}",
            request.exec_id, request.container_id
        ));
        self.agent
            .exec(context(), &request)
            .await
            .map_err(what)
            .map(|_| ())
    }

    /// See [`Uvm::kill`](super::Uvm::kill).
    pub async fn kill(&self, container: &str, exec: &str, signal: u32, all: bool) -> Result<()> {
        let request = proto::KillRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            signal,
            all,
            ..Default::default()
        };
        let what = refused(format!("send signal {signal} to container {container}"));
        self.agent
            .kill(context(), &request)
            .await
            .map_err(what)
            .map(|_| ())
    }

    /// See [`Uvm::wait`](super::Uvm::wait).
    pub async fn wait(&self, container: &str, exec: &str) -> Result<Exit> {
        let request = proto::WaitRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        let what = refused(format!("wait for container {container}"));
        let status = self
            .agent
            .wait(Context::default(), &request)
            .await
            .map_err(what)?;
        Ok(Exit {
            status: status.exit_code,
            at: UnixNanos(status.exited_at_ns),
        })
    }

    /// See [`Uvm::pause`](super::Uvm::pause).
    pub async fn pause(&self, container: &str) -> Result<()> {
        let request = proto::PauseRequest {
            container_id: container.into(),
            ..Default::default()
        };
        let what = refused(format!("pause container {container}"));
        self.agent
            .pause(context(), &request)
            .await
            .map_err(what)
            .map(|_| ())
    }

    /// See [`Uvm::unpause`](super::Uvm::unpause).
    pub async fn unpause(&self, container: &str) -> Result<()> {
        let request = proto::UnpauseRequest {
            container_id: container.into(),
            ..Default::default()
        };
        let what = refused(format!("resume container {container}"));
        self.agent
            .unpause(context(), &request)
            .await
            .map_err(what)
            .map(|_| ())
    }

    /// See [`Uvm::update`](super::Uvm::update).
    pub async fn update(&self, container: &str, resources: Vec<u8>) -> Result<()> {
        let request = proto::UpdateRequest {
            container_id: container.into(),
            resources,
            ..Default::default()
        };
        let what = refused(format!("update container {container}"));
        self.agent
            .update(context(), &request)
            .await
            .map_err(what)
            .map(|_| ())
    }

    /// See [`Uvm::stats`](super::Uvm::stats).
    pub async fn stats(&self, container: &str) -> Result<proto::StatsResponse> {
        let request = proto::StatsRequest {
            container_id: container.into(),
            ..Default::default()
        };
        let what = refused(format!("measure container {container}"));
        self.agent.stats(context(), &request).await.map_err(what)
    }

    /// See [`Uvm::written`](super::Uvm::written).
    pub async fn written(&self, containers: &[String]) -> Result<proto::WrittenResponse> {
        let request = proto::WrittenRequest {
            container_ids: containers.to_vec(),
            ..Default::default()
        };
        let what = refused("measure what the containers wrote");
        self.agent.written(context(), &request).await.map_err(what)
    }

    /// See [`Uvm::pids`](super::Uvm::pids).
    pub async fn pids(&self, container: &str) -> Result<Vec<u32>> {
        let request = proto::PidsRequest {
            container_id: container.into(),
            ..Default::default()
        };
        let what = refused(format!("list the processes of container {container}"));
        let response = self.agent.pids(context(), &request).await.map_err(what)?;
        Ok(response.processes.into_iter().map(|p| p.pid).collect())
    }

    /// See [`Uvm::network`](super::Uvm::network).
    pub async fn network(&self) -> Result<proto::NetworkState> {
        let what = refused("read its network counters");
        self.agent
            .get_network(context(), &proto::GetNetworkRequest::new())
            .await
            .map_err(what)
    }

    /// See [`Uvm::resize_tty`](super::Uvm::resize_tty).
    pub async fn resize_tty(&self, container: &str, exec: &str, w: u32, h: u32) -> Result<()> {
        let request = proto::ResizeTtyRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            width: w,
            height: h,
            ..Default::default()
        };
        let what = refused(format!("resize the terminal of container {container}"));
        self.agent
            .resize_tty(context(), &request)
            .await
            .map_err(what)
            .map(|_| ())
    }

    /// See [`Uvm::delete`](super::Uvm::delete).
    pub async fn delete(&self, container: &str, exec: &str) -> Result<()> {
        let request = proto::DeleteRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            force: true,
            ..Default::default()
        };
        let what = refused(format!("delete container {container}"));
        self.agent
            .delete(context(), &request)
            .await
            .map_err(what)
            .map(|_| ())
    }

    /// See [`Uvm::stream`](super::Uvm::stream).
    pub async fn stream(&self, header: &Header) -> Result<UnixStream> {
        self.vsock.stream(header).await.map_err(not_connected)
    }

    /// Starts to listen to what happens unasked. The channel ends with the guest.
    pub async fn events(&self) -> Result<mpsc::Receiver<GuestEvent>> {
        let mut stream = self
            .agent
            .events(Context::default(), &proto::EventsRequest::new())
            .await
            .map_err(refused("tell its events"))?;
        let (tell, events) = mpsc::channel(WAITING_EVENTS);
        tokio::spawn(async move {
            while let Ok(Some(event)) = stream.recv().await {
                if event.has_oom() {
                    let container = event.oom().container_id.clone();
                    // A guest that tells more than is taken waits.
                    if tell.send(GuestEvent::Oom { container }).await.is_err() {
                        return;
                    }
                }
            }
        });
        Ok(events)
    }
}

fn hex(bytes: usize) -> Result<String> {
    let mut buffer = vec![0; bytes];
    random(&mut buffer)?;
    Ok(buffer.iter().map(|b| format!("{b:02x}")).collect())
}

/// A random UUID (RFC 9562, version 4).
fn uuid() -> Result<String> {
    let mut bytes = [0; 16];
    random(&mut bytes)?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    Ok(format!(
        "{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_agent_refuses_keeps_its_kind() {
        let of = |kind| {
            let text = "because".to_owned();
            refused("mount it")(kiln_agent_api::Refusal { kind, text }.into())
        };
        let absent = of(RefusalKind::REFUSAL_NOT_FOUND);
        assert!(matches!(absent, Error::NotFound(_)), "{absent:?}");
        let state = of(RefusalKind::REFUSAL_STATE);
        assert!(matches!(state, Error::FailedPrecondition(_)), "{state:?}");
        let full = of(RefusalKind::REFUSAL_NO_SPACE);
        assert!(matches!(full, Error::ResourceExhausted(_)), "{full:?}");
        for kind in [
            RefusalKind::REFUSAL_FAILED,
            RefusalKind::REFUSAL_PROGRAM_NOT_FOUND,
        ] {
            let chain = of(kind).chain();
            assert_eq!(chain, "the guest could not mount it: because");
        }
    }

    #[test]
    fn long_texts_of_the_guest_are_cut_between_characters() {
        let long = "ü".repeat(LONGEST_TEXT);
        let refusal = kiln_agent_api::Refusal {
            kind: RefusalKind::REFUSAL_FAILED,
            text: format!("x{long}"),
        };
        let error = refused("mount it")(refusal.into());
        let text = error.chain();
        assert!(
            text.len() < LONGEST_TEXT + 64 && text.ends_with("ü…"),
            "{}",
            text.len()
        );
        assert_eq!(cut("short"), "short");
    }

    #[test]
    fn broken_connection_means_that_the_guest_is_gone() {
        let error = refused("x")(ttrpc::Error::RemoteClosed);
        assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
    }

    #[test]
    fn generations_are_uuids_and_differ() {
        let (a, b) = (uuid().unwrap(), uuid().unwrap());
        assert_ne!(a, b);
        assert_eq!((a.len(), &a[14..15]), (36, "4"));
    }
}
