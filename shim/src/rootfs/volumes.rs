//! A container's volumes: which of the spec's mounts are the guest's own, and which are shown to it
//! from the host.
//!
//! A path of the host becomes the same guest path for every container of the pod that mounts it the
//! same way.
//!
//! To the guest, a volume is one file system with all that is mounted below it. So what holds for a part of it only is seen
//! to on the host alone: see [`plan`].

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use kiln_agent_api::{GUEST_FILES, GUEST_SHM, proto};
use kiln_uvm::share::{Access, Owners, Volume};
use nix::sys::statfs::{HUGETLBFS_MAGIC, statfs};

use super::OwnVolumes;
use super::copies;
use super::empty_dir::{self, Medium};
use super::mounts::Mounts;
use crate::error::{Error, Result};
use crate::refusal::{self, Refusal};
use crate::spec::SpecMount;

/// What becomes of a mount.
#[derive(Debug, PartialEq, Eq)]
enum Plan {
    /// It needs nothing of the host.
    Keep,
    /// The pod's shared memory, which is the guest's.
    SharedMemory,
    /// A character device (a `hostPath` of that type), of which the guest has its own.
    Device(&'static str),
    /// It can't be had.
    Refused(Refusal),
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
    if let Some(device) = device(source) {
        return device;
    }
    if is_of_hugepages(source) {
        return Plan::Refused(refusal::hugepages_volume(&mount.destination));
    }
    if mount.has("shared") || mount.has("rshared") {
        return Plan::Refused(refusal::propagation(&mount.source, &mount.destination));
    }
    let whole = mount.has("rbind");
    Plan::Share(Volume {
        source: source.to_owned(),
        access: match (mount.has("rro"), mount.has("ro")) {
            (true, _) => Access::ReadAll,
            (false, true) => Access::Read,
            (false, false) => Access::Write,
        },
        whole,
        follows_host: mount.has("slave") || mount.has("rslave"),
        owners: mount.owners().map(|map| Owners {
            map,
            below: mount.has("ridmap"),
        }),
    })
}

/// What the guest's own mount of a volume is told: `ro` would be for all that is mounted below, which the host keeps
/// apart.
fn adapt_options(
    volume: &Volume,
    options: &mut Vec<String>,
    table: &mut Option<Mounts>,
) -> Result<()> {
    let writable_below = volume.access == Access::Read
        && volume.whole
        && (volume.follows_host || is_anything_below(&volume.source, table)?);
    options.retain(|option| match option.as_str() {
        "ro" => !writable_below,
        // What the host has done is done.
        "idmap" | "ridmap" => false,
        _ => true,
    });
    plain_read_only(options);
    Ok(())
}

/// The guest's mount has nothing below that `rro` could say more of than `ro` does.
fn plain_read_only(options: &mut [String]) {
    for option in options {
        if option == "rro" {
            "ro".clone_into(option);
        }
    }
}

fn is_anything_below(source: &Path, table: &mut Option<Mounts>) -> Result<bool> {
    // One that is not there is told of by whoever wants to show it.
    let Ok(dir) = fs::canonicalize(source) else {
        return Ok(false);
    };
    if !dir.is_dir() {
        return Ok(false);
    }
    let what = || format!("look for mounts below the volume {}", source.display());
    let mounts = Mounts::once(table).map_err(|e| Error::failed(what(), e))?;
    Ok(mounts.any_below(&dir))
}

/// What becomes of a mount whose source is a device of the node's.
fn device(source: &Path) -> Option<Plan> {
    let found = fs::metadata(source).ok()?;
    let kind = found.file_type();
    if kind.is_char_device() {
        let number = (libc::major(found.rdev()), libc::minor(found.rdev()));
        let own = refusal::guests_own((number.0.into(), number.1.into()));
        return Some(match own {
            Some(path) => Plan::Device(path),
            None => Plan::Refused(refusal::nodes_device(&source.display().to_string())),
        });
    }
    let disk = kind.is_block_device();
    disk.then(|| Plan::Refused(refusal::bound_disk(&source.display().to_string())))
}

/// Whether files there are the node's hugepages: a guest that maps one would get copies.
fn is_of_hugepages(source: &Path) -> bool {
    statfs(source).is_ok_and(|found| found.filesystem_type() == HUGETLBFS_MAGIC)
}

/// A container's volumes as the guest has them.
#[derive(Debug, Default)]
pub(super) struct InGuest {
    /// What the agent mounts before the container is made.
    pub(super) before: Vec<proto::Mount>,
    /// The spec's mounts, with guest paths.
    pub(super) mounts: Vec<SpecMount>,
}

/// The container whose mounts these are, and its pod.
#[derive(Clone, Copy)]
pub(super) struct Whose<'a> {
    pub(super) container: &'a str,
    /// The pod's uid, which the kubelet calls its folder by.
    pub(super) pod: Option<&'a str>,
    pub(super) own: &'a OwnVolumes,
    pub(super) place: empty_dir::Place<'a>,
}

