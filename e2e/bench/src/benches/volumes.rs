//! What files on volumes cost, by the volume's kind, the runtimes taking turns.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use kiln_e2e::node::{busybox, text};
use kiln_e2e::{Container, ContainerSpec, PodSpec, Test, setup};

use super::Settings;
use crate::result::Measured;

/// Seconds that a job may take.
const LIMIT: i64 = 900;
/// A job of a kind of volume, its name in the figures, and what it does in the volume's directory. What lies in `/tmp` was
/// prepared in the container's own file system.
type Job = (&'static str, &'static str);

/// Programs that unpack, look at and delete many files, and databases that write.
const ON_DISK: &[Job] = &[
    ("untar", "tar xf /tmp/tree.tar"),
    ("walk", "ls -lR . > /dev/null"),
    ("read-1000", "find tree -type f -exec cat {} + > /dev/null"),
    (
        "write-4k",
        "dd if=/dev/zero of=file bs=4k count=8192 2> /dev/null",
    ),
    ("fsync", "testprog blocks file sync 200"),
    ("rm", "rm -rf tree"),
];
const IN_MEMORY: &[Job] = &[
    (
        "first-write",
        "dd if=/dev/zero of=file bs=1M count=64 2> /dev/null",
    ),
    ("read-4k", "testprog blocks file read 20000"),
    ("write-4k", "testprog blocks file write 20000"),
    ("fsync", "testprog blocks file sync 20000"),
];
const OF_CONFIG: &[Job] = &[("open-1000", "testprog opens value 1000")];

/// Files of a thousand lengths in fifty directories.
const TREE: &str = "mkdir -p /tmp/tree && cd /tmp && for d in $(seq 50); do mkdir tree/$d; for f in $(seq 20); do \
     head -c $((d * f * 20)) /bin/busybox > tree/$d/$f; done; done && tar cf tree.tar tree && rm -r tree";

/// A pod that has a volume of each kind.
struct Volumes {
    test: Test,
    container: Container,
    memory: PathBuf,
}

const KINDS: [(&str, &[Job]); 4] = [
    ("emptydir", ON_DISK),
    ("hostpath", ON_DISK),
    ("memory", IN_MEMORY),
    ("config", OF_CONFIG),
];

impl Volumes {
    async fn start(runtime: &str) -> Result<Self> {
        let test = Test::new("volumes", runtime).await?;
        let folder = test.scratch().join("pods/5ab5f8b5");
        let volume = |kind: &str, name: &str| -> Result<PathBuf> {
            let path = folder.join("volumes").join(kind).join(name);
            fs::create_dir_all(&path)?;
            fs::set_permissions(&path, Permissions::from_mode(0o777))?;
            Ok(path)
        };
        let disk = volume("kubernetes.io~empty-dir", "disk")?;
        let memory = volume("kubernetes.io~empty-dir", "memory")?;
        busybox(&[
            "mount",
            "-t",
            "tmpfs",
            "-o",
            "size=256m",
            "tmpfs",
            &text(&memory),
        ])?;
        let config = volume("kubernetes.io~configmap", "config")?;
        fs::create_dir(config.join("..1"))?;
        fs::write(config.join("..1/value"), "a value\n".repeat(100))?;
        symlink("..1", config.join("..data"))?;
        symlink("..data/value", config.join("value"))?;
        let host = test.scratch().join("host");
        fs::create_dir(&host)?;
        let pod = test.run_pod(&PodSpec::new().uid("5ab5f8b5")).await?;
        let spec = ContainerSpec::pause("main")
            .memory_mib(512)
            .mount(&disk, "/emptydir")
            .mount(&host, "/hostpath")
            .mount(&memory, "/memory")
            .mount_read_only(&config, "/config");
        let container = pod.start(&spec).await?;
        container.shell(TREE).await?;
        Ok(Self {
            test,
            container,
            memory,
        })
    }

    /// Milliseconds of a job.
    async fn time(&self, kind: &str, script: &str) -> Result<f64> {
        let script = format!("cd /{kind} && {script}");
        let command = ["testprog", "timed", "sh", "-c", &script];
        let done = self.container.exec_limited(&command, LIMIT).await;
        let done = done.with_context(|| format!("{script} in {}", self.test))?;
        ensure!(done.code == 0, "{script} in {}: {done:?}", self.test);
        Ok(done.stdout.trim().parse::<f64>()? / 1000.0)
    }
}

pub(crate) async fn run(settings: Settings) -> Result<Measured> {
    let first = settings.runtimes.first().context("no runtime to measure")?;
    let test = Test::new("volumes", first).await?;
    setup::import(test.client(), &setup::Images::make()?).await?;
    if settings.runtimes.iter().any(|name| setup::needs_bake(name)) {
        setup::bake()?;
    }
    let mut all = Vec::new();
    for runtime in &settings.runtimes {
        all.push(Volumes::start(runtime).await?);
    }
    let mut measured = Measured::default();
    // Run 0 reads programs from the disk and the like: it is not counted.
    for run in 0..=settings.runs {
        for (kind, jobs) in KINDS {
            for (job, script) in jobs {
                for one in &all {
                    let took = one.time(kind, script).await?;
                    if run > 0 {
                        measured.add(&format!("{} {kind}-{job}", one.test.handler()), "ms", took);
                    }
                }
            }
        }
        for one in &all {
            one.container.shell("rm -f /*/file").await?;
        }
        println!("  run {run} of {}", settings.runs);
    }
    for one in &all {
        busybox(&["umount", "-l", &text(&one.memory)])?;
        one.test.clean_up().await?;
    }
    if let Some((base, others)) = settings.runtimes.split_first() {
        for other in others {
            for (kind, jobs) in KINDS {
                for (job, _) in jobs {
                    let name = format!("{kind}-{job}");
                    let (of, to) = (format!("{other} {name}"), format!("{base} {name}"));
                    let key = match other.as_str() {
                        "kiln" => format!("{name}/{base}"),
                        other => format!("{other} {name}/{base}"),
                    };
                    measured.ratio(&key, &of, &to)?;
                }
            }
        }
    }
    Ok(measured)
}
