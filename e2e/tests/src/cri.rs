//! CRI, the interface through which Kubernetes drives containerd: a thin client, one method for
//! each call, with a time limit on all of them.

use std::time::Duration;

use k8s_cri::v1 as api;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::api::CALL_LIMIT;

/// A CRI call that failed.
#[derive(Debug, thiserror::Error)]
#[error("CRI call {call} failed: {} ({:?})", status.message(), status.code())]
pub struct CallError {
    /// Name of the call.
    pub call: &'static str,
    /// containerd's answer.
    pub status: Status,
}

impl CallError {
    /// Whether the thing that the call is about does not exist.
    pub fn is_not_found(&self) -> bool {
        self.status.code() == Code::NotFound
    }
}

type Result<T, E = CallError> = std::result::Result<T, E>;

/// A client for CRI's two services.
#[derive(Debug, Clone)]
pub struct Cri {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
}

macro_rules! calls {
    ($($service:ident.$name:ident($request:ident) -> $response:ident;)*) => {
        $(
            #[doc = concat!("CRI's `", stringify!($name), "`.")]
            pub async fn $name(&self, message: api::$request) -> Result<api::$response> {
                self.$service
                    .clone()
                    .$name(limited(message, CALL_LIMIT))
                    .await
                    .map(tonic::Response::into_inner)
                    .map_err(|status| CallError { call: stringify!($name), status })
            }
        )*
    };
}

fn limited<T>(message: T, limit: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(limit);
    request
}

impl Cri {
    /// CRI over an open connection to containerd.
    pub fn new(channel: Channel) -> Self {
        // 100 000 lines fit in an answer of ExecSync.
        let limit = 16 << 20;
        Cri {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(limit),
            images: ImageServiceClient::new(channel),
        }
    }

    calls! {
        runtime.version(VersionRequest) -> VersionResponse;
        runtime.status(StatusRequest) -> StatusResponse;
        runtime.run_pod_sandbox(RunPodSandboxRequest) -> RunPodSandboxResponse;
        runtime.stop_pod_sandbox(StopPodSandboxRequest) -> StopPodSandboxResponse;
        runtime.remove_pod_sandbox(RemovePodSandboxRequest) -> RemovePodSandboxResponse;
        runtime.pod_sandbox_status(PodSandboxStatusRequest) -> PodSandboxStatusResponse;
        runtime.list_pod_sandbox(ListPodSandboxRequest) -> ListPodSandboxResponse;
        runtime.pod_sandbox_stats(PodSandboxStatsRequest) -> PodSandboxStatsResponse;
        runtime.create_container(CreateContainerRequest) -> CreateContainerResponse;
        runtime.start_container(StartContainerRequest) -> StartContainerResponse;
        runtime.stop_container(StopContainerRequest) -> StopContainerResponse;
        runtime.remove_container(RemoveContainerRequest) -> RemoveContainerResponse;
        runtime.list_containers(ListContainersRequest) -> ListContainersResponse;
        runtime.container_status(ContainerStatusRequest) -> ContainerStatusResponse;
        runtime.update_container_resources(UpdateContainerResourcesRequest)
            -> UpdateContainerResourcesResponse;
        runtime.reopen_container_log(ReopenContainerLogRequest) -> ReopenContainerLogResponse;
        runtime.exec(ExecRequest) -> ExecResponse;
        runtime.attach(AttachRequest) -> AttachResponse;
        runtime.port_forward(PortForwardRequest) -> PortForwardResponse;
        runtime.container_stats(ContainerStatsRequest) -> ContainerStatsResponse;
        runtime.list_container_stats(ListContainerStatsRequest) -> ListContainerStatsResponse;
        images.image_status(ImageStatusRequest) -> ImageStatusResponse;
        images.list_images(ListImagesRequest) -> ListImagesResponse;
    }

    /// CRI's `exec_sync`; a `timeout` of zero seconds means none, so the caller's limit counts.
    pub async fn exec_sync(
        &self,
        message: api::ExecSyncRequest,
        limit: Duration,
    ) -> Result<api::ExecSyncResponse> {
        self.runtime
            .clone()
            .exec_sync(limited(message, limit))
            .await
            .map(tonic::Response::into_inner)
            .map_err(|status| CallError {
                call: "exec_sync",
                status,
            })
    }

    /// CRI's `stop_container`, which may last as long as the container's grace period.
    pub async fn stop_with_grace(&self, container_id: &str, grace: Duration) -> Result<()> {
        let timeout = i64::try_from(grace.as_secs()).unwrap_or(i64::MAX);
        let message = api::StopContainerRequest {
            container_id: container_id.to_owned(),
            timeout,
        };
        self.runtime
            .clone()
            .stop_container(limited(message, CALL_LIMIT + grace))
            .await
            .map(|_| ())
            .map_err(|status| CallError {
                call: "stop_container",
                status,
            })
    }
}
