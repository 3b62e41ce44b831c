//! Cost of picking a μVM from stores with few and many manifests. Each pick is a fresh process's, as a shim's is, with the
//! store's files in the page cache and without.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use kiln_store::{Description, Digest, Host, Kind, Manifest, Store, Wanted, testing};
use kiln_uvm::cpu::Fingerprint;

use super::Settings;
use crate::result::Measured;
use crate::tracepoints::Tracepoint;

const FOLDER: &str = "/var/lib/kiln-e2e/bench-store";
/// Manifests in a store.
const COUNTS: [u32; 4] = [1, 100, 1000, 10_000];
/// The agent's protocol that the host of this bench speaks.
const PROTOCOL: u32 = 8;
const WANTED: Wanted = Wanted {
    cpus: 2,
    memory: Some(1 << 30),
    scratch: true,
};
/// Series, with their units, in the order in which [`pick`] prints them.
const FIGURES: [(&str, &str); 6] = [
    ("", "ms"),
    (" system calls", "count"),
    (" opens", "count"),
    (" reads", "count"),
    (" bytes read", "B"),
    (" from disk", "B"),
];

pub(crate) async fn run(settings: Settings) -> Result<Measured> {
    // All of it waits in system calls.
    tokio::task::spawn_blocking(move || measure(&settings)).await?
}

fn measure(settings: &Settings) -> Result<Measured> {
    let folder = Path::new(FOLDER);
    // Of a run that was cut short.
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder)?;
    let mut stores = Vec::new();
    for count in COUNTS {
        let root = folder.join(count.to_string());
        fill(&root, count).with_context(|| format!("a store of {count}"))?;
        println!("  {count} manifests are there");
        stores.push((count, root));
    }
    let mut measured = Measured::default();
    // Run 0 reads programs from the disk and the like: it is not counted.
    for run in 0..=settings.runs {
        let mut unused = Measured::default();
        let into = if run > 0 { &mut measured } else { &mut unused };
        for (count, root) in &stores {
            // Nothing of it is read from the disk after this one.
            pick_by_another(root, "", &mut Measured::default())?;
            pick_by_another(root, &format!("pick-{count}"), into)?;
        }
        for (count, root) in &stores {
            drop_caches()?;
            pick_by_another(root, &format!("pick-{count} cold"), into)?;
        }
        println!("  run {run} of {}", settings.runs);
    }
    fs::remove_dir_all(folder)?;
    for count in &COUNTS[1..] {
        for what in ["", " opens", " reads", " bytes read"] {
            let name = format!("pick-{count}/pick-1{what}");
            let (of, to) = (format!("pick-{count}{what}"), format!("pick-1{what}"));
            measured.ratio(&name, &of, &to)?;
        }
    }
    Ok(measured)
}

fn drop_caches() -> Result<()> {
    // SAFETY: the call has no arguments.
    unsafe { libc::sync() };
    fs::write("/proc/sys/vm/drop_caches", "3").context("dropping the page cache")
}

/// One μVM, and manifests of others that differ in class, kernel, CPU and protocol, and share its objects. Every sixth
/// would be resumed on this host, and the one that is picked is neither the first nor the last.
fn fill(root: &Path, count: u32) -> Result<()> {
    let store = Store::open_or_create(root)?;
    let staging = store.begin(0)?;
    for kind in [Kind::State, Kind::Memory, Kind::Scratch] {
        use std::io::Write;
        staging.create(kind)?.write_all(kind.name().as_bytes())?;
    }
    let first = staging.commit(description(0))?;
    let objects = store.lease(first)?.manifest().objects.clone();
    for number in 1..count {
        let about = description(number);
        let objects = objects.clone();
        let manifest = Manifest {
            about,
            parents: Vec::new(),
            objects,
        };
        let bytes = manifest.encode()?;
        let name = Digest::of_bytes(&bytes).to_string();
        fs::write(root.join("uvms").join(name), bytes)?;
    }
    // The first pick after a change by hand reads all of them, and writes the index anew.
    let picked = store.pick(&host(), &WANTED)?;
    ensure!(picked.is_ok(), "{picked:?}");
    Ok(())
}

fn host() -> Host {
    Host::this(PROTOCOL)
}

fn description(number: u32) -> Description {
    let mut about = testing::description(&number.to_string());
    about.cpu.features = Fingerprint::of_this_cpu();
    if number % 3 == 1 {
        about.cpu.features.0[9] ^= 1 << (number % 32);
    }
    about.baked_at = 1_700_000_000 + u64::from(number * 7919 % 10_007);
    about.class.max_cpus = 2 + number % 15;
    about.class.max_memory_mib = 1024 << (number % 4);
    about.kernel.release = format!("6.12.{}", number % 20);
    about.protocol = PROTOCOL - number % 2 * (number % PROTOCOL);
    about
}

/// Starts a process that picks, and adds what it says.
fn pick_by_another(root: &Path, name: &str, measured: &mut Measured) -> Result<()> {
    let program = std::env::current_exe()?;
    let output = Command::new(program).arg("--pick-in").arg(root).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "a pick ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    let figures = text.split_whitespace().map(str::parse);
    let figures: Vec<f64> = figures.collect::<Result<_, _>>()?;
    ensure!(figures.len() == FIGURES.len(), "a pick said {text:?}");
    for ((what, unit), figure) in FIGURES.into_iter().zip(figures) {
        measured.add(&format!("{name}{what}"), unit, figure);
    }
    Ok(())
}

/// The work of that process: one pick, whose figures it prints.
pub(crate) fn pick(root: &Path) -> Result<()> {
    let counted = [
        "raw_syscalls/sys_enter",
        "syscalls/sys_enter_openat",
        "syscalls/sys_enter_read",
        "syscalls/sys_enter_pread64",
    ];
    let mut points = Vec::new();
    for event in counted {
        points.push(Tracepoint::of_this_thread(event)?.with_context(|| event.to_owned())?);
    }
    // The cost of counting itself.
    let nothing = figures(&points, || Ok(()))?;
    let mut took = 0.0;
    let all = figures(&points, || {
        let begin = Instant::now();
        let picked = Store::open(root)?.pick(&host(), &WANTED)?;
        took = begin.elapsed().as_secs_f64() * 1000.0;
        picked.map(drop).map_err(Into::into)
    })?;
    let [calls, opens, reads, preads, bytes, disk] = std::array::from_fn(|i| all[i] - nothing[i]);
    println!("{took} {calls} {opens} {} {bytes} {disk}", reads + preads);
    Ok(())
}

/// By how much each count grows meanwhile, and the bytes that were read, from the page cache and from the disk.
fn figures(points: &[Tracepoint], what: impl FnOnce() -> Result<()>) -> Result<[i64; 6]> {
    let read = || -> Result<[i64; 6]> {
        let mut all = [0; 6];
        for (value, point) in all.iter_mut().zip(points) {
            *value = point.read()?.cast_signed();
        }
        let io = fs::read_to_string("/proc/self/io").context("the kernel does not count reads")?;
        for (value, name) in all[4..].iter_mut().zip(["rchar: ", "read_bytes: "]) {
            let line = io.lines().find_map(|line| line.strip_prefix(name));
            *value = line.context("a count is missing")?.trim().parse()?;
        }
        Ok(all)
    };
    let before = read()?;
    what()?;
    let after = read()?;
    Ok(std::array::from_fn(|i| after[i] - before[i]))
}
