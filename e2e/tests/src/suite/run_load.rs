//! Many execs in one container at once.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use futures_util::future::try_join_all;
use k8s_cri::v1::ExecSyncRequest;
use kiln_e2e::harness::Case;
use kiln_e2e::{ContainerSpec, Test, cases};

use super::same;

pub(crate) fn cases() -> Vec<Case> {
    let all = cases![hundred_execs_at_once_are_all_right.limit(300).alone()];
    let named = |case: Case| case.only_with("kiln", "run");
    all.into_iter().map(named).collect()
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
