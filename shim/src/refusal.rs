//! What a specification can ask for that a container in a μVM can't have.
//!
//! Each part of an OCI specification is either honoured or refused by its name, with the reason and the remedy, before anything
//! is made: the text is what `kubectl describe` shows. docs/shim.md has the table for people.

use std::fmt;

use serde_json::Value;

use kiln_node::config::HostNamespaces;

/// What a pod that needs the thing can do.
const OTHER_RUNTIME: &str = "Run the pod with a runtime class of runc, which has the node's";

const NO_HUGEPAGES: &str =
    "the guest's memory is the μVM's own and has none of the node's hugepages set aside";

/// A part of a specification that is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The thing, in the words of whoever asked for it.
    pub what: String,
    /// Why not.
    pub why: &'static str,
    /// What to do instead, a sentence without its full stop.
    pub remedy: &'static str,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, why, remedy } = self;
        write!(f, "kiln: {what} is refused: {why}. {remedy}.")
    }
}

impl std::error::Error for Refusal {}

/// `hostNetwork`.
pub fn host_network() -> Refusal {
    Refusal {
        what: "the node's network (hostNetwork)".to_owned(),
        why: "a μVM has a network card of its own, and can't be in the node's network namespace",
        remedy: OTHER_RUNTIME,
    }
}

/// `hostPID` and its kin, unless the node's owner lets them mean the pod's.
pub fn host_namespace(kind: &str, policy: HostNamespaces) -> Option<Refusal> {
    let field = match kind {
        "pid" => "the node's processes (hostPID)",
        "ipc" => "the node's IPC (hostIPC)",
        "uts" => "the node's host name (UTS namespace)",
        _ => return None,
    };
    (policy == HostNamespaces::Refuse).then(|| Refusal {
        what: field.to_owned(),
        why: "a μVM has a kernel of its own, and its containers can't be in namespaces of the node's",
        remedy: "Run the pod with a runtime class of runc, or let it mean the pod's own \
                 with `host_namespaces = \"pod\"` in /etc/kiln/config.toml",
    })
}

/// An interface that carries packets and not frames.
pub fn interface_without_mac(name: &str) -> Refusal {
    Refusal {
        what: format!("the interface {name} of the pod's network"),
        why: "it has an address, but no MAC address (a tunnel, InfiniBand), and a μVM's network card carries Ethernet frames",
        remedy: "Use a network plug-in whose interfaces are Ethernet's, such as bridge, ptp, macvlan or ipvlan in mode l2, \
                 or run the pod with a runtime class of runc",
    }
}

/// An interface of the pod's that another one of the pod's uses.
pub fn stacked_interface(upper: &str, lower: &str) -> Refusal {
    Refusal {
        what: format!("the interface {upper} on the interface {lower} of the pod's network"),
        why: "all that arrives at an interface with an address goes to the guest, so nothing would reach the one on it",
        remedy: "Let the plug-in use an interface of the node (no `linkInContainer`), \
                 or run the pod with a runtime class of runc",
    }
}

/// A route that is more than a destination, a gateway and an interface.
pub fn route(destination: &str, with: &str) -> Refusal {
    Refusal {
        what: format!("the route to {destination} in the pod's network, with {with}"),
        why: "kiln tells the guest of routes with one gateway",
        remedy: ONE_GATEWAY,
    }
}

/// A rule of policy routing by something that is not passed on.
pub fn routing_rule(priority: u32) -> Refusal {
    Refusal {
        what: format!("the routing rule of priority {priority} in the pod's network"),
        why: "kiln tells the guest of rules by addresses, interfaces and marks that name a table or a verdict",
        remedy: ONE_GATEWAY,
    }
}

const ONE_GATEWAY: &str =
    "Have the network plug-in make plain routes, or run the pod with a runtime class of runc";

/// Mounts that are to reach the node.
pub fn propagation(source: &str, destination: &str) -> Refusal {
    Refusal {
        what: format!(
            "mount propagation from the container to the node (Bidirectional) of the volume {source} at {destination}"
        ),
        why: "what is mounted in a μVM can't be mounted on the node",
        remedy: "Use HostToContainer, or run the pod with a runtime class of runc",
    }
}

/// A namespace that belongs to no container of the pod.
pub fn foreign_namespace(kind: &str, path: &str) -> Refusal {
    Refusal {
        what: format!("the {kind} namespace {path}"),
        why: "it is none of this pod's, and containers of a μVM can share with their own pod only",
        remedy: "Name a container of the same pod that runs",
    }
}

