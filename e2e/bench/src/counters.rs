//! What the kernel counts, which no noisy machine blurs: for the whole node between two moments,
//! and the private memory of a pod's processes.

use std::fs;

use anyhow::{Context, Result};

/// The node's counters at one moment.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Counters(Vec<(&'static str, &'static str, f64)>);

impl Counters {
    /// Now.
    pub(crate) fn read() -> Result<Self> {
        let stat = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
        let memory = fs::read_to_string("/proc/vmstat").context("cannot read /proc/vmstat")?;
        Self::parse(&stat, &memory)
    }

    fn parse(stat: &str, memory: &str) -> Result<Self> {
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
        Ok(Counters(vec![
            ("context switches", "count", value(stat, "ctxt")?),
            ("processes and threads", "count", value(stat, "processes")?),
            ("page faults", "count", value(memory, "pgfault")?),
            ("major page faults", "count", value(memory, "pgmajfault")?),
            ("read from disk", "KiB", value(memory, "pgpgin")?),
        ]))
    }

    /// Name, unit and increase since `before`.
    pub(crate) fn since(&self, before: &Counters) -> Vec<(&'static str, &'static str, f64)> {
        let pairs = self.0.iter().zip(&before.0);
        pairs
            .map(|((name, unit, now), (_, _, then))| (*name, *unit, now - then))
            .collect()
    }
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

fn private(memory: &str) -> f64 {
    memory
        .lines()
        .filter(|line| line.starts_with("Private_"))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_found_by_their_whole_name_and_subtracted() {
        let memory = "pgpgin 8\npgfault 100\npgmajfault 3\n";
        let before = Counters::parse("cpu 1 2\nctxt 10\nprocesses 5\n", memory).unwrap();
        let after = Counters::parse("ctxt 25\nprocesses 6\n", memory).unwrap();
        let since = after.since(&before);
        assert_eq!(since[0], ("context switches", "count", 15.0));
        assert_eq!(since[3], ("major page faults", "count", 0.0));
        assert!(Counters::parse("ctxt 1\n", memory).is_err());
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
