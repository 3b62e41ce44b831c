//! Those of medium `Memory`: the kubelet mounts a tmpfs on the node for one; the guest gets a tmpfs of its own like it, for all
//! containers of the pod. So files there are memory of the pod's, read and mapped as such, and charged to who writes them.

use std::fs;
use std::os::unix::fs::MetadataExt;

use kiln_agent_api::{GUEST_MEMORY, proto};
use nix::sys::statvfs::statvfs;

use super::super::kubelet::Owned;
use super::EmptyDir;
use crate::error::{Error, Result};

impl EmptyDir {
    /// What mounts the guest's tmpfs.
    pub(in super::super) fn memory(&self) -> Result<proto::Mount> {
        let failed = |e| Error::failed(format!("look at the volume {}", self.top.display()), e);
        let device = fs::metadata(&self.top).map_err(failed)?.dev();
        let space = statvfs(&self.top).map_err(|e| failed(e.into()))?;
        // As much as it may hold, in bytes; 0: as the memory lasts.
        let size = space.blocks().saturating_mul(space.fragment_size());
        Ok(tmpfs(device, size, self.owned))
    }
}

fn tmpfs(device: u64, size: u64, Owned { mode, uid, gid }: Owned) -> proto::Mount {
    // The node's tmpfs is what makes it the same one for all containers.
    let (major, minor) = (libc::major(device), libc::minor(device));
    proto::Mount {
        source: "kiln".into(),
        target: format!("{GUEST_MEMORY}/{major}-{minor}"),
        type_: "tmpfs".into(),
        options: vec![
            format!("size={size}"),
            format!("mode={mode:o}"),
            format!("uid={uid}"),
            format!("gid={gid}"),
        ],
        make_target: true,
        of_pod: true,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tmpfs_is_as_large_as_the_nodes_and_belongs_to_the_same() {
        let owned = Owned {
            mode: 0o2777,
            uid: 0,
            gid: 2000,
        };
        let mount = tmpfs(libc::makedev(0, 54), 16 << 20, owned);
        assert_eq!(mount.target, "/run/kiln/memory/0-54");
        assert!(mount.of_pod);
        assert_eq!(
            mount.options.join(","),
            "size=16777216,mode=2777,uid=0,gid=2000"
        );
    }
}
