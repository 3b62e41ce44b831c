//! What containers' writes cost in kiln's overlay: in RAM and on the node's disk.
//!
//! "disk" is the same μVM with the least RAM an overlay can have, whose flushes are answered by the node's disk: a
//! disk with a small cache of writes. The node's own disk is the host's page cache, as fast as a disk can be; "rented
//! disk" is the same on one whose writes take as long as those of a cloud's volume.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kiln_e2e::{Container, ContainerSpec, PodSpec, Test, setup};

use super::Settings;
use crate::disk::Rented;
use crate::result::Measured;

/// The paper's figures ask for 5 samples at least; more would take hours under emulation.
pub(super) const RUNS: u32 = 5;
/// A job may take this long on a busy emulated machine.
const LIMIT: Duration = Duration::from_secs(900);
/// How often a job's log is looked at: little next to what a job takes, and reading it costs next to nothing.
const LOOK: Duration = Duration::from_millis(10);
pub(super) const KILN: &str = "kiln";
const DISK: &str = "kiln disk";
const RENTED: &str = "rented disk";
const SYNCS: &str = "2000";
/// Sources of the short job in MiB; it writes three times as much.
const SOURCES: &str = "200";

type Annotations = &'static [(&'static str, &'static str)];

/// All of a job stays in RAM.
const IN_RAM: Annotations = &[("kiln.dev/overlay-ram", "1Gi")];
/// What is written goes on to the node's disk, and is there when the guest has flushed it.
pub(super) const ON_DISK: Annotations = &[
    ("kiln.dev/overlay-ram", "1Mi"),
    ("kiln.dev/overlay-flush", "disk"),
];

/// One way to run a job.
#[derive(Debug, Clone)]
pub(super) struct Way {
    pub(super) name: String,
    pub(super) handler: String,
    pub(super) annotations: Annotations,
    /// Its pods' disk is as slow as those that clouds rent.
    rented: bool,
}

impl Way {
    pub(super) fn new(name: &str, handler: &str, annotations: Annotations) -> Self {
        Way {
            name: name.to_owned(),
            handler: handler.to_owned(),
            annotations,
            rented: false,
        }
    }

    /// The same on a disk as clouds rent it.
    fn on_rented_disk(&self) -> Self {
        Way {
            name: format!("{} {RENTED}", self.handler),
            rented: true,
            ..self.clone()
        }
    }

    /// Runs a job: what it said, and how long it took from RunPodSandbox to the pod's removal.
    pub(super) async fn run(&self, job: &[&str]) -> Result<(Vec<String>, Duration)> {
        let test = Test::new("overlay", &self.handler).await?;
        let mut spec = PodSpec::new();
        for (name, value) in self.annotations {
            spec = spec.annotation(name, value);
        }
        let rented = self.rented.then(Rented::by_pods).transpose()?;
        let begin = Instant::now();
        let pod = test.run_pod(&spec).await?;
        let container = pod.start(&ContainerSpec::testprog("main", job)).await?;
        let said = finish(&container)
            .await
            .with_context(|| format!("{job:?}"))?;
        pod.remove().await?;
        let took = begin.elapsed();
        drop(rented);
        test.clean_up().await?;
        Ok((said, took))
    }
}

/// Waits until a job has ended well. Returns what it said.
async fn finish(container: &Container) -> Result<Vec<String>> {
    let log = container.log();
    let done = async {
        while log.stdout()?.last().is_none_or(|line| line != "done") {
            tokio::time::sleep(LOOK).await;
        }
        anyhow::Ok(())
    };
    // One that fails never says so.
    tokio::select! {
        done = done => done?,
        status = container.wait_for(LIMIT) => drop(status?),
    }
    let status = container.wait_for(LIMIT).await?;
    ensure!(
        status.exit_code == 0,
        "ended with {}: {}",
        status.exit_code,
        log.stderr()?.join("\n")
    );
    log.stdout()
}

/// The runtimes that kiln is compared with.
pub(super) fn others(settings: &Settings) -> Result<Vec<Way>> {
    ensure!(
        settings.runtimes.iter().any(|name| name == KILN),
        "the overlay is kiln's: RUNTIMES has to name it"
    );
    let others = settings.runtimes.iter().filter(|name| *name != KILN);
    Ok(others.map(|name| Way::new(name, name, &[])).collect())
}

pub(super) async fn prepare() -> Result<()> {
    let test = Test::new("overlay", KILN).await?;
    setup::import(test.client(), &setup::Images::make()?).await?;
    setup::bake()
}

/// The ways that every job is run in, the one in RAM first.
fn ways(settings: &Settings) -> Result<Vec<Way>> {
    let on_disk = Way::new(DISK, KILN, ON_DISK);
    let mut ways = vec![
        Way::new("ram", KILN, IN_RAM),
        on_disk.on_rented_disk(),
        on_disk,
    ];
    ways.extend(others(settings)?);
    Ok(ways)
}

/// Runs a job in all ways, taking turns, and compares the first way with each other one.
async fn compare(settings: &Settings, ways: &[Way], job: &[&str]) -> Result<Measured> {
    prepare().await?;
    let runs = settings.runs.min(RUNS);
    let mut measured = Measured::default();
    // Run 0 reads programs from the disk and the like: it is not counted.
    for number in 0..=runs {
        for way in ways {
            let (_, took) = way
                .run(job)
                .await
                .with_context(|| format!("run {number}, {}", way.name))?;
            if number > 0 {
                measured.add(&way.name, "ms", took.as_secs_f64() * 1000.0);
            }
        }
        println!("  run {number} of {runs}");
    }
    for way in &ways[1..] {
        let name = way.name.strip_prefix("kiln ").unwrap_or(&way.name);
        let name = name.replace(' ', "-");
        measured.ratio(&format!("ram/{name}"), "ram", &way.name)?;
    }
    Ok(measured)
}

/// Small appends, each one synced.
pub(crate) async fn fsync(settings: Settings) -> Result<Measured> {
    let mut ways = ways(&settings)?;
    ways.extend(others(&settings)?.iter().map(Way::on_rented_disk));
    compare(&settings, &ways, &["syncs", "/", SYNCS]).await
}

/// A job as continuous integration has them: sources are unpacked, built, and deleted.
pub(crate) async fn short_job(settings: Settings) -> Result<Measured> {
    let ways = ways(&settings)?;
    compare(&settings, &ways, &["build", "/", SOURCES]).await
}
