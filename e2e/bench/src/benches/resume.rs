//! How long a resume takes, from the VMM's start to the guest's first answer over vsock, beside the floor under it
//! and a cold boot. Guests have filled most of their memory; their files are in the page cache.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use kiln_e2e::uvm::{Baked, Kit, Shape, Uvm, fill_script};
use kiln_uvm::ends::Ends;

use super::Settings;
use crate::counters::Counting;
use crate::peer;
use crate::result::Measured;

/// Here, on the node's disk, everything of this bench is.
const FOLDER: &str = "/var/lib/kiln-e2e/bench-resume";
/// Machines: MiB of memory, and of those filled with data.
const SIZES: [(u64, u64); 3] = [(256, 128), (1024, 700), (2048, 1600)];
/// The same as the second of [`SIZES`], restored by QEMU from its migration stream.
const QEMU: &str = "qemu-incoming-1024";
/// How many resume at once.
const CROWDS: [usize; 2] = [16, 64];
/// A guest is saved when it has nothing left to do, as `kiln bake` sees to: every copy would do it again.
const SETTLE: Duration = Duration::from_secs(3);
/// What has to settle between two runs: KVM takes a VM down behind its process.
const PAUSE: Duration = Duration::from_millis(200);
/// How long a guest has to come to rest after its answer.
const AFTERWARDS: Duration = Duration::from_millis(200);
/// How long before its request a VMM is started where it is started ahead of time.
const AHEAD: Duration = Duration::from_millis(100);

pub(crate) async fn run(settings: Settings) -> Result<Measured> {
    // All of it waits in system calls.
    tokio::task::spawn_blocking(move || measure(&settings)).await?
}

fn measure(settings: &Settings) -> Result<Measured> {
    let folder = Path::new(FOLDER);
    // Of a run that was cut short.
    let _ = std::fs::remove_dir_all(folder);
    let made = Prepared::make(folder)?;
    let counting = Counting::begin()?;
    let mut measured = Measured::default();
    // Run 0 reads files from the disk and the like: it is not counted.
    for run in 0..=settings.runs {
        let mut unused = Measured::default();
        let into = if run > 0 { &mut measured } else { &mut unused };
        let begin = Instant::now();
        made.once(&counting, into)
            .with_context(|| format!("run {run}"))?;
        println!(
            "  run {run} of {}, {:.1} s",
            settings.runs,
            begin.elapsed().as_secs_f64()
        );
    }
    std::fs::remove_dir_all(folder)?;
    for (name, of, to) in [
        ("kiln-2048/kiln-256", "kiln-2048", "kiln-256"),
        ("kiln-256/floor", "kiln-256", "floor"),
        ("kiln-256/cold-boot", "kiln-256", "cold-boot"),
        ("kiln-1024/qemu-incoming-1024", "kiln-1024", QEMU),
        ("kiln-x16/kiln-x1", "kiln-x16", "kiln-256"),
        ("kiln-x64/kiln-x1", "kiln-x64", "kiln-256"),
    ] {
        if to != QEMU || made.peer.is_some() {
            measured.ratio(name, of, to)?;
        }
    }
    Ok(measured)
}

/// What is measured, ready to be.
struct Prepared {
    folder: PathBuf,
    kit: Kit,
    baked: Vec<(u64, Baked)>,
    /// None on a node without QEMU.
    peer: Option<peer::Saved>,
}

/// A machine with vsock and entropy, as the peers in the field were measured: with no device more than it takes.
fn shape(memory: u64) -> Shape {
    Shape {
        memory,
        hotplug: 0,
        devices: false,
        quiet: true,
        ..Shape::default()
    }
}

impl Prepared {
    fn make(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let kit = Kit::make("", folder)?;
        let mut baked = Vec::new();
        for (memory, fill) in SIZES {
            let dir = folder.join(format!("bake-{memory}"));
            std::fs::create_dir_all(&dir)?;
            let uvm = Uvm::boot(&dir, &kit, shape(memory))?;
            uvm.sh(&fill_script(&fill.to_string()))?;
            std::thread::sleep(SETTLE);
            let mut saved = uvm.snapshot(&dir, false)?;
            drop(uvm);
            saved.learn(&dir)?;
            // Once read, it stays in the page cache.
            std::io::copy(&mut File::open(&saved.memory)?, &mut std::io::sink())?;
            let touched = saved.touched.iter().map(|run| u64::from(run.pages));
            println!(
                "  {memory} MiB with {fill} of data saved; {} pages are touched first",
                touched.sum::<u64>()
            );
            baked.push((memory, saved));
        }
        let peer = if peer::is_here() {
            let (memory, fill) = SIZES[1];
            let dir = folder.join("qemu");
            std::fs::create_dir_all(&dir)?;
            Some(peer::Saved::make(&dir, &kit, memory, fill)?)
        } else {
            println!("  no QEMU in this node: no comparison with it");
            None
        };
        Ok(Self {
            folder: folder.to_owned(),
            kit,
            baked,
            peer,
        })
    }

