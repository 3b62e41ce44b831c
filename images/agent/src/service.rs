//! The calls: a thin layer over what the other modules do.

use std::sync::Arc;

use async_trait::async_trait;
use kiln_agent_api::{PROTOCOL_VERSION, proto};
use protobuf::EnumOrUnknown;
use tokio::sync::broadcast::error::RecvError;
use ttrpc::asynchronous::{ServerStreamSender, TtrpcContext};

use crate::agent::Agent;
use crate::container::process::Process;
use crate::container::{Event, blocking};
use crate::error::AgentError;
use crate::spans::Spans;
use crate::written;

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    agent: Arc<Agent>,
}

impl Service {
    pub(crate) fn new(agent: Arc<Agent>) -> Self {
        Self { agent }
    }

    /// Runs `work` to its end, even if the host hangs up meanwhile: half a container is no state.
    async fn whole<T, W>(&self, work: impl FnOnce(Arc<Agent>) -> W) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        W: Future<Output = Result<T, AgentError>> + Send + 'static,
    {
        let task = tokio::spawn(work(self.agent.clone()));
        let result = task.await.unwrap_or_else(|error| {
            Err(AgentError::Internal(format!(
                "a task of the agent failed: {error}"
            )))
        });
        Ok(result?)
    }

    /// As [`Self::whole`], for what only an open gate lets through.
    async fn gated<T, W>(&self, work: impl FnOnce(Arc<Agent>) -> W) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        W: Future<Output = Result<T, AgentError>> + Send + 'static,
    {
        self.agent.gate.check()?;
        self.whole(work).await
    }

    fn process(&self, container: &str, exec: &str) -> Result<Arc<Process>, AgentError> {
        self.agent.gate.check()?;
        self.agent.containers.process(container, exec)
    }
}

#[async_trait]
impl proto::Agent for Service {
    async fn hello(
        &self,
        _: &TtrpcContext,
        request: proto::HelloRequest,
    ) -> ttrpc::Result<proto::HelloResponse> {
        if request.protocol_version != 0 && request.protocol_version != PROTOCOL_VERSION {
            let theirs = request.protocol_version;
            let text = format!(
                "the host speaks version {theirs} of the agent's API, this agent {PROTOCOL_VERSION}; bake again"
            );
            return Err(AgentError::Invalid(text).into());
        }
        Ok(self.agent.hello()?)
    }

    async fn settle(
        &self,
        _: &TtrpcContext,
        request: proto::SettleRequest,
    ) -> ttrpc::Result<proto::SettleResponse> {
        self.whole(|agent| async move { agent.settle(&request).await })
            .await
    }

    async fn set_identity(
        &self,
        _: &TtrpcContext,
        request: proto::SetIdentityRequest,
    ) -> ttrpc::Result<proto::SetIdentityResponse> {
        self.whole(|agent| async move { agent.set_identity(request).await })
            .await
    }

    async fn shutdown(
        &self,
        _: &TtrpcContext,
        request: proto::ShutdownRequest,
    ) -> ttrpc::Result<proto::ShutdownResponse> {
        self.whole(|agent| async move { agent.shutdown(&request).await })
            .await?;
        Ok(proto::ShutdownResponse::new())
    }

    async fn configure_network(
        &self,
        _: &TtrpcContext,
        request: proto::Network,
    ) -> ttrpc::Result<proto::NetworkState> {
        self.gated(|_| async move { Ok(crate::network::configure(&request)?) })
            .await
    }

    async fn get_network(
        &self,
        _: &TtrpcContext,
        _: proto::GetNetworkRequest,
    ) -> ttrpc::Result<proto::NetworkState> {
        Ok(crate::network::state().map_err(AgentError::from)?)
    }

    async fn set_resources(
        &self,
        _: &TtrpcContext,
        request: proto::Resources,
    ) -> ttrpc::Result<proto::ResourceState> {
        self.gated(|agent| async move { agent.set_resources(request).await })
            .await
    }

    async fn get_resources(
        &self,
        _: &TtrpcContext,
        _: proto::GetResourcesRequest,
    ) -> ttrpc::Result<proto::ResourceState> {
        Ok(crate::resources::state().map_err(AgentError::from)?)
    }

