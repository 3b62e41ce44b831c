//! The runtime specification of a container that a person started: the guest is all its own, so it gets
//! what container engines give by default, and its isolation from the host is the μVM's.

use anyhow::{Context, Result, bail, ensure};
use kiln_agent_api::{GUEST_FILES, GUEST_SHM, GUEST_STATE_DIR};
use kiln_oci::Defaults;
use serde_json::{Value, json};

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The capabilities that container engines leave to a container's root.
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// What the command line says of the container's process.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wanted<'a> {
    pub(crate) command: &'a [String],
    pub(crate) entrypoint: Option<&'a str>,
    pub(crate) environment: &'a [String],
    pub(crate) directory: Option<&'a str>,
    pub(crate) owner: (u32, u32),
    pub(crate) terminal: bool,
}

/// A directory of the host in the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bind {
    /// Its path in the guest.
    pub(crate) source: String,
    pub(crate) target: String,
    pub(crate) read_only: bool,
}

/// `K=V`, or `K` for this process's own value.
pub(crate) fn variable(text: &str) -> Result<Option<String>> {
    match text.split_once('=') {
        Some(("", _)) => bail!("{text:?} is no variable: write it like NAME=VALUE (-e)"),
        Some(_) => Ok(Some(text.to_owned())),
        None => Ok(std::env::var(text)
            .ok()
            .map(|value| format!("{text}={value}"))),
    }
}

/// The process, as the specification has it.
pub(crate) fn process(wanted: &Wanted<'_>, image: &Defaults) -> Result<Value> {
    let entrypoint = match wanted.entrypoint {
        Some(own) => vec![own.to_owned()],
        None => image.entrypoint.clone().unwrap_or_default(),
    };
    let command = match (wanted.command, wanted.entrypoint) {
        // Another entry point makes nothing of the image's arguments.
        ([], Some(_)) => Vec::new(),
        ([], None) => image.cmd.clone().unwrap_or_default(),
        (own, _) => own.to_vec(),
    };
    let arguments: Vec<String> = entrypoint.into_iter().chain(command).collect();
    ensure!(
        !arguments.is_empty(),
        "the image names no command: give one behind it"
    );
    let mut environment = image.env.clone().unwrap_or_default();
    if !environment.iter().any(|entry| entry.starts_with("PATH=")) {
        environment.insert(0, PATH.to_owned());
    }
    if wanted.terminal && !environment.iter().any(|entry| entry.starts_with("TERM=")) {
        environment.push("TERM=xterm".to_owned());
    }
    add_variables(&mut environment, wanted.environment)?;
    let directory = match wanted.directory {
        Some(own) => own,
        None if image.working_dir.is_empty() => "/",
        None => &image.working_dir,
    };
    ensure!(
        directory.starts_with('/'),
        "the working directory {directory:?} does not begin with '/'"
    );
    Ok(json!({
        "terminal": wanted.terminal,
        "user": {"uid": wanted.owner.0, "gid": wanted.owner.1},
        "args": arguments,
        "env": environment,
        "cwd": directory,
        "capabilities": capabilities(wanted.owner.0 == 0),
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1_048_576, "soft": 1024}],
        "noNewPrivileges": false,
    }))
}

fn capabilities(root: bool) -> Value {
    let none: [&str; 0] = [];
    let own: &[&str] = if root { &CAPABILITIES } else { &none };
    json!({"bounding": CAPABILITIES, "effective": own, "permitted": own})
}

/// Adds variables; a name that is there gets the new value.
fn add_variables(environment: &mut Vec<String>, more: &[String]) -> Result<()> {
    for text in more {
        let name = text.split('=').next().unwrap_or_default();
        environment.retain(|entry| entry.split('=').next() != Some(name));
        environment.extend(variable(text)?);
    }
    Ok(())
}

/// The process of an `exec`, which begins with what the container's first one has.
pub(crate) fn exec_process(
    first: &Value,
    wanted: &Wanted<'_>,
    user: Option<&str>,
) -> Result<Value> {
    ensure!(!wanted.command.is_empty(), "give a command to run");
    let mut process = first.clone();
    let mut environment: Vec<String> =
        serde_json::from_value(first["env"].clone()).context("the container's environment")?;
    if wanted.terminal && !environment.iter().any(|entry| entry.starts_with("TERM=")) {
        environment.push("TERM=xterm".to_owned());
    }
    add_variables(&mut environment, wanted.environment)?;
    process["terminal"] = json!(wanted.terminal);
    process["args"] = json!(wanted.command);
    process["env"] = json!(environment);
    if let Some(directory) = wanted.directory {
        process["cwd"] = json!(directory);
    }
    if let Some(user) = user {
        let (uid, gid) = user.split_once(':').unwrap_or((user, "0"));
        let number = |text: &str| {
            text.parse::<u32>()
                .with_context(|| format!("{user:?} is no user: exec takes numbers (-u UID:GID)"))
        };
        let (uid, gid) = (number(uid)?, number(gid)?);
        process["user"] = json!({"uid": uid, "gid": gid});
        process["capabilities"] = capabilities(uid == 0);
    }
    Ok(process)
}

