//! Which system calls a container may make, unless its person says otherwise.
//!
//! What is refused is listed, not what is allowed: the guest's kernel is the container's alone, the list is a
//! tenth as long, and a filter is made on the way to every start.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

/// What a container engine refuses to a container that it gives no further rights.
const REFUSED: &[&str] = &[
    // The kernel itself: its modules, its successor, its clock, its log, its power.
    "init_module",
    "finit_module",
    "delete_module",
    "create_module",
    "query_module",
    "get_kernel_syms",
    "kexec_load",
    "kexec_file_load",
    "reboot",
    "settimeofday",
    "stime",
    "clock_settime",
    "clock_settime64",
    "clock_adjtime",
    "clock_adjtime64",
    "adjtimex",
    "syslog",
    "acct",
    "swapon",
    "swapoff",
    "quotactl",
    "quotactl_fd",
    "nfsservctl",
    "_sysctl",
    "sysfs",
    "uselib",
    "ustat",
    "vm86",
    "vm86old",
    "iopl",
    "ioperm",
    "lookup_dcookie",
    // Namespaces and mounts.
    "setns",
    "unshare",
    "mount",
    "umount",
    "umount2",
    "pivot_root",
    "move_mount",
    "open_tree",
    "fsopen",
    "fsconfig",
    "fsmount",
    "fspick",
    "mount_setattr",
    // What has no namespace of its own, or looks into others.
    "add_key",
    "request_key",
    "keyctl",
    "bpf",
    "perf_event_open",
    "open_by_handle_at",
    "fanotify_init",
    "kcmp",
    "pidfd_getfd",
    "userfaultfd",
    "io_uring_setup",
    "io_uring_enter",
    "io_uring_register",
];

/// Flags of `clone`: new namespaces.
const NAMESPACES: [u64; 7] = [
    0x0002_0000,
    0x0200_0000,
    0x0400_0000,
    0x0800_0000,
    0x1000_0000,
    0x2000_0000,
    0x4000_0000,
];
/// Sockets to the host, which are the agent's.
const AF_VSOCK: u64 = 40;
const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// The profile for a container, as the runtime specification has it; none if it is to be unconfined.
pub(super) fn profile(named: Option<&Path>) -> Result<Option<Value>> {
    let Some(path) = named else {
        return Ok(Some(default()));
    };
    if path.as_os_str() == "unconfined" {
        return Ok(None);
    }
    let read = || format!("reading the seccomp profile {}", path.display());
    let text = std::fs::read_to_string(path).with_context(read)?;
    let profile: Value = serde_json::from_str(&text).with_context(read)?;
    ensure!(
        profile["defaultAction"].is_string(),
        "{} is no seccomp profile of the runtime specification: it has no defaultAction",
        path.display()
    );
    Ok(Some(profile))
}

fn default() -> Value {
    let namespace = |flag: &u64| {
        json!({
            "names": ["clone"], "action": "SCMP_ACT_ERRNO", "errnoRet": EPERM,
            "args": [{"index": 0, "value": flag, "valueTwo": flag, "op": "SCMP_CMP_MASKED_EQ"}],
        })
    };
    let mut rules = vec![
        json!({"names": REFUSED, "action": "SCMP_ACT_ERRNO", "errnoRet": EPERM}),
        // Its flags are in memory, where no filter sees them; the C library goes on with `clone`.
        json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS}),
        json!({
            "names": ["socket"], "action": "SCMP_ACT_ERRNO", "errnoRet": EPERM,
            "args": [{"index": 0, "value": AF_VSOCK, "op": "SCMP_CMP_EQ"}],
        }),
    ];
    rules.extend(NAMESPACES.iter().map(namespace));
    json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": rules,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profile_is_the_default_a_files_or_none() {
        let of = |path: &str| profile(Some(Path::new(path)));
        let own = profile(None).unwrap().unwrap();
        assert_eq!(own["defaultAction"], "SCMP_ACT_ALLOW");
        assert_eq!(own["syscalls"].as_array().unwrap().len(), 10);
        assert_eq!(of("unconfined").unwrap(), None);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("profile.json");
        std::fs::write(&path, r#"{"defaultAction": "SCMP_ACT_LOG"}"#).unwrap();
        let named = of(path.to_str().unwrap()).unwrap().unwrap();
        assert_eq!(named["defaultAction"], "SCMP_ACT_LOG");
        for wrong in ["{}", "not json"] {
            std::fs::write(&path, wrong).unwrap();
            assert!(of(path.to_str().unwrap()).is_err());
        }
        assert!(of("/no/such/profile").is_err());
    }

    #[test]
    fn nothing_is_refused_twice() {
        let unique: std::collections::BTreeSet<_> = REFUSED.iter().collect();
        assert_eq!(unique.len(), REFUSED.len());
    }
}
