//! Statistics: what CRI and containerd tell of containers is what these see of themselves.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_client::services::v1::MetricsRequest;
use k8s_cri::v1::PodSandboxStatsRequest;
use kiln_e2e::api::{CRI_NAMESPACE, request};
use kiln_e2e::harness::Case;
use kiln_e2e::pod::STEP;
use kiln_e2e::{Container, ContainerSpec, Pod, Test, cases, wait};

pub(crate) fn cases() -> Vec<Case> {
    cases![
        memory_and_cpu_are_what_the_container_sees.limit(400),
        processes_of_a_pod_are_those_of_its_containers,
        network_of_a_pod_is_its_own,
        // Where the runtime of the comparison tells it, too.
        pressure_is_what_the_container_sees.since((2, 0)),
    ]
}

/// How far two figures of one thing may be apart.
const TOLERANCE: f64 = 0.05;
/// How old statistics may be.
const AGE: Duration = Duration::from_secs(60);

#[expect(clippy::cast_precision_loss, reason = "figures far below 2^52")]
fn alike(one: u64, other: u64) -> bool {
    let (one, other) = (one as f64, other as f64);
    (one - other).abs() <= TOLERANCE * one.max(other)
}

/// A number of a container's file, by the word before it.
async fn inside(container: &Container, file: &str, word: &str) -> Result<u64> {
    let text = container.read(&["cat", file]).await?;
    let mut lines = text.lines();
    let number = lines.find_map(|line| line.strip_prefix(word)?.trim().parse().ok());
    number.with_context(|| format!("no {word:?} in {file}: {text}"))
}

async fn memory_and_cpu_are_what_the_container_sees(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    pod.start(&ContainerSpec::pause("beside")).await?;
    let spec = ContainerSpec::testprog("main", &["fill", "64", "16"]);
    let main = pod.start(&spec).await?;
    main.log().wait_for("filled 64", STEP).await?;
    // A file that was read is memory of the container's, and not of its working set.
    let script = "testprog write /data 16777216 > /dev/null; cat /data > /dev/null; \
                  testprog burn 2 > /dev/null";
    main.shell(script).await?;

    wait::until("memory as the container sees it", AGE, || async {
        let seen = inside(&main, "/sys/fs/cgroup/memory.current", "").await?;
        let inactive = inside(&main, "/sys/fs/cgroup/memory.stat", "inactive_file ").await?;
        let told = main.stats().await?.memory.context("no memory statistics")?;
        let usage = told.usage_bytes.context("no usage")?.value;
        let working = told.working_set_bytes.context("no working set")?.value;
        let right = alike(seen, usage) && alike(seen.saturating_sub(inactive), working);
        Ok(right.then_some(()))
    })
    .await?;
    let used = "usage_usec ";
    let before = inside(&main, "/sys/fs/cgroup/cpu.stat", used).await?;
    ensure!(before > 1_000_000, "{before} µs of CPU after two seconds");
    wait::until("CPU time as the container sees it", AGE, || async {
        let told = main.stats().await?.cpu.context("no CPU statistics")?;
        let told = told.usage_core_nano_seconds.context("no CPU usage")?.value / 1000;
        let after = inside(&main, "/sys/fs/cgroup/cpu.stat", used).await?;
        ensure!(told <= after, "{told} µs are told, {after} µs were used");
        Ok((told >= before).then_some(()))
    })
    .await
}

async fn pods_statistics(test: &Test, pod: &Pod) -> Result<k8s_cri::v1::LinuxPodSandboxStats> {
    let request = PodSandboxStatsRequest {
        pod_sandbox_id: pod.id().to_owned(),
    };
    let stats = test.cri().pod_sandbox_stats(request).await?.stats;
    let stats = stats.context("no statistics of the pod")?;
    stats.linux.context("no Linux statistics of the pod")
}

async fn processes_of_a_pod_are_those_of_its_containers(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    for (name, children) in [("one", "3"), ("two", "7")] {
        let spec = ContainerSpec::testprog(name, &["spawn", children]);
        let container = pod.start(&spec).await?;
        container.log().wait_for("spawned", STEP).await?;
    }
    wait::until("the number of processes", AGE, || async {
        let process = pods_statistics(&test, &pod).await?.process;
        let count = process.and_then(|process| process.process_count);
        let count = count.context("no number of processes")?.value;
        // containerd 1.7 counts runc's pause process, too.
        Ok((12..=13).contains(&count).then_some(()))
    })
    .await
}

