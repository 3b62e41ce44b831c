//! The configuration file and the annotations that override it for one pod.
//!
//! Parsed into what was written ([`File`]), turned once into what is meant ([`Config`]); only the
//! latter reaches the rest. An absent file is the default configuration. Unknown keys are errors:
//! a misspelt limit must not be no limit.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, io};

use serde::Deserialize;

use kiln_vmm_control::{DEFAULT_SPILL_DIRECTORY, Flush, ScratchLimits};

use crate::bootstrap::AnswerForm;
use crate::size::{MIB, ParseSizeError, parse_size};

/// Where the file is looked for when containerd's runtime options name none.
pub const DEFAULT_PATH: &str = "/etc/kiln/config.toml";
/// What every annotation of ours starts with.
pub const ANNOTATION_PREFIX: &str = "kiln.dev/";

const CPUS: &str = "kiln.dev/cpus";
const MEMORY: &str = "kiln.dev/memory";
const DEBUG: &str = "kiln.dev/debug";
const OVERLAY_RAM: &str = "kiln.dev/overlay-ram";
const OVERLAY_DISK: &str = "kiln.dev/overlay-disk";
const OVERLAY_FLUSH: &str = "kiln.dev/overlay-flush";
/// All there are; the file's allow-list is a subset.
const KNOWN: [&str; 6] = [
    CPUS,
    MEMORY,
    DEBUG,
    OVERLAY_RAM,
    OVERLAY_DISK,
    OVERLAY_FLUSH,
];

/// What is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The μVM store.
    pub store: PathBuf,
    /// Where the state of running pods lies; on a tmpfs.
    pub state_dir: PathBuf,
    /// The VMM's program.
    pub vmm: PathBuf,
    /// Images made from containers' root file systems.
    pub rootfs_cache: PathBuf,
    /// How many bytes of them are kept when nobody uses them.
    pub rootfs_cache_size: u64,
    /// User and group ids from here on are the VMMs', one for each pod.
    pub vmm_ids: u32,
    /// vCPUs of a pod that states nothing.
    pub default_cpus: u32,
    /// Memory of a pod that states nothing, without the guest's own share.
    pub default_memory: u64,
    /// What the guest's kernel and agent need besides the pod's memory.
    pub guest_overhead: u64,
    /// No pod gets more vCPUs.
    pub max_cpus: u32,
    /// What a pod's containers may write to their root file systems.
    pub overlay: ScratchLimits,
    /// What their flushes do.
    pub overlay_flush: Flush,
    /// The RAM that all pods' writes may take together.
    pub overlay_node_ram: u64,
    /// Where the part of it lies that has left RAM.
    pub overlay_dir: PathBuf,
    /// Answer every old-protocol `start` in this form instead of asking containerd's version.
    pub answer: Option<AnswerForm>,
    /// Log at debug level.
    pub debug: bool,
    /// Which annotations pods may use.
    pub allowed_annotations: Vec<String>,
}

