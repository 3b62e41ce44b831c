//! Exec as probes and `kubectl exec` without streams use it: run, wait, get all output.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use futures_util::future::try_join_all;
use kiln_e2e::harness::Case;
use kiln_e2e::{ContainerSpec, Test, cases};

use super::same;

pub(crate) fn cases() -> Vec<Case> {
    cases![
        exec_returns_both_streams_and_the_exit_code,
        exec_output_of_a_megabyte_is_complete,
        exec_is_ended_by_its_timeout,
        execs_at_the_same_time_do_not_mix,
        exec_needs_a_running_container_and_a_program,
    ]
}

async fn exec_returns_both_streams_and_the_exit_code(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let spec = ContainerSpec::pause("main")
        .env("SET", "here")
        .workdir("/tmp")
        .user(7, 8);
    let container = pod.start(&spec).await?;
    for code in [0, 1, 42, 255] {
        let script = format!("echo out; echo error >&2; exit {code}");
        let output = container.exec(&["sh", "-c", &script]).await?;
        same!(
            (output.code, &*output.stdout, &*output.stderr),
            (code, "out\n", "error\n")
        );
    }
    let killed = container.exec(&["sh", "-c", "kill -9 $$"]).await?;
    same!(killed.code, 137);
    // An exec has the container's environment, directory and user.
    same!(
        container.shell("echo $SET $PWD $(id -u):$(id -g)").await?,
        "here /tmp 7:8"
    );
    Ok(())
}

async fn exec_output_of_a_megabyte_is_complete(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let container = pod.start(&ContainerSpec::pause("main")).await?;
    let output = container
        .exec(&["testprog", "lines", "20000", "60", "4"])
        .await?;
    same!(output.code, 0);
    let numbers = |text: &str| -> Vec<u32> {
        let first = |line: &str| line.split(' ').next().and_then(|word| word.parse().ok());
        text.lines().filter_map(first).collect()
    };
    let (on_error, on_output): (Vec<u32>, Vec<u32>) = (0..20000).partition(|index| index % 4 == 0);
    ensure!(
        numbers(&output.stdout) == on_output,
        "{} bytes of stdout",
        output.stdout.len()
    );
    ensure!(
        numbers(&output.stderr) == on_error,
        "{} bytes of stderr",
        output.stderr.len()
    );
    same!(output.stdout.len() + output.stderr.len(), 20000 * 61);
    Ok(())
}

async fn exec_is_ended_by_its_timeout(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let container = pod.start(&ContainerSpec::pause("main")).await?;
    let start = Instant::now();
    if container
        .exec_limited(&["testprog", "sleep", "1000"], 2)
        .await
        .is_ok()
    {
        bail!("an exec went on after its timeout");
    }
    let took = start.elapsed();
    ensure!(
        took >= Duration::from_secs(2) && took < Duration::from_secs(20),
        "{took:?}"
    );
    let processes = container.read(&["ps", "-o", "args"]).await?;
    ensure!(
        !processes.contains("sleep 1000"),
        "still running:\n{processes}"
    );
    Ok(())
}

async fn execs_at_the_same_time_do_not_mix(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let container = pod.start(&ContainerSpec::pause("main")).await?;
    try_join_all((0..8).map(|index| {
        let container = container.clone();
        async move {
            let script = format!("for i in 1 2 3; do echo {index}; done; exit {index}");
            let output = container.exec(&["sh", "-c", &script]).await?;
            same!(
                (output.code, output.stdout),
                (index, format!("{index}\n").repeat(3))
            );
            Ok(())
        }
    }))
    .await?;
    Ok(())
}

async fn exec_needs_a_running_container_and_a_program(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let container = pod.start(&ContainerSpec::pause("main")).await?;
    match container.exec(&["/no/such/program"]).await {
        Ok(output) => bail!("a missing program gave {output:?}"),
        Err(error) => ensure!(
            format!("{error:#}").contains("/no/such/program"),
            "{error:#}"
        ),
    }
    same!(container.read(&["echo", "fine"]).await?, "fine");
    container.stop(Duration::from_secs(5)).await?;
    ensure!(
        container.exec(&["true"]).await.is_err(),
        "exec in a container that has ended"
    );
    Ok(())
}
