//! Limits and statistics.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use k8s_cri::v1::{
    ContainerState, ListContainerStatsRequest, PodSandboxStatsRequest,
    UpdateContainerResourcesRequest,
};
use kiln_e2e::harness::Case;
use kiln_e2e::pod::{Resources, STEP};
use kiln_e2e::{Container, ContainerSpec, PodSpec, Test, cases, wait};

use super::same;

pub(crate) fn cases() -> Vec<Case> {
    cases![
        memory_over_the_limit_ends_in_oom_killed,
        container_without_limits_has_memory_beside_one_that_has_some,
        oom_of_a_child_is_survived_by_the_container,
        memory_under_the_limit_is_left_alone,
        cpu_limit_is_enforced,
        statistics_follow_what_the_container_does,
        limits_change_while_the_container_runs,
        process_limit_is_enforced,
    ]
}

const MIB: i64 = 1 << 20;

fn limits(memory_mib: i64, cpu_millis: i64) -> Resources {
    Resources {
        memory: memory_mib * MIB,
        cpu_millis,
        ..Resources::default()
    }
}

/// A pod whose own limits are those of its only container, as kubelet sums them.
async fn limited(test: &Test, spec: ContainerSpec, limits: Resources) -> Result<Container> {
    let pod = test.run_pod(&PodSpec::new().resources(limits)).await?;
    pod.start(&spec.resources(limits)).await
}

/// The kubelet sums the limits that there are.
async fn container_without_limits_has_memory_beside_one_that_has_some(test: Test) -> Result<()> {
    let limits = limits(48, 500);
    let pod = test.run_pod(&PodSpec::new().resources(limits)).await?;
    let small = ContainerSpec::testprog("small", &["fill", "200", "4"]);
    let small = pod.start(&small.resources(limits)).await?;
    let large = ContainerSpec::testprog("large", &["fill", "160", "40"]);
    let large = pod.start(&large).await?;
    large
        .log()
        .wait_for("filled 160", Duration::from_secs(60))
        .await?;
    same!(small.wait().await?.exit_code, 137);
    same!(large.state().await?, ContainerState::ContainerRunning);
    Ok(())
}

async fn memory_over_the_limit_ends_in_oom_killed(test: Test) -> Result<()> {
    let spec = ContainerSpec::testprog("main", &["fill", "200", "4"]);
    let container = limited(&test, spec, limits(48, 0)).await?;
    let status = container.wait().await?;
    same!(status.exit_code, 137);
    // The exit and the event of the kernel's killing come on two ways.
    let reason = wait::until(
        "OOMKilled as the reason",
        Duration::from_secs(10),
        || async {
            let reason = container.status().await?.reason;
            Ok((reason == "OOMKilled").then_some(()))
        },
    );
    reason.await.with_context(|| format!("{status:?}"))?;
    let lines = container.log().stdout()?;
    let filled: i64 = lines
        .last()
        .and_then(|line| line.strip_prefix("filled ")?.parse().ok())
        .unwrap_or(0);
    ensure!(
        (16..=48).contains(&filled),
        "killed after {filled} MiB of 48"
    );
    Ok(())
}

async fn oom_of_a_child_is_survived_by_the_container(test: Test) -> Result<()> {
    let script = "testprog fill 200 4 > /dev/null; echo child $?; exec testprog started";
    let container = limited(&test, ContainerSpec::shell("main", script), limits(48, 0)).await?;
    container.log().wait_for("child 137", STEP).await?;
    container.log().wait_for("started", STEP).await?;
    same!(container.state().await?, ContainerState::ContainerRunning);
    Ok(())
}

async fn memory_under_the_limit_is_left_alone(test: Test) -> Result<()> {
    let spec = ContainerSpec::testprog("main", &["fill", "64", "16"]);
    let container = limited(&test, spec, limits(96, 0)).await?;
    container.log().wait_for("filled 64", STEP).await?;
    same!(container.state().await?, ContainerState::ContainerRunning);
    let report = container.report().await?;
    let limit: i64 = report["cgroup"]["memory_max"]
        .as_str()
        .and_then(|text| text.parse().ok())
        .with_context(|| format!("{}", report["cgroup"]))?;
    same!(limit, 96 * MIB);
    Ok(())
}

