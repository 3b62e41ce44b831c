//! The Task service.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::types::task::{ProcessInfo, Status};
use protobuf::MessageField;
use ttrpc::Result;
use ttrpc::asynchronous::TtrpcContext;

use crate::error::Error;
use crate::events::Exit;
use crate::pod::{CreateTask, Phase, Pod};
use crate::stats;
use crate::stdio::StdioPaths;
use crate::time::timestamp;

/// The Task service of a pod.
#[derive(Debug)]
pub struct TaskService {
    pod: Arc<Pod>,
}

impl TaskService {
    /// Serves this pod.
    pub fn new(pod: Arc<Pod>) -> Self {
        Self { pod }
    }
}

fn exited_at(exit: Exit) -> MessageField<protobuf::well_known_types::timestamp::Timestamp> {
    MessageField::some(timestamp(exit.at))
}

fn status(phase: Phase) -> Status {
    match phase {
        Phase::Created => Status::CREATED,
        Phase::Running => Status::RUNNING,
        Phase::Paused => Status::PAUSED,
        Phase::Stopped => Status::STOPPED,
    }
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, r: api::StateRequest) -> Result<api::StateResponse> {
        let state = self.pod.state(&r.id, &r.exec_id)?;
        Ok(api::StateResponse {
            id: if r.exec_id.is_empty() {
                r.id
            } else {
                r.exec_id.clone()
            },
            exec_id: r.exec_id,
            bundle: state.bundle.display().to_string(),
            pid: state.pid,
            status: status(state.phase).into(),
            stdin: state.stdio.stdin,
            stdout: state.stdio.stdout,
            stderr: state.stdio.stderr,
            terminal: state.stdio.terminal,
            exit_status: state.exit.map_or(0, |e| e.status),
            exited_at: state.exit.map(exited_at).unwrap_or_default(),
            ..Default::default()
        })
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        r: api::CreateTaskRequest,
    ) -> Result<api::CreateTaskResponse> {
        if !r.checkpoint.is_empty() {
            return Err(unimplemented(
                "restoring a container from a CRIU checkpoint",
            ));
        }
        tracing::debug!(id = r.id, "create");
        let pid = self
            .pod
            .create(CreateTask {
                id: r.id,
                bundle: r.bundle.into(),
                rootfs: r.rootfs,
                stdio: StdioPaths {
                    stdin: r.stdin,
                    stdout: r.stdout,
                    stderr: r.stderr,
                    terminal: r.terminal,
                },
            })
            .await
            .inspect_err(log("create"))?;
        Ok(api::CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, r: api::StartRequest) -> Result<api::StartResponse> {
        tracing::debug!(id = r.id, exec = r.exec_id, "start");
        let pid = self
            .pod
            .start(&r.id, &r.exec_id)
            .await
            .inspect_err(log("start"))?;
        Ok(api::StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn delete(&self, _: &TtrpcContext, r: api::DeleteRequest) -> Result<api::DeleteResponse> {
        tracing::debug!(id = r.id, exec = r.exec_id, "delete");
        let (pid, exit) = self
            .pod
            .delete(&r.id, &r.exec_id)
            .await
            .inspect_err(log("delete"))?;
        Ok(api::DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: exited_at(exit),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, r: api::PidsRequest) -> Result<api::PidsResponse> {
        let processes = self.pod.pids(&r.id).await.inspect_err(log("pids"))?;
        Ok(api::PidsResponse {
            processes: processes
                .into_iter()
                .map(|pid| ProcessInfo {
                    pid,
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, r: api::PauseRequest) -> Result<api::Empty> {
        self.pod.pause(&r.id).await.inspect_err(log("pause"))?;
        Ok(api::Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, r: api::ResumeRequest) -> Result<api::Empty> {
        self.pod.resume(&r.id).await.inspect_err(log("resume"))?;
        Ok(api::Empty::new())
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        _: api::CheckpointTaskRequest,
    ) -> Result<api::Empty> {
        Err(unimplemented("checkpointing a single container"))
    }

    async fn kill(&self, _: &TtrpcContext, r: api::KillRequest) -> Result<api::Empty> {
        tracing::debug!(
            id = r.id,
            exec = r.exec_id,
            signal = r.signal,
            all = r.all,
            "kill"
        );
        self.pod.kill(&r.id, &r.exec_id, r.signal, r.all).await?;
        Ok(api::Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, r: api::ExecProcessRequest) -> Result<api::Empty> {
        tracing::debug!(id = r.id, exec = r.exec_id, "exec");
        let stdio = StdioPaths {
            stdin: r.stdin,
            stdout: r.stdout,
            stderr: r.stderr,
            terminal: r.terminal,
        };
        self.pod
            .exec(&r.id, &r.exec_id, stdio, &r.spec.value)
            .inspect_err(log("exec"))?;
        Ok(api::Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, r: api::ResizePtyRequest) -> Result<api::Empty> {
        self.pod
            .resize_pty(&r.id, &r.exec_id, r.width, r.height)
            .await?;
        Ok(api::Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, r: api::CloseIORequest) -> Result<api::Empty> {
        if r.stdin {
            self.pod.close_stdin(&r.id, &r.exec_id)?;
        }
        Ok(api::Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, r: api::UpdateTaskRequest) -> Result<api::Empty> {
        self.pod
            .update(&r.id, &r.resources.value)
            .await
            .inspect_err(log("update"))?;
        Ok(api::Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, r: api::WaitRequest) -> Result<api::WaitResponse> {
        let exit = self.pod.wait(&r.id, &r.exec_id).await?;
        Ok(api::WaitResponse {
            exit_status: exit.status,
            exited_at: exited_at(exit),
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, r: api::StatsRequest) -> Result<api::StatsResponse> {
        let (usage, network) = self.pod.stats(&r.id).await?;
        Ok(api::StatsResponse {
            stats: MessageField::some(stats::metrics(&usage, &network)?),
            ..Default::default()
        })
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        r: api::ConnectRequest,
    ) -> Result<api::ConnectResponse> {
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.pod.pid_of(&r.id),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, r: api::ShutdownRequest) -> Result<api::Empty> {
        tracing::debug!(id = r.id, now = r.now, "shutdown");
        if r.now {
            self.pod.shut_down();
        } else {
            self.pod.shutdown_if_idle();
        }
        Ok(api::Empty::new())
    }
}

fn unimplemented(what: &str) -> ttrpc::Error {
    Error::Unimplemented(format!("{what} is not supported by kiln")).into()
}

fn log(call: &'static str) -> impl Fn(&Error) {
    move |error| tracing::error!(call, error = error.chain(), "refused")
}
