use super::*;
use serde_json::json;

/// What containerd's CRI plug-in writes for a container, shortened, with `change` made to it.
fn with(pointer: &str, change: Value) -> Value {
    let mut spec = json!({
        "ociVersion": "1.2.1",
        "process": {"args": ["sh"], "apparmorProfile": "cri-containerd.apparmor.d",
            "selinuxLabel": "system_u:system_r:container_t:s0:c1,c2", "oomScoreAdj": 0},
        "root": {"path": "rootfs"},
        "hooks": {},
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "ipc", "path": "/proc/7/ns/ipc"}, {"type": "uts"},
                {"type": "mount"}, {"type": "network", "path": "/run/netns/x"}, {"type": "cgroup"}],
            "resources": {
                "devices": [{"allow": false, "access": "rwm"},
                    {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"}],
                "cpu": {"shares": 2, "cpus": "0-3"},
                "hugepageLimits": [{"pageSize": "2MB", "limit": 0}, {"pageSize": "1GB", "limit": 0}],
                "blockIO": {"weight": 0},
            },
            "devices": [],
            "intelRdt": null,
        },
    });
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    spec.pointer_mut(parent).unwrap()[name] = change;
    spec
}

fn refused(pointer: &str, change: Value) -> Option<String> {
    let result = check(&with(pointer, change), HostNamespaces::Refuse);
    result.err().map(|refusal| refusal.to_string())
}

#[test]
fn what_containerd_writes_by_itself_is_refused_for_nothing() {
    assert_eq!(refused("/hostname", json!("web-0")), None);
}

#[test]
fn what_can_not_be_had_is_refused_by_its_name() {
    let cases = [
        (
            "/process/apparmorProfile",
            json!("my-profile"),
            "\"my-profile\"",
        ),
        ("/process/selinuxLabel", json!("u:r:my_t:s0"), "\"my_t\""),
        (
            "/process/scheduler",
            json!({"policy": "SCHED_FIFO"}),
            "scheduler",
        ),
        (
            "/process/ioPriority",
            json!({"class": "IOPRIO_CLASS_RT"}),
            "ioPriority",
        ),
        (
            "/process/execCPUAffinity",
            json!({"initial": "0"}),
            "process.execCPUAffinity",
        ),
        (
            "/linux/seccomp",
            json!({"listenerPath": "/run/x"}),
            "SCMP_ACT_NOTIFY",
        ),
        (
            "/linux/seccomp",
            json!({"syscalls": [{"names": ["mount"], "action": "SCMP_ACT_NOTIFY"}]}),
            "SCMP_ACT_NOTIFY",
        ),
        ("/linux/intelRdt", json!({"closID": "gold"}), "intelRdt"),
        ("/linux/netDevices", json!({"eth7": {}}), "eth7"),
        (
            "/linux/memoryPolicy",
            json!({"mode": "MPOL_BIND"}),
            "memoryPolicy",
        ),
        (
            "/linux/resources/blockIO",
            json!({"weight": 100}),
            "blockIO",
        ),
        ("/linux/resources/network", json!({"classID": 5}), "network"),
        (
            "/linux/resources/rdma",
            json!({"mlx5": {"hcaHandles": 3}}),
            "rdma",
        ),
        (
            "/linux/resources/cpu",
            json!({"realtimeRuntime": 950}),
            "real-time",
        ),
        (
            "/linux/resources/hugepageLimits",
            json!([{"pageSize": "1GB", "limit": 0}, {"pageSize": "2MB", "limit": 2_097_152}]),
            "hugepages of 2MB (hugepages-2Mi)",
        ),
        (
            "/hooks/createRuntime",
            json!([{"path": "/opt/hook"}]),
            "createRuntime hook /opt/hook",
        ),
        (
            "/hooks/prestart",
            json!([{"path": "/opt/hook"}]),
            "prestart",
        ),
        (
            "/hooks/poststop",
            json!([{"path": "/opt/hook"}]),
            "poststop",
        ),
        (
            "/vm",
            json!({"kernel": {"path": "/vmlinuz"}}),
            "kiln: vm is refused",
        ),
        (
            "/linux/fromTheFuture",
            json!({"level": 1}),
            "linux.fromTheFuture",
        ),
    ];
    for (pointer, change, named) in cases {
        let text = refused(pointer, change).unwrap_or_default();
        assert!(text.contains(named), "{pointer}: {text:?} lacks {named:?}");
        assert!(text.starts_with("kiln: ") && text.ends_with('.'), "{text}");
        assert!(text.contains(" is refused: "), "{text}");
    }
}

#[test]
fn what_engines_put_in_by_themselves_is_let_pass() {
    for profile in DEFAULT_PROFILES {
        assert_eq!(refused("/process/apparmorProfile", json!(profile)), None);
    }
    assert_eq!(
        refused("/hooks/startContainer", json!([{"path": "/in"}])),
        None
    );
    assert_eq!(
        refused("/linux/fromTheFuture", json!({"level": 0, "list": []})),
        None
    );
}

#[test]
fn namespaces_of_the_node_are_refused_unless_its_owner_lets_them_be_the_pods() {
    for (kind, named) in [("pid", "hostPID"), ("ipc", "hostIPC"), ("uts", "UTS")] {
        let mut spec = with("/hostname", json!("x"));
        let list = spec.pointer_mut("/linux/namespaces").unwrap();
        list.as_array_mut().unwrap().retain(|n| n["type"] != kind);
        let text = check(&spec, HostNamespaces::Refuse)
            .unwrap_err()
            .to_string();
        assert!(
            text.contains(named) && text.contains("host_namespaces"),
            "{text}"
        );
        assert_eq!(check(&spec, HostNamespaces::Pod), Ok(()));
    }
    let mut spec = with("/hostname", json!("x"));
    spec["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "ipc"}]);
    for policy in [HostNamespaces::Refuse, HostNamespaces::Pod] {
        assert_eq!(check(&spec, policy), Err(host_network()));
    }
    let joined = json!([{"type": "pid"}, {"type": "ipc"}, {"type": "uts"},
        {"type": "time", "path": "/proc/1/ns/time"}]);
    let text = refused("/linux/namespaces", joined).unwrap();
    assert!(text.contains("time namespace /proc/1/ns/time"), "{text}");
}

#[test]
fn devices_of_the_node_are_refused_unless_they_are_disks_or_the_guest_has_its_own() {
    let device = |path: &str, kind: &str, major: i64, minor: i64| {
        let device = json!({"path": path, "type": kind, "major": major, "minor": minor});
        let mut spec = with("/linux/devices", json!([device]));
        let rule =
            json!({"allow": true, "type": kind, "major": major, "minor": minor, "access": "rwm"});
        let rules = spec.pointer_mut("/linux/resources/devices").unwrap();
        rules.as_array_mut().unwrap().push(rule);
        check(&spec, HostNamespaces::Refuse)
    };
    let refusal = device("/dev/nvidia0", "c", 195, 0).unwrap_err();
    assert!(refusal.what.contains("/dev/nvidia0"), "{refusal}");
    for (path, major, minor) in [
        ("/dev/fuse", 10, 229),
        ("/dev/net/tun", 10, 200),
        ("/dev/kvm", 10, 232),
    ] {
        assert_eq!(device(path, "c", major, minor), Ok(()), "{path}");
    }
    assert_eq!(device("/dev/xvda", "b", 8, 16), Ok(()));
}

#[test]
fn privileged_container_is_not_refused_for_what_else_the_node_has() {
    let all = json!([{"path": "/dev/nvidia0", "type": "c", "major": 195, "minor": 0}]);
    assert_eq!(refused("/linux/devices", all), None);
}
