//! The container that is started and ended in a guest that is tried out.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use kiln_agent_api::proto;
use kiln_cache::Lowers;
use kiln_cache::erofs::Plan;
use kiln_uvm::disks::GuestDisk;
use kiln_uvm::guest::{Guest, GuestError};
use kiln_uvm::root;
use kiln_uvm::timeline::Timeline;
use serde_json::{Value, json};

use crate::bake::BakeError;

const CONTAINER: &str = "rehearsal";
/// The container's program, in the image and in the guest itself.
const IN_IMAGE: &str = "program";
const IN_GUEST: &str = "init";

/// An image as containers' are, with the agent's program in it: an open file that has no name any more.
pub(crate) fn image(agent: &Path, staging: &Path) -> Result<File, BakeError> {
    let own = staging.join(CONTAINER);
    let made = write_image(agent, &own);
    // All of it is in the open file.
    let removed = fs::remove_dir_all(&own);
    made.and_then(|image| removed.map(|()| image))
        .map_err(|source| BakeError::Output { path: own, source })
}

fn write_image(agent: &Path, own: &Path) -> io::Result<File> {
    let (tree, path) = (own.join("tree"), own.join("image"));
    fs::create_dir_all(&tree)?;
    fs::copy(agent, tree.join(IN_IMAGE))?;
    let plan = Plan::new(&Lowers::plain(tree)).map_err(io::Error::other)?;
    let file = OwnedFd::from(File::create_new(&path)?);
    plan.write(&file).map_err(io::Error::other)?;
    File::open(&path)
}

/// Starts a container whose only program is the agent's, which says its version. Returns the program's exit code. The image
/// is on the disk; a machine without slots has none, and the guest's own files do there.
pub(crate) async fn container(guest: &dyn Guest, disk: &[GuestDisk]) -> Result<u32, GuestError> {
    let (program, mounts) = match disk {
        [] => (IN_GUEST, vec![root::overlay(CONTAINER, "/", false)]),
        disks => (IN_IMAGE, root::layered(CONTAINER, disks, "erofs", false)),
    };
    let root = root::path(CONTAINER);
    let request = proto::CreateContainerRequest {
        container_id: CONTAINER.to_owned(),
        spec: spec(&root, program).to_string().into_bytes(),
        stdio: Some(proto::Stdio::default()).into(),
        mounts,
        rootfs: root,
        start: true,
        ..Default::default()
    };
    guest.create(request, &Timeline::default()).await?;
    let end = guest.wait(CONTAINER, "").await?;
    guest.delete(CONTAINER, "").await?;
    Ok(end.exit_code)
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
