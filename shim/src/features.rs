//! What of the runtime specification a pod can have, as `-info` tells containerd and CRI tells the kubelet: without
//! `user` and `idmap` in it there are no pods with `hostUsers: false`, without `rro` no recursive read-only mounts.
//!
//! The form is the specification's own (`features.md`), and the values are what the agent's libcontainer does in the guest
//! and the shim on the host. What would need the host's kernel or its programs is not there.

use protobuf::well_known_types::any::Any;
use serde_json::{Value, json};

/// How containerd knows the document.
const TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// The specifications that are understood.
const VERSIONS: [&str; 2] = ["1.0.0", "1.3.0"];

/// `startContainer` runs in the container; all others are programs of the host.
const HOOKS: [&str; 1] = ["startContainer"];

const MOUNT_OPTIONS: [&str; 43] = [
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "idmap",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "private",
    "ratime",
    "rbind",
    "rdiratime",
    "relatime",
    "ridmap",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnorelatime",
    "rnostrictatime",
    "rnosuid",
    "rnosymfollow",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rslave",
    "rstrictatime",
    "rw",
    "slave",
    "strictatime",
    "suid",
    "sync",
    "runbindable",
    "unbindable",
];

const NAMESPACES: [&str; 7] = ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"];

/// Those of Linux 5.9 and later, in the kernel's order.
const CAPABILITIES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

const SECCOMP_ACTIONS: [&str; 8] = [
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_LOG",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_TRAP",
];

const SECCOMP_OPERATORS: [&str; 7] = [
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_LE",
    "SCMP_CMP_LT",
    "SCMP_CMP_MASKED_EQ",
    "SCMP_CMP_NE",
];

/// A μVM is of the node's own kind.
const SECCOMP_ARCHITECTURES: [&str; 3] = ["SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"];

/// A filter that waits for nobody needs nothing of `WAIT_KILLABLE_RECV`.
const SECCOMP_FLAGS: [&str; 3] = [
    "SECCOMP_FILTER_FLAG_LOG",
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
    "SECCOMP_FILTER_FLAG_TSYNC",
];

/// The document.
fn features() -> Value {
    let no = json!({"enabled": false});
    json!({
        "ociVersionMin": VERSIONS[0],
        "ociVersionMax": VERSIONS[1],
        "hooks": HOOKS,
        "mountOptions": MOUNT_OPTIONS.as_slice(),
        "linux": {
            "namespaces": NAMESPACES,
            "capabilities": CAPABILITIES.as_slice(),
            "cgroup": {"v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false},
            "seccomp": {
                "enabled": true,
                "actions": SECCOMP_ACTIONS,
                "operators": SECCOMP_OPERATORS,
                "archs": SECCOMP_ARCHITECTURES,
                "knownFlags": SECCOMP_FLAGS,
                "supportedFlags": SECCOMP_FLAGS,
            },
            // The guest has neither a policy nor profiles, and classes of caches are the host's.
            "apparmor": no,
            "selinux": no,
            "intelRdt": no,
            "netDevices": no,
            "mountExtensions": {"idmap": {"enabled": true}},
        },
    })
}

/// The document as containerd takes it.
pub(crate) fn message() -> Any {
    Any {
        type_url: TYPE.to_owned(),
        value: features().to_string().into_bytes(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(features: &Value, pointer: &str) -> Vec<String> {
        let list = features.pointer(pointer).unwrap().as_array().unwrap();
        list.iter()
            .map(|word| word.as_str().unwrap().to_owned())
            .collect()
    }

    #[test]
    fn what_cri_looks_for_is_there_and_what_kiln_refuses_is_not() {
        let features: Value = serde_json::from_slice(&message().value).unwrap();
        assert!(list(&features, "/linux/namespaces").contains(&"user".to_owned()));
        let idmap = features.pointer("/linux/mountExtensions/idmap/enabled");
        assert_eq!(idmap, Some(&Value::Bool(true)));
        let options = list(&features, "/mountOptions");
        assert!(options.contains(&"rro".to_owned()));
        for refused in ["shared", "rshared", "rrw", "rdev", "tmpcopyup"] {
            assert!(!options.contains(&refused.to_owned()), "{refused}");
        }
        let actions = list(&features, "/linux/seccomp/actions");
        assert!(!actions.contains(&"SCMP_ACT_NOTIFY".to_owned()));
    }

    #[test]
    fn no_word_is_there_twice() {
        let features = features();
        for pointer in ["/mountOptions", "/linux/capabilities", "/linux/namespaces"] {
            let mut words = list(&features, pointer);
            words.sort();
            let all = words.len();
            words.dedup();
            assert_eq!(words.len(), all, "{pointer}");
        }
    }
}
