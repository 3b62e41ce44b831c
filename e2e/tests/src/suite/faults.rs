//! What dies without being asked to: processes of a pod, and the shim that looks after it.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_client::types::v1::Status;
use k8s_cri::v1::{ContainerState, PodSandboxState};
use kiln_e2e::harness::Case;
use kiln_e2e::node::{self, Census};
use kiln_e2e::plain::{Plain, PlainSpec};
use kiln_e2e::pod::STEP;
use kiln_e2e::{Container, ContainerSpec, Pod, Test, cases, wait};

use super::same;

/// How long containerd may take to see what happened.
pub(super) const SEEN: Duration = Duration::from_secs(30);

pub(crate) fn cases() -> Vec<Case> {
    cases![
        task_killed_from_the_node_ends_as_killed,
        task_without_its_shim_is_gone_and_leaves_nothing.alone(),
        pod_without_its_shim_ends_and_leaves_nothing
            .alone()
            .fails_with("runc", (2, 0)),
        pod_whose_processes_are_killed_ends_and_leaves_nothing
            .alone()
            .fails_with("runc", (2, 0)),
        shim_killed_while_a_pod_starts_leaves_nothing
            .alone()
            .limit(400),
    ]
}

pub(super) fn kill(pid: u32) -> Result<()> {
    let pid = i32::try_from(pid)?;
    // SAFETY: plain numbers.
    let result = unsafe { libc::kill(pid, libc::SIGKILL) };
    ensure!(
        result == 0,
        "cannot kill process {pid}: {}",
        std::io::Error::last_os_error()
    );
    Ok(())
}

pub(super) fn parent(pid: u32) -> Result<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))
        .with_context(|| format!("process {pid} is not there"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    Ok(line.context("no parent")?.trim().parse()?)
}

/// The shim that serves a pod or a task. The tests that ask run alone.
pub(super) fn shim_of(id: &str) -> Result<Option<u32>> {
    let shim = node::processes()?.into_iter().find(|process| {
        let command = &process.command;
        command.contains("containerd-shim-")
            && command.contains(id)
            && !command.ends_with(" delete")
    });
    Ok(shim.map(|process| process.pid))
}

pub(super) fn children_of(pid: u32) -> Result<Vec<u32>> {
    let all = node::processes()?.into_iter().map(|process| process.pid);
    Ok(all
        .filter(|child| parent(*child).is_ok_and(|parent| parent == pid))
        .collect())
}

async fn task_killed_from_the_node_ends_as_killed(test: Test) -> Result<()> {
    let task = Plain::run(&test, &PlainSpec::testprog(&["started"])).await?;
    task.streams.wait_for("started").await?;
    kill(task.pid)?;
    same!(task.wait("").await?, 137);
    same!(task.state().await?.status(), Status::Stopped);
    same!(task.delete().await?.exit_status, 137);
    same!(task.streams.output(), "started\n");
    Ok(())
}

async fn task_without_its_shim_is_gone_and_leaves_nothing(test: Test) -> Result<()> {
    let task = Plain::run(&test, &PlainSpec::testprog(&["started"])).await?;
    task.streams.wait_for("started").await?;
    kill(shim_of(task.id())?.context("no shim")?)?;
    wait::until("containerd's knowledge of the end", SEEN, || async {
        Ok(task.state().await.is_err().then_some(()))
    })
    .await?;
    // containerd has deleted it on its own, or lets it be deleted. That nothing of it is left is looked at after
    // every test.
    let _ = task.delete().await;
    Ok(())
}

async fn running(test: &Test) -> Result<(Pod, Container)> {
    let pod = test.pod().await?;
    let container = pod
        .start(&ContainerSpec::testprog("main", &["started"]))
        .await?;
    container.log().wait_for("started", STEP).await?;
    Ok((pod, container))
}

/// What is on the node when it has had a pod before: the first one leaves containerd's directories and CNI's bridge.
async fn census(test: &Test) -> Result<Census> {
    let (pod, _) = running(test).await?;
    pod.remove().await?;
    wait::until("the removal of the pod's cgroup", SEEN, || async {
        Ok(test.remove_pod_cgroups().ok())
    })
    .await?;
    Census::take()
}

async fn ends(pod: &Pod, container: &Container) -> Result<()> {
    wait::until("the end of the container", SEEN, || async {
        let state = container.state().await?;
        Ok((state == ContainerState::ContainerExited).then_some(()))
    })
    .await?;
    same!(container.status().await?.exit_code, 137);
    wait::until("the end of the pod", SEEN, || async {
        let state = pod.status().await?.state();
        Ok((state == PodSandboxState::SandboxNotready).then_some(()))
    })
    .await?;
    pod.remove().await
}

async fn pod_without_its_shim_ends_and_leaves_nothing(test: Test) -> Result<()> {
    let before = census(&test).await?;
    let (pod, container) = running(&test).await?;
    kill(shim_of(pod.id())?.context("no shim")?)?;
    wait::until("the end of the container", SEEN, || async {
        let state = container.state().await?;
        Ok((state != ContainerState::ContainerRunning).then_some(()))
    })
    .await?;
    pod.remove().await?;
    test.node_is_as(&before).await?;
    // The node is none the worse for it.
    let (pod, _) = running(&test).await?;
    pod.remove().await
}

async fn pod_whose_processes_are_killed_ends_and_leaves_nothing(test: Test) -> Result<()> {
    let before = census(&test).await?;
    let (pod, container) = running(&test).await?;
    let shim = shim_of(pod.id())?.context("no shim")?;
    for process in children_of(shim)? {
        kill(process)?;
    }
    ends(&pod, &container).await?;
    test.node_is_as(&before).await
}

async fn shim_killed_while_a_pod_starts_leaves_nothing(test: Test) -> Result<()> {
    let before = census(&test).await?;
    // At several moments: a start takes about as long as the last of these.
    let moments = [0, 100, 300, 700, 1500];
    for milliseconds in moments.repeat(usize::try_from(super::rounds()?)?) {
        let config = test.pod_config(&kiln_e2e::PodSpec::new())?;
        let starting = Pod::run(test.cri().clone(), config, test.handler());
        let killing = async {
            let limit = Duration::from_secs(20);
            // Whichever it is: there is no other one.
            let shim = wait::until("a shim", limit, || async { shim_of("") }).await?;
            tokio::time::sleep(Duration::from_millis(milliseconds)).await;
            // It may have come and gone.
            let _ = kill(shim);
            anyhow::Ok(())
        };
        let (started, killed) = tokio::join!(starting, killing);
        killed?;
        // Killed in time, the start fails; too late, there is a pod without a shim.
        if let Ok(pod) = started {
            // containerd's own connection may break under the first try; kubelet too tries until it is done.
            wait::until("removal of the pod", SEEN, || async {
                Ok(pod.remove().await.ok())
            })
            .await?;
        }
        // One that was killed just before containerd's first call is forgotten; the end of the next pod's sees to it.
        let (next, _) = running(&test).await?;
        next.remove().await?;
        test.clean_up().await?;
        std::fs::create_dir_all(test.scratch())?;
        test.node_is_as(&before)
            .await
            .with_context(|| format!("killed after {milliseconds} ms"))?;
    }
    let (pod, _) = running(&test).await?;
    pod.remove().await
}
