//! What the guest mounts for a container's root: the image's layers below, the disk of the writable layers above.

use kiln_agent_api::{GUEST_LAYERS, GUEST_STATE_DIR, proto};

use crate::disks::GuestDisk;

/// How long the guest waits for a disk that was attached a moment ago.
const DISK_WAIT_MS: u32 = 5000;

/// Where a container's root is mounted in the guest.
pub fn path(container: &str) -> String {
    format!("{GUEST_STATE_DIR}/containers/{container}/rootfs")
}

/// Where the parts of a container's root are mounted in the guest.
pub fn storage_path(container: &str) -> String {
    format!("{GUEST_STATE_DIR}/storage/{container}")
}

/// Where a container's writable layer lies in the guest.
fn layer_path(container: &str) -> String {
    format!("{GUEST_LAYERS}/{container}")
}

fn disk_mount(disk: &GuestDisk, kind: &str, target: String, options: &[&str]) -> proto::Mount {
    proto::Mount {
        source: disk.path.clone(),
        target,
        type_: kind.to_owned(),
        options: options.iter().map(|o| (*o).to_owned()).collect(),
        wait_ms: DISK_WAIT_MS,
        make_target: true,
        target_mode: 0o755,
        min_size: disk.size,
        ..Default::default()
    }
}

/// Mounts a writable disk as the root itself.
pub fn disk_itself(container: &str, disk: &GuestDisk, kind: &str) -> Vec<proto::Mount> {
    vec![disk_mount(disk, kind, path(container), &[])]
}

/// Mounts read-only disks, the topmost first, below a writable layer. `user_xattrs`: overlayfs' attributes on them are in
/// the `user.overlay.` name space.
pub fn layered(
    container: &str,
    disks: &[GuestDisk],
    kind: &str,
    user_xattrs: bool,
) -> Vec<proto::Mount> {
    let base = storage_path(container);
    let lowers: Vec<_> = (0..disks.len())
        .map(|number| format!("{base}/lower-{number}"))
        .collect();
    let mut mounts: Vec<_> = std::iter::zip(disks, &lowers)
        .map(|(disk, lower)| disk_mount(disk, kind, lower.clone(), &["ro"]))
        .collect();
    mounts.push(overlay(container, &lowers.join(":"), user_xattrs));
    mounts
}

/// A writable layer over directories that the guest has already.
pub fn overlay(container: &str, lower: &str, user_xattrs: bool) -> proto::Mount {
    let own = layer_path(container);
    let (upper, work) = (format!("{own}/upper"), format!("{own}/work"));
    let mut options = vec![
        format!("lowerdir={lower}"),
        format!("upperdir={upper}"),
        format!("workdir={work}"),
    ];
    if user_xattrs {
        options.push("userxattr".into());
    }
    proto::Mount {
        source: "overlay".into(),
        target: path(container),
        type_: "overlay".into(),
        options,
        make_target: true,
        target_mode: 0o755,
        make_directories: vec![own, upper, work],
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_mounted_before_the_overlay_that_needs_them() {
        let disk = |path: &str| GuestDisk {
            slot: 8,
            path: path.into(),
            size: 4096,
        };
        let mounts = layered("c", &[disk("upper"), disk("lower")], "erofs", true);
        let sources: Vec<_> = mounts.iter().map(|m| &*m.source).collect();
        assert_eq!(sources, ["upper", "lower", "overlay"]);
        let root = &mounts[2];
        let (above, below) = (&mounts[0].target, &mounts[1].target);
        assert_eq!(root.options[0], format!("lowerdir={above}:{below}"));
        assert_eq!(root.options.last().unwrap(), "userxattr");
        assert!(
            mounts[..2]
                .iter()
                .all(|m| m.options == ["ro"] && m.wait_ms > 0)
        );
        assert_eq!(root.target, path("c"));
    }
}
