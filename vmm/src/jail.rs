//! What the VMM gives up: root directory, new privileges, core dumps and most capabilities before it reads its
//! first request; user and all other capabilities before it acts on it.
//!
//! The order matters: `/dev/kvm` is open already, the root directory is left while there is still the right to,
//! then the thread that serves a shared folder starts, if there is one, and then the user goes on all others.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Who to become, and where.
#[derive(Clone, Debug, Default)]
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

/// Open files a VMM may have, if it was started with the right to as many.
const MOST_FILES: libc::rlim_t = 1 << 16;

/// Sets both limits to `most`, or to what is allowed if that is less.
fn limit(what: libc::__rlimit_resource_t, most: libc::rlim_t) -> io::Result<()> {
    let mut now = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    let checked = |result: libc::c_int| match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: getrlimit writes one rlimit, setrlimit reads one.
    unsafe {
        checked(libc::getrlimit(what, &raw mut now))?;
        now.rlim_max = now.rlim_max.min(most);
        now.rlim_cur = now.rlim_max;
        checked(libc::setrlimit(what, &raw const now))
    }
}

/// Closes all descriptors but the standard ones: what was inherited by mistake is nothing a machine may reach.
pub(crate) fn close_inherited() -> io::Result<()> {
    // SAFETY: called first of all, so no descriptor above these has an owner in this process.
    match unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Enters the jail, but for the user: one thread may have to keep some of root's rights, and which is known when
/// the first request has come. Until then nothing is read but that request, which is the client's. The process must
/// still have one thread.
pub(crate) fn enter(jail: &Jail) -> Result<()> {
    if let Some(root) = &jail.root {
        change_root(root)?;
    }
    // A guest's memory belongs into no core file; a shared folder keeps a descriptor for each file the guest knows.
    limit(libc::RLIMIT_CORE, 0).context("forbidding core dumps")?;
    limit(libc::RLIMIT_NOFILE, MOST_FILES).context("limiting open files")?;
    // SAFETY: plain numbers.
    unsafe {
        if jail.gid.is_some() {
            check(libc::syscall(libc::SYS_setgroups, 0, 0), "dropping groups")?;
        }
        check(
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into(),
            "giving up new privileges",
        )?;
    }
    if jail.uid.is_some() {
        kiln_vmm_fs::keep_what_serving_needs()?;
    }
    Ok(())
}

/// Makes the calling thread the jail's user, without any capability.
pub(crate) fn become_user(jail: &Jail) -> io::Result<()> {
    let change = |call: libc::c_long, id: Option<u32>| {
        let Some(id) = id else {
            return Ok(());
        };
        // SAFETY: plain numbers. Raw system calls, because glibc's wrappers would change all threads.
        if unsafe { libc::syscall(call, id, id, id) } == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    };
    change(libc::SYS_setresgid, jail.gid)?;
    change(libc::SYS_setresuid, jail.uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_inherited_is_closed_but_for_the_standard_descriptors() {
        let inherited = tempfile::tempfile().unwrap();
        // SAFETY: the child makes system calls only, and ends by `_exit`.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0);
        if pid == 0 {
            // SAFETY: as above; numbers only.
            unsafe {
                let far = libc::dup2(std::os::fd::AsRawFd::as_raw_fd(&inherited), 700);
                let closed = close_inherited().is_ok();
                let open = (0..1024).filter(|n| libc::fcntl(*n, libc::F_GETFD) >= 0);
                let right = far == 700 && closed && open.eq([0, 1, 2]);
                libc::_exit(i32::from(!right));
            }
        }
        let mut status = 0;
        // SAFETY: waits for our own child.
        unsafe { libc::waitpid(pid, &raw mut status, 0) };
        assert!(libc::WIFEXITED(status));
        assert_eq!(libc::WEXITSTATUS(status), 0);
    }
}
