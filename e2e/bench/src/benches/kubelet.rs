//! Pods as kubelet starts and stops them, on a cluster of one node, the runtimes taking turns: one pod at a time, and a
//! Deployment of thirty.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::apps::v1::Deployment;
use kiln_e2e::harness::Subject as _;
use kiln_k8s::cluster::Cluster;
use kiln_k8s::{Test, calls, pods, set_up};

use super::Settings;
use crate::result::Measured;

/// Of CRI alone: from the request for the sandbox to the answer that the container is started.
const START: &str = "kubelet-start";
/// From the pod's object to its condition Ready, as a client sees it.
const READY: &str = "kubelet-ready";
/// Of CRI alone: from the request to stop the container, whose program ends when it is asked to, to the answer that its
/// sandbox is stopped.
const STOP: &str = "kubelet-stop";
/// From the deletion of the pod to the end of its object.
const GONE: &str = "kubelet-gone";
/// The same where kubelet hears of what ends by CRI's events, and need not ask each second.
const GONE_BY_EVENTS: &str = "kubelet-gone-events";
/// What one pod is measured by.
pub(crate) const OF_ONE: [&str; 5] = [START, READY, STOP, GONE, GONE_BY_EVENTS];
/// kubelet's feature for [`GONE_BY_EVENTS`]: alpha, and off by default.
const EVENTS: &str = "EventedPLEG";
/// From a Deployment's object to its last available pod.
pub(crate) const CROWD: &str = "kubelet-30";
/// How many these are.
const REPLICAS: i32 = 30;
/// What has to settle between two pods (kubelet removes cgroups and volumes behind the API's answer).
const PAUSE: Duration = Duration::from_secs(1);
/// How often kubelet asks what became of its pods, if nothing tells it. A deletion waits for that once or more, so how
/// long it takes depends on when in a second the pod began and when it is deleted. Left to themselves, each runtime's runs
/// would all have the same times, those to which its own speed brings it; so they are spread.
const ASKS_EACH: Duration = Duration::from_secs(1);
/// Multiples of these, without their whole parts, fill the second evenly however many runs there are.
const BEGINS: f64 = 0.618_034;
const LIVES: f64 = 0.754_878;

const POD: &str = r#"
containers:
- name: main
  command: [testprog, started]
terminationGracePeriodSeconds: 30
"#;

const DEPLOYMENT: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: crowd}
spec:
  replicas: ${REPLICAS}
  selector: {matchLabels: {of: crowd}}
  template:
    metadata: {labels: {of: crowd}}
    spec:
      runtimeClassName: ${RUNTIME}
      containers:
      - name: main
        image: ${IMAGE}
        command: [testprog, started]
"#;

pub(crate) async fn one(settings: Settings) -> Result<Vec<(&'static str, Measured)>> {
    let mut measured = Vec::new();
    let polling = Cluster::default();
    let events = Cluster::default().with_feature(EVENTS);
    for (cluster, names) in [
        (polling, [Some(START), Some(READY), Some(STOP), Some(GONE)]),
        (events, [None, None, None, Some(GONE_BY_EVENTS)]),
    ] {
        let tests = prepare(&settings, &cluster, "kubelet").await?;
        let mut of_these = names.map(|name| Some((name?, Measured::default())));
        // Run 0 reads programs from the disk and the like: it is not counted.
        for run in 0..=settings.runs {
            for test in &tests {
                tokio::time::sleep(part_of_a_second(run, BEGINS)).await;
                let took = pod(test, part_of_a_second(run, LIVES))
                    .await
                    .with_context(|| format!("run {run} with {}", test.handler()))?;
                if run > 0 {
                    for (measured, took) in of_these.iter_mut().zip(took) {
                        let Some((_, measured)) = measured else {
                            continue;
                        };
                        measured.add(test.handler(), "ms", took.as_secs_f64() * 1000.0);
                    }
                }
                tokio::time::sleep(PAUSE).await;
            }
            println!("  run {run} of {}", settings.runs);
        }
        end(&tests, &cluster).await?;
        measured.extend(of_these.into_iter().flatten());
    }
    for (_, measured) in &mut measured {
        ratios(&settings, measured)?;
    }
    Ok(measured)
}

