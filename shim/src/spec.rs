//! The OCI specification in a bundle: what the shim reads of it, and what becomes of it for the
//! guest.
//!
//! The document is kept as it came: fields the shim knows nothing of reach the agent untouched.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use kiln_agent_api::users::{IdMap, IdRange};
use serde::Deserialize;
use serde_json::{Value, json};

use kiln_node::config::HostNamespaces;

use crate::error::{Error, Result};
use crate::refusal;
use crate::size::{Limits, Resources};

const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
const SANDBOX_UID: &str = "io.kubernetes.cri.sandbox-uid";
const CONTAINER_NAME: &str = "io.kubernetes.cri.container-name";
const GROUP: &str = "io.containerd.runc.v2.group";
const SANDBOX_CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const SANDBOX_CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const SANDBOX_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";

/// What a task is to its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// CRI's pause container: stands for the pod, runs nothing.
    Sandbox,
    /// One container of a pod whose sandbox was made before.
    Member,
    /// A container without a pod (`ctr run`): a pod of one.
    Alone,
}

/// A mount as the specification has it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default)]
#[derive(Default)]
pub struct SpecMount {
    /// Where in the container.
    pub destination: String,
    /// Its type; `bind` for most.
    #[serde(rename = "type")]
    pub kind: String,
    /// What is mounted.
    pub source: String,
    /// Options as in fstab.
    pub options: Vec<String>,
    /// Which users the files are to belong to, if not to whom they do.
    #[serde(rename = "uidMappings")]
    pub uid_mappings: Vec<Mapping>,
    /// Which groups, likewise.
    #[serde(rename = "gidMappings")]
    pub gid_mappings: Vec<Mapping>,
}

/// Ids of a container and the ones they are outside of its user namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Mapping {
    /// The first in the container.
    #[serde(rename = "containerID")]
    pub container_id: u32,
    /// The first outside.
    #[serde(rename = "hostID")]
    pub host_id: u32,
    /// How many.
    pub size: u32,
}

impl From<Mapping> for IdRange {
    fn from(mapping: Mapping) -> Self {
        Self {
            inside: mapping.container_id,
            outside: mapping.host_id,
            count: mapping.size,
        }
    }
}

/// The map of these; none if there is no mapping at all.
fn id_map(users: &[Mapping], groups: &[Mapping]) -> Option<IdMap> {
    let ranges = |list: &[Mapping]| list.iter().copied().map(IdRange::from).collect();
    let any = !(users.is_empty() && groups.is_empty());
    any.then(|| IdMap {
        users: ranges(users),
        groups: ranges(groups),
    })
}

impl SpecMount {
    /// Whether a path of the host is meant.
    pub fn is_bind(&self) -> bool {
        self.kind == "bind" || self.options.iter().any(|o| o == "bind" || o == "rbind")
    }

    /// Whether an option is among its own.
    pub fn has(&self, option: &str) -> bool {
        self.options.iter().any(|o| o == option)
    }

    /// To whom its files are to belong, if not to whom they do.
    pub fn owners(&self) -> Option<IdMap> {
        id_map(&self.uid_mappings, &self.gid_mappings)
    }
}

/// A block device of the host that a container is given by name (`volumeDevices`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockDevice {
    /// Where in the container.
    pub path: String,
    /// Its numbers on the host.
    pub number: (i64, i64),
    /// Whether it may not be written to.
    pub read_only: bool,
}

/// Which PID namespace a container is to be in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PidNamespace {
    /// One of its own.
    Own,
    /// That of a process of the node.
    Of(u32),
    /// One by another path.
    Other(PathBuf),
    /// The node's.
    Host,
}

/// A specification.
#[derive(Debug, Clone)]
pub struct Spec {
    value: Value,
    annotations: BTreeMap<String, String>,
}

impl Spec {
    /// Reads a bundle's `config.json`.
    pub fn load(bundle: &Path) -> Result<Self> {
        let path = bundle.join("config.json");
        let text = fs::read(&path)
            .map_err(|e| Error::failed(format!("read the OCI spec {}", path.display()), e))?;
        Self::parse(&text)
    }