/// Makes ready what the mounts of a container need, noting it in `shared`.
pub(super) async fn prepare(
    whose: Whose<'_>,
    shared: &mut Vec<Volume>,
    mounts: Vec<SpecMount>,
) -> Result<InGuest> {
    let mut guest = InGuest::default();
    // Read once, if at all: a node has thousands of mounts.
    let mut table = None;
    for mut mount in mounts {
        match plan(&mount) {
            Plan::Keep => {}
            Plan::SharedMemory => mount.source = GUEST_SHM.to_owned(),
            Plan::Device(path) => mount.source = path.to_owned(),
            Plan::Refused(refusal) => return Err(refusal.into()),
            Plan::Share(volume) => match own_mounts(whose, &mount, &guest, &mut table).await? {
                Some((before, source)) => {
                    guest.before.extend(before);
                    mount.source = source;
                    // Nothing is ever mounted below it.
                    plain_read_only(&mut mount.options);
                }
                None => {
                    adapt_options(&volume, &mut mount.options, &mut table)?;
                    mount.source = whose.place.uvm.share(&volume)?;
                    shared.push(volume);
                }
            },
        }
        guest.mounts.push(mount);
    }
    Ok(guest)
}

/// What the guest mounts for a volume that it has to itself, and where that then is.
async fn own_mounts(
    whose: Whose<'_>,
    mount: &SpecMount,
    guest: &InGuest,
    table: &mut Option<Mounts>,
) -> Result<Option<(Vec<proto::Mount>, String)>> {
    if let Some(top) = copies::find(mount, whose.pod) {
        let copy = whose.own.copies.mount(&top, whose.place.uvm);
        return Ok(copy.map(|copy| {
            let target = copy.target.clone();
            (vec![copy], target)
        }));
    }
    let Some(volume) = empty_dir::find(mount, whose.pod, table)? else {
        return Ok(None);
    };
    let whole = match volume.medium() {
        Medium::Memory => Some(volume.memory()?),
        Medium::Disk => whose.own.disks.mount(&volume, whose.place).await?,
    };
    let number = guest.mounts.len();
    Ok(whole.map(|whole| volume.in_guest(whole, whose.container, number)))
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
        ..SpecMount::default()
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
    use crate::spec::Mapping;

    fn bind(source: &str, destination: &str, options: &[&str]) -> SpecMount {
        SpecMount {
            destination: destination.into(),
            kind: "bind".into(),
            source: source.into(),
            options: options.iter().map(|o| (*o).to_owned()).collect(),
            ..SpecMount::default()
        }
    }

    fn volume(source: &str, access: Access, follows_host: bool) -> Volume {
        Volume {
            source: source.into(),
            access,
            whole: true,
            follows_host,
            owners: None,
        }
    }

    fn share(mount: &SpecMount) -> Volume {
        match plan(mount) {
            Plan::Share(volume) => volume,
            other => panic!("{other:?}"),
        }
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
            share(&bind(memory, "/dev/shm", &["rbind", "rw"])),
            volume(memory, Access::Write, false)
        );
        assert_eq!(
            share(&bind("/etc/ssl", "/ssl", &["rbind", "ro", "rprivate"])),
            volume("/etc/ssl", Access::Read, false)
        );
        assert_eq!(
            share(&bind("/etc/ssl", "/ssl", &["rbind", "rro", "rprivate"])),
            volume("/etc/ssl", Access::ReadAll, false)
        );
        assert_eq!(
            share(&bind("/mnt", "/mnt", &["rbind", "rslave"])),
            volume("/mnt", Access::Write, true)
        );
        assert!(!share(&bind("/mnt", "/mnt", &["bind"])).whole);
    }

    #[test]
    fn what_can_not_reach_the_node_is_refused_by_name() {
        for option in ["shared", "rshared"] {
            let Plan::Refused(refusal) = plan(&bind("/srv/csi", "/csi", &["rbind", option])) else {
                panic!("{option} is not refused");
            };
            let text = refusal.to_string();
            for word in ["Bidirectional", "/srv/csi", "/csi", "HostToContainer"] {
                assert!(text.contains(word), "{text}");
            }
        }
    }

    #[test]
    fn owners_are_the_volumes_own_or_of_all_below() {
        let mapping = Mapping {
            container_id: 0,
            host_id: 65_536,
            size: 10,
        };
        let mut mount = bind("/data", "/data", &["rbind"]);
        mount.uid_mappings = vec![mapping];
        mount.gid_mappings = vec![mapping];
        let owners = share(&mount).owners.unwrap();
        assert_eq!((owners.map.user(3), owners.below), (Some(65_539), false));
        mount.options.push("ridmap".into());
        assert!(share(&mount).owners.unwrap().below);
    }

    #[test]
    fn the_guests_mount_is_read_only_unless_something_below_is_not() {
        let options = |volume: &Volume, options: &[&str], table: &str| {
            let mut options = options.iter().map(|o| (*o).to_owned()).collect();
            let mut table = Some(Mounts::parse(table.as_bytes()));
            adapt_options(volume, &mut options, &mut table).unwrap();
            options.join(",")
        };
        let (none, proc) = (
            "",
            "36 35 0:3 / /proc/sys/fs/binfmt_misc rw - binfmt_misc b rw\n",
        );
        let fixed = volume("/proc/sys", Access::Read, false);
        assert_eq!(options(&fixed, &["rbind", "ro"], none), "rbind,ro");
        assert_eq!(options(&fixed, &["rbind", "ro"], proc), "rbind");
        let follows = volume("/proc/sys", Access::Read, true);
        assert_eq!(
            options(&follows, &["rbind", "ro", "rslave"], none),
            "rbind,rslave"
        );
        let all = volume("/proc/sys", Access::ReadAll, false);
        assert_eq!(options(&all, &["rbind", "rro", "ridmap"], proc), "rbind,ro");
        let file = volume("/proc/version", Access::Read, false);
        assert_eq!(options(&file, &["rbind", "ro"], proc), "rbind,ro");
    }

    #[test]
    fn device_of_the_node_is_the_guests_own_of_that_number() {
        let null = bind("/dev/null", "/etc/masked", &["rbind"]);
        assert_eq!(plan(&null), Plan::Device("/dev/null"));
        let zero = bind("/dev/zero", "/dev/x", &["rbind"]);
        assert_eq!(plan(&zero), Plan::Device("/dev/zero"));
    }

    #[test]
    fn pods_files_are_added_where_the_container_has_none() {
        let own = bind("/run/kiln/volumes/0", "/etc/hosts", &["rbind"]);
        let shm = SpecMount {
            destination: "/dev/shm".into(),
            kind: "tmpfs".into(),
            source: "shm".into(),
            options: vec!["size=65536k".into()],
            ..SpecMount::default()
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
