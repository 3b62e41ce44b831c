//! The guest's side of a μVM: what its agent is asked, and what its refusals become.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use kiln_agent_api::client::{ConnectError, Vsock};
use kiln_agent_api::proto::{self, AgentClient};
use kiln_agent_api::stream::{Header, Status};
use kiln_agent_api::{MIN_ENTROPY, RefusalKind};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use ttrpc::context::{Context, with_duration};

use crate::text::beginning;
use crate::timeline::{Timeline, step};
use crate::{Error, random};

/// No call but the wait for a process may take longer; a guest that doesn't answer is broken.
const CALL_LIMIT: Duration = Duration::from_secs(60);
/// How long the guest may take to bring online what was plugged.
const GROW_LIMIT_MS: u32 = 30_000;
/// Events of the guest that wait for whoever takes them.
const WAITING_EVENTS: usize = 16;
/// No text of the guest's is passed on beyond this.
const LONGEST_TEXT: usize = 1 << 10;

/// Why the guest did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// Its agent refused.
    #[error("the guest could not {what}: {text}")]
    Refused {
        /// What it was to do.
        what: String,
        /// What kind of reason it has.
        kind: RefusalKind,
        /// Its reason, cut to a length that somebody wants to read.
        text: String,
    },
    /// The connection is broken.
    #[error("the guest is gone ({what}: {why})")]
    Gone {
        /// What it was to do.
        what: String,
        /// What became of the connection.
        why: String,
    },
    /// There was no connection.
    #[error("the guest's agent cannot be reached")]
    Unreachable(#[source] ConnectError),
    /// The process whose stream is asked for is not there.
    #[error("the guest has no such stream")]
    NoStream,
    /// Somebody else has the stream.
    #[error("the stream is connected already")]
    StreamTaken,
    /// It took another identity than the one it was given.
    #[error("the guest acknowledged another identity than it was given")]
    OtherIdentity,
}

/// What makes a guest one of its own.
#[derive(Debug, Clone, Default)]
pub struct Identity {
    /// Its host name; empty: none was asked for.
    pub hostname: String,
    /// Its network; `None` leaves it with its loopback.
    pub network: Option<proto::Network>,
    /// Sysctls that are its own.
    pub sysctls: BTreeMap<String, String>,
    /// What is mounted for its whole life.
    pub mounts: Vec<proto::Mount>,
    /// Bytes that its containers may write.
    pub scratch_limit: u64,
    /// Whether its flushes are to reach the disk.
    pub scratch_flush: bool,
}

/// Something that happened in the guest unasked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestEvent {
    /// The kernel killed a process of the container because its memory ran out.
    Oom {
        /// The container.
        container: String,
    },
}

/// What a guest with containers in it can be asked. An empty `exec` means the container's first process.
#[async_trait]
pub trait Guest: Send + Sync {
    /// Makes a container; its first process waits to be started, unless the request says otherwise.
    async fn create(
        &self,
        request: proto::CreateContainerRequest,
        timeline: &Timeline,
    ) -> Result<(), GuestError>;
    /// Starts a container's first process.
    async fn start(&self, container: &str, timeline: &Timeline) -> Result<(), GuestError>;
    /// Starts another process.
    async fn exec(&self, request: proto::ExecRequest) -> Result<(), GuestError>;
    /// Sends a signal.
    async fn kill(
        &self,
        container: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), GuestError>;
    /// Waits for the end of a process. Answers until the process is deleted, so none is missed.
    async fn wait(&self, container: &str, exec: &str) -> Result<proto::ExitStatus, GuestError>;
    /// Freezes a container.
    async fn pause(&self, container: &str) -> Result<(), GuestError>;
    /// Thaws it.
    async fn unpause(&self, container: &str) -> Result<(), GuestError>;
    /// Changes a container's limits: an OCI `LinuxResources`, JSON.
    async fn update(&self, container: &str, resources: Vec<u8>) -> Result<(), GuestError>;
    /// Usage of a container, or of all together for an empty id.
    async fn stats(&self, container: &str) -> Result<proto::StatsResponse, GuestError>;
    /// What containers wrote to their root file systems: all together, and each of these.
    async fn written(&self, containers: &[String]) -> Result<proto::WrittenResponse, GuestError>;
    /// The guest's process ids of a container's processes.
    async fn pids(&self, container: &str) -> Result<Vec<u32>, GuestError>;
    /// The guest's network counters.
    async fn network(&self) -> Result<proto::NetworkState, GuestError>;
    /// Changes a terminal's size.
    async fn resize_tty(
        &self,
        container: &str,
        exec: &str,
        size: (u32, u32),
    ) -> Result<(), GuestError>;
    /// Ends the books on a process or container, killing it first if need be.
    async fn delete(&self, container: &str, exec: &str) -> Result<(), GuestError>;
    /// Opens a stream of a process, or a TCP connection into the guest.
    async fn stream(&self, header: &Header) -> Result<UnixStream, GuestError>;
    /// Mounts for the pod, beside those of its containers.
    async fn mount(&self, mounts: Vec<proto::Mount>) -> Result<(), GuestError>;
    /// Writes a file of the guest's own.
    async fn write_file(&self, path: String, text: String) -> Result<(), GuestError>;
}

