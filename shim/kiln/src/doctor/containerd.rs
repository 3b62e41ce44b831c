//! containerd: is it there, does it run, and does it know kiln?

use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::Context;
use kiln_node::containerd::{
    Config, RUNTIME_TYPE, config_path, default_layout, release, snippet, version_in,
};

use super::{Check, System};

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
pub(super) fn registration(system: &System) -> anyhow::Result<String> {
    let found = find(system);
    let path = config_path(&system.root);
    let config = Config::read(&system.root, &path, layout(found.as_ref()))
        .context("containerd's configuration cannot be used")?;
    let mut text = format!("# Belongs into {}.\n", path.display());
    if !system.at(&path).exists() {
        text += &format!("version = {}\n\n", config.version);
    }
    Ok(text + &snippet(config.version) + "\n")
}

fn layout(found: Option<&Found>) -> i64 {
    default_layout(found.and_then(|found| found.version.as_deref()))
}

/// Does its configuration name kiln?
pub(super) fn registered(system: &System, found: Option<&Found>) -> Check {
    const NAME: &str = "registered";
    let path = config_path(&system.root);
    let config = match Config::read(&system.root, &path, layout(found)) {
        Ok(config) => config,
        Err(problem) => {
            return Check::fail(
                NAME,
                format!("{:#}", anyhow::Error::from(problem)),
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
    fn without_a_file_the_version_is_said_too() {
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
        let path = format!("{V2}\nruntime_path = '/opt/kiln/bin/shim'\n");
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
