//! Volumes of memory (`emptyDir` of medium `Memory`). The kubelet mounts a tmpfs on the node for one; the guest gets a tmpfs of
//! its own like it, for all containers of the pod. So files there are memory of the pod's, read and mapped as such, and
//! charged to who writes them.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use kiln_agent_api::{GUEST_MEMORY, proto};
use kiln_uvm::root;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::sys::statvfs::statvfs;

use super::mounts::Mounts;
use crate::error::{Error, Result};
use crate::spec::SpecMount;

/// The folder in which the kubelet has a pod's volumes of this kind, by name.
const EMPTY_DIRS: &str = "kubernetes.io~empty-dir";
/// The folder in which it binds parts of volumes (`subPath`).
const SUB_PATHS: &str = "volume-subpaths";
/// What a file's mode has beside its type.
const PERMISSIONS: u32 = 0o7777;

/// A mount of the spec that is such a volume, or a part of one.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct MemoryVolume {
    /// What makes it the same one for all containers: the node's tmpfs.
    device: (u32, u32),
    /// As much as it may hold, in bytes; 0: as the memory lasts.
    size: u64,
    top: Owned,
    /// What of it is wanted, if not all.
    part: Option<(PathBuf, Owned)>,
}

/// Whose a directory is, and what they may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Owned {
    mode: u32,
    uid: u32,
    gid: u32,
}

impl Owned {
    fn of(found: &Metadata) -> Self {
        Self {
            mode: found.mode() & PERMISSIONS,
            uid: found.uid(),
            gid: found.gid(),
        }
    }
}

/// What a mount is a volume of memory of, if it is one. The table of mounts is read if it has to be.
pub(super) fn find(mount: &SpecMount, table: &mut Option<Mounts>) -> Result<Option<MemoryVolume>> {
    let source = Path::new(&mount.source);
    let may_be = source.components().any(is_kubelets)
        && statfs(source).is_ok_and(|found| found.filesystem_type() == TMPFS_MAGIC);
    // The guest's tmpfs could not have the owners of a user namespace that the node maps.
    if !may_be || mount.owners().is_some() {
        return Ok(None);
    }
    let failed = |e| Error::failed(format!("look at the volume {}", source.display()), e);
    let dir = fs::canonicalize(source).map_err(failed)?;
    let mounts = match table.take() {
        Some(mounts) => mounts,
        None => Mounts::read().map_err(failed)?,
    };
    let Some((top, part)) = table.insert(mounts).whole_and_part(&dir, is_volume) else {
        return Ok(None);
    };
    let whole = fs::metadata(&top).map_err(failed)?;
    let space = statvfs(&top).map_err(|e| failed(e.into()))?;
    let part = match part.as_os_str().is_empty() {
        true => None,
        false => Some((part, Owned::of(&fs::metadata(&dir).map_err(failed)?))),
    };
    Ok(Some(MemoryVolume {
        device: (libc::major(whole.dev()), libc::minor(whole.dev())),
        size: space.blocks().saturating_mul(space.fragment_size()),
        top: Owned::of(&whole),
        part,
    }))
}

fn is_kubelets(component: Component<'_>) -> bool {
    component.as_os_str() == EMPTY_DIRS || component.as_os_str() == SUB_PATHS
}

/// Whether the kubelet mounts volumes of memory at such a path.
fn is_volume(path: &Path) -> bool {
    let folder = path.parent().and_then(Path::file_name);
    folder.is_some_and(|name| name == EMPTY_DIRS)
}

impl MemoryVolume {
    /// What the guest has to mount for the `number`th one of a container, and where it then is.
    pub(super) fn in_guest(&self, container: &str, number: usize) -> (Vec<proto::Mount>, String) {
        let Owned { mode, uid, gid } = self.top;
        let (major, minor) = self.device;
        let top = format!("{GUEST_MEMORY}/{major}-{minor}");
        let whole = proto::Mount {
            source: "kiln".into(),
            target: top.clone(),
            type_: "tmpfs".into(),
            options: vec![
                format!("size={}", self.size),
                format!("mode={mode:o}"),
                format!("uid={uid}"),
                format!("gid={gid}"),
            ],
            make_target: true,
            of_pod: true,
            ..Default::default()
        };
        let Some((path, Owned { mode, uid, gid })) = &self.part else {
            return (vec![whole], top);
        };
        let target = format!("{}/memory-{number}", root::storage_path(container));
        let beneath = proto::Beneath {
            path: path.display().to_string(),
            mode: *mode,
            uid: *uid,
            gid: *gid,
            ..Default::default()
        };
        let part = proto::Mount {
            source: top,
            target: target.clone(),
            type_: "bind".into(),
            make_target: true,
            beneath: Some(beneath).into(),
            ..Default::default()
        };
        (vec![whole, part], target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOP: &str = "/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir/cache";
    const PART: &str = "/var/lib/kubelet/pods/u/volume-subpaths/cache/main/0";

    #[test]
    fn volume_and_its_parts_are_known_by_the_table_of_mounts() {
        let table = Mounts::parse(
            format!(
                "36 35 0:54 / {TOP} rw - tmpfs tmpfs rw\n\
                 37 35 0:54 /a/b {PART} rw - tmpfs tmpfs rw\n\
                 38 35 0:55 / /var/lib/kubelet/pods/u/volumes/kubernetes.io~secret/s rw - tmpfs tmpfs rw\n"
            )
            .as_bytes(),
        );
        let of = |path: &str| table.whole_and_part(Path::new(path), is_volume);
        assert_eq!(of(TOP), Some((TOP.into(), PathBuf::new())));
        assert_eq!(of(PART), Some((TOP.into(), "a/b".into())));
        let below = format!("{TOP}/c");
        assert_eq!(of(&below), Some((TOP.into(), "c".into())));
        assert_eq!(
            of("/var/lib/kubelet/pods/u/volumes/kubernetes.io~secret/s"),
            None
        );
        assert_eq!(
            of("/var/lib/kubelet/pods/u/volume-subpaths/cache/main/1"),
            None
        );
    }

    #[test]
    fn part_is_bound_from_the_pods_one_file_system() {
        let owned = Owned {
            mode: 0o2777,
            uid: 0,
            gid: 2000,
        };
        let mut volume = MemoryVolume {
            device: (0, 54),
            size: 16 << 20,
            top: owned,
            part: None,
        };
        let (mounts, path) = volume.in_guest("c", 0);
        assert_eq!(path, "/run/kiln/memory/0-54");
        assert_eq!(mounts.len(), 1);
        assert!(mounts[0].of_pod);
        assert_eq!(
            mounts[0].options.join(","),
            "size=16777216,mode=2777,uid=0,gid=2000"
        );
        volume.part = Some(("a/b".into(), owned));
        let (mounts, path) = volume.in_guest("c", 3);
        assert_eq!(path, "/run/kiln/storage/c/memory-3");
        assert_eq!(
            (mounts[1].target.as_str(), mounts[1].of_pod),
            (path.as_str(), false)
        );
        assert_eq!(mounts[1].source, "/run/kiln/memory/0-54");
        assert_eq!(mounts[1].beneath.path, "a/b");
    }

    #[test]
    fn other_volumes_are_left_to_others() {
        let mut table = None;
        for source in ["/dev/shm", "/tmp", TOP] {
            let mount = SpecMount {
                kind: "bind".into(),
                source: source.into(),
                ..SpecMount::default()
            };
            assert_eq!(find(&mount, &mut table).unwrap(), None, "{source}");
        }
        assert!(table.is_none(), "nobody had to read it");
    }
}