/// Fields of a specification that are honoured, or that [`RULES`] look at.
const KNOWN: [(&str, &[&str]); 3] = [
    (
        "",
        &[
            "ociVersion",
            "process",
            "root",
            "hostname",
            "domainname",
            "mounts",
            "hooks",
            "annotations",
            "linux",
        ],
    ),
    (
        "/process",
        &[
            "terminal",
            "consoleSize",
            "user",
            "args",
            "env",
            "cwd",
            "capabilities",
            "rlimits",
            "noNewPrivileges",
            "apparmorProfile",
            "oomScoreAdj",
            "selinuxLabel",
            "scheduler",
            "ioPriority",
        ],
    ),
    (
        "/linux",
        &[
            "uidMappings",
            "gidMappings",
            "sysctl",
            "resources",
            "cgroupsPath",
            "namespaces",
            "devices",
            "seccomp",
            "rootfsPropagation",
            "maskedPaths",
            "readonlyPaths",
            "mountLabel",
            "personality",
            "timeOffsets",
            "intelRdt",
            "netDevices",
            "memoryPolicy",
        ],
    ),
];

struct Rule {
    /// Where it is in the specification.
    at: &'static str,
    /// What of it is refused, by name.
    asks: fn(&Value) -> Option<String>,
    why: &'static str,
    remedy: &'static str,
}

const PROCESS: &[Rule] = &[
    Rule {
        at: "apparmorProfile",
        asks: |value| {
            let profile = value.as_str().filter(|p| !DEFAULT_PROFILES.contains(p))?;
            Some(format!("the AppArmor profile {profile:?}"))
        },
        why: "profiles are loaded into the node's kernel, and the container runs on the guest's",
        remedy: "Leave the profile out, or ask for RuntimeDefault or Unconfined",
    },
    Rule {
        at: "selinuxLabel",
        asks: |value| {
            let label = value.as_str().filter(|l| !l.is_empty())?;
            let kind = label.split(':').nth(2).unwrap_or(label);
            let named = !DEFAULT_TYPES.contains(&kind);
            named.then(|| format!("the SELinux type {kind:?}"))
        },
        why: "the policy is the node's kernel's, and the container runs on the guest's",
        remedy: "Leave the type out",
    },
    Rule {
        at: "scheduler",
        asks: |value| asked(value).then(|| "process.scheduler".to_owned()),
        why: "the guest's processes are scheduled within the μVM's own share of the node",
        remedy: OTHER_RUNTIME,
    },
    Rule {
        at: "ioPriority",
        asks: |value| asked(value).then(|| "process.ioPriority".to_owned()),
        why: "the μVM's disks have no priorities",
        remedy: OTHER_RUNTIME,
    },
];

const LINUX: &[Rule] = &[
    Rule {
        at: "seccomp",
        asks: |value| {
            let listener = value.get("listenerPath").is_some_and(asked);
            let notify = value
                .get("syscalls")
                .and_then(Value::as_array)
                .is_some_and(|list| list.iter().any(|rule| rule["action"] == "SCMP_ACT_NOTIFY"));
            (listener || notify || value["defaultAction"] == "SCMP_ACT_NOTIFY")
                .then(|| "the seccomp profile's listener (SCMP_ACT_NOTIFY)".to_owned())
        },
        why: "the listener is on the node, and the container's system calls are the guest's",
        remedy: "Use a profile with other actions",
    },
    Rule {
        at: "intelRdt",
        asks: |value| asked(value).then(|| "linux.intelRdt (the RDT class)".to_owned()),
        why: "classes of cache and bandwidth are set for processes of the node",
        remedy: OTHER_RUNTIME,
    },
    Rule {
        at: "netDevices",
        asks: |value| {
            let names = value.as_object().filter(|names| !names.is_empty())?;
            let names: Vec<_> = names.keys().map(String::as_str).collect();
            Some(format!("the node's network device {}", names.join(", ")))
        },
        why: "a network device can't be moved into a guest",
        remedy: "Have the CNI plug-in make the interface in the pod's network namespace",
    },
    Rule {
        at: "memoryPolicy",
        asks: |value| asked(value).then(|| "linux.memoryPolicy".to_owned()),
        why: "the guest has none of the node's memory nodes",
        remedy: OTHER_RUNTIME,
    },
    Rule {
        at: "namespaces",
        asks: |value| {
            let joins = |entry: &&Value| {
                let kind = entry["type"].as_str().unwrap_or_default();
                matches!(kind, "mount" | "cgroup" | "time") && entry.get("path").is_some_and(asked)
            };
            let entry = value.as_array()?.iter().find(joins)?;
            let (kind, path) = (entry["type"].as_str()?, entry["path"].as_str()?);
            Some(format!("the {kind} namespace {path}"))
        },
        why: "it is one of the node's kernel's, and the container runs on the guest's",
        remedy: "Let the container have one of its own",
    },
];

