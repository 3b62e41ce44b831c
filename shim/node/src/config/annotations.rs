//! The annotations of a pod, as far as the node lets it have them.

use std::collections::BTreeMap;

use kiln_uvm::Flush;
use serde::Deserialize;

use super::{Config, ConfigError, host_memory, positive, size};
use kiln_uvm::size::Bytes;

/// What every annotation of ours starts with.
pub const ANNOTATION_PREFIX: &str = "kiln.dev/";

const CPUS: &str = "kiln.dev/cpus";
const MEMORY: &str = "kiln.dev/memory";
const DEBUG: &str = "kiln.dev/debug";
const OVERLAY_RAM: &str = "kiln.dev/overlay-ram";
const OVERLAY_DISK: &str = "kiln.dev/overlay-disk";
const OVERLAY_FLUSH: &str = "kiln.dev/overlay-flush";
/// All there are; the file's allow-list is a subset.
pub(super) const KNOWN: [&str; 6] = [
    CPUS,
    MEMORY,
    DEBUG,
    OVERLAY_RAM,
    OVERLAY_DISK,
    OVERLAY_FLUSH,
];

/// What takes nothing from the node; the others are its owner's to allow.
pub(super) const HARMLESS: [&str; 1] = [OVERLAY_FLUSH];
/// The most disk that an annotation may ask for, unless the file says otherwise.
pub(super) const MOST_OVERLAY_DISK: u64 = 64 << 30;

/// The most that a pod's annotations may ask for; more is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Most {
    /// vCPUs.
    pub cpus: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes of RAM for writes.
    pub overlay_ram: u64,
    /// Bytes of the node's disk for writes.
    pub overlay_disk: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileAnnotations {
    pub(super) allow: Option<Vec<String>>,
    max_cpus: Option<u32>,
    max_memory: Option<String>,
    max_overlay_ram: Option<String>,
    max_overlay_disk: Option<String>,
}

impl FileAnnotations {
    /// The last two are the node's vCPUs for one pod and its RAM for all pods' writes.
    pub(super) fn most(&self, max_cpus: u32, node_ram: u64) -> Result<Most, ConfigError> {
        Ok(Most {
            cpus: positive("annotations.max_cpus", self.max_cpus, max_cpus)?,
            memory: size(
                "annotations.max_memory",
                self.max_memory.as_deref(),
                host_memory() / 2,
            )?,
            overlay_ram: size(
                "annotations.max_overlay_ram",
                self.max_overlay_ram.as_deref(),
                node_ram,
            )?,
            overlay_disk: size(
                "annotations.max_overlay_disk",
                self.max_overlay_disk.as_deref(),
                MOST_OVERLAY_DISK,
            )?,
        })
    }
}

/// What a pod's annotations ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodOverrides {
    /// vCPUs.
    pub cpus: Option<u32>,
    /// Memory.
    pub memory: Option<u64>,
    /// Log at debug level.
    pub debug: Option<bool>,
    /// RAM of the writable layers.
    pub overlay_ram: Option<u64>,
    /// Disk of the writable layers.
    pub overlay_disk: Option<u64>,
    /// What flushes of the writable layers do.
    pub overlay_flush: Option<Flush>,
}

impl Config {
    /// Reads a pod's `kiln.dev/` annotations. One that is unknown or not on the allow-list is an
    /// error, so that nobody believes it had an effect.
    pub fn pod_overrides(
        &self,
        annotations: &BTreeMap<String, String>,
    ) -> Result<PodOverrides, ConfigError> {
        let mut overrides = PodOverrides::default();
        for (key, value) in annotations
            .iter()
            .filter(|(k, _)| k.starts_with(ANNOTATION_PREFIX))
        {
            if !self.allowed_annotations.contains(key) {
                return Err(ConfigError::NotAllowed {
                    key: key.clone(),
                    allowed: self.allowed_annotations.join(", "),
                });
            }
            self.read(key, value, &mut overrides)?;
        }
        Ok(overrides)
    }