/// CPU time in seconds that a container used in `seconds` of wall time, as it says itself.
async fn burn(container: &Container, seconds: f64) -> Result<f64> {
    let output = container
        .read(&["testprog", "burn", &seconds.to_string(), "2"])
        .await?;
    let millis: f64 = output
        .split_whitespace()
        .find_map(|word| word.strip_prefix("cpu_ms=")?.parse().ok())
        .with_context(|| output.clone())?;
    Ok(millis / 1000.0)
}

async fn cpu_limit_is_enforced(test: Test) -> Result<()> {
    let container = limited(&test, ContainerSpec::pause("main"), limits(64, 200)).await?;
    let start = Instant::now();
    let used = burn(&container, 4.0).await?;
    // Wall time as the node sees it: a throttled process sees its own end late.
    let share = used / start.elapsed().as_secs_f64();
    ensure!(share < 0.3, "{share:.2} of a CPU used with a limit of 0.2");
    ensure!(
        share > 0.02,
        "{share:.2} of a CPU used: was anything computed?"
    );
    Ok(())
}

async fn statistics_follow_what_the_container_does(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let idle = pod.start(&ContainerSpec::pause("idle")).await?;
    let busy = pod
        .start(&ContainerSpec::testprog("busy", &["fill", "64", "16"]))
        .await?;
    busy.log().wait_for("filled 64", STEP).await?;
    let memory = busy.stats().await?.memory.context("no memory statistics")?;
    let working = memory.working_set_bytes.context("no working set")?.value;
    ensure!(
        (64 << 20..110 << 20).contains(&working),
        "working set of {working} bytes"
    );
    let memory = idle.stats().await?.memory.context("no memory statistics")?;
    let working = memory.working_set_bytes.context("no working set")?.value;
    ensure!(
        working < 16 << 20,
        "a working set of {working} bytes, of a process that waits"
    );

    let cpu = |container: &Container| {
        let container = container.clone();
        async move {
            let cpu = container.stats().await?.cpu.context("no CPU statistics")?;
            let usage = cpu.usage_core_nano_seconds.context("no CPU usage")?.value;
            anyhow::Ok(std::time::Duration::from_nanos(usage).as_secs_f64())
        }
    };
    let before = cpu(&busy).await?;
    let used = burn(&busy, 2.0).await?;
    // Statistics may be up to some seconds old.
    wait::until(
        "CPU time in the statistics",
        Duration::from_secs(20),
        || async {
            let counted = cpu(&busy).await? - before;
            Ok((counted > used * 0.8 && counted < used * 1.5 + 1.0).then_some(()))
        },
    )
    .await
    .with_context(|| format!("{used} s were used"))?;
    ensure!(
        cpu(&idle).await? < 2.0,
        "{} s of CPU for waiting",
        cpu(&idle).await?
    );

    let list = test
        .cri()
        .list_container_stats(ListContainerStatsRequest { filter: None })
        .await?;
    for container in [&idle, &busy] {
        let listed = list.stats.iter().any(|stats| {
            stats
                .attributes
                .as_ref()
                .is_some_and(|attributes| attributes.id == container.id())
        });
        ensure!(
            listed,
            "{} is not in the list of statistics",
            container.id()
        );
    }
    let spawned = pod
        .start(&ContainerSpec::testprog("spawned", &["spawn", "7"]))
        .await?;
    spawned.log().wait_for("spawned", STEP).await?;
    let request = PodSandboxStatsRequest {
        pod_sandbox_id: pod.id().to_owned(),
    };
    let stats = test
        .cri()
        .pod_sandbox_stats(request)
        .await?
        .stats
        .context("no pod statistics")?;
    let linux = stats.linux.context("no Linux statistics of the pod")?;
    let processes = linux
        .process
        .and_then(|process| process.process_count)
        .map(|count| count.value);
    // 8 in the last container, 1 in each other, and perhaps one of the sandbox.
    ensure!(
        processes.is_some_and(|count| (10..=13).contains(&count)),
        "{processes:?} processes"
    );
    let network = linux.network.and_then(|network| network.default_interface);
    ensure!(network.is_some(), "no network statistics");
    Ok(())
}

