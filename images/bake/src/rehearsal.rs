//! A container started and ended in the guest that is tried out: a bake whose containers do not start is none, and the
//! pages that a start needs are known afterwards.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use kiln_agent_api::{GUEST_LAYERS, GUEST_STATE_DIR, proto, slots};
use kiln_cache::Lowers;
use kiln_cache::erofs::Plan;
use serde_json::{Value, json};
use ttrpc::context::Context;

use crate::bake::BakeError;

const CONTAINER: &str = "rehearsal";
/// The container's program, in the image and in the guest itself.
const IN_IMAGE: &str = "program";
const IN_GUEST: &str = "init";

/// An image as containers' are, with the agent's program in it: an open file that has no name any more, and its size.
pub(crate) fn image(agent: &Path, staging: &Path) -> Result<(File, u64), BakeError> {
    let own = staging.join(CONTAINER);
    let made = write_image(agent, &own);
    // All of it is in the open file.
    let removed = fs::remove_dir_all(&own);
    made.and_then(|image| removed.map(|()| image))
        .map_err(|source| BakeError::Output { path: own, source })
}

fn write_image(agent: &Path, own: &Path) -> io::Result<(File, u64)> {
    let (tree, path) = (own.join("tree"), own.join("image"));
    fs::create_dir_all(&tree)?;
    fs::copy(agent, tree.join(IN_IMAGE))?;
    let plan = Plan::new(&Lowers::plain(tree)).map_err(io::Error::other)?;
    let file = OwnedFd::from(File::create_new(&path)?);
    plan.write(&file).map_err(io::Error::other)?;
    Ok((File::open(&path)?, plan.size()))
}

/// Starts a container whose only program is the agent's, which says its version. Returns the program's exit code. An image
/// of this size is in the first disk's slot; a machine without slots has none, and the guest's own files do there.
pub(crate) async fn container(
    agent: &proto::AgentClient,
    image: Option<u64>,
    deadline: Context,
) -> ttrpc::Result<u32> {
    let root = format!("{GUEST_STATE_DIR}/containers/{CONTAINER}/rootfs");
    let request = proto::CreateContainerRequest {
        container_id: CONTAINER.to_owned(),
        spec: spec(&root, image.map_or(IN_GUEST, |_| IN_IMAGE))
            .to_string()
            .into_bytes(),
        stdio: Some(proto::Stdio::default()).into(),
        mounts: mounts(&root, image),
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

/// As a container's in a pod.
fn mounts(root: &str, image: Option<u64>) -> Vec<proto::Mount> {
    let Some(size) = image else {
        return vec![root_mount(root, "/")];
    };
    let lower = format!("{GUEST_STATE_DIR}/storage/{CONTAINER}/lower-0");
    let image = proto::Mount {
        source: slots::disk_name(slots::FIRST_DISK).unwrap_or_default(),
        target: lower.clone(),
        type_: "erofs".to_owned(),
        options: vec!["ro".to_owned()],
        wait_ms: 5000,
        make_target: true,
        target_mode: 0o755,
        min_size: size,
        ..Default::default()
    };
    vec![image, root_mount(root, &lower)]
}

fn root_mount(root: &str, lower: &str) -> proto::Mount {
    let own = format!("{GUEST_LAYERS}/{CONTAINER}");
    let (upper, work) = (format!("{own}/upper"), format!("{own}/work"));
    proto::Mount {
        source: "overlay".to_owned(),
        target: root.to_owned(),
        type_: "overlay".to_owned(),
        options: vec![
            format!("lowerdir={lower}"),
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
fn spec(root: &str, program: &str) -> Value {
    let mount = |target: &str, kind: &str, options: &[&str]| json!({"destination": target, "type": kind, "source": kind, "options": options});
    json!({
        "ociVersion": "1.1.0",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": [format!("/{program}"), "--version"],
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
