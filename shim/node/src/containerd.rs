//! containerd's configuration: whether it names kiln, and what to add so that it does.

use std::io;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

/// What a handler's `runtime_type` says when it is ours.
pub const RUNTIME_TYPE: &str = "io.containerd.kiln.v2";
const SHIM: &str = "containerd-shim-kiln-v2";
const DEFAULT_CONFIG: &str = "/etc/containerd/config.toml";

/// containerd's configuration can't be read.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It isn't TOML.
    #[error("{} is not valid TOML: {message}", path.display())]
    Toml {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        message: String,
    },
    /// It can't be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A runtime that is kiln's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handler {
    /// What a RuntimeClass calls it.
    pub name: String,
    /// Its shim, if the configuration names one.
    pub runtime_path: Option<PathBuf>,
    /// The file that names it.
    pub file: PathBuf,
}

/// What the configuration says of kiln.
#[derive(Debug, PartialEq, Eq)]
pub struct Config {
    /// The version of its layout.
    pub version: i64,
    /// The runtimes that are kiln's.
    pub handlers: Vec<Handler>,
}

/// A file of the machine whose root is here, by its absolute path there.
fn at(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// The version that `containerd --version` tells: `containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1-6`,
/// the third word.
pub fn version_in(text: &str) -> Option<String> {
    let mut words = text.split_whitespace();
    (words.next()? == "containerd").then_some(())?;
    let version = words.nth(1)?.trim_start_matches('v');
    version
        .starts_with(|c: char| c.is_ascii_digit())
        .then(|| version.to_owned())
}

/// Major and minor number of a version.
pub fn release(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// The version of the layout in which the containerd of this version takes a configuration if there is none.
pub fn default_layout(version: Option<&str>) -> i64 {
    match version.and_then(release) {
        Some((0 | 1, _)) => 2,
        _ => 3,
    }
}

/// What registers kiln, for a configuration file of this version.
pub fn snippet(version: i64) -> String {
    let plugin = if version >= 3 {
        "io.containerd.cri.v1.runtime"
    } else {
        "io.containerd.grpc.v1.cri"
    };
    let quote = if version >= 3 { '\'' } else { '"' };
    format!(
        "[plugins.{quote}{plugin}{quote}.containerd.runtimes.kiln]\n  \
         runtime_type = \"{RUNTIME_TYPE}\"\n  \
         pod_annotations = [\"kiln.dev/*\"]"
    )
}

/// The file the running containerd was started with; its default file if none runs.
pub fn config_path(root: &Path) -> PathBuf {
    running_config(root).unwrap_or_else(|| DEFAULT_CONFIG.into())
}

fn running_config(root: &Path) -> Option<PathBuf> {
    for process in std::fs::read_dir(at(root, Path::new("/proc")))
        .ok()?
        .flatten()
    {
        let read = |name: &str| std::fs::read(process.path().join(name)).ok();
        if read("comm").as_deref() != Some(b"containerd\n") {
            continue;
        }
        let line = read("cmdline").unwrap_or_default();
        let arguments: Vec<String> = line
            .split(|b| *b == 0)
            .map(|a| String::from_utf8_lossy(a).into_owned())
            .collect();
        return config_argument(&arguments);
    }
    None
}

fn config_argument(arguments: &[String]) -> Option<PathBuf> {
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        if matches!(argument.as_str(), "-c" | "--config" | "-config") {
            return arguments.next().map(PathBuf::from);
        }
        for prefix in ["-c=", "--config=", "-config="] {
            if let Some(path) = argument.strip_prefix(prefix) {
                return Some(path.into());
            }
        }
    }
    None
}

impl Config {
    /// Reads a configuration file and those it imports. A file that is not there is empty, as it
    /// is for containerd.
    pub fn read(root: &Path, path: &Path, default: i64) -> Result<Config, ConfigError> {
        let mut config = Config {
            version: 0,
            handlers: Vec::new(),
        };
        let mut queue = vec![path.to_owned()];
        let mut seen = Vec::new();
        while let Some(path) = queue.pop() {
            if seen.contains(&path) {
                continue;
            }
            seen.push(path.clone());
            let text = match std::fs::read_to_string(at(root, &path)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(ConfigError::Read { path, source }),
                Ok(text) => text,
            };
            let table: Table =
                text.parse()
                    .map_err(|error: toml::de::Error| ConfigError::Toml {
                        path: path.clone(),
                        message: error.message().to_owned(),
                    })?;
            let version = table
                .get("version")
                .and_then(Value::as_integer)
                .unwrap_or(1);
            if seen.len() == 1 {
                config.version = version;
            }
            config.handlers.extend(handlers(&table, &path));
            let base = path.parent().unwrap_or(Path::new("/"));
            let imports = table.get("imports").and_then(Value::as_array);
            for import in imports.into_iter().flatten().filter_map(Value::as_str) {
                queue.extend(expand(root, &base.join(import)));
            }
        }
        // There is no file.
        config.version = if config.version == 0 {
            default
        } else {
            config.version
        };
        Ok(config)
    }
}

/// The runtimes of ours that one file names, in a layout of version 2 or 3.
fn handlers(table: &Table, file: &Path) -> Vec<Handler> {
    let mut found = Vec::new();
    for plugin in ["io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri"] {
        let runtimes = ["plugins", plugin, "containerd", "runtimes"]
            .into_iter()
            .try_fold(table, |table, key| table.get(key)?.as_table());
        for (name, runtime) in runtimes.into_iter().flatten() {
            let text = |key: &str| runtime.get(key).and_then(Value::as_str).unwrap_or_default();
            let path = text("runtime_path");
            if text("runtime_type") == RUNTIME_TYPE || path.ends_with(SHIM) {
                let runtime_path = (!path.is_empty()).then(|| PathBuf::from(path));
                found.push(Handler {
                    name: name.clone(),
                    runtime_path,
                    file: file.to_owned(),
                });
            }
        }
    }
    found
}

/// An import may end in a pattern for file names, such as `conf.d/*.toml`.
fn expand(root: &Path, import: &Path) -> Vec<PathBuf> {
    let Some(pattern) = import.file_name().and_then(|name| name.to_str()) else {
        return Vec::new();
    };
    let Some((before, after)) = pattern.split_once('*') else {
        return vec![import.to_owned()];
    };
    let dir = import.parent().unwrap_or(Path::new("/"));
    let mut files: Vec<PathBuf> = std::fs::read_dir(at(root, dir))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| {
            name.len() >= before.len() + after.len()
                && name.starts_with(before)
                && name.ends_with(after)
        })
        .map(|name| dir.join(name))
        .collect();
    files.sort();
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_debian_and_upstream_are_understood() {
        let debian = "containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1-6+deb13u1";
        assert_eq!(version_in(debian).as_deref(), Some("1.7.24~ds1"));
        let two = "containerd github.com/containerd/containerd/v2 v2.1.4 75cb2b7193e4";
        assert_eq!(version_in(two).as_deref(), Some("2.1.4"));
        assert_eq!(version_in("something else entirely"), None);
        assert_eq!(release("2.1.9+ds1"), Some((2, 1)));
        assert_eq!(release("nonsense"), None);
    }

    #[test]
    fn without_a_file_the_installed_release_decides() {
        assert_eq!(default_layout(Some("1.7.24~ds1")), 2);
        assert_eq!(default_layout(Some("2.1.9")), 3);
        assert_eq!(default_layout(None), 3);
    }

    #[test]
    fn configuration_that_containerd_is_started_with_is_found_among_its_arguments() {
        let argument =
            |text: &str| config_argument(&text.split(' ').map(str::to_owned).collect::<Vec<_>>());
        assert_eq!(argument("containerd -c=/a"), Some("/a".into()));
        assert_eq!(argument("containerd -c /a"), Some("/a".into()));
        assert_eq!(argument("containerd --log-level debug"), None);
    }
}
