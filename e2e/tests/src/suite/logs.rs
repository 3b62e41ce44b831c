//! Container logs: complete, in order, in CRI's format.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_cri::v1::ReopenContainerLogRequest;
use kiln_e2e::harness::Case;
use kiln_e2e::log::{LogFile, Stream};
use kiln_e2e::pod::STEP;
use kiln_e2e::{ContainerSpec, Test, cases, wait};

use super::same;

pub(crate) fn cases() -> Vec<Case> {
    cases![
        both_streams_are_logged_line_by_line,
        hundred_thousand_lines_are_complete_and_in_order.limit(240),
        long_lines_are_divided_and_not_lost,
        log_can_be_rotated_while_it_is_written,
        log_of_a_slow_reader_is_complete,
    ]
}

/// The log once the container's exit is known and everything is written.
async fn complete(log: &LogFile, lines: usize) -> Result<Vec<kiln_e2e::log::Line>> {
    let what = format!("{lines} lines in {}", log.path().display());
    let all = wait::until(&what, STEP, || async {
        let all = log.lines()?;
        Ok((all.len() >= lines).then_some(all))
    });
    all.await
        .with_context(|| format!("there are {:?} lines", log.lines().map(|all| all.len())))
}

async fn both_streams_are_logged_line_by_line(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let script = "echo one; echo; sleep 0.3; echo two >&2; sleep 0.3; echo ' three  '; \
                  sleep 0.3; printf 'no newline'";
    let (code, log) = pod.finish(&ContainerSpec::shell("main", script)).await?;
    same!(code, 0);
    let lines = complete(&log, 4).await?;
    let seen: Vec<_> = lines
        .iter()
        .map(|line| (line.stream, line.text.as_str()))
        .collect();
    let expected = [
        (Stream::Stdout, "one"),
        (Stream::Stdout, ""),
        (Stream::Stderr, "two"),
        (Stream::Stdout, " three  "),
    ];
    same!(seen[..4], expected);
    // A last line without an end is kept too, marked as a part (which `lines` leaves out) or not.
    let raw = std::fs::read_to_string(log.path())?;
    ensure!(raw.trim_end().ends_with("no newline"), "{raw:?}");
    ensure!(lines.is_sorted_by(|a, b| a.time <= b.time), "{lines:?}");
    Ok(())
}

async fn hundred_thousand_lines_are_complete_and_in_order(test: Test) -> Result<()> {
    const LINES: usize = 100_000;
    let pod = test.pod().await?;
    let spec = ContainerSpec::testprog("main", &["lines", &LINES.to_string(), "40"]);
    let container = pod.start(&spec).await?;
    same!(
        container
            .wait_for(Duration::from_secs(180))
            .await?
            .exit_code,
        0
    );
    let lines = complete(container.log(), LINES).await?;
    same!(lines.len(), LINES);
    for (index, line) in lines.iter().enumerate() {
        let number = line.text.split(' ').next();
        ensure!(
            line.text.len() == 40 && number == Some(&*index.to_string()),
            "line {index} is {line:?}"
        );
    }
    Ok(())
}

async fn long_lines_are_divided_and_not_lost(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let (code, log) = pod
        .finish(&ContainerSpec::testprog("main", &["lines", "5", "50000"]))
        .await?;
    same!(code, 0);
    let lines = complete(&log, 5).await?;
    same!(lines.len(), 5);
    for (index, line) in lines.iter().enumerate() {
        same!(line.text.len(), 50_000);
        ensure!(
            line.text.starts_with(&format!("{index} xxx")),
            "{:?}",
            &line.text[..20]
        );
        ensure!(line.parts > 1, "an entry of 50 000 bytes");
    }
    Ok(())
}

async fn log_can_be_rotated_while_it_is_written(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let script = "i=0; while [ $i -lt 60 ]; do echo line $i; i=$((i+1)); sleep 0.05; done";
    let container = pod.start(&ContainerSpec::shell("main", script)).await?;
    container.log().wait_for("line 5", STEP).await?;
    let path = container.log().path();
    let old = path.with_extension("old");
    std::fs::rename(path, &old)?;
    let request = ReopenContainerLogRequest {
        container_id: container.id().to_owned(),
    };
    test.cri().reopen_container_log(request).await?;
    same!(container.wait().await?.exit_code, 0);
    let first = kiln_e2e::log::parse(&std::fs::read_to_string(&old)?)?;
    let second = complete(container.log(), 60 - first.len()).await?;
    ensure!(
        !first.is_empty() && !second.is_empty(),
        "{} and {}",
        first.len(),
        second.len()
    );
    let all: Vec<String> = first
        .into_iter()
        .chain(second)
        .map(|line| line.text)
        .collect();
    let expected: Vec<String> = (0..60).map(|index| format!("line {index}")).collect();
    same!(all, expected);
    Ok(())
}

async fn log_of_a_slow_reader_is_complete(test: Test) -> Result<()> {
    // A container that writes more than any pipe holds and ends at once: what is still on its way
    // when the process is gone must arrive.
    let pod = test.pod().await?;
    let spec = ContainerSpec::testprog("main", &["lines", "5000", "1000", "2"]);
    let (code, log) = pod.finish(&spec).await?;
    same!(code, 0);
    let lines = complete(&log, 5000).await?;
    for stream in [Stream::Stdout, Stream::Stderr] {
        let numbers: Vec<u32> = lines
            .iter()
            .filter(|line| line.stream == stream)
            .filter_map(|line| line.text.split(' ').next()?.parse().ok())
            .collect();
        same!(numbers.len(), 2500);
        ensure!(numbers.is_sorted(), "{stream:?} is out of order");
    }
    Ok(())
}
