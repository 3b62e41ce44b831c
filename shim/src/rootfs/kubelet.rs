//! The kubelet's folder of a pod: `UID/volumes/KIND/NAME` are its volumes, `UID/volume-subpaths/NAME/CONTAINER/NUMBER` parts of
//! them.

use std::ffi::OsStr;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kiln_agent_api::proto;

/// The folder of a pod's volumes, by kind.
const VOLUMES: &str = "volumes";
/// The folder in which parts of volumes are bound (`subPath`).
pub(super) const SUB_PATHS: &str = "volume-subpaths";
/// What a file's mode has beside its type.
const PERMISSIONS: u32 = 0o7777;

/// Whether a directory is a volume of this kind of the pod's, whose uid this is.
pub(super) fn is_volume(top: &Path, pod: &str, kind: &OsStr) -> bool {
    let mut above = top.ancestors().skip(1).map(Path::file_name);
    let mut is = |name: &OsStr| above.next().flatten() == Some(name);
    is(kind) && is(OsStr::new(VOLUMES)) && is(OsStr::new(pod))
}

/// The directory of the pod's volume of this kind that a path is of, in it or where a part of it is bound.
pub(super) fn volume_of(dir: &Path, pod: &str, kind: &OsStr) -> Option<PathBuf> {
    let called =
        |path: Option<&Path>, name: &str| path.and_then(Path::file_name) == Some(OsStr::new(name));
    dir.ancestors().find_map(|above| {
        if is_volume(above, pod, kind) {
            return Some(above.to_owned());
        }
        let parts = above.parent()?;
        if !called(Some(parts), SUB_PATHS) || !called(parts.parent(), pod) {
            return None;
        }
        let volumes = parts.with_file_name(VOLUMES);
        Some(volumes.join(kind).join(above.file_name()?))
    })
}

/// Whose a file is, and what they may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owned {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

impl Owned {
    pub(super) fn of(found: &Metadata) -> Self {
        Self {
            mode: found.mode() & PERMISSIONS,
            uid: found.uid(),
            gid: found.gid(),
        }
    }

    pub(super) fn told(self) -> proto::Owned {
        let Self { mode, uid, gid } = self;
        proto::Owned {
            mode,
            uid,
            gid,
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volume_and_its_parts_are_known_by_their_paths() {
        const POD: &str = "/var/lib/kubelet/pods/u";
        let kind = OsStr::new("kubernetes.io~empty-dir");
        let top = PathBuf::from(format!("{POD}/volumes/kubernetes.io~empty-dir/cache"));
        let of = |path: &str| volume_of(Path::new(&format!("{POD}/{path}")), "u", kind);
        for path in [
            "volumes/kubernetes.io~empty-dir/cache",
            "volumes/kubernetes.io~empty-dir/cache/a/b",
            "volume-subpaths/cache/main/0",
        ] {
            assert_eq!(of(path), Some(top.clone()), "{path}");
        }
        for other in [
            "volumes/kubernetes.io~empty-dir",
            "volumes/kubernetes.io~secret/s",
            "volume-subpaths",
            "kubernetes.io~empty-dir/cache",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
        // Another pod's is a directory of the node's like any other.
        assert_eq!(volume_of(&top, "v", kind), None);
    }
}
