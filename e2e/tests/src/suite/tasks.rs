//! Plain containers through containerd's own API, as `ctr` and other clients run them.

use std::time::Duration;

use anyhow::{Result, ensure};
use containerd_client::types::v1::Status;
use kiln_e2e::harness::Case;
use kiln_e2e::plain::{Plain, PlainSpec};
use kiln_e2e::{Test, cases, wait};

use super::same;

pub(crate) fn cases() -> Vec<Case> {
    cases![
        task_goes_through_all_its_states,
        task_streams_are_complete,
        task_execs_have_streams_and_exits_of_their_own,
        task_with_a_terminal,
        task_takes_signals,
        task_pauses_and_resumes,
        created_task_can_be_deleted_without_a_start,
    ]
}

async fn task_goes_through_all_its_states(test: Test) -> Result<()> {
    let script = "echo started; echo problem >&2; exit 12";
    let task = Plain::create(&test, &PlainSpec::shell(script)).await?;
    same!(task.state().await?.status(), Status::Created);
    ensure!(task.pid > 0);
    task.start().await?;
    same!(task.wait("").await?, 12);
    let state = task.state().await?;
    same!((state.status(), state.exit_status), (Status::Stopped, 12));
    let deleted = task.delete().await?;
    same!((deleted.exit_status, deleted.pid), (12, task.pid));
    ensure!(
        deleted
            .exited_at
            .is_some_and(|time| time.seconds > 1_600_000_000)
    );
    same!(task.streams.all_output().await?, "started\n");
    same!(task.streams.all_errors().await?, "problem\n");
    ensure!(
        task.state().await.is_err(),
        "a deleted task still has a state"
    );
    Ok(())
}

async fn task_streams_are_complete(test: Test) -> Result<()> {
    let task = Plain::run(&test, &PlainSpec::testprog(&["echo"]).stdin()).await?;
    task.streams.write(b"hello\n").await?;
    task.streams.wait_for("hello\n").await?;
    let mut sent = String::from("hello\n");
    for piece in 0..64 {
        let text = format!("{piece:>8190}\n\n");
        task.streams.write(text.as_bytes()).await?;
        sent.push_str(&text);
    }
    task.close_stdin("", &task.streams).await?;
    same!(task.wait("").await?, 0);
    task.delete().await?;
    let output = task.streams.all_output().await?;
    ensure!(
        output == sent,
        "{} bytes came back of {}",
        output.len(),
        sent.len()
    );
    same!(
        task.streams.all_errors().await?,
        format!("echoed {} bytes\n", sent.len())
    );
    Ok(())
}

async fn task_execs_have_streams_and_exits_of_their_own(test: Test) -> Result<()> {
    let task = Plain::run(&test, &PlainSpec::testprog(&["started"])).await?;
    task.streams.wait_for("started").await?;
    let quick = task
        .exec("quick", &PlainSpec::shell("echo out; echo err >&2; exit 9"))
        .await?;
    same!(task.wait("quick").await?, 9);
    same!(quick.all_output().await?, "out\n");
    same!(quick.all_errors().await?, "err\n");
    let deleted = task.delete_exec("quick").await?;
    same!(deleted.exit_status, 9);

    let echo = task
        .exec("echo", &PlainSpec::testprog(&["echo"]).stdin())
        .await?;
    echo.write(b"to the exec\n").await?;
    echo.wait_for("to the exec\n").await?;
    ensure!(task.pids().await?.len() >= 2, "{:?}", task.pids().await?);
    task.close_stdin("echo", &echo).await?;
    same!(task.wait("echo").await?, 0);
    task.delete_exec("echo").await?;

    // An exec that is killed does not touch the first process.
    task.exec("killed", &PlainSpec::testprog(&["sleep", "1000"]))
        .await?;
    task.kill("killed", libc::SIGKILL, false).await?;
    same!(task.wait("killed").await?, 137);
    task.delete_exec("killed").await?;
    same!(task.state().await?.status(), Status::Running);
    task.kill("", libc::SIGTERM, false).await?;
    same!(task.wait("").await?, 0);
    same!(task.streams.output(), "started\n");
    Ok(())
}

async fn task_with_a_terminal(test: Test) -> Result<()> {
    let spec = PlainSpec::testprog(&["tty"]).terminal().stdin();
    let task = Plain::run(&test, &spec).await?;
    task.streams
        .wait_for("tty stdin=true stdout=true stderr=true")
        .await?;
    task.resize("", 120, 40).await?;
    task.streams.wait_for("size 120x40").await?;
    let exec = task
        .exec("shell", &PlainSpec::shell("exec sh").terminal().stdin())
        .await?;
    exec.write(b"echo $((40+2)); exit 3\n").await?;
    exec.wait_for("42\r\n").await?;
    same!(task.wait("shell").await?, 3);
    task.delete_exec("shell").await?;
    // Ctrl-C.
    task.streams.write(&[3]).await?;
    same!(task.wait("").await?, 0);
    Ok(())
}

async fn task_takes_signals(test: Test) -> Result<()> {
    let task = Plain::run(&test, &PlainSpec::testprog(&["signals", "TERM=21"])).await?;
    task.streams.wait_for("ready").await?;
    for (signal, name) in [
        (libc::SIGHUP, "HUP"),
        (libc::SIGUSR1, "USR1"),
        (libc::SIGUSR2, "USR2"),
    ] {
        task.kill("", signal, false).await?;
        task.streams.wait_for(&format!("signal {name}\n")).await?;
    }
    task.kill("", libc::SIGTERM, false).await?;
    same!(task.wait("").await?, 21);
    ensure!(
        task.kill("", libc::SIGTERM, false).await.is_err(),
        "an ended task took a signal"
    );
    Ok(())
}

async fn task_pauses_and_resumes(test: Test) -> Result<()> {
    let script = "i=0; while true; do i=$((i+1)); echo $i; sleep 0.1; done";
    let task = Plain::run(&test, &PlainSpec::shell(script)).await?;
    task.streams.wait_for("3\n").await?;
    task.pause().await?;
    same!(task.state().await?.status(), Status::Paused);
    // What was written before the pause may still be on its way.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let paused = task.streams.output();
    tokio::time::sleep(Duration::from_secs(1)).await;
    same!(task.streams.output(), paused, "output of a paused task");
    task.resume().await?;
    same!(task.state().await?.status(), Status::Running);
    wait::until(
        "output after the pause",
        Duration::from_secs(15),
        || async { Ok((task.streams.output().len() > paused.len()).then_some(())) },
    )
    .await
}

async fn created_task_can_be_deleted_without_a_start(test: Test) -> Result<()> {
    let task = Plain::create(&test, &PlainSpec::shell("echo never")).await?;
    task.kill("", libc::SIGKILL, true).await?;
    same!(task.wait("").await?, 137);
    task.delete().await?;
    same!(task.streams.output(), "");
    Ok(())
}