    /// Parses a specification.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let value: Value = serde_json::from_slice(text)
            .map_err(|e| Error::InvalidArgument(format!("the OCI spec is not JSON: {e}")))?;
        if !value.is_object() {
            return Err(Error::InvalidArgument(
                "the OCI spec is not a JSON object".into(),
            ));
        }
        let annotations = value
            .get("annotations")
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
            .filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned())))
            .collect();
        Ok(Self { value, annotations })
    }

    /// All annotations.
    pub fn annotations(&self) -> &BTreeMap<String, String> {
        &self.annotations
    }

    /// The id of the pod this belongs to, if it says.
    pub fn group(&self) -> Option<&str> {
        [GROUP, SANDBOX_ID]
            .iter()
            .find_map(|k| self.annotations.get(*k))
            .map(String::as_str)
    }

    /// Its name in its pod, if it has one.
    pub fn container_name(&self) -> Option<&str> {
        self.annotations.get(CONTAINER_NAME).map(String::as_str)
    }

    /// The uid that Kubernetes has given its pod.
    pub fn pod_uid(&self) -> Option<&str> {
        let uid = self.annotations.get(SANDBOX_UID)?;
        Some(uid.as_str()).filter(|uid| !uid.is_empty())
    }

    /// What it is to its pod.
    pub fn role(&self) -> Role {
        match self.annotations.get(CONTAINER_TYPE).map(String::as_str) {
            Some("sandbox") => Role::Sandbox,
            Some("container") => Role::Member,
            _ => Role::Alone,
        }
    }

    /// The limits of the whole pod, which CRI writes on the sandbox.
    pub fn sandbox_limits(&self) -> Limits {
        sandbox_limits(&self.annotations)
    }

    /// The container's own limits.
    pub fn limits(&self) -> Limits {
        self.value
            .pointer("/linux/resources")
            .and_then(|r| Resources::deserialize(r).ok())
            .unwrap_or_default()
            .limits()
    }

    /// The network namespace, if the spec names one; `Some(None)` is a new one.
    pub fn network_namespace(&self) -> Option<Option<PathBuf>> {
        self.namespace("network")
    }

    /// The PID namespace.
    pub fn pid_namespace(&self) -> PidNamespace {
        match self.namespace("pid") {
            None => PidNamespace::Host,
            Some(None) => PidNamespace::Own,
            Some(Some(path)) => match process_of(&path, "pid") {
                Some(pid) => PidNamespace::Of(pid),
                None => PidNamespace::Other(path),
            },
        }
    }

    /// The namespaces of the kind that the pod shares, with the processes that are said to have them; none for
    /// a path that names no process.
    pub fn shared_namespaces(&self) -> impl Iterator<Item = (&'static str, PathBuf, Option<u32>)> {
        ["ipc", "uts"].into_iter().filter_map(|kind| {
            let path = self.namespace(kind)??;
            let process = process_of(&path, kind);
            Some((kind, path, process))
        })
    }

    /// The map of the user namespace, if it is to have one. A path, which names the pod's on the host, says nothing
    /// that the map doesn't.
    pub fn user_namespace(&self) -> Result<Option<IdMap>> {
        if self.namespace("user").is_none() {
            return Ok(None);
        }
        let mappings = |pointer: &str| match self.value.pointer(pointer) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(list) => Vec::<Mapping>::deserialize(list)
                .map_err(|e| Error::InvalidArgument(format!("the OCI spec's {pointer}: {e}"))),
        };
        let users = mappings("/linux/uidMappings")?;
        let groups = mappings("/linux/gidMappings")?;
        if users.is_empty() || groups.is_empty() {
            return Err(Error::InvalidArgument(
                "kiln: a user namespace without uidMappings and gidMappings is refused: one of the \
                 host's can't be joined from a μVM. State the mappings"
                    .into(),
            ));
        }
        let map = id_map(&users, &groups);
        let has_root = |map: &IdMap| map.user(0).is_some() && map.group(0).is_some();
        if map.as_ref().is_some_and(|map| !has_root(map)) {
            return Err(Error::InvalidArgument(
                "kiln: a user namespace that has no root is refused: what is made for a container before its first \
                 process runs is root's. Map the container's id 0 in uidMappings and gidMappings"
                    .into(),
            ));
        }
        Ok(map)
    }

    fn namespace(&self, kind: &str) -> Option<Option<PathBuf>> {
        let list = self.value.pointer("/linux/namespaces")?.as_array()?;
        let entry = list
            .iter()
            .find(|n| n.get("type").and_then(Value::as_str) == Some(kind))?;
        let path = entry
            .get("path")
            .and_then(Value::as_str)
            .filter(|p| !p.is_empty());
        Some(path.map(PathBuf::from))
    }

    /// The cgroup the spec asks for on the host.
    pub fn cgroups_path(&self) -> Option<&str> {
        self.value
            .pointer("/linux/cgroupsPath")
            .and_then(Value::as_str)
            .filter(|p| !p.is_empty())
    }

    /// How likely the first process is to be killed when memory runs out, if the spec says.
    pub fn oom_score_adj(&self) -> Option<i32> {
        let score = self.value.pointer("/process/oomScoreAdj")?.as_i64()?;
        i32::try_from(score).ok()
    }

    /// The host name.
    pub fn hostname(&self) -> Option<&str> {
        self.value
            .get("hostname")
            .and_then(Value::as_str)
            .filter(|h| !h.is_empty())
    }

    /// The sysctls.
    pub fn sysctls(&self) -> BTreeMap<String, String> {
        self.value
            .pointer("/linux/sysctl")
            .and_then(|s| BTreeMap::deserialize(s).ok())
            .unwrap_or_default()
    }

    /// Whether the root file system is read only.
    pub fn root_is_read_only(&self) -> bool {
        self.value
            .pointer("/root/readonly")
            .and_then(Value::as_bool)
            .unwrap_or(false)
    }

    /// Whether the first process has a terminal.
    pub fn terminal(&self) -> bool {
        self.value
            .pointer("/process/terminal")
            .and_then(Value::as_bool)
            .unwrap_or(false)
    }

    /// The terminal's width and height; 0 if not stated.
    pub fn console_size(&self) -> (u32, u32) {
        let side = |name: &str| {
            self.value
                .pointer(&format!("/process/consoleSize/{name}"))
                .and_then(Value::as_u64)
                .and_then(|n| u32::try_from(n).ok())
                .unwrap_or(0)
        };
        (side("width"), side("height"))
    }

    /// The mounts.
    pub fn mounts(&self) -> Result<Vec<SpecMount>> {
        match self.value.get("mounts") {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(list) => Vec::deserialize(list)
                .map_err(|e| Error::InvalidArgument(format!("the OCI spec's mounts: {e}"))),
        }
    }

    /// The block devices meant for this container.
    pub fn block_devices(&self) -> Vec<BlockDevice> {
        let Some(linux) = self.value.get("linux") else {
            return Vec::new();
        };
        let list = |pointer: &str| {
            let list = linux.pointer(pointer).and_then(Value::as_array);
            list.into_iter().flatten().filter(|entry| is_block(entry))
        };
        let number = |entry: &Value| Some((entry["major"].as_i64()?, entry["minor"].as_i64()?));
        let given = |entry: &Value| {
            let wanted = number(entry)?;
            let rule = list("/resources/devices")
                .find(|rule| rule["allow"] == true && number(rule) == Some(wanted))?;
            Some(BlockDevice {
                path: entry["path"].as_str()?.to_owned(),
                number: wanted,
                read_only: !rule["access"].as_str()?.contains('w'),
            })
        };
        list("/devices").filter_map(given).collect()
    }

    /// Looks for what a container in a μVM can't have.
    pub fn check(&self, policy: HostNamespaces) -> Result<()> {
        refusal::check(&self.value, policy)?;
        self.user_namespace().map(|_| ())
    }

    /// The specification for the agent: `mounts` in place of the spec's own, no path of the host
    /// left in it, and nothing that only makes sense on the host.
    pub fn for_guest(&self, mounts: &[SpecMount]) -> Result<Vec<u8>> {
        let mut value = self.value.clone();
        value["mounts"] = mounts
            .iter()
            .map(|m| {
                json!({
                    "destination": m.destination, "type": m.kind,
                    "source": m.source, "options": m.options,
                })
            })
            .collect();
        // The agent decides where the root lies.
        if let Some(root) = value.get_mut("root").and_then(Value::as_object_mut) {
            root.insert("path".into(), "rootfs".into());
        }
        // Programs of the host, which are refused, but for those that run in the container.
        if let Some(hooks) = value.get_mut("hooks").and_then(Value::as_object_mut) {
            hooks.retain(|kind, _| kind == "startContainer");
        }
        // Engines' own; others are refused. The guest has no profiles and no policy; the VM is the confinement.
        remove(&mut value, "/process", "apparmorProfile");
        remove(&mut value, "/process", "selinuxLabel");
        remove(&mut value, "/linux", "mountLabel");
        // The others' numbers are the host's. Disks that the container is given are among the mounts.
        if let Some(list) = value
            .pointer_mut("/linux/devices")
            .and_then(Value::as_array_mut)
        {
            list.retain(refusal::is_guests_own);
        }
        if let Some(list) = value
            .pointer_mut("/linux/namespaces")
            .and_then(Value::as_array_mut)
        {
            // The guest's own network is the pod's. A namespace with a path is one the pod's
            // containers share: for ipc and uts that is the guest's own, for pid the agent is told
            // by another field.
            list.retain(|n| {
                let kind = n.get("type").and_then(Value::as_str).unwrap_or_default();
                let joined = n
                    .get("path")
                    .and_then(Value::as_str)
                    .is_some_and(|p| !p.is_empty());
                kind == "user" || (kind != "network" && !joined)
            });
            // The guest makes the pod's by the mappings.
            for namespace in list.iter_mut().filter(|n| n["type"] == "user") {
                *namespace = json!({"type": "user"});
            }
        }
        serde_json::to_vec(&value).map_err(|e| Error::failed("write the guest's OCI spec", e))
    }
}

