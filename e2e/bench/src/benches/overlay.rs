//! What containers' writes cost in kiln's overlay: in RAM and on the node's disk.
//!
//! "disk" is the same μVM with the least RAM an overlay can have, so that whatever the guest writes goes on to the node's disk.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kiln_e2e::{ContainerSpec, PodSpec, Test, setup};

use super::Settings;
use crate::result::Measured;

/// The paper's figures ask for 5 samples at least; more would take hours under emulation.
const RUNS: u32 = 5;
/// A job may take this long on a busy emulated machine.
const LIMIT: Duration = Duration::from_secs(900);
const KILN: &str = "kiln";
const DISK: &str = "kiln disk";
const SYNCS: &str = "500";
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

/// From RunPodSandbox to the pod's removal.
async fn run(way: &Way, job: &[&str]) -> Result<Duration> {
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
    Ok(took)
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
            let took = run(way, job)
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

/// Small appends, each one synced.
pub(crate) async fn fsync(settings: Settings) -> Result<Measured> {
    compare(&settings, "512Mi", &["syncs", "/", SYNCS]).await
}