/// What was written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    store: Option<PathBuf>,
    state_dir: Option<PathBuf>,
    vmm: Option<PathBuf>,
    rootfs_cache: Option<PathBuf>,
    rootfs_cache_size: Option<String>,
    vmm_ids: Option<u32>,
    debug: Option<bool>,
    answer: Option<AnswerForm>,
    uvm: FileUvm,
    overlay: FileOverlay,
    annotations: FileAnnotations,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct FileUvm {
    cpus: Option<u32>,
    memory: Option<String>,
    overhead: Option<String>,
    max_cpus: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct FileOverlay {
    ram: Option<String>,
    disk: Option<String>,
    node_ram: Option<String>,
    dir: Option<PathBuf>,
    flush: Option<Flush>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct FileAnnotations {
    allow: Option<Vec<String>>,
}

/// The configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It can't be read.
    #[error("read the configuration {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It isn't what a configuration looks like.
    #[error("the configuration {path} is wrong")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A size isn't one.
    #[error("{key} of the configuration")]
    Size {
        /// The key.
        key: &'static str,
        /// Why.
        #[source]
        source: ParseSizeError,
    },
    /// A number is out of range.
    #[error("{key} of the configuration must be at least 1")]
    Zero {
        /// The key.
        key: &'static str,
    },
    /// An annotation is allowed that doesn't exist.
    #[error("annotations.allow names {0:?}; known are {known}", known = KNOWN.join(", "))]
    UnknownAllowed(String),
    /// A pod uses an annotation that doesn't exist or isn't allowed.
    #[error(
        "the pod's annotation {key} is not allowed on this node; annotations.allow in kiln's \
         configuration has: {allowed}"
    )]
    NotAllowed {
        /// The annotation.
        key: String,
        /// Those allowed.
        allowed: String,
    },
    /// An annotation's value makes no sense.
    #[error("the pod's annotation {key} is {value:?}; {expected}")]
    Annotation {
        /// The annotation.
        key: String,
        /// Its value.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
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

impl Default for Config {
    fn default() -> Self {
        Self {
            store: "/var/lib/kiln/store".into(),
            state_dir: "/run/kiln".into(),
            vmm: default_vmm(),
            rootfs_cache: "/var/lib/kiln/rootfs".into(),
            rootfs_cache_size: 16 << 30,
            vmm_ids: 0x7000_0000,
            default_cpus: 1,
            default_memory: 256 * MIB,
            guest_overhead: 64 * MIB,
            max_cpus: host_cpus(),
            overlay: ScratchLimits::default(),
            overlay_flush: Flush::default(),
            overlay_node_ram: host_memory() / 2,
            overlay_dir: DEFAULT_SPILL_DIRECTORY.into(),
            answer: None,
            debug: false,
            allowed_annotations: KNOWN.map(str::to_owned).to_vec(),
        }
    }
}

impl Config {
    /// Reads the file at `path`, or the default one if there is no path.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let (path, required) = match path {
            Some(path) => (path, true),
            None => (Path::new(DEFAULT_PATH), false),
        };
        match fs::read_to_string(path) {
            Ok(text) => Self::parse(&text, path),
            Err(e) if e.kind() == io::ErrorKind::NotFound && !required => Ok(Self::default()),
            Err(source) => Err(ConfigError::Read {
                path: path.to_owned(),
                source,
            }),
        }
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let file: File = toml::from_str(text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        let d = Self::default();
        let size = |key, text: Option<String>, default| match text {
            Some(text) => parse_size(&text).map_err(|source| ConfigError::Size { key, source }),
            None => Ok(default),
        };
        let positive = |key, n: Option<u32>, default| match n {
            Some(0) => Err(ConfigError::Zero { key }),
            n => Ok(n.unwrap_or(default)),
        };
        let allowed = file.annotations.allow.unwrap_or(d.allowed_annotations);
        if let Some(unknown) = allowed.iter().find(|a| !KNOWN.contains(&a.as_str())) {
            return Err(ConfigError::UnknownAllowed(unknown.clone()));
        }
        Ok(Self {
            store: file.store.unwrap_or(d.store),
            state_dir: file.state_dir.unwrap_or(d.state_dir),
            vmm: file.vmm.unwrap_or(d.vmm),
            rootfs_cache: file.rootfs_cache.unwrap_or(d.rootfs_cache),
            rootfs_cache_size: size(
                "rootfs_cache_size",
                file.rootfs_cache_size,
                d.rootfs_cache_size,
            )?,
            // 0 would be root.
            vmm_ids: positive("vmm_ids", file.vmm_ids, d.vmm_ids)?,
            default_cpus: positive("uvm.cpus", file.uvm.cpus, d.default_cpus)?,
            default_memory: size("uvm.memory", file.uvm.memory, d.default_memory)?,
            guest_overhead: size("uvm.overhead", file.uvm.overhead, d.guest_overhead)?,
            max_cpus: positive("uvm.max_cpus", file.uvm.max_cpus, d.max_cpus)?,
            overlay: ScratchLimits {
                ram: size("overlay.ram", file.overlay.ram, d.overlay.ram)?,
                disk: size("overlay.disk", file.overlay.disk, d.overlay.disk)?,
            },
            overlay_flush: file.overlay.flush.unwrap_or(d.overlay_flush),
            overlay_node_ram: size(
                "overlay.node_ram",
                file.overlay.node_ram,
                d.overlay_node_ram,
            )?,
            overlay_dir: file.overlay.dir.unwrap_or(d.overlay_dir),
            answer: file.answer,
            debug: file.debug.unwrap_or(false),
            allowed_annotations: allowed,
        })
    }

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
            let wrong = |expected| ConfigError::Annotation {
                key: key.clone(),
                value: value.clone(),
                expected,
            };
            match key.as_str() {
                CPUS => {
                    let cpus: u32 = value.parse().unwrap_or(0);
                    if cpus == 0 {
                        return Err(wrong("it must be a whole number of at least 1"));
                    }
                    overrides.cpus = Some(cpus);
                }
                MEMORY => {
                    let bytes = parse_size(value).map_err(|_| {
                        wrong("it must be a size such as 512MiB, 2Gi or a number of bytes")
                    })?;
                    overrides.memory = Some(bytes);
                }
                OVERLAY_RAM | OVERLAY_DISK => {
                    let bytes = parse_size(value).map_err(|_| {
                        wrong("it must be a size such as 512MiB, 2Gi or a number of bytes")
                    })?;
                    if key == OVERLAY_RAM {
                        overrides.overlay_ram = Some(bytes);
                    } else {
                        overrides.overlay_disk = Some(bytes);
                    }
                }
                OVERLAY_FLUSH => {
                    overrides.overlay_flush = Some(match value.as_str() {
                        "none" => Flush::None,
                        "disk" => Flush::Disk,
                        _ => return Err(wrong("it must be none or disk")),
                    });
                }
                DEBUG => {
                    overrides.debug = Some(
                        value
                            .parse()
                            .map_err(|_| wrong("it must be true or false"))?,
                    );
                }
                _ => {}
            }
        }
        Ok(overrides)
    }
}

