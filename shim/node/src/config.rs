//! The configuration file and the annotations that override it for one pod.
//!
//! Parsed into what was written ([`File`]), turned once into what is meant ([`Config`]); only the
//! latter reaches the rest. An absent file is the default configuration. Unknown keys are errors:
//! a misspelt limit must not be no limit.

mod annotations;

use std::path::{Path, PathBuf};
use std::{fs, io};

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use kiln_store::DEFAULT_ROOT;
use kiln_uvm::scratch::{DEFAULT_SPILL_DIRECTORY, ScratchLimits};
use kiln_uvm::{Flush, jail};

use kiln_uvm::size::{Bytes, MIB, NotASize};

use crate::pods;

pub use annotations::{ANNOTATION_PREFIX, Most, PodOverrides};
use annotations::{FileAnnotations, HARMLESS, KNOWN, MOST_OVERLAY_DISK};

/// Where the file is looked for when containerd's runtime options name none.
pub const DEFAULT_PATH: &str = "/etc/kiln/config.toml";

/// The forms in which a shim can tell containerd where it listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum AnswerForm {
    /// The address alone: containerd 1.6 to 2.2 take it for Task v2 over ttrpc.
    Bare,
    /// JSON that promises Task v2: containerd 1.7 to 2.2.
    JsonV2,
    /// JSON that promises Task v3 and the Sandbox service: containerd 2.0 to 2.2. An error in 1.7.
    JsonV3,
    /// `BootstrapResult`: containerd 2.3 and later.
    Protobuf,
}

/// What namespaces of the node (`hostPID`, `hostIPC`) are for a pod in a μVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostNamespaces {
    /// Refused: the node's are out of reach, and something else is not what was asked for.
    #[default]
    Refuse,
    /// The pod's own.
    Pod,
}

/// What is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The store: baked μVMs, and images made from containers' root file systems.
    pub store: PathBuf,
    /// Where the state of running pods lies; on a tmpfs.
    pub state_dir: PathBuf,
    /// The VMM's program.
    pub vmm: PathBuf,
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
    /// What namespaces of the node are for a pod.
    pub host_namespaces: HostNamespaces,
    /// Answer every old-protocol `start` in this form instead of asking containerd's version.
    pub answer: Option<AnswerForm>,
    /// Log at debug level.
    pub debug: bool,
    /// Which annotations pods may use.
    pub allowed_annotations: Vec<String>,
    /// The most that they may ask for.
    pub most: Most,
}

/// What was written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    store: Option<PathBuf>,
    state_dir: Option<PathBuf>,
    vmm: Option<PathBuf>,
    rootfs_cache: Option<IgnoredAny>,
    rootfs_cache_size: Option<IgnoredAny>,
    vmm_ids: Option<u32>,
    debug: Option<bool>,
    host_namespaces: HostNamespaces,
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

fn size(key: &'static str, text: Option<&str>, default: u64) -> Result<u64, ConfigError> {
    match text {
        Some(text) => {
            Bytes::more_than_none(text).map_err(|source| ConfigError::Size { key, source })
        }
        None => Ok(default),
    }
}