/// The whole specification.
pub(crate) fn container(
    process: &Value,
    hostname: &str,
    limit: Option<u64>,
    binds: &[Bind],
    seccomp: Option<&Value>,
) -> Value {
    let plain = |target: &str, kind: &str, options: &[&str]| json!({"destination": target, "type": kind, "source": kind, "options": options});
    let file = |name: &str| {
        json!({
            "destination": format!("/etc/{name}"), "type": "bind",
            "source": format!("{GUEST_FILES}/{name}"), "options": ["bind", "rw"],
        })
    };
    let mut mounts = vec![
        plain("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        plain(
            "/dev",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        plain(
            "/dev/pts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        json!({
            "destination": "/dev/shm", "type": "bind", "source": GUEST_SHM,
            "options": ["rbind", "nosuid", "noexec", "nodev"],
        }),
        plain("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        plain("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        plain(
            "/sys/fs/cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", "ro"],
        ),
        file("hosts"),
        file("hostname"),
        file("resolv.conf"),
    ];
    for bind in binds {
        let mode = if bind.read_only { "ro" } else { "rw" };
        mounts.push(json!({
            "destination": bind.target, "type": "bind", "source": bind.source,
            "options": ["rbind", "rprivate", mode],
        }));
    }
    let memory = limit.map_or(json!({}), |bytes| json!({"limit": bytes}));
    let mut spec = json!({
        "ociVersion": "1.1.0",
        "process": process,
        "root": {"path": format!("{GUEST_STATE_DIR}/root"), "readonly": false},
        "hostname": hostname,
        "mounts": mounts,
        "linux": {
            "resources": {"memory": memory},
            "namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "cgroup"}],
            "maskedPaths": [
                "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi",
                "/sys/firmware", "/sys/devices/virtual/powercap"
            ],
            "readonlyPaths": [
                "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"
            ],
        },
    });
    if let Some(profile) = seccomp {
        spec["linux"]["seccomp"] = profile.clone();
    }
    spec
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Defaults {
        Defaults {
            entrypoint: Some(vec!["/entry".into()]),
            cmd: Some(vec!["serve".into()]),
            env: Some(vec!["A=1".into(), "B=2".into()]),
            working_dir: "/srv".into(),
            user: String::new(),
        }
    }

    fn text(list: &[&str]) -> Vec<String> {
        list.iter().map(|one| (*one).to_owned()).collect()
    }

    #[test]
    fn command_replaces_the_images_arguments_and_entrypoint_both() {
        let args = |command: &[&str], entrypoint: Option<&str>| {
            let command = text(command);
            let wanted = Wanted {
                command: &command,
                entrypoint,
                ..Wanted::default()
            };
            process(&wanted, &image()).unwrap()["args"].clone()
        };
        assert_eq!(args(&[], None), json!(["/entry", "serve"]));
        assert_eq!(args(&["x", "y"], None), json!(["/entry", "x", "y"]));
        assert_eq!(args(&[], Some("sh")), json!(["sh"]));
        assert_eq!(args(&["-c"], Some("sh")), json!(["sh", "-c"]));
        let error = process(&Wanted::default(), &Defaults::default()).unwrap_err();
        assert!(error.to_string().contains("give one"));
    }

    #[test]
    fn variables_are_the_images_then_those_asked_for() {
        let environment = text(&["B=3", "C=", "KILN_NOWHERE"]);
        let wanted = Wanted {
            environment: &environment,
            terminal: true,
            ..Wanted::default()
        };
        let found = process(&wanted, &image()).unwrap()["env"].clone();
        assert_eq!(found, json!([PATH, "A=1", "TERM=xterm", "B=3", "C="]));
        assert!(variable("=x").is_err());
    }

    #[test]
    fn exec_keeps_what_it_is_not_told_to_change() {
        let first = process(&Wanted::default(), &image()).unwrap();
        let command = text(&["id"]);
        let wanted = Wanted {
            command: &command,
            terminal: true,
            ..Wanted::default()
        };
        let exec = exec_process(&first, &wanted, Some("7:8")).unwrap();
        assert_eq!(exec["cwd"], "/srv");
        assert_eq!(exec["user"], json!({"uid": 7, "gid": 8}));
        assert_eq!(exec["capabilities"]["effective"], json!([]));
        assert_eq!(exec["args"], json!(["id"]));
        assert!(exec_process(&first, &wanted, Some("www")).is_err());
        assert!(exec_process(&first, &Wanted::default(), None).is_err());
    }

    #[test]
    fn spec_has_the_limit_and_the_binds() {
        let process = process(&Wanted::default(), &image()).unwrap();
        let bind = Bind {
            source: "/run/kiln/share/0".into(),
            target: "/data".into(),
            read_only: true,
        };
        let spec = container(&process, "web", Some(64 << 20), &[bind], None);
        assert!(spec["linux"].get("seccomp").is_none());
        assert_eq!(spec["linux"]["resources"]["memory"]["limit"], 64 << 20);
        let mounts = spec["mounts"].as_array().unwrap();
        let data = mounts.iter().find(|m| m["destination"] == "/data").unwrap();
        assert_eq!(data["options"], json!(["rbind", "rprivate", "ro"]));
    }
}
