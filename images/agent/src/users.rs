//! User namespaces of the pod's containers, and mounts whose files belong to whom a namespace says.
//!
//! libcontainer could make one for each container. But a pod's containers share one, and it would then want systemd for the
//! cgroup; so the agent makes a namespace for each map that a spec has, keeps it as a file, and has libcontainer
//! join it by its path. It stays as long as the guest.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use kiln_agent_api::users::{IdMap, IdRange};
use libcontainer::oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Spec};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::sys;

/// The network is the guest's, and no right over it comes with a namespace of users. So the two things for which the root of
/// an ordinary container has a right of its own are allowed to everybody, as engines do: low ports and ping.
const FOR_EVERYBODY: [(&str, &str); 2] = [
    ("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0"),
    ("/proc/sys/net/ipv4/ping_group_range", "0 2147483647"),
];

/// The map of a spec's user namespace, if it has one.
pub(crate) fn map_of(spec: &Spec) -> Option<IdMap> {
    let linux = spec.linux().as_ref()?;
    let mut namespaces = linux.namespaces().iter().flatten();
    namespaces.find(|namespace| namespace.typ() == LinuxNamespaceType::User)?;
    let ranges = |list: &Option<Vec<LinuxIdMapping>>| {
        let range = |mapping: &LinuxIdMapping| IdRange {
            inside: mapping.container_id(),
            outside: mapping.host_id(),
            count: mapping.size(),
        };
        list.iter().flatten().map(range).collect()
    };
    Some(IdMap {
        users: ranges(linux.uid_mappings()),
        groups: ranges(linux.gid_mappings()),
    })
}

/// A namespace that has been made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Users {
    pub(crate) map: IdMap,
    /// The file that it is.
    pub(crate) path: PathBuf,
}

/// All that have been made.
#[derive(Debug, Default)]
pub(crate) struct AllUsers(Mutex<Vec<Users>>);

impl AllUsers {
    /// The namespace of a map; made, as a file in `folder`, when it is first asked for. Blocks the thread.
    pub(crate) fn namespace(&self, map: IdMap, folder: &Path) -> io::Result<Users> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = all.iter().find(|known| known.map == map) {
            return Ok(known.clone());
        }
        let path = folder.join(format!("user-{}", all.len()));
        keep(map.namespace()?.as_fd(), &path)?;
        for (file, value) in FOR_EVERYBODY {
            // A kernel without the one or the other still has everything else of a network.
            if let Err(error) = fs::write(file, value) {
                tracing::warn!(file, %error, "a user namespace's root has fewer rights than others");
            }
        }
        let users = Users { map, path };
        all.push(users.clone());
        Ok(users)
    }
}

/// Keeps a namespace as a file, which anybody can join who has the right to.
pub(crate) fn keep(namespace: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, "")?;
    let source = format!("/proc/self/fd/{}", namespace.as_raw_fd());
    let nothing = None::<&str>;
    Ok(mount(
        Some(source.as_str()),
        path,
        nothing,
        MsFlags::MS_BIND,
        nothing,
    )?)
}

/// Puts in place of what is mounted at `target` the same with other owners: those that its files' are outside of the
/// namespace.
pub(crate) fn map_owners(target: &str, namespace: BorrowedFd<'_>) -> io::Result<()> {
    let path = sys::c_path(Path::new(target))?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: the path lives through the call; the kernel gives a new descriptor.
    let tree = sys::check(unsafe {
        libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags)
    })?;
    let tree = i32::try_from(tree).map_err(io::Error::other)?;
    // SAFETY: a new descriptor, which is ours.
    let tree = unsafe { OwnedFd::from_raw_fd(tree) };
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        // An open descriptor's number is not negative.
        userns_fd: u64::from(namespace.as_raw_fd().unsigned_abs()),
    };
    // SAFETY: the path is empty and static, the attributes live through the call, and the size is the structure's.
    sys::check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    })?;
    umount2(target, MntFlags::MNT_DETACH)?;
    // SAFETY: both paths live through the call.
    sys::check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_has_a_map_only_with_a_user_namespace() {
        let spec = |namespaces: &str| -> Spec {
            let text = format!(
                r#"{{"ociVersion": "1.1.0", "linux": {{
                    "namespaces": [{namespaces}],
                    "uidMappings": [{{"containerID": 0, "hostID": 65536, "size": 10}}],
                    "gidMappings": [{{"containerID": 0, "hostID": 131072, "size": 10}}]
                }}}}"#
            );
            serde_json::from_str(&text).expect("spec")
        };
        let map = map_of(&spec(r#"{"type": "pid"}, {"type": "user"}"#)).expect("a map");
        assert_eq!((map.user(1), map.group(9)), (Some(65_537), Some(131_081)));
        assert_eq!(map_of(&spec(r#"{"type": "pid"}"#)), None);
    }
}