const RESOURCES: &[Rule] = &[
    Rule {
        at: "hugepageLimits",
        asks: |value| {
            // The kubelet states a limit of 0 for each size that the node has.
            let entry = value
                .as_array()?
                .iter()
                .find(|e| e.get("limit").is_some_and(asked))?;
            let size = entry["pageSize"].as_str().unwrap_or_default();
            Some(format!(
                "hugepages of {size} (hugepages-{})",
                size.replace('B', "i")
            ))
        },
        why: NO_HUGEPAGES,
        remedy: OTHER_RUNTIME,
    },
    Rule {
        at: "blockIO",
        asks: |value| {
            asked(value).then(|| "linux.resources.blockIO (the block I/O class)".to_owned())
        },
        why: "weights and rates are set for the node's disks, which the guest does not see",
        remedy: OTHER_RUNTIME,
    },
    Rule {
        at: "network",
        asks: |value| asked(value).then(|| "linux.resources.network".to_owned()),
        why: "classes and priorities of traffic are set for processes of the node",
        remedy: OTHER_RUNTIME,
    },
    Rule {
        at: "rdma",
        asks: |value| asked(value).then(|| "linux.resources.rdma".to_owned()),
        why: "the guest has none of the node's RDMA devices",
        remedy: OTHER_RUNTIME,
    },
    Rule {
        at: "cpu",
        asks: |value| {
            let of = |key: &str| value.get(key).is_some_and(asked);
            (of("realtimeRuntime") || of("realtimePeriod"))
                .then(|| "real-time CPU (linux.resources.cpu.realtimeRuntime)".to_owned())
        },
        why: "the μVM's CPUs are threads without real-time scheduling",
        remedy: OTHER_RUNTIME,
    },
];

/// Profiles that engines put in by themselves where the node has AppArmor. In a guest the μVM is the confinement.
const DEFAULT_PROFILES: [&str; 5] = [
    "",
    "unconfined",
    "cri-containerd.apparmor.d",
    "nerdctl-default",
    "docker-default",
];
/// Types that engines put in by themselves where the node has SELinux; likewise.
const DEFAULT_TYPES: [&str; 4] = [
    "container_t",
    "container_init_t",
    "container_kvm_t",
    "spc_t",
];

/// Looks for what can't be had in a container's specification.
pub fn check(spec: &Value, policy: HostNamespaces) -> Result<(), Refusal> {
    for (at, known) in KNOWN {
        let fields = spec.pointer(at).and_then(Value::as_object);
        for (name, value) in fields.into_iter().flatten() {
            if !known.contains(&name.as_str()) && asked(value) {
                return Err(unknown(&format!("{at}/{name}")));
            }
        }
    }
    hooks(spec)?;
    if let Some(process) = spec.get("process") {
        check_process(process)?;
    }
    let Some(linux) = spec.get("linux") else {
        return Ok(());
    };
    rules(linux, LINUX)?;
    devices(linux)?;
    namespaces(linux, policy)?;
    linux.get("resources").map_or(Ok(()), check_resources)
}

/// Likewise in a process's, which may be an exec's.
pub fn check_process(process: &Value) -> Result<(), Refusal> {
    rules(process, PROCESS)
}

/// Likewise in limits, which may be new ones of a container that runs.
pub fn check_resources(resources: &Value) -> Result<(), Refusal> {
    rules(resources, RESOURCES)
}

fn rules(section: &Value, rules: &[Rule]) -> Result<(), Refusal> {
    for rule in rules {
        if let Some(what) = section.get(rule.at).and_then(rule.asks) {
            let (why, remedy) = (rule.why, rule.remedy);
            return Err(Refusal { what, why, remedy });
        }
    }
    Ok(())
}

fn unknown(pointer: &str) -> Refusal {
    Refusal {
        what: pointer.trim_start_matches('/').replace('/', "."),
        why: "this version of kiln does not know that part of a specification",
        remedy: "Leave it out, or use a version that does",
    }
}

/// All but those that run in the container are programs of the node.
fn hooks(spec: &Value) -> Result<(), Refusal> {
    let hooks = spec.get("hooks").and_then(Value::as_object);
    for (kind, list) in hooks.into_iter().flatten() {
        let first = list.as_array().and_then(|list| list.first());
        let Some(first) = first.filter(|_| kind != "startContainer") else {
            continue;
        };
        let program = first["path"].as_str().unwrap_or_default();
        return Err(Refusal {
            what: format!("the {kind} hook {program}"),
            why: "it is a program of the node's that changes a container there, and the container is in a guest",
            remedy: OTHER_RUNTIME,
        });
    }
    Ok(())
}