/// A connection to a guest's agent. Clones share it.
#[derive(Clone)]
pub struct Agent {
    vsock: Vsock,
    client: AgentClient,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent")
            .field("vsock", &self.vsock)
            .finish_non_exhaustive()
    }
}

fn limit() -> Context {
    with_duration(CALL_LIMIT)
}

fn refused(what: impl Into<String>) -> impl FnOnce(ttrpc::Error) -> GuestError {
    let what = what.into();
    move |error| match kiln_agent_api::refusal(&error) {
        Some(refusal) => GuestError::Refused {
            what,
            kind: refusal.kind,
            text: cut(&refusal.text),
        },
        None => GuestError::Gone {
            what,
            why: cut(&error.to_string()),
        },
    }
}

/// What the guest says, but not more of it than somebody wants to read.
fn cut(text: &str) -> String {
    match beginning(text, LONGEST_TEXT) {
        all if all.len() == text.len() => all.to_owned(),
        part => format!("{part}…"),
    }
}

fn not_connected(error: ConnectError) -> GuestError {
    match error {
        ConnectError::Stream(Status::NotFound) => GuestError::NoStream,
        ConnectError::Stream(Status::Busy) => GuestError::StreamTaken,
        error => GuestError::Unreachable(error),
    }
}

impl Agent {
    /// Connects to the agent of a guest that runs, however long it takes: for whoever has a limit of their own.
    pub async fn connect_patiently(vsock: &Vsock) -> Result<Agent, GuestError> {
        loop {
            match Agent::connect(vsock).await {
                Err(GuestError::Unreachable(ConnectError::Timeout { .. })) => {}
                result => return result,
            }
        }
    }

    /// Connects to the agent of a guest that runs. One that does not answer in time is broken.
    pub async fn connect(vsock: &Vsock) -> Result<Agent, GuestError> {
        let client = vsock.agent().await.map_err(not_connected)?;
        Ok(Agent {
            vsock: vsock.clone(),
            client,
        })
    }

    /// What the agent can be asked that has no shorter form here.
    pub fn client(&self) -> &AgentClient {
        &self.client
    }

    /// Makes the guest one of its own: what must be unique is made anew, and the rest of the set-up goes along in the
    /// same call. Nothing of the user's runs before this has returned.
    pub async fn set_identity(
        &self,
        identity: &Identity,
    ) -> Result<proto::SetIdentityResponse, Error> {
        let request = identity_request(identity)?;
        let response = self.client.set_identity(limit(), &request).await;
        let response = response.map_err(refused("take its identity"))?;
        if response.generation != request.generation {
            return Err(GuestError::OtherIdentity.into());
        }
        Ok(response)
    }

    /// Waits until the guest has what was plugged. No memory: whatever it has will do.
    pub async fn set_resources(
        &self,
        cpus: u32,
        memory_bytes: u64,
    ) -> Result<proto::ResourceState, GuestError> {
        let request = proto::Resources {
            cpus,
            memory_bytes,
            timeout_ms: GROW_LIMIT_MS,
            ..Default::default()
        };
        let set = self.client.set_resources(limit(), &request).await;
        set.map_err(refused("bring plugged CPUs and memory online"))
    }

