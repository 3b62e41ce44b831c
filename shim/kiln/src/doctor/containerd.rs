//! containerd: is it there, does it run, and does it know kiln?

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use toml::{Table, Value};

use super::{Check, System};

/// What a handler's `runtime_type` says when it is ours.
pub(super) const RUNTIME_TYPE: &str = "io.containerd.kiln.v2";
const SHIM: &str = "containerd-shim-kiln-v2";
const DEFAULT_CONFIG: &str = "/etc/containerd/config.toml";
const SOCKET: &str = "/run/containerd/containerd.sock";

/// An installed containerd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    path: PathBuf,
    /// Such as `1.7.24~ds1`; `None` if it does not tell.
    version: Option<String>,
}

pub(super) fn find(system: &System) -> Option<Found> {
    let path = system.program("containerd")?;
    let output = Command::new(&path)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .ok();
    let version = output.and_then(|output| version_in(&String::from_utf8_lossy(&output.stdout)));
    Some(Found { path, version })
}

/// `containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1-6`: the third word.
fn version_in(text: &str) -> Option<String> {
    let mut words = text.split_whitespace();
    (words.next()? == "containerd").then_some(())?;
    let version = words.nth(1)?.trim_start_matches('v');
    version
        .starts_with(|c: char| c.is_ascii_digit())
        .then(|| version.to_owned())
}

