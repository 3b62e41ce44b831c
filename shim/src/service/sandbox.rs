//! The Sandbox service (`sandboxer = "shim"`).

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::sandbox_api as api;
use containerd_shim_protos::sandbox_async::Sandbox;
use protobuf::MessageField;
use protobuf::well_known_types::timestamp::Timestamp;
use ttrpc::Result;
use ttrpc::asynchronous::TtrpcContext;

use super::sandbox_config;
use crate::error::Error;
use crate::pod::Pod;
use crate::stats;
use crate::time::{UnixNanos, timestamp};

// What CRI calls the states of a sandbox.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// The Sandbox service of a pod.
#[derive(Debug)]
pub struct SandboxService {
    pod: Arc<Pod>,
}

impl SandboxService {
    /// Serves this pod.
    pub fn new(pod: Arc<Pod>) -> Self {
        Self { pod }
    }
}

fn time(at: Option<UnixNanos>) -> MessageField<Timestamp> {
    at.map(timestamp).into()
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        r: api::CreateSandboxRequest,
    ) -> Result<api::CreateSandboxResponse> {
        tracing::debug!(id = r.sandbox_id, netns = r.netns_path, "create sandbox");
        let request = sandbox_config::request(r)?;
        self.pod
            .create_sandbox(request)
            .inspect_err(log("create sandbox"))?;
        Ok(api::CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        r: api::StartSandboxRequest,
    ) -> Result<api::StartSandboxResponse> {
        tracing::debug!(id = r.sandbox_id, "start sandbox");
        let status = self
            .pod
            .start_sandbox(&r.sandbox_id)
            .await
            .inspect_err(log("start sandbox"))?;
        Ok(api::StartSandboxResponse {
            pid: status.pid,
            created_at: time(status.started_at),
            ..Default::default()
        })
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        _: api::PlatformRequest,
    ) -> Result<api::PlatformResponse> {
        let mut response = api::PlatformResponse::new();
        let platform = response.platform.mut_or_insert_default();
        platform.os = "linux".to_owned();
        platform.architecture = go_architecture().to_owned();
        Ok(response)
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        r: api::StopSandboxRequest,
    ) -> Result<api::StopSandboxResponse> {
        tracing::debug!(id = r.sandbox_id, "stop sandbox");
        self.pod
            .stop_sandbox(&r.sandbox_id)
            .await
            .inspect_err(log("stop sandbox"))?;
        Ok(api::StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        r: api::WaitSandboxRequest,
    ) -> Result<api::WaitSandboxResponse> {
        let exit = self.pod.wait_sandbox(&r.sandbox_id).await?;
        Ok(api::WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: time(Some(exit.at)),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        r: api::SandboxStatusRequest,
    ) -> Result<api::SandboxStatusResponse> {
        let status = self.pod.sandbox_status(&r.sandbox_id)?;
        Ok(api::SandboxStatusResponse {
            sandbox_id: r.sandbox_id,
            pid: status.pid,
            state: if status.ready() { READY } else { NOT_READY }.to_owned(),
            created_at: time(status.started_at),
            exited_at: time(status.exit.map(|e| e.at)),
            ..Default::default()
        })
    }

    async fn ping_sandbox(
        &self,
        _: &TtrpcContext,
        r: api::PingRequest,
    ) -> Result<api::PingResponse> {
        let status = self.pod.sandbox_status(&r.sandbox_id)?;
        if !status.ready() {
            return Err(
                Error::Unavailable(format!("sandbox {} is not running", r.sandbox_id)).into(),
            );
        }
        Ok(api::PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        r: api::ShutdownSandboxRequest,
    ) -> Result<api::ShutdownSandboxResponse> {
        tracing::debug!(id = r.sandbox_id, "shutdown sandbox");
        self.pod
            .shutdown_sandbox(&r.sandbox_id)
            .await
            .inspect_err(log("shutdown sandbox"))?;
        Ok(api::ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        r: api::SandboxMetricsRequest,
    ) -> Result<api::SandboxMetricsResponse> {
        let (usage, network) = self.pod.sandbox_stats(&r.sandbox_id).await?;
        let mut response = api::SandboxMetricsResponse::new();
        let metrics = response.metrics.mut_or_insert_default();
        metrics.id = r.sandbox_id;
        metrics.timestamp = time(Some(UnixNanos::now()));
        metrics.data = MessageField::some(stats::metrics(&usage, &network)?);
        Ok(response)
    }
}

/// The name that container images have for this architecture.
fn go_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn log(call: &'static str) -> impl Fn(&Error) {
    move |error| tracing::error!(call, error = error.chain(), "refused")
}