fn positive(key: &'static str, number: Option<u32>, default: u32) -> Result<u32, ConfigError> {
    match number {
        Some(0) => Err(ConfigError::Zero { key }),
        number => Ok(number.unwrap_or(default)),
    }
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
        source: NotASize,
    },
    /// A number is out of range.
    #[error("{key} of the configuration must be at least 1")]
    Zero {
        /// The key.
        key: &'static str,
    },
    /// A key had a meaning once.
    #[error("{key} of the configuration is no more: images are in the store; {instead}")]
    Gone {
        /// The key.
        key: &'static str,
        /// What there is now.
        instead: &'static str,
    },
    /// An annotation is allowed that doesn't exist.
    #[error("annotations.allow names {0:?}; known are {known}", known = KNOWN.join(", "))]
    UnknownAllowed(String),
    /// A pod uses an annotation that doesn't exist or isn't allowed.
    #[error(
        "the pod's annotation {key} is not allowed on this node; leave it out, or have it added to \
         annotations.allow in kiln's configuration, which has: {allowed}"
    )]
    NotAllowed {
        /// The annotation.
        key: String,
        /// Those allowed.
        allowed: String,
    },
    /// An annotation asks for more than the node gives.
    #[error(
        "the pod's annotation {key} is {value:?}, and this node gives at most {most}; ask for less, \
         or have {setting} raised in kiln's configuration"
    )]
    TooMuch {
        /// The annotation.
        key: String,
        /// Its value.
        value: String,
        /// The most there is.
        most: String,
        /// The key of the configuration that says so.
        setting: &'static str,
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

impl Default for Config {
    fn default() -> Self {
        let (max_cpus, memory) = (host_cpus(), host_memory());
        Self {
            store: DEFAULT_ROOT.into(),
            state_dir: pods::STATE.into(),
            vmm: default_vmm(),
            vmm_ids: jail::FIRST_ID,
            default_cpus: 1,
            default_memory: 256 * MIB,
            guest_overhead: 64 * MIB,
            max_cpus,
            overlay: ScratchLimits::default(),
            overlay_flush: Flush::default(),
            overlay_node_ram: memory / 2,
            overlay_dir: DEFAULT_SPILL_DIRECTORY.into(),
            host_namespaces: HostNamespaces::default(),
            answer: None,
            debug: false,
            allowed_annotations: HARMLESS.map(str::to_owned).to_vec(),
            most: Most {
                cpus: max_cpus,
                memory: memory / 2,
                overlay_ram: memory / 2,
                overlay_disk: MOST_OVERLAY_DISK,
            },
        }
    }
}

impl Config {
    /// Memory of the μVM of a pod without a limit, before it is rounded up.
    pub fn memory_without_limit(&self) -> u64 {
        self.default_memory.saturating_add(self.guest_overhead)
    }

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
        for (old, key, instead) in [
            (
                &file.rootfs_cache,
                "rootfs_cache",
                "the key `store` names where they are",
            ),
            (
                &file.rootfs_cache_size,
                "rootfs_cache_size",
                "the store has one budget: `kiln gc --set-budget`",
            ),
        ] {
            if old.is_some() {
                return Err(ConfigError::Gone { key, instead });
            }
        }
        let d = Self::default();
        let size = |key, text: Option<String>, default| size(key, text.as_deref(), default);
        let max_cpus = positive("uvm.max_cpus", file.uvm.max_cpus, d.max_cpus)?;
        let node_ram = size(
            "overlay.node_ram",
            file.overlay.node_ram,
            d.overlay_node_ram,
        )?;
        let most = file.annotations.most(max_cpus, node_ram)?;
        let allowed = file.annotations.allow.unwrap_or(d.allowed_annotations);
        if let Some(unknown) = allowed.iter().find(|a| !KNOWN.contains(&a.as_str())) {
            return Err(ConfigError::UnknownAllowed(unknown.clone()));
        }
        Ok(Self {
            store: file.store.unwrap_or(d.store),
            state_dir: file.state_dir.unwrap_or(d.state_dir),
            vmm: file.vmm.unwrap_or(d.vmm),
            // 0 would be root.
            vmm_ids: positive("vmm_ids", file.vmm_ids, d.vmm_ids)?,
            default_cpus: positive("uvm.cpus", file.uvm.cpus, d.default_cpus)?,
            default_memory: size("uvm.memory", file.uvm.memory, d.default_memory)?,
            guest_overhead: size("uvm.overhead", file.uvm.overhead, d.guest_overhead)?,
            max_cpus,
            overlay: ScratchLimits {
                ram: size("overlay.ram", file.overlay.ram, d.overlay.ram)?,
                disk: size("overlay.disk", file.overlay.disk, d.overlay.disk)?,
            },
            overlay_flush: file.overlay.flush.unwrap_or(d.overlay_flush),
            overlay_node_ram: node_ram,
            overlay_dir: file.overlay.dir.unwrap_or(d.overlay_dir),
            host_namespaces: file.host_namespaces,
            answer: file.answer,
            debug: file.debug.unwrap_or(false),
            allowed_annotations: allowed,
            most,
        })
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
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(info.mem_unit.into())
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
        let cause = std::error::Error::source(&error).unwrap();
        let text = format!("{error}: {cause}");
        assert!(
            text.contains("config.toml") && text.contains("memmory"),
            "{text}"
        );
    }

    #[test]
    fn key_of_the_image_cache_says_what_there_is_now() {
        for (text, instead) in [
            ("rootfs_cache = '/var/lib/kiln/rootfs'", "`store`"),
            ("rootfs_cache_size = '16GiB'", "--set-budget"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(matches!(error, ConfigError::Gone { .. }), "{error:?}");
            assert!(error.to_string().contains(instead), "{error}");
        }
    }

    #[test]
    fn a_file_that_was_named_must_exist() {
        assert!(Config::load(Some(Path::new("/nonexistent/kiln.toml"))).is_err());
    }
}
