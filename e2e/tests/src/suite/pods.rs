//! Life of pods and of the containers in them.

use anyhow::{Result, ensure};
use k8s_cri::v1::{ContainerState, PodSandboxState};
use kiln_e2e::harness::Case;
use kiln_e2e::pod::STEP;
use kiln_e2e::{ContainerSpec, Test, cases};

pub(crate) fn cases() -> Vec<Case> {
    cases![pod_up]
}

async fn pod_up(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let status = pod.status().await?;
    ensure!(
        status.state() == PodSandboxState::SandboxReady,
        "{status:?}"
    );
    ensure!(status.runtime_handler == test.handler(), "{status:?}");
    let container = pod
        .create(&ContainerSpec::testprog("main", &["started"]))
        .await?;
    ensure!(container.state().await? == ContainerState::ContainerCreated);
    container.start().await?;
    ensure!(container.state().await? == ContainerState::ContainerRunning);
    container.log().wait_for("started", STEP).await?;
    pod.stop().await?;
    ensure!(pod.status().await?.state() == PodSandboxState::SandboxNotready);
    ensure!(container.state().await? == ContainerState::ContainerExited);
    pod.remove().await
}