/// What the kernel counted in a container's cgroup while two of its threads computed.
#[derive(Debug)]
struct Throttled {
    limit: String,
    periods: u64,
    throttled: u64,
    used_usec: u64,
}

impl Throttled {
    async fn while_burning(container: &Container) -> Result<Self> {
        let script =
            "cd /sys/fs/cgroup; cat cpu.max cpu.stat; testprog burn 3 2 > /dev/null; cat cpu.stat";
        let text = container.read(&["sh", "-c", script]).await?;
        let grown = |name: &str| -> Result<u64> {
            let mut values = text.lines().filter_map(|line| {
                let value = line.strip_prefix(name)?.strip_prefix(' ')?;
                value.parse::<u64>().ok()
            });
            let (before, after) = (values.next(), values.next());
            let grown = after.zip(before).map(|(after, before)| after - before);
            grown.with_context(|| format!("no {name} in {text}"))
        };
        Ok(Throttled {
            limit: text.lines().next().unwrap_or_default().to_owned(),
            periods: grown("nr_periods")?,
            throttled: grown("nr_throttled")?,
            used_usec: grown("usage_usec")?,
        })
    }
}

async fn limits_change_while_the_container_runs(test: Test) -> Result<()> {
    let container = limited(&test, ContainerSpec::pause("main"), limits(64, 150)).await?;
    let slow = Throttled::while_burning(&container).await?;
    same!(slow.limit, "15000 100000");
    ensure!(slow.periods > 0 && slow.throttled > 0, "{slow:?}");
    // The kernel hands time out in slices, so that a period may use a little of the next one's.
    let share = slow.used_usec / slow.periods;
    ensure!(
        (1..=22_500).contains(&share),
        "{share} µs a period: {slow:?}"
    );
    let update = |limits: Resources| UpdateContainerResourcesRequest {
        container_id: container.id().to_owned(),
        linux: Some(limits.to_api()),
        ..Default::default()
    };
    test.cri()
        .update_container_resources(update(limits(160, 700)))
        .await?;
    let quick = Throttled::while_burning(&container).await?;
    same!(quick.limit, "70000 100000");
    // On a busy node it may get less than it is allowed, but then it isn't held back.
    let share = quick.used_usec / quick.periods.max(1);
    ensure!(
        quick.throttled == 0 || share > 22_500,
        "{share} µs a period: {quick:?}"
    );
    // 100 MiB fit now, and do not any more afterwards. (A process has a program until it ends; its command line is empty for a
    // moment of exec, too.)
    let script = ": > /out; testprog fill 100 20 > /out & p=$!; \
                  until grep -q 'filled 100' /out || ! test -e /proc/$p/exe; do sleep 0.1; done; \
                  kill $p; wait $p; cat /out";
    let fill = &["sh", "-c", script];
    let output = container.exec(fill).await?;
    ensure!(output.stdout.contains("filled 100"), "{output:?}");
    test.cri()
        .update_container_resources(update(limits(48, 700)))
        .await?;
    let output = container.exec(fill).await?;
    ensure!(!output.stdout.contains("filled 60"), "{output:?}");
    same!(container.state().await?, ContainerState::ContainerRunning);
    Ok(())
}

async fn process_limit_is_enforced(test: Test) -> Result<()> {
    if !kiln_e2e::node::has_cgroup_v2() {
        // The limit comes by a field that only cgroup v2 knows; the node of the tests has it.
        eprintln!("no cgroup v2 on this node: nothing was tested");
        return Ok(());
    }
    let pod = test.pod().await?;
    let resources = Resources {
        pids: 20,
        ..Resources::default()
    };
    let container = pod
        .start(&ContainerSpec::pause("main").resources(resources))
        .await?;
    let output = container
        .exec(&["timeout", "5", "testprog", "spawn", "50"])
        .await?;
    ensure!(
        output.code != 0 && output.stderr.contains("cannot start child"),
        "{output:?}"
    );
    same!(container.read(&["echo", "alive"]).await?, "alive");
    Ok(())
}