/// A container sees none of the node's; without an entry it would.
fn namespaces(linux: &Value, policy: HostNamespaces) -> Result<(), Refusal> {
    let list = linux.get("namespaces").and_then(Value::as_array);
    let has = |kind: &str| list.is_some_and(|list| list.iter().any(|n| n["type"] == kind));
    // A pod on the node's network has no host name of its own either: this is what was asked for.
    if !has("network") {
        return Err(host_network());
    }
    let missing = ["pid", "ipc", "uts"].into_iter().find(|kind| !has(kind));
    let refusal = missing.and_then(|kind| host_namespace(kind, policy));
    refusal.map_or(Ok(()), Err)
}

/// Character devices whose numbers are the same everywhere, and which are the guest's own in a container, with the guest's paths.
/// Of the last three the guest's kernel may have none.
const GUESTS: [((i64, i64), &str); 11] = [
    ((1, 3), "/dev/null"),
    ((1, 5), "/dev/zero"),
    ((1, 7), "/dev/full"),
    ((1, 8), "/dev/random"),
    ((1, 9), "/dev/urandom"),
    ((5, 0), "/dev/tty"),
    ((5, 1), "/dev/console"),
    ((5, 2), "/dev/ptmx"),
    ((10, 200), "/dev/net/tun"),
    ((10, 229), "/dev/fuse"),
    ((10, 232), "/dev/kvm"),
];

/// The guest's own character device of a number, if it has one.
pub fn guests_own(number: (i64, i64)) -> Option<&'static str> {
    let mut devices = GUESTS.iter();
    devices.find_map(|(own, path)| (*own == number).then_some(*path))
}

/// Whether a device is the guest's own: it is made there, by its number.
pub fn is_guests_own(device: &Value) -> bool {
    match device["type"].as_str() {
        Some("c" | "u") => number(device).is_some_and(|number| guests_own(number).is_some()),
        Some("p") => true,
        _ => false,
    }
}

/// Whether a device is meant for this container. A privileged container's list names every device of the node, but only one that is
/// given has a rule of its own.
pub fn is_given(device: &Value, linux: &Value) -> bool {
    let wanted = number(device);
    let rules = linux
        .pointer("/resources/devices")
        .and_then(Value::as_array);
    let rules = rules.into_iter().flatten();
    let mut own = rules.filter(|rule| rule["allow"] == true && number(rule) == wanted);
    wanted.is_some() && own.any(|rule| same_kind(device, rule))
}

fn same_kind(device: &Value, rule: &Value) -> bool {
    let is_block = |entry: &Value| entry["type"] == "b";
    is_block(device) == is_block(rule)
}

fn number(entry: &Value) -> Option<(i64, i64)> {
    Some((entry["major"].as_i64()?, entry["minor"].as_i64()?))
}

/// A device of the node that is no disk.
pub fn nodes_device(path: &str) -> Refusal {
    Refusal {
        what: format!("the node's device {path}"),
        why: "a μVM can be given block devices of the node (volumeDevices), and no others",
        remedy: OTHER_RUNTIME,
    }
}

/// A volume of medium `HugePages`. containerd says nothing of limits unless `disable_hugetlb_controller` is false.
pub fn hugepages_volume(destination: &str) -> Refusal {
    Refusal {
        what: format!("the volume of hugepages (medium: HugePages) at {destination}"),
        why: NO_HUGEPAGES,
        remedy: OTHER_RUNTIME,
    }
}

/// A disk that is mounted like a file.
pub fn bound_disk(path: &str) -> Refusal {
    Refusal {
        what: format!("the node's block device {path} as a mount"),
        why: "a file that is shown to a guest is no device there",
        remedy: "Ask for it as a block volume (volumeDevices)",
    }
}

fn devices(linux: &Value) -> Result<(), Refusal> {
    let list = linux.get("devices").and_then(Value::as_array);
    for device in list.into_iter().flatten() {
        // Block devices become disks of the guest.
        if device["type"] == "b" || is_guests_own(device) || !is_given(device, linux) {
            continue;
        }
        return Err(nodes_device(device["path"].as_str().unwrap_or_default()));
    }
    Ok(())
}

/// Whether a value says anything: not if it is empty, or nothing but zeros.
fn asked(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(yes) => *yes,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => list.iter().any(asked),
        Value::Object(fields) => fields.values().any(asked),
    }
}

#[cfg(test)]
mod tests;
