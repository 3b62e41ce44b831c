//! A thread that sees nothing but one folder and has no rights but a file server's.
//!
//! The folder becomes the thread's root directory. The thread stays in the mount namespace it is in: what
//! counts is the mount that the folder's descriptor belongs to, so mounts that are made below it later, in the
//! namespace it comes from, are seen here too.
//!
//! A root directory binds names only: `..` from a directory that lies outside leads anywhere, and a file that is
//! open for reading can be opened again for writing through `/proc`. So the thread has a table of descriptors of
//! its own, with little in it, and sees that table as a mount of its own, which has nothing above it.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use thiserror::Error;

use crate::credentials::{capabilities, set_capabilities};
use crate::host::{Errno, Numbers};

/// A step on the way into the folder failed.
#[derive(Debug, Error)]
#[error("can't confine the file server's thread: {step} failed; start the VMM as root")]
pub struct SandboxError {
    step: &'static str,
    #[source]
    source: io::Error,
}

/// Capability numbers (linux/capability.h).
const CHOWN: u32 = 0;
const DAC_OVERRIDE: u32 = 1;
const FOWNER: u32 = 3;
const FSETID: u32 = 4;
const SETGID: u32 = 6;
const SETUID: u32 = 7;
const SETPCAP: u32 = 8;
const SYS_CHROOT: u32 = 18;
const SYS_ADMIN: u32 = 21;
const SETFCAP: u32 = 31;

/// Acting for another user takes no capability away, and nobody can change that again (linux/securebits.h).
const KEEP_FOR_OTHER_USERS: libc::c_ulong = 1 << 2 | 1 << 3;

/// What serving files takes: acting for any of the pod's users, whose rights the guest's kernel has checked, by all of
/// their groups, of which a request names one. Not among them: making devices, which would be the node's, not the pod's.
///
/// Files may be given capabilities, as a container's root may give them: the host's kernel asks for SETFCAP, and the
/// guest's has asked its own user for the same.
const SERVING: u64 = 1 << CHOWN
    | 1 << DAC_OVERRIDE
    | 1 << FOWNER
    | 1 << FSETID
    | 1 << SETGID
    | 1 << SETUID
    | 1 << SETFCAP;

/// Keeps those capabilities of the calling thread that a file server's thread needs or needs to confine itself.
pub fn keep_what_serving_needs() -> Result<(), SandboxError> {
    limit(SERVING | 1 << SETPCAP | 1 << SYS_CHROOT | 1 << SYS_ADMIN)
}

/// What a confined thread left behind, in the table of the process: drop it on a thread that has that table.
#[derive(Debug)]
pub struct Left(#[allow(dead_code, reason = "held to be closed")] [OwnedFd; 2]);

/// Gives the calling thread a table of descriptors with nothing in it but standard output, standard error and `keep`,
/// and makes `folder` its root. `outside` has the `/proc` in which the thread's descriptors are found: they become its
/// working directory, as a mount of their own, which nothing leads out of. `make` runs in between, where the folder is the
/// root. Leaves the thread only the capabilities that serving files takes.
pub(crate) fn enter<T, E: From<SandboxError>>(
    folder: OwnedFd,
    outside: OwnedFd,
    keep: &[RawFd],
    make: impl FnOnce(Numbers) -> Result<T, E>,
) -> Result<(T, Left), E> {
    // SAFETY: flags only.
    let unshared = unsafe { libc::unshare(libc::CLONE_FS | libc::CLONE_FILES) };
    check("unshare", unshared)?;
    // Descriptor 0 is the client's socket.
    // SAFETY: numbers only; the table is this thread's alone from here on.
    check("covering standard input", unsafe { libc::dup2(1, 0) })?;
    let (inside, out) = (folder.as_raw_fd(), outside.as_raw_fd());
    close_others([&[0, 1, 2, inside, out], keep].concat())?;
    change_root(out)?;
    let numbers = own_descriptors()?;
    change_root(inside)?;
    // SAFETY: a number of an open descriptor.
    let entered = unsafe { libc::fchdir(numbers.as_raw_fd()) };
    check("changing to the thread's descriptors", entered)?;
    for fd in [inside, out] {
        // SAFETY: the owners of these are about to be sent to the process's table, which has both as well.
        check("closing the folder", unsafe { libc::close(fd) })?;
    }
    let made = make(Numbers::here(numbers))?;
    // SAFETY: plain numbers.
    let kept = unsafe { libc::prctl(libc::PR_SET_SECUREBITS, KEEP_FOR_OTHER_USERS, 0, 0, 0) };
    check("keeping its rights for each user", kept)?;
    limit(SERVING)?;
    Ok((made, Left([folder, outside])))
}

/// Makes an open folder the root and working directory of the calling thread.
fn change_root(folder: RawFd) -> Result<(), SandboxError> {
    // SAFETY: a number of an open descriptor; a constant string.
    unsafe {
        check("changing to the folder", libc::fchdir(folder))?;
        check("making it the root", libc::chroot(c".".as_ptr()))
    }
}

/// The calling thread's descriptors, as a mount of their own.
fn own_descriptors() -> Result<OwnedFd, SandboxError> {
    let path = c"/proc/thread-self/fd".as_ptr();
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: a constant string.
    let tree = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path, flags) };
    // A descriptor, or -1.
    let tree = tree as RawFd;
    check("mounting the thread's descriptors", tree)?;
    // SAFETY: a new descriptor, which is ours.
    Ok(unsafe { OwnedFd::from_raw_fd(tree) })
}

/// Closes all descriptors of the calling thread's table but these.
fn close_others(mut keep: Vec<RawFd>) -> Result<(), SandboxError> {
    keep.sort_unstable();
    let mut from = 0;
    for until in keep.iter().copied().chain([RawFd::MAX]) {
        if from < until {
            // SAFETY: numbers only. The table is the calling thread's alone, and it uses none of these.
            let closed = unsafe { libc::syscall(libc::SYS_close_range, from, until - 1, 0) };
            check("closing descriptors", if closed < 0 { -1 } else { 0 })?;
        }
        from = from.max(until.saturating_add(1));
    }
    Ok(())
}

/// Gives up all capabilities but these, as far as the thread has them.
fn limit(keep: u64) -> Result<(), SandboxError> {
    let failed = |step| {
        move |error: Errno| SandboxError {
            step,
            source: io::Error::from_raw_os_error(error.0),
        }
    };
    let mut sets = capabilities().map_err(failed("reading capabilities"))?;
    // The lower and the upper half.
    for (set, keep) in sets.iter_mut().zip([keep as u32, (keep >> 32) as u32]) {
        set.permitted &= keep;
        set.effective = set.permitted;
        set.inheritable = 0;
    }
    set_capabilities(&sets).map_err(failed("giving up capabilities"))
}

fn check(step: &'static str, result: libc::c_int) -> Result<(), SandboxError> {
    if result < 0 {
        Err(SandboxError {
            step,
            source: io::Error::last_os_error(),
        })
    } else {
        Ok(())
    }
}
