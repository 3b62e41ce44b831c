//! Mounts that are made out of sight and put in place by descriptor.
//!
//! A mount is changed only while it is detached: whoever watches the place it goes to sees it whole, or not at all.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

/// What a mount must not allow, as in `mount_setattr(2)`.
pub(crate) const RESTRICTED: u64 =
    libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
pub(crate) const READ_ONLY: u64 = libc::MOUNT_ATTR_RDONLY;

/// What of a tree of mounts is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// The topmost one.
    Top,
    /// It and all that is mounted below.
    Whole,
}

/// Whether mounts made or removed in one place appear in another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Propagation {
    /// Neither way.
    Private,
    /// From where it was copied, and not back.
    FromSource,
}

/// A copy of what is mounted at `path`, with all that is mounted below if `whole`, and mounted nowhere yet. It goes with
/// the descriptor until it is moved somewhere.
pub(crate) fn copy(path: &Path, whole: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if whole {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(open_tree(CWD, path, flags)?)
}

/// Changes a mount and all that is mounted below it.
pub(crate) fn restrict(
    mount: impl AsFd,
    attributes: u64,
    propagation: Propagation,
) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: attributes,
        propagation: match propagation {
            Propagation::Private => libc::MS_PRIVATE,
            Propagation::FromSource => libc::MS_SLAVE,
        },
        ..UNCHANGED
    };
    change(mount, Reach::Whole, &attributes)
}

/// Sets attributes of a mount.
pub(crate) fn set(mount: impl AsFd, reach: Reach, attributes: u64) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: attributes,
        ..UNCHANGED
    };
    change(mount, reach, &attributes)
}

/// Has a mount show each file as belonging to whom its owner is outside of a user namespace.
pub(crate) fn map_owners(mount: impl AsFd, reach: Reach, users: impl AsFd) -> io::Result<()> {
    let number = users.as_fd().as_raw_fd();
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        // An open descriptor's number is not negative.
        userns_fd: u64::from(number.unsigned_abs()),
        ..UNCHANGED
    };
    change(mount, reach, &attributes)
}

const UNCHANGED: libc::mount_attr = libc::mount_attr {
    attr_set: 0,
    attr_clr: 0,
    propagation: 0,
    userns_fd: 0,
};

fn change(mount: impl AsFd, reach: Reach, attributes: &libc::mount_attr) -> io::Result<()> {
    let flags = match reach {
        Reach::Top => libc::AT_EMPTY_PATH,
        Reach::Whole => libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
    };
    // SAFETY: the path is empty and static, the attributes live through the call, and the size is the structure's.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Puts a detached mount on a directory or file that is open.
pub(crate) fn put(mount: impl AsFd, on: impl AsFd) -> io::Result<()> {
    let both = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(mount, c"", on, c"", both)?)
}