    /// Reads one that is allowed.
    fn read(&self, key: &str, value: &str, into: &mut PodOverrides) -> Result<(), ConfigError> {
        let annotation = Annotation { key, value };
        let most = &self.most;
        match key {
            CPUS => into.cpus = Some(annotation.cpus(most.cpus)?),
            MEMORY => into.memory = Some(annotation.bytes(most.memory, "annotations.max_memory")?),
            OVERLAY_RAM => {
                let setting = "annotations.max_overlay_ram";
                into.overlay_ram = Some(annotation.bytes(most.overlay_ram, setting)?);
            }
            OVERLAY_DISK => {
                let setting = "annotations.max_overlay_disk";
                into.overlay_disk = Some(annotation.bytes(most.overlay_disk, setting)?);
            }
            OVERLAY_FLUSH => {
                into.overlay_flush = Some(match value {
                    "none" => Flush::None,
                    "disk" => Flush::Disk,
                    _ => return Err(annotation.wrong("it must be none or disk")),
                });
            }
            DEBUG => {
                let wrong = |_| annotation.wrong("it must be true or false");
                into.debug = Some(value.parse().map_err(wrong)?);
            }
            _ => {}
        }
        Ok(())
    }
}

/// One annotation of ours.
#[derive(Debug, Clone, Copy)]
struct Annotation<'a> {
    key: &'a str,
    value: &'a str,
}

