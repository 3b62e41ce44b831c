//! A container's volumes: which of the spec's mounts are the guest's own, and which are shown to it
//! from the host.
//!
//! A path of the host becomes the same guest path for every container of the pod that mounts it the
//! same way.

use std::path::Path;

use kiln_agent_api::{GUEST_FILES, GUEST_SHM};
use kiln_uvm::share::Volume;

use crate::error::Result;
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

/// Files in `/etc` that all containers of a pod have alike, in the guest's [`GUEST_FILES`].
pub const POD_FILES: [&str; 3] = ["hosts", "hostname", "resolv.conf"];

/// Adds what containerd mounts into containers of its own sandboxes: the pod's files, unless the container has others
/// there, and its shared memory instead of a container's own.
pub(super) fn add_pods_own(mounts: &mut Vec<SpecMount>, read_only: bool) {
    let bind = |source: String, options: &[&str]| SpecMount {
        destination: String::new(),
        kind: "bind".into(),
        source,
        options: options.iter().map(|o| (*o).to_owned()).collect(),
    };
    for mount in mounts.iter_mut() {
        if mount.destination == "/dev/shm" && mount.kind == "tmpfs" {
            *mount = SpecMount {
                destination: mount.destination.clone(),
                ..bind(GUEST_SHM.to_owned(), &["rbind", "rw"])
            };
        }
    }
    for name in POD_FILES {
        let destination = format!("/etc/{name}");
        if !mounts.iter().any(|mount| mount.destination == destination) {
            let access = if read_only { "ro" } else { "rw" };
            mounts.push(SpecMount {
                destination,
                ..bind(
                    format!("{GUEST_FILES}/{name}"),
                    &["rbind", "rprivate", access],
                )
            });
        }
    }
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

    #[test]
    fn pods_files_are_added_where_the_container_has_none() {
        let own = bind("/run/kiln/volumes/0", "/etc/hosts", &["rbind"]);
        let shm = SpecMount {
            destination: "/dev/shm".into(),
            kind: "tmpfs".into(),
            source: "shm".into(),
            options: vec!["size=65536k".into()],
        };
        let mut mounts = vec![own.clone(), shm];
        add_pods_own(&mut mounts, true);
        assert_eq!(mounts[0], own);
        assert_eq!(mounts[1], bind(GUEST_SHM, "/dev/shm", &["rbind", "rw"]));
        let resolv = bind(
            "/run/kiln/etc/resolv.conf",
            "/etc/resolv.conf",
            &["rbind", "rprivate", "ro"],
        );
        assert_eq!(mounts.len(), 4);
        assert_eq!(mounts[3], resolv);
    }
}
