//! What the kernel counts, which no noisy machine blurs: for the whole node between two moments,
//! and the private memory of a pod's processes.

use std::fs;

use anyhow::{Context, Result};

use crate::tracepoints::Tracepoint;

/// What is counted while it lives.
#[derive(Debug)]
pub(crate) struct Counting(Vec<Tracepoint>);

impl Counting {
    /// Begins to count what the kernel counts only if asked.
    pub(crate) fn begin() -> Result<Self> {
        let events = [
            ("system calls", "raw_syscalls/sys_enter"),
            ("VM exits", "kvm/kvm_exit"),
        ];
        let mut counted = Vec::new();
        for (name, event) in events {
            counted.extend(Tracepoint::count(name, event)?);
        }
        Ok(Counting(counted))
    }

    /// All counters now.
    pub(crate) fn now(&self) -> Result<Counters> {
        let mut counters = Counters::read()?;
        for tracepoint in &self.0 {
            // Counts of one bench stay far below what an f64 holds exactly.
            #[allow(clippy::cast_precision_loss)]
            let value = tracepoint.read()? as f64;
            counters.0.push((tracepoint.name, "count", value));
        }
        Ok(counters)
    }
}

/// The node's counters at one moment.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Counters(Vec<(&'static str, &'static str, f64)>);

impl Counters {
    /// Now.
    fn read() -> Result<Self> {
        let stat = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
        let memory = fs::read_to_string("/proc/vmstat").context("cannot read /proc/vmstat")?;
        // Not every kernel keeps this; the node's does.
        let schedule = fs::read_to_string("/proc/schedstat").ok();
        Self::parse(&stat, &memory, schedule.as_deref())
    }

    fn parse(stat: &str, memory: &str, schedule: Option<&str>) -> Result<Self> {
        let value = |text: &str, name: &str| -> Result<f64> {
            text.lines()
                .find_map(|line| {
                    line.strip_prefix(name)?
                        .strip_prefix(' ')?
                        .trim()
                        .parse()
                        .ok()
                })
                .with_context(|| format!("the kernel does not count {name}"))
        };
        let mut counters = vec![
            ("context switches", "count", value(stat, "ctxt")?),
            ("processes and threads", "count", value(stat, "processes")?),
            ("page faults", "count", value(memory, "pgfault")?),
            ("major page faults", "count", value(memory, "pgmajfault")?),
            ("read from disk", "KiB", value(memory, "pgpgin")?),
        ];
        if let Some(schedule) = schedule {
            // On the counted clock a nanosecond of this is an instruction.
            counters.push(("CPU time", "ms", cpu_nanoseconds(schedule)? / 1e6));
        }
        Ok(Counters(counters))
    }

    /// Name, unit and increase since `before`.
    pub(crate) fn since(&self, before: &Counters) -> Vec<(&'static str, &'static str, f64)> {
        let pairs = self.0.iter().zip(&before.0);
        pairs
            .map(|((name, unit, now), (_, _, then))| (*name, *unit, now - then))
            .collect()
    }
}

/// How long tasks ran, on all CPUs together.
fn cpu_nanoseconds(schedule: &str) -> Result<f64> {
    let mut sum = 0.0;
    for line in schedule.lines().filter(|line| line.starts_with("cpu")) {
        let field = line.split_whitespace().nth(7);
        let field: f64 = field
            .and_then(|field| field.parse().ok())
            .with_context(|| format!("/proc/schedstat: {line:?}"))?;
        sum += field;
    }
    Ok(sum)
}

/// Private memory in KiB of all processes that belong to a pod: its id is in their arguments, or
/// `owner` in the name of their cgroup.
pub(crate) fn private_memory(id: &str, owner: &str) -> Result<f64> {
    let mut sum = 0.0;
    for process in kiln_e2e::node::processes()? {
        let folder = format!("/proc/{}", process.pid);
        let cgroup = fs::read_to_string(format!("{folder}/cgroup")).unwrap_or_default();
        if process.command.contains(id) || cgroup.contains(owner) {
            let memory = fs::read_to_string(format!("{folder}/smaps_rollup")).unwrap_or_default();
            sum += private(&memory);
        }
    }
    Ok(sum)
}

pub(crate) fn private(memory: &str) -> f64 {
    memory
        .lines()
        .filter(|line| line.starts_with("Private_"))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCHEDULE: &str = "version 15\ntimestamp 4\n\
        cpu0 0 0 0 0 0 0 3000000 9 9\ndomain0 3 1 2\ncpu1 0 0 0 0 0 0 500000 9 9\n";

    #[test]
    fn cpu_time_is_the_sum_over_cpus() {
        assert_eq!(cpu_nanoseconds(SCHEDULE).unwrap(), 3_500_000.0);
        assert!(cpu_nanoseconds("cpu0 1 2\n").is_err());
    }

    #[test]
    fn counters_are_found_by_their_whole_name_and_subtracted() {
        let memory = "pgpgin 8\npgfault 100\npgmajfault 3\n";
        let before =
            Counters::parse("cpu 1 2\nctxt 10\nprocesses 5\n", memory, Some(SCHEDULE)).unwrap();
        let after = Counters::parse("ctxt 25\nprocesses 6\n", memory, Some(SCHEDULE)).unwrap();
        let since = after.since(&before);
        assert_eq!(since[0], ("context switches", "count", 15.0));
        assert_eq!(since[3], ("major page faults", "count", 0.0));
        assert!(Counters::parse("ctxt 1\n", memory, Some(SCHEDULE)).is_err());
    }

    #[test]
    fn private_memory_is_clean_and_dirty_and_huge_but_not_shared() {
        let text = "Rss: 100 kB\nShared_Clean: 50 kB\nPrivate_Clean: 4 kB\nPrivate_Dirty: 8 kB\n";
        assert_eq!(private(text), 12.0);
    }

    #[test]
    fn this_kernel_counts_all_of_it() {
        Counters::read().unwrap();
    }
}
