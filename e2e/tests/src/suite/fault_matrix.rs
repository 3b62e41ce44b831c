//! containerd, a shim, a VMM or a container dies at every step of a task's life: containerd tells the truth in the end,
//! nothing is left, and the next task starts.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use containerd_client::types::v1::Status;
use kiln_e2e::harness::Case;
use kiln_e2e::node::Census;
use kiln_e2e::plain::{Plain, PlainSpec};
use kiln_e2e::{Test, cases, wait};

use super::faults::{SEEN, children_of, kill, shim_of};
use super::same;

/// A step takes about so long on an emulated node, in milliseconds.
const STEP: u64 = 600;
/// A step whose counterpart died must end, in an error or not.
const STEP_LIMIT: Duration = Duration::from_secs(60);

pub(crate) fn cases() -> Vec<Case> {
    let all = cases![
        killed_containerd_at_any_step.alone().limit(600),
        killed_shim_at_any_step.alone().limit(600),
        killed_vmm_at_any_step.alone().limit(600),
        killed_container_at_any_step.alone().limit(600),
        restarted_containerd_finds_its_tasks.alone().limit(300),
    ];
    let named = |case: Case| case.only_with("kiln", "faults");
    all.into_iter().map(named).collect()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Create,
    Start,
    Exec,
    Delete,
}

/// Who dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Containerd,
    Shim,
    Vmm,
    Container,
}

/// Moments that differ from run to run, and can be told.
struct Moments(u64);

impl Moments {
    fn new() -> Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        Ok(Moments(now.as_nanos() as u64 | 1))
    }

    fn next(&mut self) -> Duration {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        Duration::from_millis(self.0 % STEP)
    }
}

async fn killed_containerd_at_any_step(test: Test) -> Result<()> {
    disturb(&test, Victim::Containerd).await
}

async fn killed_shim_at_any_step(test: Test) -> Result<()> {
    disturb(&test, Victim::Shim).await
}

async fn killed_vmm_at_any_step(test: Test) -> Result<()> {
    disturb(&test, Victim::Vmm).await
}

async fn killed_container_at_any_step(test: Test) -> Result<()> {
    disturb(&test, Victim::Container).await
}

async fn disturb(test: &Test, victim: Victim) -> Result<()> {
    // The first task leaves containerd's own directories.
    end(Plain::run(test, &sleeper()).await?).await?;
    let rounds = super::rounds()?;
    if victim == Victim::Containerd {
        // For each step of a round, and each look at whether the node is as it was.
        test.spare_snapshots(12 * usize::try_from(rounds)?).await?;
    }
    let before = Census::take()?;
    let mut moments = Moments::new()?;
    // Each time at another moment of a step.
    for _ in 0..rounds {
        for step in [Step::Create, Step::Start, Step::Exec, Step::Delete] {
            let moment = moments.next();
            let what = || format!("{victim:?} killed {moment:?} into {step:?}");
            round(test, victim, step, moment).await.with_context(what)?;
            test.clean_up().await.with_context(what)?;
            std::fs::create_dir_all(test.scratch())?;
            test.node_is_as(&before).await.with_context(what)?;
        }
    }
    test.remove_spare_snapshots().await?;
    // The node is none the worse for it.
    let task = Plain::run(test, &sleeper()).await?;
    task.streams.wait_for("started").await?;
    end(task).await
}

fn sleeper() -> PlainSpec {
    PlainSpec::testprog(&["started"])
}

async fn end(task: Plain) -> Result<()> {
    task.kill("", libc::SIGKILL, true).await?;
    same!(task.wait("").await?, 137);
    task.delete().await?;
    Ok(())
}

async fn round(test: &Test, victim: Victim, step: Step, moment: Duration) -> Result<()> {
    let task = match step {
        Step::Create => None,
        Step::Start => Some(Plain::create(test, &sleeper()).await?),
        Step::Exec | Step::Delete => {
            let task = Plain::run(test, &sleeper()).await?;
            task.streams.wait_for("started").await?;
            Some(task)
        }
    };
    if let (Step::Delete, Some(task)) = (step, &task) {
        task.kill("", libc::SIGKILL, true).await?;
        same!(task.wait("").await?, 137);
    }
    let stepping = tokio::time::timeout(STEP_LIMIT, take(test, step, task.as_ref()));
    let striking = async {
        if step == Step::Create {
            wait::until("the victim", STEP_LIMIT, || async { there(victim) }).await?;
        }
        tokio::time::sleep(moment).await;
        strike(victim, task.as_ref()).await
    };
    let (stepped, struck) = tokio::join!(stepping, striking);
    struck?;
    let made = match stepped {
        Err(_) => bail!("the step had no end within {STEP_LIMIT:?}"),
        // Whether it came to be depends on the moment; what matters is that the answer is kept to.
        Ok(Err(_)) => None,
        Ok(Ok(made)) => made,
    };
    if victim == Victim::Containerd {
        start_containerd().await?;
    }
    let Some(task) = made.or(task) else {
        return Ok(());
    };
    // It may take containerd a moment to see who died.
    let deadline = Instant::now() + SEEN;
    let mut questions = 0;
    loop {
        questions += 1;
        match truth(&task, step, questions).await {
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            Ok(()) => return Ok(()),
        }
    }
}

