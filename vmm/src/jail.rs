//! What the VMM gives up before it reads its first request: root directory, user, capabilities, new
//! privileges, core dumps.
//!
//! The order matters: `/dev/kvm` is open already, the root directory is left while there is still the right to,
//! and then the user goes, which takes all capabilities along.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Who to become, and where.
#[derive(Debug, Default)]
pub(crate) struct Jail {
    /// User.
    pub(crate) uid: Option<u32>,
    /// Group.
    pub(crate) gid: Option<u32>,
    /// An empty directory.
    pub(crate) root: Option<PathBuf>,
}

fn check(result: libc::c_long, what: &'static str) -> Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error()).context(what)
    }
}

fn change_root(root: &Path) -> Result<()> {
    let path = CString::new(root.as_os_str().as_bytes())?;
    let top = c"/";
    // SAFETY: both paths are NUL-terminated and live through the calls.
    unsafe {
        check(
            libc::chroot(path.as_ptr()).into(),
            "leaving the root directory",
        )?;
        check(
            libc::chdir(top.as_ptr()).into(),
            "entering the empty root directory",
        )
    }
}

/// Enters the jail. The process must still have one thread.
pub(crate) fn enter(jail: &Jail) -> Result<()> {
    if let Some(root) = &jail.root {
        change_root(root)?;
    }
    let none = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: setrlimit reads one rlimit; the other calls take plain numbers. Raw system calls, because the
    // process has one thread and glibc's wrappers would look for others.
    unsafe {
        check(
            libc::setrlimit(libc::RLIMIT_CORE, &raw const none).into(),
            "forbidding core dumps",
        )?;
        if let Some(gid) = jail.gid {
            check(libc::syscall(libc::SYS_setgroups, 0, 0), "dropping groups")?;
            check(
                libc::syscall(libc::SYS_setresgid, gid, gid, gid),
                "changing group",
            )?;
        }
        if let Some(uid) = jail.uid {
            check(
                libc::syscall(libc::SYS_setresuid, uid, uid, uid),
                "changing user",
            )?;
        }
        check(
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into(),
            "giving up new privileges",
        )
    }
}
