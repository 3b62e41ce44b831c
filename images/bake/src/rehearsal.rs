//! A container started and ended in the guest that is tried out: a bake whose containers do not start is none, and the
//! pages that a start needs are known afterwards.

use kiln_agent_api::{GUEST_LAYERS, GUEST_STATE_DIR, proto};
use serde_json::{Value, json};
use ttrpc::context::Context;

const CONTAINER: &str = "rehearsal";

/// Starts a container whose only program is the agent's, which says its version. Returns the program's exit code.
pub(crate) async fn container(agent: &proto::AgentClient, deadline: Context) -> ttrpc::Result<u32> {
    let root = format!("{GUEST_STATE_DIR}/containers/{CONTAINER}/rootfs");
    let request = proto::CreateContainerRequest {
        container_id: CONTAINER.to_owned(),
        spec: spec(&root).to_string().into_bytes(),
        stdio: Some(proto::Stdio::default()).into(),
        mounts: vec![root_mount(&root)],
        rootfs: root,
        start: true,
        ..Default::default()
    };
    agent.create_container(deadline.clone(), &request).await?;
    let wait = proto::WaitRequest {
        container_id: CONTAINER.to_owned(),
        ..Default::default()
    };
    let end = agent.wait(deadline.clone(), &wait).await?;
    let delete = proto::DeleteRequest {
        container_id: CONTAINER.to_owned(),
        ..Default::default()
    };
    agent.delete(deadline, &delete).await?;
    Ok(end.exit_code)
}

/// As a container's in a pod, but above what the guest itself has.
fn root_mount(root: &str) -> proto::Mount {
    let own = format!("{GUEST_LAYERS}/{CONTAINER}");
    let (upper, work) = (format!("{own}/upper"), format!("{own}/work"));
    proto::Mount {
        source: "overlay".to_owned(),
        target: root.to_owned(),
        type_: "overlay".to_owned(),
        options: vec![
            "lowerdir=/".to_owned(),
            format!("upperdir={upper}"),
            format!("workdir={work}"),
        ],
        make_target: true,
        target_mode: 0o755,
        make_directories: vec![own, upper, work],
        ..Default::default()
    }
}

/// Much of what Kubernetes gives a container.
fn spec(root: &str) -> Value {
    let mount = |target: &str, kind: &str, options: &[&str]| json!({"destination": target, "type": kind, "source": kind, "options": options});
    json!({
        "ociVersion": "1.1.0",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["/init", "--version"],
            "env": ["PATH=/"],
            "cwd": "/",
            "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]},
            "noNewPrivileges": true,
        },
        "root": {"path": root, "readonly": false},
        "mounts": [
            mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
        ],
        "linux": {
            "resources": {"cpu": {"shares": 2}, "memory": {"limit": 64 << 20}},
            "namespaces": [{"type": "mount"}, {"type": "cgroup"}, {"type": "pid"}],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}