    /// Starts to listen to what happens unasked. The channel ends with the guest.
    pub async fn events(&self) -> Result<mpsc::Receiver<GuestEvent>, GuestError> {
        let request = proto::EventsRequest::new();
        let asked = self.client.events(Context::default(), &request).await;
        let mut stream = asked.map_err(refused("tell its events"))?;
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

/// An identity that no other μVM has.
fn identity_request(identity: &Identity) -> Result<proto::SetIdentityRequest, Error> {
    let failed = |source| Error::System {
        action: "get random bytes from the kernel",
        source,
    };
    let wall_clock = || {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        i64::try_from(now.unwrap_or_default().as_nanos()).unwrap_or(i64::MAX)
    };
    Ok(proto::SetIdentityRequest {
        generation: random::uuid().map_err(failed)?,
        // Two of the kernel generator's keys.
        entropy: random::bytes::<{ 2 * MIN_ENTROPY }>()
            .map_err(failed)?
            .to_vec(),
        machine_id: random::hex::<16>().map_err(failed)?,
        hostname: identity.hostname.clone(),
        network: identity.network.clone().into(),
        sysctls: identity.sysctls.clone().into_iter().collect(),
        mounts: identity.mounts.clone(),
        scratch_limit_bytes: identity.scratch_limit,
        scratch_flush: identity.scratch_flush,
        // Last, for it ages.
        wall_clock_ns: wall_clock(),
        ..Default::default()
    })
}

/// A call that is a step of a start, with what the guest says of it.
async fn timed<T>(
    timeline: &Timeline,
    step: &'static str,
    what: String,
    call: impl Future<Output = ttrpc::Result<T>>,
    spans: impl FnOnce(&T) -> &[proto::Span],
) -> Result<(), GuestError> {
    let asked = timeline.now();
    let answer = timeline.of(step, call).await.map_err(refused(what))?;
    timeline.add_guest(step, asked, spans(&answer));
    Ok(())
}

#[async_trait]
impl Guest for Agent {
    async fn create(
        &self,
        request: proto::CreateContainerRequest,
        timeline: &Timeline,
    ) -> Result<(), GuestError> {
        let what = format!("create container {}", request.container_id);
        let creating = self.client.create_container(limit(), &request);
        timed(timeline, step::CREATE, what, creating, |made| &made.spans).await
    }

    async fn start(&self, container: &str, timeline: &Timeline) -> Result<(), GuestError> {
        let request = proto::StartContainerRequest {
            container_id: container.into(),
            ..Default::default()
        };
        let what = format!("start container {container}");
        let starting = self.client.start_container(limit(), &request);
        timed(timeline, step::START, what, starting, |made| &made.spans).await
    }

    async fn exec(&self, request: proto::ExecRequest) -> Result<(), GuestError> {
        let (exec, container) = (&request.exec_id, &request.container_id);
        let what = refused(format!("start exec {exec} in container {container}"));
        let started = self.client.exec(limit(), &request).await;
        started.map_err(what).map(drop)
    }

    async fn kill(
        &self,
        container: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), GuestError> {
        let request = proto::KillRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            signal,
            all,
            ..Default::default()
        };
        let what = refused(format!("send signal {signal} to container {container}"));
        let killed = self.client.kill(limit(), &request).await;
        killed.map_err(what).map(drop)
    }

    async fn wait(&self, container: &str, exec: &str) -> Result<proto::ExitStatus, GuestError> {
        let request = proto::WaitRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        let what = refused(format!("wait for container {container}"));
        let ended = self.client.wait(Context::default(), &request).await;
        ended.map_err(what)
    }

    async fn pause(&self, container: &str) -> Result<(), GuestError> {
        let request = proto::PauseRequest {
            container_id: container.into(),
            ..Default::default()
        };
        let what = refused(format!("pause container {container}"));
        let paused = self.client.pause(limit(), &request).await;
        paused.map_err(what).map(drop)
    }

    async fn unpause(&self, container: &str) -> Result<(), GuestError> {
        let request = proto::UnpauseRequest {
            container_id: container.into(),
            ..Default::default()
        };
        let what = refused(format!("resume container {container}"));
        let resumed = self.client.unpause(limit(), &request).await;
        resumed.map_err(what).map(drop)
    }

    async fn update(&self, container: &str, resources: Vec<u8>) -> Result<(), GuestError> {
        let request = proto::UpdateRequest {
            container_id: container.into(),
            resources,
            ..Default::default()
        };
        let what = refused(format!("update container {container}"));
        let updated = self.client.update(limit(), &request).await;
        updated.map_err(what).map(drop)
    }

    async fn stats(&self, container: &str) -> Result<proto::StatsResponse, GuestError> {
        let request = proto::StatsRequest {
            container_id: container.into(),
            ..Default::default()
        };
        let what = refused(format!("measure container {container}"));
        self.client.stats(limit(), &request).await.map_err(what)
    }

    async fn written(&self, containers: &[String]) -> Result<proto::WrittenResponse, GuestError> {
        let request = proto::WrittenRequest {
            container_ids: containers.to_vec(),
            ..Default::default()
        };
        let what = refused("measure what the containers wrote");
        self.client.written(limit(), &request).await.map_err(what)
    }

    async fn pids(&self, container: &str) -> Result<Vec<u32>, GuestError> {
        let request = proto::PidsRequest {
            container_id: container.into(),
            ..Default::default()
        };
        let what = refused(format!("list the processes of container {container}"));
        let listed = self.client.pids(limit(), &request).await.map_err(what)?;
        Ok(listed.processes.into_iter().map(|p| p.pid).collect())
    }

    async fn network(&self) -> Result<proto::NetworkState, GuestError> {
        let request = proto::GetNetworkRequest::new();
        let read = self.client.get_network(limit(), &request).await;
        read.map_err(refused("read its network counters"))
    }

    async fn resize_tty(
        &self,
        container: &str,
        exec: &str,
        (width, height): (u32, u32),
    ) -> Result<(), GuestError> {
        let request = proto::ResizeTtyRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            width,
            height,
            ..Default::default()
        };
        let what = refused(format!("resize the terminal of container {container}"));
        let resized = self.client.resize_tty(limit(), &request).await;
        resized.map_err(what).map(drop)
    }

