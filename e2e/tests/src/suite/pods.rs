//! Life of pods and of the containers in them.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use futures_util::future::try_join_all;
use k8s_cri::v1::{
    ContainerState, PodSandboxState, RemovePodSandboxRequest, StopPodSandboxRequest,
};
use kiln_e2e::harness::Case;
use kiln_e2e::node::Census;
use kiln_e2e::pod::STEP;
use kiln_e2e::{Container, ContainerSpec, Pod, PodSpec, Test, cases};

use super::same;

pub(crate) fn cases() -> Vec<Case> {
    cases![
        pod_up,
        removal_of_a_running_pod_and_again,
        containers_share_localhost_hostname_and_ipc,
        containers_see_each_others_processes_only_if_shared,
        init_containers_run_one_after_the_other,
        one_container_restarts_while_another_runs,
        unknown_handler_is_refused,
        failed_create_leaves_the_pod_usable,
        a_dozen_containers_have_files_of_their_own.limit(400),
        ten_pods_at_once_leave_nothing.alone().limit(400),
    ]
    .into_iter()
    .chain(
        cases![thirty_pods_at_once_leave_nothing.alone().limit(1800)]
            .into_iter()
            .map(|case| case.only_with("kiln", "pods")),
    )
    .collect()
}

async fn pod_up(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let status = pod.status().await?;
    same!(status.state(), PodSandboxState::SandboxReady);
    same!(status.runtime_handler, test.handler());
    let container = pod
        .create(&ContainerSpec::testprog("main", &["started"]))
        .await?;
    same!(container.state().await?, ContainerState::ContainerCreated);
    container.start().await?;
    same!(container.state().await?, ContainerState::ContainerRunning);
    container.log().wait_for("started", STEP).await?;
    let status = container.status().await?;
    ensure!(
        status.created_at > 0 && status.started_at >= status.created_at,
        "{status:?}"
    );
    pod.stop().await?;
    same!(
        pod.status().await?.state(),
        PodSandboxState::SandboxNotready
    );
    same!(container.state().await?, ContainerState::ContainerExited);
    pod.remove().await
}

async fn removal_of_a_running_pod_and_again(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    pod.start(&ContainerSpec::testprog("main", &["started"]))
        .await?;
    // Without stopping it first, and then all of it once more: kubelet repeats itself.
    let remove = || RemovePodSandboxRequest {
        pod_sandbox_id: pod.id().to_owned(),
    };
    test.cri().remove_pod_sandbox(remove()).await?;
    test.cri().remove_pod_sandbox(remove()).await?;
    let stop = StopPodSandboxRequest {
        pod_sandbox_id: pod.id().to_owned(),
    };
    test.cri().stop_pod_sandbox(stop).await?;
    ensure!(
        pod.status().await.is_err(),
        "a removed pod still has a status"
    );
    Ok(())
}

async fn containers_share_localhost_hostname_and_ipc(test: Test) -> Result<()> {
    let spec = PodSpec::new()
        .hostname("together")
        .name_server("192.0.2.53")
        .sysctl("net.ipv4.ip_unprivileged_port_start", "7");
    let pod = test.run_pod(&spec).await?;
    let server = pod
        .start(&ContainerSpec::testprog("server", &["http", "8080"]))
        .await?;
    server.log().wait_for("listening 8080", STEP).await?;
    let client = pod.start(&ContainerSpec::pause("client")).await?;
    same!(
        client
            .read(&["testprog", "get", "127.0.0.1:8080", "/"])
            .await?,
        "together"
    );
    same!(
        client
            .read(&["testprog", "get", "[::1]:8080", "/peer"])
            .await?,
        "::1"
    );
    same!(client.read(&["hostname"]).await?, "together");
    server.shell("echo shared > /dev/shm/file").await?;
    same!(client.read(&["cat", "/dev/shm/file"]).await?, "shared");
    let resolv = client.read(&["cat", "/etc/resolv.conf"]).await?;
    ensure!(resolv.contains("nameserver 192.0.2.53"), "{resolv:?}");
    ensure!(resolv.contains("search kiln.test"), "{resolv:?}");
    let port = client
        .read(&["cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start"])
        .await?;
    same!(port, "7");
    // What they must not share.
    server.shell("echo mine > /tmp/file").await?;
    same!(client.exec(&["cat", "/tmp/file"]).await?.code, 1);
    Ok(())
}

async fn containers_see_each_others_processes_only_if_shared(test: Test) -> Result<()> {
    let apart = test.pod().await?;
    apart
        .start(&ContainerSpec::testprog("one", &["sleep", "1000"]))
        .await?;
    let two = apart.start(&ContainerSpec::pause("two")).await?;
    let processes = two.read(&["ps", "-o", "args"]).await?;
    ensure!(!processes.contains("sleep 1000"), "{processes}");
    same!(
        two.report().await?["status"]["NSpid"]
            .as_str()
            .map(|pid| pid.contains('\t')),
        Some(false)
    );

    let together = test.run_pod(&PodSpec::new().share_processes()).await?;
    let one = ContainerSpec::testprog("one", &["sleep", "1000"]).share_processes();
    together.start(&one).await?;
    let two = together
        .start(&ContainerSpec::pause("two").share_processes())
        .await?;
    let processes = two.read(&["ps", "-o", "args"]).await?;
    ensure!(processes.contains("sleep 1000"), "{processes}");
    Ok(())
}

