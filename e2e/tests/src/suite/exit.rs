//! How containers end: exit codes, signals, stopping, and processes that hardly live.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use futures_util::future::try_join_all;
use k8s_cri::v1::ContainerState;
use kiln_e2e::harness::Case;
use kiln_e2e::pod::STEP;
use kiln_e2e::{ContainerSpec, PodSpec, Test, cases, wait};

use super::same;

pub(crate) fn cases() -> Vec<Case> {
    cases![
        exit_codes_and_reasons_are_kept,
        stop_sends_term_and_keeps_the_exit_code,
        stop_kills_after_the_grace_period,
        short_processes_never_lose_their_exit,
        orphans_are_reaped,
        first_process_takes_all_others_with_it,
    ]
}

async fn exit_codes_and_reasons_are_kept(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let cases = [
        ("exit 0", 0, "Completed"),
        ("exit 1", 1, "Error"),
        ("exit 126", 126, "Error"),
        ("exit 255", 255, "Error"),
        // A shell that is the first process ignores signals to itself; its child does not.
        ("sh -c 'kill -SEGV $$'; exit $?", 139, "Error"),
    ];
    for (attempt, (script, code, reason)) in (0..).zip(cases) {
        let container = pod
            .start(&ContainerSpec::shell("main", script).attempt(attempt))
            .await?;
        let status = container.wait().await?;
        same!(
            (status.exit_code, &*status.reason),
            (code, reason),
            "{script}"
        );
        // Not the end after the start: containerd notes the start when the call that made it is over, and
        // a short process has ended by then.
        let made = status.created_at;
        ensure!(
            made > 0 && status.started_at > made && status.finished_at > made,
            "{status:?}"
        );
    }
    Ok(())
}

async fn stop_sends_term_and_keeps_the_exit_code(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let spec = ContainerSpec::testprog("polite", &["signals", "TERM=33"]);
    let polite = pod.start(&spec).await?;
    polite.log().wait_for("ready", STEP).await?;
    let start = Instant::now();
    polite.stop(Duration::from_secs(30)).await?;
    ensure!(
        start.elapsed() < Duration::from_secs(15),
        "waited {:?}",
        start.elapsed()
    );
    let status = polite.status().await?;
    same!(status.state(), ContainerState::ContainerExited);
    same!(status.exit_code, 33);
    same!(polite.log().stdout()?, ["ready", "signal TERM"]);
    // Again, as kubelet may.
    polite.stop(Duration::from_secs(1)).await?;

    // A process that does not handle the signal dies of it, unless it is the first of its pid
    // namespace: those of a pod with shared processes are not.
    let shared = test.run_pod(&PodSpec::new().share_processes()).await?;
    let spec = ContainerSpec::testprog("dying", &["burn", "1000"]).share_processes();
    let dying = shared.start(&spec).await?;
    dying.log().wait_for("burning", STEP).await?;
    dying.stop(Duration::from_secs(30)).await?;
    same!(dying.status().await?.exit_code, 143);
    Ok(())
}

async fn stop_kills_after_the_grace_period(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let spec = ContainerSpec::testprog("stubborn", &["signals", "TERM=ignore"]);
    let stubborn = pod.start(&spec).await?;
    stubborn.log().wait_for("ready", STEP).await?;
    let start = Instant::now();
    stubborn.stop(Duration::from_secs(2)).await?;
    let took = start.elapsed();
    ensure!(
        took >= Duration::from_secs(2) && took < Duration::from_secs(20),
        "{took:?}"
    );
    same!(stubborn.status().await?.exit_code, 137);

    // Without any grace at all.
    let spec = ContainerSpec::testprog("other", &["signals", "TERM=1"]);
    let other = pod.start(&spec).await?;
    other.log().wait_for("ready", STEP).await?;
    other.stop(Duration::ZERO).await?;
    same!(other.status().await?.exit_code, 137);
    Ok(())
}

async fn short_processes_never_lose_their_exit(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    for attempt in 0..10 {
        let code = i32::try_from(attempt)? + 100;
        let spec = ContainerSpec::testprog("short", &["exit", &code.to_string()]);
        let container = pod.start(&spec.attempt(attempt)).await?;
        same!(
            container.wait_for(Duration::from_secs(15)).await?.exit_code,
            code
        );
        container.remove().await?;
    }
    // Several at once.
    let ends = try_join_all((0..4).map(|index| {
        let pod = pod.clone();
        async move {
            let spec = ContainerSpec::new(&format!("short-{index}"), &["echo", "here"]);
            let (code, log) = pod.finish(&spec).await?;
            same!(log.stdout()?, ["here"]);
            anyhow::Ok(code)
        }
    }));
    same!(ends.await?, [0, 0, 0, 0]);
    // And execs.
    let steady = pod.start(&ContainerSpec::pause("steady")).await?;
    for code in 0..20 {
        let output = steady
            .exec(&["testprog", "exit", &code.to_string()])
            .await?;
        same!(output.code, code);
    }
    Ok(())
}

async fn orphans_are_reaped(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let container = pod.start(&ContainerSpec::pause("main")).await?;
    for _ in 0..5 {
        container.read(&["testprog", "orphan"]).await?;
    }
    wait::until("the orphans' end", Duration::from_secs(15), || async {
        let states = container.read(&["ps", "-o", "stat,args"]).await?;
        let left = states
            .lines()
            .any(|line| line.starts_with('Z') || line.contains("sleep 0.2"));
        Ok((!left).then_some(()))
    })
    .await
}

async fn first_process_takes_all_others_with_it(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let beside = pod
        .start(&ContainerSpec::testprog("beside", &["started"]))
        .await?;
    let script = "testprog sleep 1000 & testprog sleep 1000 & sleep 1; exit 4";
    let container = pod.start(&ContainerSpec::shell("main", script)).await?;
    let long = tokio::spawn({
        let container = container.clone();
        async move { container.exec(&["testprog", "sleep", "1000"]).await }
    });
    same!(container.wait().await?.exit_code, 4);
    // The exec ends with the container, one way or the other.
    let ended = tokio::time::timeout(Duration::from_secs(20), long).await;
    ensure!(ended.is_ok(), "an exec outlived its container");
    container.remove().await?;
    same!(beside.state().await?, ContainerState::ContainerRunning);
    let left = kiln_e2e::node::traces(&[container.id().to_owned()])?;
    ensure!(left.is_empty(), "left of the container: {left:?}");
    Ok(())
}