    async fn delete(&self, container: &str, exec: &str) -> Result<(), GuestError> {
        let request = proto::DeleteRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            force: true,
            ..Default::default()
        };
        let what = refused(format!("delete container {container}"));
        let deleted = self.client.delete(limit(), &request).await;
        deleted.map_err(what).map(drop)
    }

    async fn stream(&self, header: &Header) -> Result<UnixStream, GuestError> {
        self.vsock.stream(header).await.map_err(not_connected)
    }

    async fn mount(&self, mounts: Vec<proto::Mount>) -> Result<(), GuestError> {
        let request = proto::AddMountsRequest {
            mounts,
            ..Default::default()
        };
        let mounted = self.client.add_mounts(limit(), &request).await;
        mounted.map_err(refused("mount for the pod")).map(drop)
    }

    async fn write_file(&self, path: String, text: String) -> Result<(), GuestError> {
        let what = refused(format!("write {path}"));
        let request = proto::WriteFileRequest {
            path,
            data: text.into_bytes(),
            mode: 0o644,
            ..Default::default()
        };
        let written = self.client.write_file(limit(), &request).await;
        written.map_err(what).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_agent_api::Refusal;

    #[test]
    fn what_the_agent_refuses_keeps_its_kind() {
        let refusal = Refusal {
            kind: RefusalKind::REFUSAL_NOT_FOUND,
            text: "because".to_owned(),
        };
        match refused("mount it")(refusal.into()) {
            GuestError::Refused { what, kind, text } => {
                assert_eq!((&*what, &*text), ("mount it", "because"));
                assert_eq!(kind, RefusalKind::REFUSAL_NOT_FOUND);
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn long_texts_of_the_guest_are_cut_between_characters() {
        let long = "ü".repeat(LONGEST_TEXT);
        let refusal = Refusal {
            kind: RefusalKind::REFUSAL_FAILED,
            text: format!("x{long}"),
        };
        let text = refused("mount it")(refusal.into()).to_string();
        assert!(
            text.len() < LONGEST_TEXT + 64 && text.ends_with("ü…"),
            "{}",
            text.len()
        );
        assert_eq!(cut("short"), "short");
    }

    #[test]
    fn broken_connection_means_that_the_guest_is_gone() {
        let error = Error::from(refused("x")(ttrpc::Error::RemoteClosed));
        assert!(error.is_gone(), "{error:?}");
    }

    #[test]
    fn no_two_identities_are_alike() {
        let (a, b) = (Identity::default(), Identity::default());
        let (a, b) = (identity_request(&a).unwrap(), identity_request(&b).unwrap());
        assert!(a.entropy.len() >= MIN_ENTROPY);
        assert_eq!(a.machine_id.len(), 32);
        assert!(a.entropy != b.entropy && a.machine_id != b.machine_id);
        assert_ne!(a.generation, b.generation);
    }
}
