//! How big a pod's μVM is to be.

use kiln_uvm::size::{BLOCK, Size};
use serde::Deserialize;

use kiln_node::config::{Config, PodOverrides};

/// CPU and memory limits as the OCI spec and CRI's annotations state them. Zero or less: none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// CFS quota in microseconds per period.
    pub cpu_quota: i64,
    /// CFS period in microseconds.
    pub cpu_period: u64,
    /// Bytes.
    pub memory: i64,
}

impl Limits {
    /// Whole vCPUs that give at least the quota.
    fn cpus(&self) -> Option<u32> {
        let quota = u64::try_from(self.cpu_quota).ok().filter(|&q| q > 0)?;
        // 100 ms is the kernel's default period.
        let period = if self.cpu_period == 0 {
            100_000
        } else {
            self.cpu_period
        };
        u32::try_from(quota.div_ceil(period)).ok()
    }

    fn memory(&self) -> Option<u64> {
        // "Unlimited" comes as -1, 0 or a huge number.
        u64::try_from(self.memory)
            .ok()
            .filter(|&m| m > 0 && m < 1 << 50)
    }

    /// The limits of two containers together: without a limit on one of them there is none on both.
    pub fn plus(self, other: Self) -> Self {
        let cpu = match (self.cpus_exact(), other.cpus_exact()) {
            (Some(a), Some(b)) => (a.saturating_add(b), 100_000),
            _ => (0, 0),
        };
        let memory = match (self.memory(), other.memory()) {
            (Some(a), Some(b)) => i64::try_from(a.saturating_add(b)).unwrap_or(0),
            _ => 0,
        };
        Self {
            cpu_quota: cpu.0,
            cpu_period: cpu.1,
            memory,
        }
    }

    /// These with room for what the configuration gives to who states nothing, where they limit something that `other` does not:
    /// CRI's sum for a pod leaves out containers without limits.
    pub fn with_room_for(self, other: Self, config: &Config) -> Self {
        let mut room = self;
        if let (Some(memory), None) = (self.memory(), other.memory()) {
            let memory = memory.saturating_add(config.default_memory);
            room.memory = i64::try_from(memory).unwrap_or(0);
        }
        if let (Some(quota), None) = (self.cpus_exact(), other.cpus_exact()) {
            let more = i64::from(config.default_cpus) * 100_000;
            (room.cpu_quota, room.cpu_period) = (quota.saturating_add(more), 100_000);
        }
        room
    }

    /// The quota in microseconds per 100 ms.
    fn cpus_exact(&self) -> Option<i64> {
        let quota = Some(self.cpu_quota).filter(|&q| q > 0)?;
        let period = if self.cpu_period == 0 {
            100_000
        } else {
            self.cpu_period
        };
        let per = i128::from(quota) * 100_000 / i128::from(period);
        i64::try_from(per).ok()
    }
}

/// The size for a pod: its annotations first, then its limits, then the configured default.
pub fn size_of(limits: Limits, overrides: &PodOverrides, config: &Config) -> Size {
    let cpus = overrides
        .cpus
        .or_else(|| limits.cpus())
        .unwrap_or(config.default_cpus);
    let memory = overrides
        .memory
        .or_else(|| limits.memory())
        .unwrap_or(config.default_memory);
    Size {
        cpus: cpus.clamp(1, config.max_cpus),
        memory: memory
            .saturating_add(config.guest_overhead)
            .checked_next_multiple_of(BLOCK)
            .unwrap_or(u64::MAX - u64::MAX % BLOCK),
    }
}

