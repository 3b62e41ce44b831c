//! Memory that runs out, of two pods together and of the node: a pod that was promised nothing goes before one that was
//! promised all that it has, whatever runs them.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use k8s_cri::v1::ContainerState;
use kiln_e2e::harness::Case;
use kiln_e2e::pod::{Resources, STEP};
use kiln_e2e::{Container, ContainerSpec, Pod, PodSpec, Test, cases};

use super::same;

/// What is taken from the node at a time.
const PIECE: usize = 16 << 20;
/// An emulated machine fills some hundred MiB a second when it has nothing else to do.
const FILLED: Duration = Duration::from_secs(300);
/// Of this process, which the kernel is then never to kill.
const OWN_SCORE: &str = "/proc/self/oom_score_adj";

pub(crate) fn cases() -> Vec<Case> {
    let all = cases![
        pod_of_the_lowest_class_is_killed_first_when_memory_of_pods_runs_out
            .alone()
            .limit(300),
        pod_of_the_lowest_class_is_killed_first_when_memory_of_the_node_runs_out
            .alone()
            .limit(600),
    ];
    let named = |case: Case| case.only_with("kiln", "hostile");
    all.into_iter().map(named).collect()
}

/// A container of a runc pod that was promised its memory, and uses it.
async fn guaranteed(test: &Test) -> Result<(Pod, Container)> {
    let pod = test
        .run_pod(&PodSpec::new().class("").handler("runc"))
        .await?;
    let container = pod
        .start(
            &ContainerSpec::testprog("kept", &["fill", "220"]).resources(Resources {
                memory: 300 << 20,
                oom_score_adj: -997,
                ..Resources::default()
            }),
        )
        .await?;
    container.log().wait_for("filled 220", STEP).await?;
    Ok((pod, container))
}

/// A container of a pod that was promised nothing, and takes some.
async fn best_effort(test: &Test) -> Result<(Pod, Container)> {
    let pod = test.run_pod(&PodSpec::new().class("besteffort")).await?;
    let container = pod
        .start(
            &ContainerSpec::testprog("greedy", &["fill", "230"]).resources(Resources {
                oom_score_adj: 1000,
                ..Resources::default()
            }),
        )
        .await?;
    Ok((pod, container))
}

async fn check(greedy: &Container, kept: &Container) -> Result<()> {
    let status = greedy.wait_for(FILLED).await?;
    same!(
        (status.exit_code, status.reason.as_str()),
        (137, "OOMKilled")
    );
    match kept.status().await?.state() {
        ContainerState::ContainerRunning => Ok(()),
        state => bail!("the guaranteed pod's container is {state:?}"),
    }
}

async fn pod_of_the_lowest_class_is_killed_first_when_memory_of_pods_runs_out(
    test: Test,
) -> Result<()> {
    const TOGETHER: u64 = 448 << 20;
    let cgroup = Path::new("/sys/fs/cgroup").join(test.cgroup().trim_start_matches('/'));
    let both = cgroup.join("kubepods");
    fs::create_dir_all(&both)?;
    let mut above: Vec<_> = both.ancestors().skip(1).take(3).collect();
    above.reverse();
    for above in above {
        fs::write(above.join("cgroup.subtree_control"), "+memory +pids +cpu")
            .with_context(|| format!("{}", above.display()))?;
    }
    fs::write(both.join("memory.max"), TOGETHER.to_string())?;
    let (_guaranteed, kept) = guaranteed(&test).await?;
    let (_best_effort, greedy) = best_effort(&test).await?;
    check(&greedy, &kept).await
}

async fn pod_of_the_lowest_class_is_killed_first_when_memory_of_the_node_runs_out(
    test: Test,
) -> Result<()> {
    let (_guaranteed, kept) = guaranteed(&test).await?;
    let (_best_effort, greedy) = best_effort(&test).await?;
    greedy.log().wait_for("filled 230", STEP).await?;
    let begun = killed_in_the_node()?;
    let eater = Eater::begin()?;
    let ended = check(&greedy, &kept).await;
    let eaten = eater.end().await?;
    let killed = killed_in_the_node()? - begun;
    ended.with_context(|| format!("{eaten} MiB were taken, {killed} processes were killed"))?;
    ensure!(
        killed > 0,
        "the kernel killed nothing, so memory never ran out"
    );
    Ok(())
}

/// How many processes the kernel has killed for want of memory.
fn killed_in_the_node() -> Result<u64> {
    let counters = fs::read_to_string("/proc/vmstat")?;
    let line = counters
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill "));
    Ok(line
        .context("the node's kernel does not count kills")?
        .parse()?)
}

/// Takes all memory that the node has, from a process that can't be killed for it.
struct Eater {
    over: Arc<AtomicBool>,
    work: tokio::task::JoinHandle<Result<usize>>,
    score: String,
}

impl Eater {
    fn begin() -> Result<Self> {
        let score = fs::read_to_string(OWN_SCORE)?;
        fs::write(OWN_SCORE, "-1000").context(OWN_SCORE)?;
        let over = Arc::new(AtomicBool::new(false));
        let ended = over.clone();
        let killed = killed_in_the_node()?;
        let work = tokio::task::spawn_blocking(move || {
            let mut pieces = Vec::new();
            // Once somebody was killed, nobody else is to be.
            while !ended.load(Ordering::SeqCst) && killed_in_the_node()? == killed {
                pieces.push(vec![1_u8; PIECE]);
            }
            Ok(pieces.len() * (PIECE >> 20))
        });
        Ok(Eater { over, work, score })
    }

    /// Gives it all back; how much it was, in MiB.
    async fn end(self) -> Result<usize> {
        self.over.store(true, Ordering::SeqCst);
        let eaten = self.work.await?;
        fs::write(OWN_SCORE, self.score.trim())?;
        eaten
    }
}