impl Annotation<'_> {
    fn wrong(&self, expected: &'static str) -> ConfigError {
        ConfigError::Annotation {
            key: self.key.to_owned(),
            value: self.value.to_owned(),
            expected,
        }
    }

    fn too_much(&self, most: String, setting: &'static str) -> ConfigError {
        ConfigError::TooMuch {
            key: self.key.to_owned(),
            value: self.value.to_owned(),
            most,
            setting,
        }
    }

    fn cpus(&self, most: u32) -> Result<u32, ConfigError> {
        match self.value.parse() {
            Ok(cpus) if cpus > most => Err(self.too_much(most.to_string(), "annotations.max_cpus")),
            Ok(cpus) if cpus > 0 => Ok(cpus),
            _ => Err(self.wrong("it must be a whole number of at least 1")),
        }
    }

    fn bytes(&self, most: u64, setting: &'static str) -> Result<u64, ConfigError> {
        let wrong = |_| self.wrong("it must be a size such as 512MiB, 2Gi or a number of bytes");
        match Bytes::more_than_none(self.value).map_err(wrong)? {
            bytes if bytes > most => Err(self.too_much(format!("{most} bytes"), setting)),
            bytes => Ok(bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_uvm::size::MIB;
    use std::path::Path;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("config.toml"))
    }

    fn annotations(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    /// One that allows everything, on a node of 8 CPUs and 4 GiB.
    fn generous() -> Config {
        Config {
            allowed_annotations: KNOWN.map(str::to_owned).to_vec(),
            most: Most {
                cpus: 8,
                memory: 4 << 30,
                overlay_ram: 1 << 30,
                overlay_disk: 64 << 30,
            },
            ..Config::default()
        }
    }

    #[test]
    fn what_takes_from_the_node_is_the_nodes_to_allow() {
        let config = Config::default();
        for (key, value) in [
            (CPUS, "1"),
            (MEMORY, "1Mi"),
            (OVERLAY_RAM, "1Mi"),
            (OVERLAY_DISK, "1Mi"),
            (DEBUG, "true"),
        ] {
            let error = config
                .pod_overrides(&annotations(&[(key, value)]))
                .unwrap_err();
            let text = error.to_string();
            assert!(
                text.contains(key) && text.contains("annotations.allow"),
                "{text}"
            );
        }
        let flush = config.pod_overrides(&annotations(&[(OVERLAY_FLUSH, "disk")]));
        assert_eq!(flush.unwrap().overlay_flush, Some(Flush::Disk));
    }

    #[test]
    fn nobody_gets_more_than_the_maximum_and_is_told_where_it_is_set() {
        let config = generous();
        for (key, most, more, setting) in [
            (CPUS, "8", "9", "annotations.max_cpus"),
            (MEMORY, "4Gi", "4097Mi", "annotations.max_memory"),
            (OVERLAY_RAM, "1Gi", "1025Mi", "annotations.max_overlay_ram"),
            (
                OVERLAY_DISK,
                "64Gi",
                "18446744073709551615",
                "annotations.max_overlay_disk",
            ),
        ] {
            config.pod_overrides(&annotations(&[(key, most)])).unwrap();
            let error = config
                .pod_overrides(&annotations(&[(key, more)]))
                .unwrap_err();
            let text = error.to_string();
            for part in [key, more, setting] {
                assert!(text.contains(part), "{part} in {text}");
            }
        }
    }

    #[test]
    fn maxima_follow_the_nodes_own_limits_unless_they_are_written() {
        let config = parse("[uvm]\nmax_cpus = 3\n[overlay]\nnode_ram = '1GiB'").unwrap();
        assert_eq!((config.most.cpus, config.most.overlay_ram), (3, 1 << 30));
        let written = "[annotations]\nmax_cpus = 2\nmax_memory = '1GiB'\n\
                       max_overlay_ram = '2GiB'\nmax_overlay_disk = '3GiB'";
        let most = Most {
            cpus: 2,
            memory: 1 << 30,
            overlay_ram: 2 << 30,
            overlay_disk: 3 << 30,
        };
        assert_eq!(parse(written).unwrap().most, most);
        assert!(parse("[annotations]\nmax_cpus = 0").is_err());
        assert!(parse("[annotations]\nmax_memory = 'much'").is_err());
    }

    #[test]
    fn annotations_set_the_size() {
        let config = generous();
        let asked = annotations(&[
            ("kiln.dev/cpus", "3"),
            ("kiln.dev/memory", "1Gi"),
            ("a", "b"),
        ]);
        let overrides = config.pod_overrides(&asked).unwrap();
        assert_eq!(overrides.cpus, Some(3));
        assert_eq!(overrides.memory, Some(1024 * MIB));
    }

    #[test]
    fn what_flushes_do_is_the_nodes_to_say_and_then_the_pods() {
        let config = parse("[overlay]\nflush = 'disk'").unwrap();
        assert_eq!(config.overlay_flush, Flush::Disk);
        assert!(parse("[overlay]\nflush = 'always'").is_err());
        let of = |pairs: &[_]| config.pod_overrides(&annotations(pairs)).unwrap();
        assert_eq!(of(&[]).overlay_flush, None);
        for (value, flush) in [("none", Flush::None), ("disk", Flush::Disk)] {
            let asked = of(&[("kiln.dev/overlay-flush", value)]);
            assert_eq!(asked.overlay_flush, Some(flush));
        }
    }

    #[test]
    fn annotations_off_the_list_are_refused_not_ignored() {
        let config = parse("[annotations]\nallow = ['kiln.dev/cpus']").unwrap();
        assert!(
            config
                .pod_overrides(&annotations(&[("kiln.dev/cpus", "2")]))
                .is_ok()
        );
        for key in ["kiln.dev/memory", "kiln.dev/invented"] {
            let error = config
                .pod_overrides(&annotations(&[(key, "1Gi")]))
                .unwrap_err();
            assert!(error.to_string().contains(key), "{error}");
        }
        assert!(parse("[annotations]\nallow = ['kiln.dev/invented']").is_err());
    }

    #[test]
    fn nonsense_values_say_what_would_make_sense() {
        let config = generous();
        for (key, value) in [
            ("kiln.dev/cpus", "0"),
            ("kiln.dev/memory", "much"),
            ("kiln.dev/overlay-flush", "sometimes"),
        ] {
            let error = config
                .pod_overrides(&annotations(&[(key, value)]))
                .unwrap_err();
            assert!(error.to_string().contains("must be"), "{error}");
        }
    }
}
