//! A container's volumes: which of the spec's mounts are the guest's own, and which are shown to it
//! from the host.
//!
//! A path of the host becomes the same guest path for every container of the pod that mounts it the
//! same way.

use std::path::Path;

use kiln_agent_api::GUEST_SHM;

use crate::error::Result;
use crate::share::Volume;
use crate::spec::SpecMount;
use crate::uvm::Uvm;

/// What becomes of a mount.
#[derive(Debug, PartialEq, Eq)]
enum Plan {
    /// It needs nothing of the host.
    Keep,
    /// The pod's shared memory, which is the guest's.
    SharedMemory,
    /// It is shown from the host.
    Share(Volume),
}

fn plan(mount: &SpecMount) -> Plan {
    if !mount.is_bind() {
        return Plan::Keep;
    }
    // containerd's own for the pod is called so; a volume that a pod mounts there has another name.
    let source = Path::new(&mount.source);
    if mount.destination == "/dev/shm" && source.file_name().is_some_and(|name| name == "shm") {
        return Plan::SharedMemory;
    }
    let follows = ["slave", "rslave", "shared", "rshared"];
    Plan::Share(Volume {
        source: source.to_owned(),
        read_only: mount.is_read_only(),
        follows_host: mount.options.iter().any(|o| follows.contains(&o.as_str())),
    })
}

/// Makes ready what the mounts need, noting it in `shared`, and gives them back with guest paths.
pub(super) fn prepare(
    uvm: &dyn Uvm,
    shared: &mut Vec<Volume>,
    mounts: Vec<SpecMount>,
) -> Result<Vec<SpecMount>> {
    let mut out = Vec::with_capacity(mounts.len());
    for mut mount in mounts {
        match plan(&mount) {
            Plan::Keep => {}
            Plan::SharedMemory => mount.source = GUEST_SHM.to_owned(),
            Plan::Share(volume) => {
                mount.source = uvm.share(&volume)?;
                shared.push(volume);
            }
        }
        out.push(mount);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bind(source: &str, destination: &str, options: &[&str]) -> SpecMount {
        SpecMount {
            destination: destination.into(),
            kind: "bind".into(),
            source: source.into(),
            options: options.iter().map(|o| (*o).to_owned()).collect(),
        }
    }

    fn shared(source: &str, read_only: bool, follows_host: bool) -> Plan {
        Plan::Share(Volume {
            source: source.into(),
            read_only,
            follows_host,
        })
    }

    #[test]
    fn every_kind_of_volume_has_its_way() {
        let tmpfs = SpecMount {
            kind: "tmpfs".into(),
            ..SpecMount::default()
        };
        assert_eq!(plan(&tmpfs), Plan::Keep);
        let shm = "/run/containerd/io.containerd.grpc.v1.cri/sandboxes/1/shm";
        assert_eq!(
            plan(&bind(shm, "/dev/shm", &["rbind", "rw"])),
            Plan::SharedMemory
        );
        let memory = "/var/lib/kubelet/pods/1/volumes/kubernetes.io~empty-dir/cache";
        assert_eq!(
            plan(&bind(memory, "/dev/shm", &["rbind", "rw"])),
            shared(memory, false, false)
        );
        assert_eq!(
            plan(&bind("/etc/ssl", "/ssl", &["rbind", "ro", "rprivate"])),
            shared("/etc/ssl", true, false)
        );
        assert_eq!(
            plan(&bind("/mnt", "/mnt", &["rbind", "rslave"])),
            shared("/mnt", false, true)
        );
    }
}
