//! What containers' writes cost in kiln's overlay: in RAM, on the node's disk, and across the threshold between them.
//!
//! "disk" is the same μVM with the least RAM an overlay can have, so that whatever the guest writes goes on to the node's disk.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use kiln_e2e::{ContainerSpec, PodSpec, Test, setup};

use super::Settings;
use crate::result::Measured;

/// The paper's figures ask for 5 samples at least; more would take hours under emulation.
const RUNS: u32 = 5;
/// A job may take this long on a busy emulated machine.
const LIMIT: Duration = Duration::from_secs(900);
const KILN: &str = "kiln";
const DISK: &str = "kiln disk";
/// MiB of the tree that the short job unpacks.
const TREE: &str = "200";
const SYNCS: &str = "500";
/// The curve, in MiB: its end, its steps, and the threshold.
const CURVE: (&str, &str, &str) = ("384", "32", "128Mi");

/// One way to run a job.
#[derive(Debug, Clone)]
struct Way {
    name: String,
    handler: String,
    /// `kiln.dev/overlay-ram`.
    ram: Option<&'static str>,
}

fn ways(settings: &Settings, ram: &'static str) -> Result<Vec<Way>> {
    ensure!(
        settings.runtimes.iter().any(|name| name == KILN),
        "the overlay is kiln's: RUNTIMES has to name it"
    );
    let way = |name: &str, handler: &str, ram| Way {
        name: name.to_owned(),
        handler: handler.to_owned(),
        ram,
    };
    let mut ways = vec![way("ram", KILN, Some(ram)), way(DISK, KILN, Some("1Mi"))];
    for other in settings.runtimes.iter().filter(|name| *name != KILN) {
        ways.push(way(other, other, None));
    }
    Ok(ways)
}

/// From RunPodSandbox to the pod's removal; returns the job's output.
async fn run(way: &Way, job: &[&str]) -> Result<(Duration, String)> {
    let test = Test::new("overlay", &way.handler).await?;
    let mut spec = PodSpec::new();
    if let Some(ram) = way.ram {
        spec = spec.annotation("kiln.dev/overlay-ram", ram);
    }
    let begin = Instant::now();
    let pod = test.run_pod(&spec).await?;
    let container = pod.start(&ContainerSpec::testprog("main", job)).await?;
    let status = container.wait_for(LIMIT).await?;
    let log = container.log().stdout()?.join("\n");
    ensure!(
        status.exit_code == 0,
        "{job:?} ended with {}: {log}",
        status.exit_code
    );
    pod.remove().await?;
    let took = begin.elapsed();
    test.clean_up().await?;
    Ok((took, log))
}

async fn prepare() -> Result<()> {
    let test = Test::new("overlay", KILN).await?;
    setup::import(test.client(), &setup::Images::make()?).await?;
    setup::bake()
}

/// Runs a job in all ways, taking turns, and compares the first way with each other one.
async fn compare(settings: &Settings, ram: &'static str, job: &[&str]) -> Result<Measured> {
    let ways = ways(settings, ram)?;
    prepare().await?;
    let runs = settings.runs.min(RUNS);
    let mut measured = Measured::default();
    // Run 0 reads programs from the disk and the like: it is not counted.
    for number in 0..=runs {
        for way in &ways {
            let (took, _) = run(way, job)
                .await
                .with_context(|| format!("run {number}, {}", way.name))?;
            if number > 0 {
                measured.add(&way.name, "ms", took.as_secs_f64() * 1000.0);
            }
        }
        println!("  run {number} of {runs}");
    }
    for way in &ways[1..] {
        let name = way.name.rsplit(' ').next().unwrap_or(&way.name);
        measured.ratio(&format!("ram/{name}"), "ram", &way.name)?;
    }
    Ok(measured)
}

/// A tree is unpacked, built and deleted.
pub(crate) async fn short_job(settings: Settings) -> Result<Measured> {
    compare(&settings, "512Mi", &["job", "/", TREE]).await
}

/// Small appends, each one synced.
pub(crate) async fn fsync(settings: Settings) -> Result<Measured> {
    compare(&settings, "512Mi", &["syncs", "/", SYNCS]).await
}

/// Throughput as a file grows through the threshold, and the same with none.
pub(crate) async fn curve(settings: Settings) -> Result<Measured> {
    let (end, step, threshold) = CURVE;
    let mut ways = ways(&settings, threshold)?;
    ways.truncate(2);
    prepare().await?;
    let runs = settings.runs.min(RUNS);
    let mut measured = Measured::default();
    for number in 0..=runs {
        for way in &ways {
            let (_, log) = run(way, &["grow", "/", end, step]).await?;
            if number > 0 {
                for (mib, speed) in steps(&log, step)? {
                    measured.add(&format!("{} {mib:>4} MiB", way.name), "MiB/s", speed);
                }
            }
        }
        println!("  run {number} of {runs}");
    }
    let last = format!("{:>4} MiB", end);
    measured.ratio(
        "past/disk",
        &format!("ram {last}"),
        &format!("{DISK} {last}"),
    )?;
    Ok(measured)
}

/// The job's lines: MiB so far, and the milliseconds of the step.
fn steps(log: &str, step: &str) -> Result<Vec<(u32, f64)>> {
    let step: f64 = step.parse()?;
    let mut found = Vec::new();
    for line in log.lines().filter(|line| *line != "done") {
        let Some((mib, ms)) = line.split_once(' ') else {
            bail!("the job printed {line:?}");
        };
        let ms: f64 = ms.parse()?;
        found.push((mib.parse()?, step * 1000.0 / ms.max(0.001)));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_become_speeds() {
        let found = steps("32 500.0\n64 1000.0\ndone\n", "32").unwrap();
        assert_eq!(found, [(32, 64.0), (64, 32.0)]);
        assert!(steps("nonsense\n", "32").is_err());
    }
}
