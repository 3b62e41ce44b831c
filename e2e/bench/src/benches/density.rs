//! What idle μVMs cost: many resumed of one bake, left alone for a minute.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use kiln_e2e::uvm::{Kit, Shape, Uvm};
use kiln_uvm::ends::Ends;
use libc::{ENOENT, ESRCH};

use super::Settings;
use crate::counters::private;
use crate::result::Measured;

const FOLDER: &str = "/var/lib/kiln-e2e/bench-density";
/// How many, unless the node's memory ends before.
const COUNT: usize = 100;
/// What has to stay free.
const SPARE_KIB: u64 = 1 << 20;
/// What a resume leaves to do (an answered guest goes on for a moment).
const SETTLE: Duration = Duration::from_secs(5);
const IDLE: Duration = Duration::from_secs(60);

pub(crate) async fn run(_settings: Settings) -> Result<Measured> {
    // All of it waits in system calls.
    tokio::task::spawn_blocking(measure).await?
}

fn measure() -> Result<Measured> {
    let folder = Path::new(FOLDER);
    // Of a run that was cut short.
    let _ = fs::remove_dir_all(folder);
    let bake = folder.join("bake");
    fs::create_dir_all(&bake)?;
    let kit = Kit::make("", folder)?;
    // All kinds of devices, as for a pod.
    let shape = Shape {
        quiet: true,
        ..Shape::default()
    };
    let uvm = Uvm::boot(&bake, &kit, shape)?;
    uvm.sh("echo 3 > /proc/sys/vm/drop_caches; echo 1 > /proc/sys/vm/compact_memory")?;
    std::thread::sleep(SETTLE);
    let mut baked = uvm.snapshot(&bake, false)?;
    drop(uvm);
    baked.learn(&bake)?;

    let mut all = Vec::new();
    while all.len() < COUNT && available_kib()? > SPARE_KIB {
        let dir = folder.join(format!("uvm{}", all.len()));
        fs::create_dir_all(&dir)?;
        let uvm = Uvm::resume(&dir, &baked, Ends::new())?;
        drop(uvm.ask()?);
        all.push(uvm);
    }
    println!("  {} μVMs resumed and answered", all.len());
    std::thread::sleep(SETTLE);
    let before = all
        .iter()
        .map(|uvm| Cost::of(uvm.vmm().pid()))
        .collect::<Result<Vec<_>>>()?;
    std::thread::sleep(IDLE);
    let mut measured = Measured::default();
    for (uvm, before) in all.iter().zip(&before) {
        let after = Cost::of(uvm.vmm().pid())?;
        measured.add("private memory", "MiB", after.private / 1024.0);
        measured.add(
            "private memory gained in a minute",
            "KiB",
            after.private - before.private,
        );
        measured.add("CPU time in a minute", "ms", after.cpu_ms - before.cpu_ms);
        for (name, kib) in &after.parts {
            measured.add(&format!("of it {name}"), "MiB", kib / 1024.0);
        }
    }
    // Not samples of one thing: what all ratios here are to.
    measured.add("1 MiB", "MiB", 1.0);
    measured.ratio("kiln-idle-private-mib/1", "private memory", "1 MiB")?;
    drop(all);
    fs::remove_dir_all(folder)?;
    Ok(measured)
}

fn available_kib() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.context("/proc/meminfo without MemAvailable")
}

/// What a process has cost so far.
#[derive(Debug, Default)]
struct Cost {
    /// KiB.
    private: f64,
    /// KiB by what is mapped.
    parts: BTreeMap<&'static str, f64>,
    cpu_ms: f64,
}

impl Cost {
    fn of(pid: u32) -> Result<Self> {
        let maps = fs::read_to_string(format!("/proc/{pid}/smaps"))
            .with_context(|| format!("the memory of process {pid}"))?;
        let mut cost = Self::default();
        for (kind, kib) in mappings(&maps) {
            cost.private += kib;
            *cost.parts.entry(kind).or_default() += kib;
        }
        for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
            let stat = match fs::read_to_string(thread?.path().join("schedstat")) {
                // It has ended since it was listed, and costs nothing any more.
                Err(error) if matches!(error.raw_os_error(), Some(ENOENT | ESRCH)) => continue,
                stat => stat?,
            };
            let ns: f64 = stat
                .split_whitespace()
                .next()
                .context("a thread's schedstat")?
                .parse()?;
            cost.cpu_ms += ns / 1e6;
        }
        Ok(cost)
    }
}

/// Kind and private KiB of each mapping in an smaps file.
fn mappings(text: &str) -> Vec<(&'static str, f64)> {
    let mut found = Vec::new();
    let mut lines = text.lines().peekable();
    while let Some(head) = lines.next() {
        let mut rest = String::new();
        while let Some(line) = lines.next_if(|line| !is_head(line)) {
            rest.push_str(line);
            rest.push('\n');
        }
        found.push((kind(head), private(&rest)));
    }
    found
}

/// `7f..-7f.. rw-p ...`, and not `Size: ...`.
fn is_head(line: &str) -> bool {
    line.split_whitespace()
        .next()
        .is_some_and(|word| word.contains('-') && !word.ends_with(':'))
}

fn kind(head: &str) -> &'static str {
    let mut words = head.split_whitespace();
    let length = words.next().and_then(|range| {
        let (from, to) = range.split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        number(to)?.checked_sub(number(from)?)
    });
    match words.nth(4) {
        Some(path) if path.ends_with("/memory") => "guest memory with data",
        Some(path) if path.ends_with("kiln-vmm") => "the program's data",
        Some("[heap]") => "heap",
        Some("[stack]") => "stacks",
        // No stack of a thread and no part of the heap is as large; huge pages are where the file has holes.
        None if length.is_some_and(|length| length >= 2 << 20 && length % (2 << 20) == 0) => {
            "guest memory of the file's holes"
        }
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_memory_is_told_by_what_is_mapped() {
        let text = "7f0000000000-7f0000200000 rw-p 00000000 00:00 0 \n\
            Size: 2048 kB\nPrivate_Clean: 0 kB\nPrivate_Dirty: 2048 kB\nVmFlags: rd wr \n\
            7f0000200000-7f0000300000 rw-p 00200000 08:01 77 /var/lib/x/memory\n\
            Private_Clean: 4 kB\nPrivate_Dirty: 8 kB\n\
            7ffe0000-7fff0000 rw-p 00000000 00:00 0 [stack]\nPrivate_Dirty: 12 kB\n";
        assert_eq!(
            mappings(text),
            [
                ("guest memory of the file's holes", 2048.0),
                ("guest memory with data", 12.0),
                ("stacks", 12.0)
            ]
        );
    }

    #[test]
    fn this_process_costs_something() {
        let cost = Cost::of(std::process::id()).unwrap();
        assert!(cost.private > 0.0 && cost.parts.len() > 1, "{cost:?}");
        assert!(available_kib().unwrap() > 0);
    }
}