/// The part of an OCI `LinuxResources` that says how big the μVM must be.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Resources {
    cpu: Option<Cpu>,
    memory: Option<Memory>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Cpu {
    quota: Option<i64>,
    period: Option<u64>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Memory {
    limit: Option<i64>,
}

impl Resources {
    /// The limits it states.
    pub fn limits(&self) -> Limits {
        let cpu = self.cpu.clone().unwrap_or_default();
        Limits {
            cpu_quota: cpu.quota.unwrap_or(0),
            cpu_period: cpu.period.unwrap_or(0),
            memory: self.memory.as_ref().and_then(|m| m.limit).unwrap_or(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_uvm::size::MIB;

    fn config() -> Config {
        Config {
            max_cpus: 8,
            ..Config::default()
        }
    }

    fn limits(cpu_quota: i64, memory: i64) -> Limits {
        Limits {
            cpu_quota,
            cpu_period: 100_000,
            memory,
        }
    }

    #[test]
    fn a_fraction_of_a_cpu_gets_a_whole_one() {
        let none = PodOverrides::default();
        for (quota, cpus) in [(1000, 1), (100_000, 1), (100_001, 2), (250_000, 3)] {
            assert_eq!(
                size_of(limits(quota, 0), &none, &config()).cpus,
                cpus,
                "{quota}"
            );
        }
    }

    #[test]
    fn the_guests_own_memory_comes_on_top_of_the_pods() {
        let size = size_of(limits(0, 128 << 20), &PodOverrides::default(), &config());
        assert_eq!(size.memory, (128 + 64) * MIB);
    }

    #[test]
    fn no_limit_means_the_default_whichever_way_it_is_written() {
        let expected = Size {
            cpus: 1,
            memory: (256 + 64) * MIB,
        };
        for limits in [limits(0, 0), limits(-1, -1), limits(-1, i64::MAX)] {
            assert_eq!(
                size_of(limits, &PodOverrides::default(), &config()),
                expected
            );
        }
    }

    #[test]
    fn annotations_win_and_the_node_caps() {
        let overrides = PodOverrides {
            cpus: Some(100),
            memory: Some(1 << 30),
            debug: None,
            ..Default::default()
        };
        let size = size_of(limits(100_000, 1 << 20), &overrides, &config());
        assert_eq!(
            size,
            Size {
                cpus: 8,
                memory: (1024 + 64) * MIB
            }
        );
    }

    #[test]
    fn the_largest_numbers_there_are_make_a_size_all_the_same() {
        let overrides = PodOverrides {
            cpus: Some(u32::MAX),
            memory: Some(u64::MAX),
            ..Default::default()
        };
        let size = size_of(Limits::default(), &overrides, &config());
        assert_eq!((size.cpus, size.memory % BLOCK), (8, 0));
        let most = Limits {
            cpu_quota: i64::MAX,
            cpu_period: 1,
            memory: i64::MAX,
        };
        assert_eq!(most.plus(most).cpus(), None);
        assert_eq!(size_of(most, &PodOverrides::default(), &config()).cpus, 1);
    }

    #[test]
    fn limits_add_up_unless_one_is_missing() {
        let sum = limits(50_000, 100 << 20).plus(Limits {
            cpu_quota: 25_000,
            cpu_period: 50_000,
            memory: 28 << 20,
        });
        assert_eq!(sum, limits(100_000, 128 << 20));
        assert_eq!(limits(50_000, 1 << 20).plus(Limits::default()).cpus(), None);
    }

    #[test]
    fn who_has_no_limit_gets_the_default_beside_those_who_have_one() {
        let (some, none) = (limits(50_000, 100 << 20), Limits::default());
        assert_eq!(some.with_room_for(some, &config()), some);
        let both = some.with_room_for(none, &config());
        assert_eq!(both, limits(150_000, 356 << 20));
        let memory = some.with_room_for(limits(1000, 0), &config());
        assert_eq!(memory, limits(50_000, 356 << 20));
        assert_eq!(none.with_room_for(none, &config()), none);
    }

    #[test]
    fn resources_of_the_oci_spec_are_read_leniently() {
        let json = r#"{"cpu":{"shares":2,"quota":150000,"period":100000},
                       "memory":{"limit":1048576},"unified":{"memory.high":"1"}}"#;
        let resources: Resources = serde_json::from_str(json).unwrap();
        assert_eq!(resources.limits(), limits(150_000, 1 << 20));
    }
}