/// Beside the shim, as the packages install them; else on the PATH.
fn default_vmm() -> PathBuf {
    let beside = std::env::current_exe().ok().and_then(|exe| {
        let path = exe.parent()?.join("kiln-vmm");
        path.exists().then_some(path)
    });
    beside.unwrap_or_else(|| PathBuf::from("/usr/local/bin/kiln-vmm"))
}

/// The node's RAM in bytes; none if it can't be told, which makes every pod spill early rather than none.
fn host_memory() -> u64 {
    nix::sys::sysinfo::sysinfo().map_or(0, |info| info.ram_total())
}

fn host_cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("config.toml"))
    }

    fn annotations(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    #[test]
    fn empty_file_means_the_defaults() {
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn written_values_replace_defaults() {
        let config = parse(
            "store = '/s'\nanswer = 'json-v3'\n[uvm]\ncpus = 2\nmemory = '1GiB'\nmax_cpus = 8\n",
        )
        .unwrap();
        assert_eq!(config.store, PathBuf::from("/s"));
        assert_eq!(config.answer, Some(AnswerForm::JsonV3));
        assert_eq!((config.default_cpus, config.max_cpus), (2, 8));
        assert_eq!(config.default_memory, 1024 * MIB);
    }

    #[test]
    fn misspelt_key_is_an_error_that_names_file_and_key() {
        let error = parse("[uvm]\nmemmory = '1GiB'").unwrap_err();
        let text = crate::error::chain(&error);
        assert!(
            text.contains("config.toml") && text.contains("memmory"),
            "{text}"
        );
    }

    #[test]
    fn a_file_that_was_named_must_exist() {
        assert!(Config::load(Some(Path::new("/nonexistent/kiln.toml"))).is_err());
    }

    #[test]
    fn annotations_set_the_size() {
        let config = Config::default();
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
        let config = Config::default();
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