async fn init_containers_run_one_after_the_other(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let shared = test.scratch().join("shared");
    std::fs::create_dir(&shared)?;
    for name in ["first", "second", "third"] {
        let script = format!("echo {name} >> /shared/order");
        let spec = ContainerSpec::shell(name, &script).mount(&shared, "/shared");
        let (code, _) = pod.finish(&spec).await?;
        same!(code, 0);
    }
    let spec = ContainerSpec::new("main", &["cat", "/shared/order"]).mount(&shared, "/shared");
    let (code, log) = pod.finish(&spec).await?;
    same!(code, 0);
    same!(log.stdout()?, ["first", "second", "third"]);
    Ok(())
}

async fn one_container_restarts_while_another_runs(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let steady = pod
        .start(&ContainerSpec::testprog("steady", &["started"]))
        .await?;
    let started = steady.status().await?.started_at;
    for attempt in 0..3 {
        let spec = ContainerSpec::shell("crashing", "echo again; echo x > /written; exit 3");
        let container = pod.start(&spec.attempt(attempt)).await?;
        let status = container.wait().await?;
        same!(status.exit_code, 3);
        same!(status.reason, "Error");
        same!(container.log().stdout()?, ["again"]);
        container.remove().await?;
    }
    // A new attempt starts from the image, not from where the last one ended.
    let spec = ContainerSpec::new("crashing", &["ls", "/written"]).attempt(3);
    same!(pod.finish(&spec).await?.0, 1);
    let status = steady.status().await?;
    same!(status.state(), ContainerState::ContainerRunning);
    same!(status.started_at, started);
    Ok(())
}

async fn unknown_handler_is_refused(test: Test) -> Result<()> {
    match test
        .run_pod(&PodSpec::new().handler("no-such-handler"))
        .await
    {
        Ok(_) => bail!("a pod runs with a handler that is not configured"),
        Err(error) => {
            ensure!(
                format!("{error:#}").contains("no-such-handler"),
                "{error:#}"
            );
            Ok(())
        }
    }
}

async fn failed_create_leaves_the_pod_usable(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let missing = ContainerSpec::pause("main").image("kiln.test/no-such-image:1");
    ensure!(
        pod.create(&missing).await.is_err(),
        "a container of an image that is not there"
    );
    let container = pod
        .create(&ContainerSpec::new("broken", &["/no/such/program"]))
        .await?;
    let Err(error) = container.start().await else {
        bail!("a missing program was started")
    };
    ensure!(
        format!("{error:#}").contains("/no/such/program"),
        "{error:#}"
    );
    let status = container.status().await?;
    same!(status.state(), ContainerState::ContainerExited);
    same!(status.reason, "StartError");
    let (code, _) = pod
        .finish(&ContainerSpec::testprog("fine", &["exit", "0"]))
        .await?;
    same!(code, 0);
    Ok(())
}

/// More than a μVM was baked with slots for.
async fn a_dozen_containers_have_files_of_their_own(test: Test) -> Result<()> {
    async fn start(pod: &Pod, name: &str) -> Result<Container> {
        let container = pod
            .start(&ContainerSpec::testprog(name, &["started"]))
            .await?;
        let output = container.exec(&["cat", "/mine"]).await?;
        ensure!(output.code != 0, "{name} begins with {}", output.stdout);
        container.shell(&format!("echo {name} > /mine")).await?;
        Ok(container)
    }
    let pod = test.pod().await?;
    let mut all = Vec::new();
    for number in 0..12 {
        all.push(start(&pod, &format!("c{number}")).await?);
    }
    // One of the first and two of the last make room for others.
    for number in [11, 10, 1] {
        let container = all.remove(number);
        // At once: as one that ends by itself is to be killed, containerd 1.7 may hang up on it and fail.
        container.stop(Duration::ZERO).await?;
        container.remove().await?;
    }
    for number in 12..15 {
        all.push(start(&pod, &format!("c{number}")).await?);
    }
    let names = [0, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14];
    for (container, number) in all.iter().zip(names) {
        same!(
            container.read(&["cat", "/mine"]).await?,
            format!("c{number}")
        );
    }
    Ok(())
}

async fn ten_pods_at_once_leave_nothing(test: Test) -> Result<()> {
    at_once(&test, 10).await
}

async fn thirty_pods_at_once_leave_nothing(test: Test) -> Result<()> {
    // A node's first pod leaves the directories and the bridge that all pods use.
    test.pod().await?.remove().await?;
    for round in 0..super::rounds()? {
        let all = at_once(&test, 30).await;
        all.with_context(|| format!("round {round}"))?;
    }
    Ok(())
}

async fn at_once(test: &Test, many: usize) -> Result<()> {
    let before = Census::take()?;
    let pods = try_join_all((0..many).map(|_| {
        let test = test.clone();
        async move {
            let pod = test.pod().await?;
            let container = pod
                .start(&ContainerSpec::testprog("main", &["http", "80"]))
                .await?;
            container
                .log()
                .wait_for("listening", Duration::from_secs(120))
                .await?;
            anyhow::Ok((pod, container))
        }
    }))
    .await?;
    let mut addresses = Vec::new();
    for (pod, container) in &pods {
        let host = container
            .read(&["testprog", "get", "127.0.0.1:80", "/"])
            .await?;
        same!(host, pod.config().hostname);
        addresses.push(pod.ip().await?);
    }
    addresses.sort();
    addresses.dedup();
    same!(addresses.len(), many, "different addresses");
    try_join_all(pods.iter().map(|(pod, _)| pod.remove())).await?;
    test.node_is_as(&before).await
}
