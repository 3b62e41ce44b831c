//! A pod's own volumes (`emptyDir`). Nobody but the pod's containers uses one, so it need not be shown to the guest by
//! virtio-fs, where each access asks the host: one of memory is a tmpfs of the guest's, one on the node's disk is a disk.

mod disk;
mod memory;

use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use kiln_agent_api::proto;
use kiln_uvm::root;
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, statfs};

use super::kubelet::{self, Owned};
use super::mounts::Mounts;
use crate::error::{Error, Result};
use crate::spec::SpecMount;

pub(super) use disk::{Disks, Place};

/// The folder in which the kubelet has a pod's volumes of this kind, by name.
const EMPTY_DIRS: &str = "kubernetes.io~empty-dir";

/// A mount of the spec that is such a volume of the pod, or a part of one.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct EmptyDir {
    /// Its directory on the node.
    top: PathBuf,
    owned: Owned,
    medium: Medium,
    /// What of it is wanted, if not all.
    part: Option<(PathBuf, Owned)>,
}

/// What it is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Medium {
    Disk,
    Memory,
}

/// What a mount is a volume of this kind of, if it is one of the pod's, whose uid this is. The table of mounts is read if it
/// has to be.
pub(super) fn find(
    mount: &SpecMount,
    pod: Option<&str>,
    table: &mut Option<Mounts>,
) -> Result<Option<EmptyDir>> {
    let source = Path::new(&mount.source);
    let kubelets = |part: Component<'_>| {
        part.as_os_str() == EMPTY_DIRS || part.as_os_str() == kubelet::SUB_PATHS
    };
    let Some(pod) = pod.filter(|_| mount.is_bind() && source.components().any(kubelets)) else {
        return Ok(None);
    };
    // A file system of the guest's could not have the owners of a user namespace that the node maps.
    if mount.owners().is_some() {
        return Ok(None);
    }
    let failed = |e| Error::failed(format!("look at the volume {}", source.display()), e);
    // One that is not there is told of by whoever wants to show it.
    let Ok(dir) = fs::canonicalize(source) else {
        return Ok(None);
    };
    let Some(top) =
        kubelet::volume_of(&dir, pod, OsStr::new(EMPTY_DIRS)).filter(|top| is_directory(top))
    else {
        return Ok(None);
    };
    let found = fs::metadata(&top).map_err(failed)?;
    let medium = match statfs(&top)
        .map_err(|e| failed(e.into()))?
        .filesystem_type()
    {
        HUGETLBFS_MAGIC => return Ok(None),
        // The kubelet's own folder can be on one.
        TMPFS_MAGIC if is_mount_point(&top, &found) => Medium::Memory,
        _ => Medium::Disk,
    };
    let part = if dir == top {
        None
    } else {
        // Something else that is mounted there is not the volume's.
        let Some(part) = Mounts::once(table).map_err(failed)?.part(&top, &dir) else {
            return Ok(None);
        };
        Some((part, Owned::of(&fs::metadata(&dir).map_err(failed)?)))
    };
    Ok(Some(EmptyDir {
        owned: Owned::of(&found),
        top,
        medium,
        part,
    }))
}

/// Whether another file system begins there.
fn is_mount_point(top: &Path, found: &Metadata) -> bool {
    let above = top.parent().and_then(|above| fs::metadata(above).ok());
    above.is_some_and(|above| above.dev() != found.dev())
}

fn is_directory(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.is_dir())
}

impl EmptyDir {
    pub(super) fn medium(&self) -> Medium {
        self.medium
    }

    /// What the guest has to mount for the `number`th mount of a container, and where it then is. `whole` mounts all of it,
    /// once for the pod.
    pub(super) fn in_guest(
        &self,
        whole: proto::Mount,
        container: &str,
        number: usize,
    ) -> (Vec<proto::Mount>, String) {
        let top = whole.target.clone();
        let Some((path, owned)) = &self.part else {
            return (vec![whole], top);
        };
        let target = format!("{}/volume-{number}", root::storage_path(container));
        let beneath = proto::Beneath {
            path: path.display().to_string(),
            owned: Some(owned.told()).into(),
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

    #[test]
    fn what_is_no_volume_of_the_pod_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("u/volumes/kubernetes.io~empty-dir/cache");
        fs::create_dir_all(top.join("below")).unwrap();
        let bind = |source: &Path, pod: Option<&str>| {
            let mount = SpecMount {
                kind: "bind".into(),
                source: source.display().to_string(),
                options: vec!["rbind".into()],
                ..SpecMount::default()
            };
            find(&mount, pod, &mut None).unwrap()
        };
        assert_eq!(bind(&top, None), None);
        assert_eq!(bind(&top, Some("v")), None);
        assert_eq!(bind(&top.join("gone"), Some("u")), None);
        let whole = bind(&top, Some("u")).unwrap();
        let top = fs::canonicalize(&top).unwrap();
        assert_eq!((whole.top.as_path(), &whole.part), (top.as_path(), &None));
        assert_eq!(whole.medium, Medium::Disk);
        let part = bind(&top.join("below"), Some("u")).unwrap();
        assert_eq!(part.part.unwrap().0, Path::new("below"));
    }

    #[test]
    fn part_is_bound_from_the_pods_one_file_system() {
        let owned = Owned {
            mode: 0o2777,
            uid: 0,
            gid: 2000,
        };
        let mut volume = EmptyDir {
            top: "/top".into(),
            owned,
            medium: Medium::Disk,
            part: None,
        };
        let whole = proto::Mount {
            target: "/run/kiln/disks/cache".into(),
            of_pod: true,
            ..Default::default()
        };
        let (mounts, path) = volume.in_guest(whole.clone(), "c", 0);
        assert_eq!(
            (path.as_str(), &mounts[..]),
            ("/run/kiln/disks/cache", &[whole.clone()][..])
        );
        volume.part = Some(("a/b".into(), owned));
        let (mounts, path) = volume.in_guest(whole, "c", 3);
        assert_eq!(path, "/run/kiln/storage/c/volume-3");
        assert_eq!(
            (mounts[1].target.as_str(), mounts[1].of_pod),
            (path.as_str(), false)
        );
        assert_eq!(mounts[1].source, "/run/kiln/disks/cache");
        let beneath = mounts[1].beneath.as_ref().unwrap();
        assert_eq!((beneath.path.as_str(), beneath.owned.mode), ("a/b", 0o2777));
    }
}
