//! The guest's numbers in containerd's form.
//!
//! containerd, CRI and the kubelet read cgroup v2 metrics, whatever the node's own cgroups are: the
//! containers' cgroups are the guest's, and the guest has version 2.

use containerd_shim_protos::cgroups_v2::metrics as wire;
use kiln_agent_api::proto;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;

use crate::error::{Error, Result};
use crate::events::any;

/// "No limit", as cgroup files' `max` is passed on.
const NO_LIMIT: u64 = u64::MAX;

/// Packs a container's usage for `Stats` and `SandboxMetrics`.
pub fn metrics(stats: &proto::StatsResponse, network: &proto::NetworkState) -> Result<Any> {
    any(&convert(stats, network)).map_err(|e| Error::failed("encode the metrics", e))
}

fn convert(stats: &proto::StatsResponse, network: &proto::NetworkState) -> wire::Metrics {
    wire::Metrics {
        pids: MessageField::some(wire::PidsStat {
            current: stats.pids.current,
            // containerd writes 0 for no limit.
            limit: if stats.pids.max == NO_LIMIT {
                0
            } else {
                stats.pids.max
            },
            ..Default::default()
        }),
        cpu: MessageField::some(wire::CPUStat {
            usage_usec: stats.cpu.usage_usec,
            user_usec: stats.cpu.user_usec,
            system_usec: stats.cpu.system_usec,
            nr_periods: stats.cpu.nr_periods,
            nr_throttled: stats.cpu.nr_throttled,
            throttled_usec: stats.cpu.throttled_usec,
            psi: pressure(stats.cpu_pressure.as_ref()),
            ..Default::default()
        }),
        memory: MessageField::some(memory(stats)),
        memory_events: MessageField::some(memory_events(&stats.memory)),
        io: MessageField::some(wire::IOStat {
            usage: stats
                .io
                .iter()
                .map(|io| wire::IOEntry {
                    major: io.major,
                    minor: io.minor,
                    rbytes: io.rbytes,
                    wbytes: io.wbytes,
                    rios: io.rios,
                    wios: io.wios,
                    ..Default::default()
                })
                .collect(),
            psi: pressure(stats.io_pressure.as_ref()),
            ..Default::default()
        }),
        network: network
            .interfaces
            .iter()
            .filter(|i| i.name != "lo")
            .map(|i| wire::NetworkStat {
                name: i.name.clone(),
                rx_bytes: i.rx_bytes,
                rx_packets: i.rx_packets,
                rx_errors: i.rx_errors,
                rx_dropped: i.rx_dropped,
                tx_bytes: i.tx_bytes,
                tx_packets: i.tx_packets,
                tx_errors: i.tx_errors,
                tx_dropped: i.tx_dropped,
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    }
}

/// Nothing, where the guest's kernel does not count it: no figure is not the figure 0.
fn pressure(pressure: Option<&proto::Pressure>) -> MessageField<wire::PSIStats> {
    let data = |stall: &MessageField<proto::Stall>| {
        let data = stall.as_ref().map(|stall| wire::PSIData {
            avg10: stall.avg10,
            avg60: stall.avg60,
            avg300: stall.avg300,
            total: stall.total_usec,
            ..Default::default()
        });
        MessageField::from(data)
    };
    let stats = pressure.map(|pressure| wire::PSIStats {
        some: data(&pressure.some),
        full: data(&pressure.full),
        ..Default::default()
    });
    stats.into()
}

fn memory(stats: &proto::StatsResponse) -> wire::MemoryStat {
    let memory = &stats.memory;
    let stat = |key: &str| memory.stat.get(key).copied().unwrap_or(0);
    let sum = |key: &str| {
        let of = |kind: &str| stat(&format!("{key}_{kind}"));
        of("anon").saturating_add(of("file"))
    };
    wire::MemoryStat {
        anon: stat("anon"),
        file: stat("file"),
        kernel_stack: stat("kernel_stack"),
        slab: stat("slab"),
        sock: stat("sock"),
        shmem: stat("shmem"),
        file_mapped: stat("file_mapped"),
        file_dirty: stat("file_dirty"),
        file_writeback: stat("file_writeback"),
        anon_thp: stat("anon_thp"),
        inactive_anon: stat("inactive_anon"),
        active_anon: stat("active_anon"),
        // Usage less this is the working set that the kubelet evicts by.
        inactive_file: stat("inactive_file"),
        active_file: stat("active_file"),
        unevictable: stat("unevictable"),
        slab_reclaimable: stat("slab_reclaimable"),
        slab_unreclaimable: stat("slab_unreclaimable"),
        pgfault: stat("pgfault"),
        pgmajfault: stat("pgmajfault"),
        // The kernel split these in two; their sum is what was meant.
        workingset_refault: sum("workingset_refault"),
        workingset_activate: sum("workingset_activate"),
        workingset_nodereclaim: stat("workingset_nodereclaim"),
        pgrefill: stat("pgrefill"),
        pgscan: stat("pgscan"),
        pgsteal: stat("pgsteal"),
        pgactivate: stat("pgactivate"),
        pgdeactivate: stat("pgdeactivate"),
        pglazyfree: stat("pglazyfree"),
        pglazyfreed: stat("pglazyfreed"),
        thp_fault_alloc: stat("thp_fault_alloc"),
        thp_collapse_alloc: stat("thp_collapse_alloc"),
        usage: memory.current,
        usage_limit: memory.max,
        max_usage: memory.peak,
        swap_usage: memory.swap_current,
        swap_limit: memory.swap_max,
        psi: pressure(stats.memory_pressure.as_ref()),
        ..Default::default()
    }
}

fn memory_events(memory: &proto::MemoryStats) -> wire::MemoryEvents {
    let event = |key: &str| memory.events.get(key).copied().unwrap_or(0);
    wire::MemoryEvents {
        low: event("low"),
        high: event("high"),
        max: event("max"),
        oom: event("oom"),
        oom_kill: event("oom_kill"),
        oom_group_kill: event("oom_group_kill"),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::Message;

    #[test]
    fn kubelets_working_set_comes_out_right() {
        let mut stats = proto::StatsResponse::new();
        let memory = stats.memory.mut_or_insert_default();
        memory.current = 10 << 20;
        memory.max = 128 << 20;
        memory.stat.insert("inactive_file".into(), 3 << 20);
        memory.stat.insert("workingset_refault_anon".into(), 2);
        memory.stat.insert("workingset_refault_file".into(), 5);
        memory.events.insert("oom_kill".into(), 1);
        stats.cpu.mut_or_insert_default().usage_usec = 1234;
        stats.pids.mut_or_insert_default().max = NO_LIMIT;
        let any = metrics(&stats, &proto::NetworkState::new()).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let out = wire::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(out.memory.usage - out.memory.inactive_file, 7 << 20);
        assert_eq!(out.memory.usage_limit, 128 << 20);
        assert_eq!(out.memory.workingset_refault, 7);
        assert_eq!(out.memory_events.oom_kill, 1);
        assert_eq!(out.cpu.usage_usec, 1234);
        assert_eq!(out.pids.limit, 0);
    }

    #[test]
    fn pressure_is_told_where_it_is_counted() {
        let mut stats = proto::StatsResponse::new();
        let some = stats.cpu_pressure.mut_or_insert_default();
        some.some.mut_or_insert_default().avg10 = 2.5;
        some.full.mut_or_insert_default().total_usec = 7;
        let out = convert(&stats, &proto::NetworkState::new());
        assert_eq!((out.cpu.psi.some.avg10, out.cpu.psi.full.total), (2.5, 7));
        assert!(out.memory.psi.is_none() && out.io.psi.is_none());
    }

    #[test]
    fn sums_of_a_guests_numbers_have_an_end() {
        let mut stats = proto::StatsResponse::new();
        let memory = stats.memory.mut_or_insert_default();
        for kind in ["anon", "file"] {
            let name = format!("workingset_refault_{kind}");
            memory.stat.insert(name, u64::MAX);
        }
        let out = convert(&stats, &proto::NetworkState::new());
        assert_eq!(out.memory.workingset_refault, u64::MAX);
    }

    #[test]
    fn loopback_is_not_the_pods_network() {
        let interface = |name: &str, rx_bytes| proto::InterfaceState {
            name: name.into(),
            rx_bytes,
            ..Default::default()
        };
        let network = proto::NetworkState {
            interfaces: vec![interface("lo", 1), interface("eth0", 2)],
            ..Default::default()
        };
        let out = convert(&proto::StatsResponse::new(), &network);
        assert_eq!(out.network.len(), 1);
        assert_eq!(
            (out.network[0].name.as_str(), out.network[0].rx_bytes),
            ("eth0", 2)
        );
    }
}