/// Does the step; creating gives the new task.
async fn take(test: &Test, step: Step, task: Option<&Plain>) -> Result<Option<Plain>> {
    match (step, task) {
        (Step::Create, _) => return Plain::create(test, &sleeper()).await.map(Some),
        (Step::Start, Some(task)) => task.start().await?,
        (Step::Exec, Some(task)) => {
            task.exec("exec", &PlainSpec::shell("echo here")).await?;
            task.wait("exec").await?;
        }
        (Step::Delete, Some(task)) => drop(task.delete().await?),
        (_, None) => bail!("there is no task"),
    }
    Ok(None)
}

/// Something when the victim can be killed. No other task runs meanwhile.
fn there(victim: Victim) -> Result<Option<()>> {
    let found = match (victim, shim_of("")?) {
        (Victim::Containerd, _) => true,
        // A container that is not made yet has no process; its start is another step.
        (Victim::Container, shim) => shim.is_some(),
        (_, None) => false,
        (Victim::Shim, Some(_)) => true,
        (Victim::Vmm, Some(shim)) => !children_of(shim)?.is_empty(),
    };
    Ok(found.then_some(()))
}

async fn strike(victim: Victim, task: Option<&Plain>) -> Result<()> {
    if victim == Victim::Containerd {
        return kill_containerd();
    }
    // Who has ended meanwhile cannot be killed.
    let shim = shim_of("")?;
    match (victim, shim, task) {
        (Victim::Shim, Some(shim), _) => drop(kill(shim)),
        (Victim::Vmm, Some(shim), _) => {
            for child in children_of(shim)? {
                drop(kill(child));
            }
        }
        (Victim::Container, _, Some(task)) => drop(task.kill("", libc::SIGKILL, true).await),
        _ => {}
    }
    Ok(())
}

fn kill_containerd() -> Result<()> {
    let pid = std::fs::read_to_string("/run/containerd.pid")?;
    kill(pid.trim().parse()?)
}

async fn start_containerd() -> Result<()> {
    let started = tokio::process::Command::new("start-containerd").output();
    let output = started.await.context("running start-containerd")?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

fn not_found(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<tonic::Status>()
        .is_some_and(|status| status.code() == tonic::Code::NotFound)
}

/// What containerd says of the task is so, and it can be ended and deleted.
async fn truth(task: &Plain, step: Step, question: u32) -> Result<()> {
    let state = match task.state().await {
        Err(error) if not_found(&error) => return Ok(()),
        other => other?,
    };
    match state.status() {
        Status::Running => {
            // It says so, then it does.
            let name = format!("truth{question}");
            task.exec(&name, &PlainSpec::shell("exit 7")).await?;
            same!(task.wait(&name).await?, 7);
            task.delete_exec(&name).await?;
            task.kill("", libc::SIGKILL, true).await?;
            same!(task.wait("").await?, 137);
        }
        Status::Created => {
            ensure!(
                matches!(step, Step::Create | Step::Start),
                "created again after {step:?}"
            );
            task.kill("", libc::SIGKILL, true).await?;
            same!(task.wait("").await?, 137);
        }
        Status::Stopped => same!(task.wait("").await?, 137),
        other => bail!("the task is {other:?}"),
    }
    match task.delete().await {
        Err(error) if !not_found(&error) => Err(error),
        _ => Ok(()),
    }
}

async fn restarted_containerd_finds_its_tasks(test: Test) -> Result<()> {
    let running = Plain::run(&test, &sleeper()).await?;
    running.streams.wait_for("started").await?;
    let ending = Plain::run(&test, &PlainSpec::shell("sleep 3; exit 9")).await?;
    let pod = test.pod().await?;
    kill_containerd()?;
    // One of them ends while nobody listens.
    tokio::time::sleep(Duration::from_secs(5)).await;
    start_containerd().await?;
    same!(running.state().await?.status(), Status::Running);
    running.exec("after", &PlainSpec::shell("exit 7")).await?;
    same!(running.wait("after").await?, 7);
    same!(ending.wait("").await?, 9);
    same!(ending.state().await?.status(), Status::Stopped);
    same!(ending.delete().await?.exit_status, 9);
    end(running).await?;
    let container = pod
        .start(&kiln_e2e::ContainerSpec::testprog("main", &["started"]))
        .await?;
    container.log().wait_for("started", SEEN).await?;
    pod.remove().await
}