/// Major and minor number.
fn release(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// Is there one, and is it new enough?
pub(super) fn installed(found: Option<&Found>) -> Check {
    const NAME: &str = "containerd";
    const INSTALL: &str = "install containerd 1.7 or later (Debian: `apt install containerd`)";
    let Some(found) = found else {
        return Check::fail(NAME, "there is no containerd", INSTALL);
    };
    let path = found.path.display();
    let Some(version) = &found.version else {
        return Check::warn(NAME, format!("{path} does not tell its version"), INSTALL);
    };
    match release(version) {
        Some(release) if release >= (1, 7) => Check::ok(NAME, format!("{version} ({path})")),
        _ => Check::fail(NAME, format!("{version} ({path}) is too old"), INSTALL),
    }
}

/// Does it answer?
pub(super) fn running(system: &System) -> Check {
    const NAME: &str = "containerd-socket";
    let path = system.at(SOCKET);
    match UnixStream::connect(&path) {
        Ok(_) => Check::ok(NAME, SOCKET),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Check::warn(
            NAME,
            format!("{SOCKET} is not for this user, so whether containerd runs is unknown"),
            "run `sudo kiln doctor`",
        ),
        Err(error) => Check::fail(
            NAME,
            format!("nobody listens on {SOCKET}: {error}"),
            "start it: `systemctl start containerd`; see `journalctl -u containerd`",
        ),
    }
}

/// What one adds to the configuration of the containerd that is installed here, and to which file.
pub(super) fn registration(system: &System) -> Result<String, String> {
    let found = find(system);
    let path = config_path(system);
    let config = Config::read(system, &path, default_layout(found.as_ref()))?;
    let mut text = format!("# Belongs into {}.\n", path.display());
    if !system.at(&path).exists() {
        text += &format!("version = {}\n\n", config.version);
    }
    Ok(text + &snippet(config.version) + "\n")
}

/// The version that containerd takes a configuration for if there is none.
fn default_layout(found: Option<&Found>) -> i64 {
    let version = found.and_then(|found| found.version.as_deref());
    match version.and_then(release) {
        Some((0 | 1, _)) => 2,
        _ => 3,
    }
}

/// Does its configuration name kiln?
pub(super) fn registered(system: &System, found: Option<&Found>) -> Check {
    const NAME: &str = "registered";
    let path = config_path(system);
    let config = match Config::read(system, &path, default_layout(found)) {
        Ok(config) => config,
        Err(problem) => {
            return Check::fail(
                NAME,
                problem,
                "mend the file: `containerd config dump` names the line",
            );
        }
    };
    if let Some(handler) = config.handlers.first() {
        if let Some(path) = &handler.runtime_path
            && !system.at(path).exists()
        {
            return Check::fail(
                NAME,
                format!(
                    "runtime '{}' names {}, which is not there",
                    handler.name,
                    path.display()
                ),
                format!(
                    "correct runtime_path in {}, or remove it",
                    handler.file.display()
                ),
            );
        }
        return Check::ok(
            NAME,
            format!(
                "as runtime '{}' in {}",
                handler.name,
                handler.file.display()
            ),
        );
    }
    Check::fail(
        NAME,
        format!("{} names no runtime of type {RUNTIME_TYPE}", path.display()),
        format!(
            "add this to {} and restart containerd:\n{}",
            path.display(),
            snippet(config.version)
        ),
    )
}

/// What registers kiln, for a configuration file of this version.
fn snippet(version: i64) -> String {
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
fn config_path(system: &System) -> PathBuf {
    running_config(system).unwrap_or_else(|| DEFAULT_CONFIG.into())
}

fn running_config(system: &System) -> Option<PathBuf> {
    for process in std::fs::read_dir(system.at("/proc")).ok()?.flatten() {
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

/// A runtime that is kiln's.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Handler {
    name: String,
    runtime_path: Option<PathBuf>,
    /// The file that names it.
    file: PathBuf,
}

/// What the configuration says of kiln.
#[derive(Debug, PartialEq, Eq)]
struct Config {
    version: i64,
    handlers: Vec<Handler>,
}

impl Config {
    /// Reads a configuration file and those it imports. A file that is not there is empty, as it
    /// is for containerd.
    fn read(system: &System, path: &Path, default: i64) -> Result<Config, String> {
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
            let text = match std::fs::read_to_string(system.at(&path)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(format!("{} cannot be read: {error}", path.display())),
                Ok(text) => text,
            };
            let table: Table = text.parse().map_err(|error: toml::de::Error| {
                format!("{} is not valid TOML: {}", path.display(), error.message())
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
                queue.extend(expand(system, &base.join(import)));
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
fn expand(system: &System, import: &Path) -> Vec<PathBuf> {
    let Some(pattern) = import.file_name().and_then(|name| name.to_str()) else {
        return Vec::new();
    };
    let Some((before, after)) = pattern.split_once('*') else {
        return vec![import.to_owned()];
    };
    let dir = import.parent().unwrap_or(Path::new("/"));
    let mut files: Vec<PathBuf> = std::fs::read_dir(system.at(dir))
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
    use super::super::Status;
    use super::super::tests::Fixture;
    use super::*;

    const V2: &str = r#"
        version = 2
        [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kiln]
        runtime_type = "io.containerd.kiln.v2"
    "#;
    const V3: &str = r#"
        version = 3
        [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
        runtime_type = 'io.containerd.runc.v2'
        [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.small]
        runtime_type = 'io.containerd.kiln.v2'
        sandboxer = 'shim'
    "#;

    fn registered_with(files: &[(&str, &str)]) -> Check {
        let fixture = Fixture::new();
        for (path, text) in files {
            fixture.file(path, text);
        }
        registered(&fixture.system, None)
    }

    #[test]
    fn handler_is_found_in_both_layouts() {
        let config = "etc/containerd/config.toml";
        let check = registered_with(&[(config, V2)]);
        assert_eq!(
            (check.status, check.found.contains("'kiln'")),
            (Status::Ok, true)
        );
        let check = registered_with(&[(config, V3)]);
        assert_eq!(
            (check.status, check.found.contains("'small'")),
            (Status::Ok, true)
        );
    }

    #[test]
    fn handler_is_found_in_imports_by_pattern_and_relative_path() {
        let main = "version = 3\nimports = ['conf.d/*.toml', 'gone.toml']\n";
        let check = registered_with(&[
            ("etc/containerd/config.toml", main),
            (
                "etc/containerd/conf.d/a.toml",
                "version = 3\nimports = ['../more.toml']\n",
            ),
            ("etc/containerd/conf.d/b.txt", "not = [toml"),
            ("etc/containerd/more.toml", V3),
        ]);
        assert_eq!(check.status, Status::Ok, "{check:?}");
        assert!(check.found.contains("more.toml"));
    }

    #[test]
    fn files_that_import_each_other_do_not_end_in_a_loop() {
        let check = registered_with(&[
            (
                "etc/containerd/config.toml",
                "imports = ['/etc/containerd/b.toml']",
            ),
            (
                "etc/containerd/b.toml",
                "imports = ['/etc/containerd/config.toml']",
            ),
        ]);
        assert_eq!(check.status, Status::Fail);
    }

    #[test]
    fn remedy_shows_the_snippet_for_the_version_in_use() {
        let old = registered_with(&[("etc/containerd/config.toml", "version = 2\n")]);
        assert!(old.remedy.unwrap().contains("io.containerd.grpc.v1.cri"));
        let new = registered_with(&[("etc/containerd/config.toml", "version = 3\n")]);
        assert!(new.remedy.unwrap().contains("io.containerd.cri.v1.runtime"));
        let none = registered_with(&[]);
        assert!(
            none.remedy
                .unwrap()
                .contains("io.containerd.cri.v1.runtime")
        );
    }

    #[test]
    fn without_a_file_the_installed_release_decides() {
        let found = |version: &str| Found {
            path: "/usr/bin/containerd".into(),
            version: Some(version.to_owned()),
        };
        assert_eq!(default_layout(Some(&found("1.7.24~ds1"))), 2);
        assert_eq!(default_layout(Some(&found("2.1.9"))), 3);
        assert_eq!(default_layout(None), 3);
        let fixture = Fixture::new();
        let text = registration(&fixture.system).unwrap();
        assert!(
            text.contains("version = 3\n") && text.contains("pod_annotations"),
            "{text}"
        );
        fixture.file("etc/containerd/config.toml", "version = 2\n");
        let text = registration(&fixture.system).unwrap();
        assert!(
            !text.contains("version =") && text.contains("grpc.v1.cri"),
            "{text}"
        );
    }

    /// The snippet itself must register kiln.
    #[test]
    fn snippet_is_accepted_once_it_is_added() {
        for version in [2, 3] {
            let text = format!("version = {version}\n{}\n", snippet(version));
            let check = registered_with(&[("etc/containerd/config.toml", &text)]);
            assert_eq!(check.status, Status::Ok, "{text}");
        }
    }

    #[test]
    fn broken_file_and_missing_runtime_path_are_named() {
        let broken = registered_with(&[("etc/containerd/config.toml", "version = [")]);
        assert!(broken.found.contains("not valid TOML"), "{broken:?}");
        let path = format!("{V2}\nruntime_path = '/opt/kiln/bin/{SHIM}'\n");
        let missing = registered_with(&[("etc/containerd/config.toml", &path)]);
        assert_eq!(missing.status, Status::Fail);
        assert!(missing.found.contains("/opt/kiln/bin"));
    }

    #[test]
    fn configuration_of_the_running_containerd_counts() {
        let check = registered_with(&[
            ("proc/77/comm", "containerd\n"),
            (
                "proc/77/cmdline",
                "/usr/bin/containerd\0--config\0/etc/other.toml\0",
            ),
            ("etc/other.toml", V3),
        ]);
        assert_eq!(check.status, Status::Ok, "{check:?}");
        let argument =
            |text: &str| config_argument(&text.split(' ').map(str::to_owned).collect::<Vec<_>>());
        assert_eq!(argument("containerd -c=/a"), Some("/a".into()));
        assert_eq!(argument("containerd -c /a"), Some("/a".into()));
        assert_eq!(argument("containerd --log-level debug"), None);
    }

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
    fn containerd_must_be_there_and_new_enough() {
        let fixture = Fixture::new();
        assert_eq!(
            installed(find(&fixture.system).as_ref()).status,
            Status::Fail
        );
        let status = |version: Option<&str>| {
            let version = version.map(str::to_owned);
            installed(Some(&Found {
                path: "/usr/bin/containerd".into(),
                version,
            }))
            .status
        };
        assert_eq!(status(Some("2.0.0")), Status::Ok);
        assert_eq!(status(Some("1.7.24~ds1")), Status::Ok);
        assert_eq!(status(Some("1.6.20")), Status::Fail);
        assert_eq!(status(None), Status::Warn);
    }

    #[test]
    fn program_of_that_name_that_tells_nothing_is_found_without_a_version() {
        let fixture = Fixture::new();
        fixture.file("usr/bin/x", "");
        // A link, not a script: what was just written may be busy while another test forks.
        std::os::unix::fs::symlink("/bin/true", fixture.system.at("/usr/bin/containerd")).unwrap();
        assert_eq!(find(&fixture.system).unwrap().version, None);
    }

    #[test]
    fn socket_must_answer() {
        let fixture = Fixture::new();
        assert_eq!(running(&fixture.system).status, Status::Fail);
        fixture.file("run/containerd/x", "");
        let socket = fixture.system.at(SOCKET);
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert_eq!(running(&fixture.system).status, Status::Ok);
        drop(listener);
        assert_eq!(
            running(&fixture.system).status,
            Status::Fail,
            "a socket nobody listens on"
        );
    }
}
