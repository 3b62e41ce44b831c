//! Process namespaces that containers share, with their pod or with one other container.

use anyhow::{Result, ensure};
use kiln_e2e::harness::Case;
use kiln_e2e::pod::STEP;
use kiln_e2e::{Container, ContainerSpec, PodSpec, Test, cases};

use super::same;

pub(crate) fn cases() -> Vec<Case> {
    cases![
        debugger_sees_the_processes_of_its_target_and_of_no_other,
        target_in_a_pod_that_shares_processes_is_in_the_pods_namespace,
        first_process_of_a_pod_that_shares_processes_is_a_pause,
        debugger_of_a_container_that_has_ended_is_refused,
    ]
}

async fn debugger_sees_the_processes_of_its_target_and_of_no_other(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let target = pod
        .start(&ContainerSpec::testprog("target", &["spawn", "3"]))
        .await?;
    target.log().wait_for("spawned", STEP).await?;
    pod.start(&ContainerSpec::testprog("other", &["sleep", "4711"]))
        .await?;
    let spec = ContainerSpec::shell("debugger", "exec sleep 1000").target(&target);
    let debugger = pod.start(&spec).await?;
    let arguments = "cat /proc/1/cmdline | tr '\\0' ' '";
    same!(debugger.shell(arguments).await?, "/bin/testprog spawn 3");
    let processes = debugger.read(&["ps", "-o", "args"]).await?;
    ensure!(processes.contains("sleep 1000"), "{processes}");
    ensure!(!processes.contains("4711"), "{processes}");
    // And is seen by it.
    let processes = target.read(&["ps", "-o", "args"]).await?;
    ensure!(processes.contains("sleep 1000"), "{processes}");
    // The target's files are in reach, as `kubectl debug` is used for.
    target.shell("echo of the target > /mine").await?;
    same!(
        debugger.read(&["cat", "/proc/1/root/mine"]).await?,
        "of the target"
    );
    // The namespace ends with its first process, and so may the one that asks it to end before
    // its own exit.
    let kill = debugger.exec(&["kill", "-TERM", "1"]).await?;
    ensure!(
        [0, 137].contains(&kill.code),
        "{}: {}",
        kill.code,
        kill.stderr
    );
    target.wait().await?;
    same!(debugger.wait().await?.exit_code, 137);
    Ok(())
}

async fn target_in_a_pod_that_shares_processes_is_in_the_pods_namespace(test: Test) -> Result<()> {
    let pod = test.run_pod(&PodSpec::new().share_processes()).await?;
    let spec = ContainerSpec::testprog("target", &["sleep", "4711"]).share_processes();
    let target = pod.start(&spec).await?;
    let debugger = pod
        .start(&ContainerSpec::pause("debugger").target(&target))
        .await?;
    first_is_a_pause(&debugger).await?;
    let processes = debugger.read(&["ps", "-o", "args"]).await?;
    ensure!(processes.contains("4711"), "{processes}");
    Ok(())
}

async fn first_process_of_a_pod_that_shares_processes_is_a_pause(test: Test) -> Result<()> {
    let pod = test.run_pod(&PodSpec::new().share_processes()).await?;
    let main = pod
        .start(&ContainerSpec::pause("main").share_processes())
        .await?;
    first_is_a_pause(&main).await?;
    // It collects what others leave behind: an orphan's end is waited for by its number.
    let script = "sh -c 'sleep 0.2 & echo $!' > /pid; pid=$(cat /pid); \
                  while test -e /proc/$pid; do sleep 0.1; done; echo collected";
    same!(main.shell(script).await?, "collected");
    Ok(())
}

async fn debugger_of_a_container_that_has_ended_is_refused(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let target = pod.start(&ContainerSpec::shell("target", "exit 0")).await?;
    target.wait().await?;
    let refused = pod
        .create(&ContainerSpec::pause("debugger").target(&target))
        .await;
    ensure!(refused.is_err(), "a namespace that is gone was joined");
    Ok(())
}

/// By its name, or by what it was called with: with runc it is what the sandbox's image has.
async fn first_is_a_pause(container: &Container) -> Result<()> {
    let said = container
        .read(&["cat", "/proc/1/comm", "/proc/1/cmdline"])
        .await?;
    ensure!(said.contains("pause"), "the first process is {said:?}");
    Ok(())
}