/// The process that a path like `/proc/7/ns/pid` names.
fn process_of(path: &Path, kind: &str) -> Option<u32> {
    let path = path.to_str()?.strip_prefix("/proc/")?;
    let (pid, rest) = path.split_once('/')?;
    let namespace = rest.strip_prefix("ns/")?;
    (namespace == kind).then(|| pid.parse().ok())?
}

/// The limits of a whole pod from CRI's annotations on its sandbox.
pub fn sandbox_limits(annotations: &BTreeMap<String, String>) -> Limits {
    let number = |key: &str| {
        annotations
            .get(key)
            .and_then(|v| v.parse::<i64>().ok())
            .unwrap_or(0)
    };
    Limits {
        cpu_quota: number(SANDBOX_CPU_QUOTA),
        cpu_period: u64::try_from(number(SANDBOX_CPU_PERIOD)).unwrap_or(0),
        memory: number(SANDBOX_MEMORY),
    }
}

fn is_block(entry: &Value) -> bool {
    entry["type"] == "b"
}

fn remove(value: &mut Value, parent: &str, key: &str) {
    if let Some(object) = value.pointer_mut(parent).and_then(Value::as_object_mut) {
        object.remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(value: &Value) -> Spec {
        Spec::parse(&serde_json::to_vec(value).unwrap()).unwrap()
    }

    fn sandbox() -> Spec {
        spec(&json!({
            "hostname": "web-0",
            "annotations": {
                "io.kubernetes.cri.container-type": "sandbox",
                "io.kubernetes.cri.sandbox-id": "sb",
                "io.kubernetes.cri.sandbox-cpu-quota": "50000",
                "io.kubernetes.cri.sandbox-cpu-period": "100000",
                "io.kubernetes.cri.sandbox-memory": "134217728",
            },
            "linux": {
                "cgroupsPath": "/kubepods/pod1/sb",
                "sysctl": {"net.ipv4.ip_unprivileged_port_start": "0"},
                "namespaces": [{"type": "pid"}, {"type": "network", "path": "/run/netns/cni-1"}],
            },
        }))
    }

    #[test]
    fn sandbox_of_cri_is_recognised_with_its_limits_and_network() {
        let spec = sandbox();
        assert_eq!(spec.role(), Role::Sandbox);
        assert_eq!(spec.group(), Some("sb"));
        assert_eq!(
            spec.sandbox_limits(),
            Limits {
                cpu_quota: 50_000,
                cpu_period: 100_000,
                memory: 128 << 20
            }
        );
        assert_eq!(
            spec.network_namespace(),
            Some(Some("/run/netns/cni-1".into()))
        );
        assert_eq!(spec.pid_namespace(), PidNamespace::Own);
        assert_eq!(spec.hostname(), Some("web-0"));
        assert_eq!(spec.sysctls().len(), 1);
    }

    #[test]
    fn container_of_ctr_is_a_pod_of_one() {
        let spec = spec(&json!({"process": {"terminal": true}}));
        assert_eq!(spec.role(), Role::Alone);
        assert_eq!(spec.group(), None);
        assert!(spec.terminal());
        assert_eq!(spec.network_namespace(), None);
    }

    #[test]
    fn the_guests_copy_has_no_path_of_the_host_and_keeps_what_it_does_not_know() {
        let spec = spec(&json!({
            "ociVersion": "1.2.0",
            "process": {"args": ["sh"], "apparmorProfile": "cri", "selinuxLabel": "x", "novel": 1},
            "root": {"path": "/run/containerd/x/rootfs", "readonly": true},
            "hooks": {
                "prestart": [{"path": "/usr/bin/nvidia"}],
                "startContainer": [{"path": "/inside"}],
            },
            "mounts": [{"destination": "/data", "type": "bind", "source": "/var/lib/kubelet/x"}],
            "linux": {
                "mountLabel": "x",
                "namespaces": [
                    {"type": "mount"}, {"type": "pid"},
                    {"type": "network", "path": "/proc/7/ns/net"},
                    {"type": "ipc", "path": "/proc/7/ns/ipc"},
                ],
            },
        }));
        let mount = SpecMount {
            destination: "/data".into(),
            kind: "bind".into(),
            source: "/run/kiln/volumes/0".into(),
            options: vec!["rbind".into()],
            ..SpecMount::default()
        };
        let guest: Value = serde_json::from_slice(&spec.for_guest(&[mount]).unwrap()).unwrap();
        let text = guest.to_string();
        for host in [
            "/var/lib/kubelet",
            "/run/containerd",
            "/proc/7",
            "nvidia",
            "apparmor",
        ] {
            assert!(!text.contains(host), "{host} in {text}");
        }
        assert_eq!(guest["process"]["novel"], 1);
        assert_eq!(guest["hooks"]["startContainer"][0]["path"], "/inside");
        assert_eq!(guest["root"]["readonly"], true);
        assert_eq!(
            guest["linux"]["namespaces"],
            json!([{"type": "mount"}, {"type": "pid"}])
        );
        assert_eq!(guest["mounts"][0]["source"], "/run/kiln/volumes/0");
    }

    #[test]
    fn only_block_devices_that_are_given_by_name_are_the_containers() {
        let spec = spec(&json!({"linux": {
            "devices": [
                {"path": "/dev/xvda", "type": "b", "major": 7, "minor": 1},
                {"path": "/dev/xvdb", "type": "b", "major": 7, "minor": 2},
                {"path": "/dev/vda", "type": "b", "major": 253, "minor": 0},
                {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
            ],
            "resources": {"devices": [
                {"allow": false, "access": "rwm"},
                {"allow": true, "type": "b", "major": 7, "minor": 1, "access": "rwm"},
                {"allow": true, "type": "b", "major": 7, "minor": 2, "access": "r"},
                {"allow": true, "type": "b", "access": "rwm"},
            ]},
        }}));
        let device = |path: &str, minor, read_only| BlockDevice {
            path: path.into(),
            number: (7, minor),
            read_only,
        };
        assert_eq!(
            spec.block_devices(),
            [device("/dev/xvda", 1, false), device("/dev/xvdb", 2, true)]
        );
        let guest: Value = serde_json::from_slice(&spec.for_guest(&[]).unwrap()).unwrap();
        let left = guest["linux"]["devices"].as_array().unwrap();
        assert_eq!((left.len(), &left[0]["path"]), (1, &json!("/dev/fuse")));
    }

    #[test]
    fn processes_that_namespaces_are_of_are_read_from_their_paths() {
        let with = |entries: Value| spec(&json!({"linux": {"namespaces": entries}}));
        let pid = |path: &str| with(json!([{"type": "pid", "path": path}])).pid_namespace();
        assert_eq!(pid("/proc/71/ns/pid"), PidNamespace::Of(71));
        for other in ["/proc/71/ns/net", "/proc/self/ns/pid", "/run/pidns/x"] {
            assert_eq!(pid(other), PidNamespace::Other(other.into()));
        }
        assert_eq!(with(json!([])).pid_namespace(), PidNamespace::Host);
        let shared = with(json!([
            {"type": "ipc", "path": "/proc/71/ns/ipc"}, {"type": "uts", "path": "/run/x"},
        ]));
        let shared: Vec<_> = shared.shared_namespaces().map(|n| (n.0, n.2)).collect();
        assert_eq!(shared, [("ipc", Some(71)), ("uts", None)]);
    }

    #[test]
    fn devices_of_the_host_go_to_no_guest() {
        let spec = spec(&json!({"linux": {"devices": [
            {"path": "/dev/nvidia0", "type": "c", "major": 195, "minor": 0},
            {"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232},
        ]}}));
        let guest: Value = serde_json::from_slice(&spec.for_guest(&[]).unwrap()).unwrap();
        let left = guest["linux"]["devices"].as_array().unwrap();
        assert_eq!((left.len(), &left[0]["path"]), (1, &json!("/dev/kvm")));
    }

    #[test]
    fn a_user_namespace_is_its_map_and_keeps_no_path_of_the_host() {
        let mappings = json!([{"containerID": 0, "hostID": 131_072, "size": 65_536}]);
        let mut value = json!({"linux": {
            "namespaces": [{"type": "user", "path": "/proc/7/ns/user"}],
            "uidMappings": mappings, "gidMappings": mappings,
        }});
        let found = spec(&value).user_namespace().unwrap().unwrap();
        assert_eq!(
            (found.user(0), found.group(65_535)),
            (Some(131_072), Some(196_607))
        );
        let guest: Value = serde_json::from_slice(&spec(&value).for_guest(&[]).unwrap()).unwrap();
        assert_eq!(guest["linux"]["namespaces"], json!([{"type": "user"}]));
        assert_eq!(guest["linux"]["uidMappings"], mappings);

        for (wrong, named) in [
            (json!(null), "gidMappings"),
            (
                json!([{"containerID": 1, "hostID": 131_072, "size": 65_536}]),
                "no root",
            ),
        ] {
            value["linux"]["gidMappings"] = wrong;
            let error = spec(&value).user_namespace().unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
            spec(&value).check(HostNamespaces::Refuse).unwrap_err();
        }
        assert_eq!(spec(&json!({"linux": {}})).user_namespace().unwrap(), None);
    }

    #[test]
    fn a_mounts_owners_are_read() {
        let spec = spec(&json!({"mounts": [
            {"destination": "/a", "uidMappings": [{"containerID": 0, "hostID": 9, "size": 2}]},
            {"destination": "/b"},
        ]}));
        let owners: Vec<_> = spec
            .mounts()
            .unwrap()
            .iter()
            .map(SpecMount::owners)
            .collect();
        assert_eq!(owners[0].as_ref().and_then(|map| map.user(1)), Some(10));
        assert_eq!(owners[1], None);
    }

    #[test]
    fn documents_that_are_no_spec_are_refused() {
        assert!(Spec::parse(b"[]").is_err());
        assert!(Spec::parse(b"{").is_err());
    }

    #[test]
    fn bind_mounts_are_known_by_type_or_option() {
        let mount = |kind: &str, options: &[&str]| SpecMount {
            kind: kind.into(),
            options: options.iter().map(|o| (*o).to_owned()).collect(),
            ..SpecMount::default()
        };
        assert!(mount("bind", &[]).is_bind());
        assert!(mount("none", &["rbind", "ro"]).is_bind());
        assert!(!mount("tmpfs", &["nosuid"]).is_bind());
    }
}