    async fn add_mounts(
        &self,
        _: &TtrpcContext,
        request: proto::AddMountsRequest,
    ) -> ttrpc::Result<proto::AddMountsResponse> {
        self.gated(|_| async move {
            let mut spans = Spans::new();
            let mounts = request.mounts;
            let add = move || Ok(crate::storage::add(&mounts, None)?);
            let each = spans.of("mount", crate::container::blocking(add)).await?;
            spans.within("mount", each);
            Ok(proto::AddMountsResponse {
                spans: spans.finish(),
                ..Default::default()
            })
        })
        .await
    }

    async fn remove_mounts(
        &self,
        _: &TtrpcContext,
        request: proto::RemoveMountsRequest,
    ) -> ttrpc::Result<proto::RemoveMountsResponse> {
        self.gated(|_| async move {
            crate::container::blocking(move || {
                let (detach, remove) = (request.detach, request.remove_target);
                Ok(crate::storage::remove(&request.targets, detach, remove)?)
            })
            .await?;
            Ok(proto::RemoveMountsResponse::new())
        })
        .await
    }

    async fn write_file(
        &self,
        _: &TtrpcContext,
        request: proto::WriteFileRequest,
    ) -> ttrpc::Result<proto::WriteFileResponse> {
        self.gated(|_| async move {
            crate::storage::write_file(&request)?;
            Ok(proto::WriteFileResponse::new())
        })
        .await
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: proto::CreateContainerRequest,
    ) -> ttrpc::Result<proto::CreateContainerResponse> {
        self.gated(|agent| async move {
            let mut spans = Spans::new();
            let boot_id = agent.gate.boot_id_file();
            let container = agent
                .containers
                .create(&request, boot_id, &mut spans)
                .await?;
            if request.start {
                spans
                    .of("start", agent.containers.start(&request.container_id))
                    .await?;
            }
            Ok(proto::CreateContainerResponse {
                pid: container.init.pid.cast_unsigned(),
                spans: spans.finish(),
                ..Default::default()
            })
        })
        .await
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: proto::StartContainerRequest,
    ) -> ttrpc::Result<proto::StartContainerResponse> {
        self.gated(|agent| async move {
            let mut spans = Spans::new();
            let start = agent.containers.start(&request.container_id);
            let container = spans.of("start", start).await?;
            Ok(proto::StartContainerResponse {
                pid: container.init.pid.cast_unsigned(),
                spans: spans.finish(),
                ..Default::default()
            })
        })
        .await
    }

    async fn exec(
        &self,
        _: &TtrpcContext,
        request: proto::ExecRequest,
    ) -> ttrpc::Result<proto::ExecResponse> {
        self.gated(|agent| async move {
            let mut spans = Spans::new();
            let process = agent.containers.exec(&request, &mut spans).await?;
            Ok(proto::ExecResponse {
                pid: process.pid.cast_unsigned(),
                spans: spans.finish(),
                ..Default::default()
            })
        })
        .await
    }

    async fn kill(
        &self,
        _: &TtrpcContext,
        request: proto::KillRequest,
    ) -> ttrpc::Result<proto::KillResponse> {
        self.agent.gate.check()?;
        self.agent.containers.kill(&request)?;
        Ok(proto::KillResponse::new())
    }

