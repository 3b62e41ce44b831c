//! What a cgroup has used, may use and has waited for, as the kernel counts it.

use std::collections::BTreeMap;

use kiln_agent_api::proto;

use super::cgroup::Cgroup;

/// The figures of a cgroup.
pub(super) fn of(cgroup: &Cgroup, taken_at_ns: i64) -> proto::StatsResponse {
    let cpu = cgroup.table("cpu.stat");
    let used = |key: &str| cpu.get(key).copied().unwrap_or(0);
    let mut stats = proto::StatsResponse::new();
    stats.taken_at_ns = taken_at_ns;
    stats.cpu = Some(proto::CpuStats {
        usage_usec: used("usage_usec"),
        user_usec: used("user_usec"),
        system_usec: used("system_usec"),
        nr_periods: used("nr_periods"),
        nr_throttled: used("nr_throttled"),
        throttled_usec: used("throttled_usec"),
        ..Default::default()
    })
    .into();
    stats.memory = Some(proto::MemoryStats {
        current: cgroup.number("memory.current").unwrap_or(0),
        max: cgroup.number("memory.max").unwrap_or(u64::MAX),
        peak: cgroup.number("memory.peak").unwrap_or(0),
        swap_current: cgroup.number("memory.swap.current").unwrap_or(0),
        swap_max: cgroup.number("memory.swap.max").unwrap_or(u64::MAX),
        stat: cgroup.table("memory.stat").into_iter().collect(),
        events: cgroup.table("memory.events").into_iter().collect(),
        ..Default::default()
    })
    .into();
    stats.pids = Some(proto::PidsStats {
        current: cgroup.number("pids.current").unwrap_or(0),
        max: cgroup.number("pids.max").unwrap_or(u64::MAX),
        ..Default::default()
    })
    .into();
    stats.io = cgroup.text("io.stat").lines().filter_map(io).collect();
    stats.cpu_pressure = pressure(&cgroup.text("cpu.pressure")).into();
    stats.memory_pressure = pressure(&cgroup.text("memory.pressure")).into();
    stats.io_pressure = pressure(&cgroup.text("io.pressure")).into();
    stats
}

/// `8:0 rbytes=1 wbytes=2 ...`
fn io(line: &str) -> Option<proto::IoStats> {
    let (device, values) = line.split_once(' ')?;
    let (major, minor) = device.split_once(':')?;
    let values = pairs(values);
    let of = |key| values.get(key).and_then(|n| n.parse().ok()).unwrap_or(0);
    Some(proto::IoStats {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        rbytes: of("rbytes"),
        wbytes: of("wbytes"),
        rios: of("rios"),
        wios: of("wios"),
        ..Default::default()
    })
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and a line for `full`. None from a kernel that doesn't count.
fn pressure(text: &str) -> Option<proto::Pressure> {
    let of = |kind: &str| {
        let mut lines = text.lines();
        let line = lines.find_map(|line| line.strip_prefix(kind)?.strip_prefix(' '))?;
        let values = pairs(line);
        let average = |key| values.get(key).and_then(|n| n.parse().ok()).unwrap_or(0.0);
        Some(proto::Stall {
            avg10: average("avg10"),
            avg60: average("avg60"),
            avg300: average("avg300"),
            total_usec: values.get("total")?.parse().ok()?,
            ..Default::default()
        })
    };
    let (some, full) = (of("some"), of("full"));
    (some.is_some() || full.is_some()).then(|| proto::Pressure {
        some: some.into(),
        full: full.into(),
        ..Default::default()
    })
}

fn pairs(words: &str) -> BTreeMap<&str, &str> {
    words
        .split_whitespace()
        .filter_map(|word| word.split_once('='))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_of_each_device_is_read() {
        let io = io("254:16 rbytes=4096 wbytes=1 rios=2 wios=3 dbytes=0 dios=0").expect("io");
        assert_eq!((io.major, io.minor, io.rbytes, io.wios), (254, 16, 4096, 3));
    }

    #[test]
    fn what_is_no_io_is_none() {
        assert!(io("").is_none());
    }

    #[test]
    fn pressure_has_both_kinds() {
        let text = "some avg10=1.50 avg60=0.25 avg300=0.00 total=1234\n\
                    full avg10=0.10 avg60=0.00 avg300=0.00 total=34\n";
        let pressure = pressure(text).expect("pressure");
        assert_eq!((pressure.some.avg10, pressure.some.avg60), (1.5, 0.25));
        assert_eq!(
            (pressure.some.total_usec, pressure.full.total_usec),
            (1234, 34)
        );
    }

    #[test]
    fn kernel_that_does_not_count_has_no_pressure() {
        assert!(pressure("").is_none());
    }
}