pub(crate) async fn crowd(settings: Settings) -> Result<Vec<(&'static str, Measured)>> {
    let cluster = Cluster::default();
    let tests = prepare(&settings, &cluster, CROWD).await?;
    let mut measured = Measured::default();
    for run in 0..=settings.runs {
        for test in &tests {
            let took = deployment(test)
                .await
                .with_context(|| format!("run {run} with {}", test.handler()))?;
            if run > 0 {
                measured.add(test.handler(), "ms", took.as_secs_f64() * 1000.0);
            }
            tokio::time::sleep(PAUSE).await;
        }
        println!("  run {run} of {}", settings.runs);
    }
    end(&tests, &cluster).await?;
    ratios(&settings, &mut measured)?;
    Ok(vec![(CROWD, measured)])
}

fn part_of_a_second(run: u32, step: f64) -> Duration {
    ASKS_EACH.mul_f64((f64::from(run) * step).fract())
}

async fn prepare(settings: &Settings, cluster: &Cluster, name: &str) -> Result<Vec<Test>> {
    if !Cluster::can_be_made() {
        bail!("this node has no kubelet; use one of suite k8s (make bench NODE=k8s)");
    }
    set_up(cluster, |ready| println!("  {ready}")).await?;
    let mut tests = Vec::new();
    for runtime in &settings.runtimes {
        tests.push(Test::new(name, runtime).await?);
    }
    Ok(tests)
}

async fn end(tests: &[Test], cluster: &Cluster) -> Result<()> {
    for test in tests {
        test.clean_up().await?;
    }
    Ok(cluster.down()?)
}

fn ratios(settings: &Settings, measured: &mut Measured) -> Result<()> {
    let Some((base, others)) = settings.runtimes.split_first() else {
        bail!("no runtime to measure");
    };
    for other in others {
        measured.ratio(&format!("{other}/{base}"), other, base)?;
    }
    Ok(())
}

/// Starts a pod and deletes it so long after it was Ready: start, ready, stop and gone.
async fn pod(test: &Test, lives: Duration) -> Result<[Duration; 4]> {
    let begin = Instant::now();
    let pod = test.run(POD).await?;
    let ready = begin.elapsed();
    let uid = pod.metadata.uid.as_deref().context("a pod without a uid")?;
    let status = pods::container(&pod, "main");
    let id = status.and_then(|status| status.container_id.as_deref());
    let id = id.and_then(|id| id.split("//").nth(1));
    let id = id.context("a Ready pod without a container")?;
    let start = calls::sandbox_to_start(uid, id)?;
    tokio::time::sleep(lives).await;
    let begin = Instant::now();
    test.delete("pod").await?;
    let gone = begin.elapsed();
    Ok([start, ready, calls::stop_to_stopped(uid, id)?, gone])
}

/// Makes a Deployment, and removes it again.
async fn deployment(test: &Test) -> Result<Duration> {
    let begin = Instant::now();
    test.apply_with(DEPLOYMENT, &[("REPLICAS", &REPLICAS.to_string())])
        .await?;
    let all = |deployment: Option<&Deployment>| {
        let status = deployment.and_then(|deployment| deployment.status.as_ref());
        status.and_then(|status| status.available_replicas) == Some(REPLICAS)
    };
    test.until("crowd", "to have all its pods", all).await?;
    let took = begin.elapsed();
    test.kubectl()
        .run(&["delete", "deployment", "crowd", "--cascade=foreground"])
        .await?;
    test.kubectl()
        .run(&["wait", "--for=delete", "pod", "--all", "--timeout=600s"])
        .await?;
    Ok(took)
}