    async fn wait(
        &self,
        _: &TtrpcContext,
        request: proto::WaitRequest,
    ) -> ttrpc::Result<proto::ExitStatus> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        let exit = process.ended().await;
        Ok(process.status(exit))
    }

    async fn state(
        &self,
        _: &TtrpcContext,
        request: proto::StateRequest,
    ) -> ttrpc::Result<proto::ProcessState> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        let phase = match request.container_id.as_str() {
            "" => crate::container::Phase::Running,
            id => self.agent.containers.get(id)?.phase(),
        };
        Ok(process.state(phase))
    }

    async fn list_containers(
        &self,
        _: &TtrpcContext,
        _: proto::ListContainersRequest,
    ) -> ttrpc::Result<proto::ListContainersResponse> {
        let processes = self.agent.containers.list();
        Ok(proto::ListContainersResponse {
            processes,
            ..Default::default()
        })
    }

    async fn pids(
        &self,
        _: &TtrpcContext,
        request: proto::PidsRequest,
    ) -> ttrpc::Result<proto::PidsResponse> {
        self.agent.gate.check()?;
        Ok(self.agent.containers.pids(&request.container_id)?)
    }

    async fn pause(
        &self,
        _: &TtrpcContext,
        request: proto::PauseRequest,
    ) -> ttrpc::Result<proto::PauseResponse> {
        self.gated(|agent| async move {
            agent.containers.pause(&request.container_id, true).await?;
            Ok(proto::PauseResponse::new())
        })
        .await
    }

    async fn unpause(
        &self,
        _: &TtrpcContext,
        request: proto::UnpauseRequest,
    ) -> ttrpc::Result<proto::UnpauseResponse> {
        self.gated(|agent| async move {
            agent.containers.pause(&request.container_id, false).await?;
            Ok(proto::UnpauseResponse::new())
        })
        .await
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        request: proto::UpdateRequest,
    ) -> ttrpc::Result<proto::UpdateResponse> {
        self.agent.gate.check()?;
        self.agent.containers.update(&request)?;
        Ok(proto::UpdateResponse::new())
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: proto::StatsRequest,
    ) -> ttrpc::Result<proto::StatsResponse> {
        Ok(self.agent.containers.stats(&request.container_id)?)
    }

    async fn written(
        &self,
        _: &TtrpcContext,
        request: proto::WrittenRequest,
    ) -> ttrpc::Result<proto::WrittenResponse> {
        self.gated(|_| blocking(move || written::answer(&request)))
            .await
    }

    async fn resize_tty(
        &self,
        _: &TtrpcContext,
        request: proto::ResizeTtyRequest,
    ) -> ttrpc::Result<proto::ResizeTtyResponse> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        process.resize(request.width, request.height)?;
        Ok(proto::ResizeTtyResponse::new())
    }

    async fn close_stdin(
        &self,
        _: &TtrpcContext,
        request: proto::CloseStdinRequest,
    ) -> ttrpc::Result<proto::CloseStdinResponse> {
        self.process(&request.container_id, &request.exec_id)?
            .stdio
            .close_stdin();
        Ok(proto::CloseStdinResponse::new())
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: proto::DeleteRequest,
    ) -> ttrpc::Result<proto::DeleteResponse> {
        self.gated(|agent| async move {
            let exit = agent.containers.delete(&request).await?;
            Ok(proto::DeleteResponse {
                exit: Some(exit).into(),
                ..Default::default()
            })
        })
        .await
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        _: proto::EventsRequest,
        sender: ServerStreamSender<proto::Event>,
    ) -> ttrpc::Result<()> {
        let mut events = self.agent.containers.events();
        loop {
            match events.recv().await {
                Ok(event) => sender.send(&message(event)).await?,
                Err(RecvError::Lagged(lost)) => {
                    tracing::warn!(lost, "the host reads events too slowly");
                }
                Err(RecvError::Closed) => return Ok(()),
            }
        }
    }
}

fn message(event: Event) -> proto::Event {
    let mut message = proto::Event::new();
    match event {
        Event::Exit {
            container,
            exec,
            pid,
            status,
        } => message.set_exit(proto::ExitEvent {
            container_id: container,
            exec_id: exec,
            pid: pid.cast_unsigned(),
            status: Some(status).into(),
            ..Default::default()
        }),
        Event::Oom { container, kills } => {
            message.set_oom(proto::OomEvent {
                container_id: container,
                kills,
                ..Default::default()
            });
        }
        Event::Resumed => message.set_resumed(proto::ResumedEvent::new()),
    }
    message
}

/// The gate's state, as the API has it.
pub(crate) fn gate_state(open: bool) -> EnumOrUnknown<proto::GateState> {
    let state = if open {
        proto::GateState::GATE_OPEN
    } else {
        proto::GateState::GATE_SHUT
    };
    EnumOrUnknown::new(state)
}