/// What came in and went out by `eth0`, from a table like `/proc/net/dev`.
fn traffic(table: &str) -> Result<(u64, u64)> {
    let line = table
        .lines()
        .find_map(|line| line.trim().strip_prefix("eth0:"));
    let words: Vec<_> = line
        .with_context(|| format!("no eth0 in {table}"))?
        .split_whitespace()
        .collect();
    let number = |place: usize| -> Result<u64> {
        let word = words.get(place).context("too few figures")?;
        Ok(word.parse()?)
    };
    Ok((number(0)?, number(8)?))
}

async fn network_of_a_pod_is_its_own(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let main = pod.start(&ContainerSpec::pause("main")).await?;
    let script =
        "ping -q -c 40 -i 0.1 -s 8000 $(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p')";
    main.shell(script).await?;
    let pid = pod.pid().await?;
    wait::until("the pod's traffic", AGE, || async {
        let seen = traffic(&main.read(&["cat", "/proc/net/dev"]).await?)?;
        ensure!(seen.0 > 300_000 && seen.1 > 300_000, "{seen:?} were sent");
        // By the process, as cAdvisor does, and by CRI.
        let by_process = traffic(&fs::read_to_string(format!("/proc/{pid}/net/dev"))?)?;
        let network = pods_statistics(&test, &pod).await?.network;
        let told = network.and_then(|network| network.default_interface);
        let told = told.context("no network statistics")?;
        let value = |figure: Option<k8s_cri::v1::UInt64Value>| figure.map_or(0, |f| f.value);
        let told = (value(told.rx_bytes), value(told.tx_bytes));
        let right = |other: (u64, u64)| alike(seen.0, other.0) && alike(seen.1, other.1);
        Ok((right(by_process) && right(told)).then_some(()))
    })
    .await
}

/// The first field of a number in a message of Protocol Buffers, as it is on the wire.
fn field(message: &[u8], wanted: u64) -> Option<Wire<'_>> {
    let mut rest = message;
    while !rest.is_empty() {
        let tag = varint(&mut rest)?;
        let value = match tag & 7 {
            0 => Wire::Number(varint(&mut rest)?),
            1 => Wire::Bytes(take(&mut rest, 8)?),
            2 => {
                let length = usize::try_from(varint(&mut rest)?).ok()?;
                Wire::Bytes(take(&mut rest, length)?)
            }
            _ => return None,
        };
        if tag >> 3 == wanted {
            return Some(value);
        }
    }
    None
}

enum Wire<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

fn take<'a>(rest: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (bytes, after) = rest.split_at_checked(length)?;
    *rest = after;
    Some(bytes)
}

fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let byte = *take(rest, 1)?.first()?;
        number |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(number);
        }
    }
    None
}

/// Microseconds in which some process waited for the CPU: `cpu` (2), `psi` (7), `some` (1), `total` (4) of
/// `io.containerd.cgroups.v2.Metrics`.
fn cpu_pressure(metrics: &[u8]) -> Option<u64> {
    let mut message = metrics;
    for number in [2, 7, 1] {
        let Wire::Bytes(bytes) = field(message, number)? else {
            return None;
        };
        message = bytes;
    }
    match field(message, 4)? {
        Wire::Number(total) => Some(total),
        Wire::Bytes(_) => None,
    }
}

async fn pressure_is_what_the_container_sees(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let main = pod.start(&ContainerSpec::pause("main")).await?;
    main.shell("testprog burn 2 16 > /dev/null").await?;
    let seen = async || {
        let text = main.shell("sed -n 's/^some .*total=/some /p' /sys/fs/cgroup/cpu.pressure");
        let text = text.await?;
        let number = text.strip_prefix("some ").context("no pressure")?;
        anyhow::Ok(number.trim().parse::<u64>()?)
    };
    let before = seen().await?;
    ensure!(before > 100_000, "{before} µs of waiting among 16 threads");
    let message = MetricsRequest {
        filters: vec![format!("id=={}", main.id())],
    };
    let mut tasks = test.client().tasks();
    let answer = tasks.metrics(request(CRI_NAMESPACE, message)?);
    let metrics = answer.await?.into_inner().metrics;
    let data = metrics.first().and_then(|metric| metric.data.as_ref());
    let told = cpu_pressure(&data.context("no metrics")?.value).context("no pressure is told")?;
    let after = seen().await?;
    ensure!(
        before <= told && told <= after,
        "{told} µs are told between {before} and {after}"
    );
    Ok(())
}
