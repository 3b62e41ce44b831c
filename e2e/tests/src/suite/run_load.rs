//! Much at once: many execs in one container, and much output.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use k8s_cri::v1::ExecSyncRequest;
use kiln_e2e::harness::Case;
use kiln_e2e::plain::{Plain, PlainSpec};
use kiln_e2e::{ContainerSpec, Test, cases};

use super::same;

pub(crate) fn cases() -> Vec<Case> {
    let of_kiln = cases![hundred_execs_at_once_are_all_right.limit(300).alone()];
    let of_all = cases![fifty_thousand_lines_a_second_arrive_whole.limit(240)];
    let named = |case: Case| case.only_with("kiln", "run");
    of_kiln.into_iter().map(named).chain(of_all).collect()
}

/// How long one of a hundred may wait for its turn on two emulated CPUs.
const LIMIT: Duration = Duration::from_secs(200);

async fn hundred_execs_at_once_are_all_right(test: Test) -> Result<()> {
    const MANY: usize = 100;
    let pod = test.pod().await?;
    let container = pod.start(&ContainerSpec::pause("main")).await?;
    let start = Instant::now();
    try_join_all((0..MANY).map(|index| {
        let (cri, container_id) = (test.cri().clone(), container.id().to_owned());
        async move {
            let script = format!("echo out {index}; echo err {index} >&2; exit {index}");
            let request = ExecSyncRequest {
                container_id,
                cmd: vec!["sh".to_owned(), "-c".to_owned(), script],
                timeout: 0,
            };
            let answer = cri.exec_sync(request, LIMIT).await?;
            same!(answer.exit_code, i32::try_from(index)?);
            same!(&*answer.stdout, format!("out {index}\n").as_bytes());
            same!(&*answer.stderr, format!("err {index}\n").as_bytes());
            anyhow::Ok(())
        }
    }))
    .await?;
    let took = start.elapsed();
    println!(
        "{}: {MANY} execs at once in {:.1} s",
        test.handler(),
        took.as_secs_f64()
    );
    // All of them are gone, and the next one finds the container as it was.
    let left = container.read(&["ps", "-o", "args"]).await?;
    ensure!(!left.contains("echo out"), "left:\n{left}");
    Ok(())
}

async fn fifty_thousand_lines_a_second_arrive_whole(test: Test) -> Result<()> {
    const RATE: usize = 50_000;
    const LINES: usize = 3 * RATE;
    let (rate, lines) = (RATE.to_string(), LINES.to_string());
    let spec = PlainSpec::testprog(&["pace", &rate, &lines, "30"]);
    let plain = Plain::run(&test, &spec).await?;
    let code = tokio::time::timeout(LIMIT, plain.wait("")).await;
    same!(code.context("it still runs")??, 0);
    let text = plain.streams.all_output().await?;
    let mut whole = 0;
    for (index, line) in text.lines().enumerate() {
        ensure!(
            line.len() == 30 && line.split(' ').next() == Some(&*index.to_string()),
            "line {index} is {line:?}"
        );
        whole += 1;
    }
    same!(whole, LINES);
    ensure!(text.ends_with('\n'), "the last line has no end");
    // How fast it could be written, by the writer's own clock, is no matter of right or wrong here.
    let took: f64 = plain.streams.all_errors().await?.trim().parse()?;
    println!(
        "{}: {LINES} lines at {RATE} a second took {:.1} s",
        test.handler(),
        took / 1000.0
    );
    plain.delete().await?;
    Ok(())
}