    fn dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.folder.join(name);
        std::fs::create_dir_all(&dir)?;
        Ok(dir)
    }

    fn smallest(&self) -> Result<&Baked> {
        Ok(&self.baked.first().context("nothing is baked")?.1)
    }

    /// Everything once, one after the other.
    fn once(&self, counting: &Counting, measured: &mut Measured) -> Result<()> {
        let dir = self.dir("run")?;
        self.floor(measured)?;
        for (memory, baked) in &self.baked {
            resume(&dir, &format!("kiln-{memory}"), baked, counting, measured)?;
        }
        let vmm = Uvm::spawn(&dir)?;
        std::thread::sleep(AHEAD);
        let begin = Instant::now();
        let uvm = Uvm::resume_in(vmm, &dir, self.smallest()?, Ends::new())?;
        let _answer = uvm.ask()?;
        measured.add("kiln-256, VMM started ahead", "ms", ms(begin.elapsed()));
        end(uvm);
        if let Some(peer) = &self.peer {
            measured.add(QEMU, "ms", ms(peer.restore(&dir)?));
            std::thread::sleep(PAUSE);
        }
        for crowd in CROWDS {
            self.crowd(crowd, counting, measured)?;
        }
        let begin = Instant::now();
        let uvm = Uvm::boot(&dir, &self.kit, shape(SIZES[0].0))?;
        measured.add("cold-boot", "ms", ms(begin.elapsed()));
        end(uvm);
        std::thread::sleep(PAUSE);
        Ok(())
    }

    fn floor(&self, measured: &mut Measured) -> Result<()> {
        let program = std::env::current_exe()?.with_file_name("kiln-floor");
        let baked = self.smallest()?;
        let begin = monotonic_ns();
        let mut child = Command::new(&program)
            .arg(&baked.state)
            .arg(&baked.memory)
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("{} is missing", program.display()))?;
        let mut text = String::new();
        if let Some(out) = &mut child.stdout {
            out.read_to_string(&mut text)?;
        }
        ensure!(child.wait()?.success(), "the floor's program failed");
        let mut last = begin;
        for line in text.lines() {
            let (end, name) = line.split_once(' ').context("the floor's answer")?;
            let end: u64 = end.parse()?;
            measured.add(&format!("floor {name}"), "ms", ns_to_ms(end - last));
            last = end;
        }
        measured.add("floor", "ms", ns_to_ms(last - begin));
        std::thread::sleep(PAUSE);
        Ok(())
    }

    /// From the first start to the last answer.
    fn crowd(&self, count: usize, counting: &Counting, measured: &mut Measured) -> Result<()> {
        let dirs = (0..count)
            .map(|i| self.dir(&format!("crowd/{i}")))
            .collect::<Result<Vec<_>>>()?;
        let baked = self.smallest()?;
        let [here, go, done] = [count + 1, count + 1, count + 1].map(Barrier::new);
        let (counted, all) = std::thread::scope(|scope| {
            let start = |dir| {
                let (here, go, done) = (&here, &go, &done);
                scope.spawn(move || {
                    here.wait();
                    go.wait();
                    // The connection stays: what its end takes is no part of one answer, nor of many.
                    let resumed = Uvm::resume(dir, baked, Ends::new())
                        .and_then(|uvm| uvm.ask().map(|answer| (uvm, answer)));
                    let answered = Instant::now();
                    // And so do threads, which are this bench's, until all have answered.
                    done.wait();
                    (resumed, answered)
                })
            };
            let threads: Vec<_> = dirs.iter().map(|dir| start(dir)).collect();
            here.wait();
            // Before anyone may go: afterwards it could be a while until this thread has its turn.
            let before = counting.now();
            let begin = Instant::now();
            go.wait();
            done.wait();
            let all: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
            let last = all.iter().flatten().map(|(_, answered)| *answered).max();
            let took = last.unwrap_or(begin) - begin;
            let counted = before.and_then(|before| Ok(counting.now()?.since(&before)));
            measured.add(&format!("kiln-x{count}"), "ms", ms(took));
            (counted, all)
        });
        for (what, unit, value) in counted? {
            measured.add(&format!("kiln-x{count} {what}"), unit, value);
        }
        for one in all {
            let (resumed, _) = one.map_err(|_| anyhow!("a resume panicked"))?;
            drop(resumed?);
        }
        std::thread::sleep(PAUSE);
        Ok(())
    }
}

/// One resume with all its times and counts.
fn resume(
    dir: &Path,
    name: &str,
    baked: &Baked,
    counting: &Counting,
    measured: &mut Measured,
) -> Result<()> {
    let before = counting.now()?;
    let begin = Instant::now();
    let vmm = Uvm::spawn(dir)?;
    let spawned = Instant::now();
    let uvm = Uvm::resume_in(vmm, dir, baked, Ends::new())?;
    let started = Instant::now();
    let _answer = uvm.ask()?;
    let answered = Instant::now();
    let counted = counting.now()?;
    // Many at once have this in each other's way.
    std::thread::sleep(AFTERWARDS);
    let afterwards = counting.now()?.since(&counted);
    let counted = counted.since(&before);
    let mut add = |what: &str, unit: &str, value: f64| {
        measured.add(&format!("{name} {what}"), unit, value);
    };
    add("spawn", "ms", ms(spawned - begin));
    add("request to started", "ms", ms(started - spawned));
    for step in &uvm.steps {
        add(&step.name, "ms", ns_to_ms(step.duration_ns));
    }
    add("started to answer", "ms", ms(answered - started));
    for (what, unit, value) in counted {
        add(what, unit, value);
    }
    for (what, unit, value) in afterwards {
        if what == "CPU time" {
            add("CPU time after the answer", unit, value);
        }
    }
    measured.add(name, "ms", ms(answered - begin));
    end(uvm);
    Ok(())
}

fn end(uvm: Uvm) {
    drop(uvm);
    std::thread::sleep(PAUSE);
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn ns_to_ms(ns: u64) -> f64 {
    ms(Duration::from_nanos(ns))
}

/// The clock that the floor's program reads, too.
fn monotonic_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes one timespec, which `now` is.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    // A monotonic clock counts up from 0.
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
