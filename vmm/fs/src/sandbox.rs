//! A thread that sees nothing but one folder.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use thiserror::Error;

/// A step on the way into the folder failed.
#[derive(Debug, Error)]
#[error("can't confine the file server's thread: {step} failed; it needs CAP_SYS_ADMIN")]
pub struct SandboxError {
    step: &'static str,
    #[source]
    source: io::Error,
}

/// Makes `root` (an open folder) the root of everything the calling thread sees, in a mount namespace of
/// its own. Other threads of the process are not affected, nor is this one by what they do to theirs.
pub fn enter(root: &OwnedFd) -> Result<(), SandboxError> {
    // SAFETY: takes flags only.
    check("unshare", unsafe {
        libc::unshare(libc::CLONE_FS | libc::CLONE_NEWNS)
    })?;
    mount(
        "making mounts private",
        None,
        c"/",
        libc::MS_REC | libc::MS_PRIVATE,
    )?;
    let path = format!("/proc/self/fd/{}\0", root.as_raw_fd());
    let path = CStr::from_bytes_with_nul(path.as_bytes()).unwrap_or_default();
    // pivot_root wants a mount: the folder, bound onto itself with all that is mounted below it.
    mount(
        "binding the folder",
        Some(path),
        path,
        libc::MS_BIND | libc::MS_REC,
    )?;
    let open = |step, path: &CStr| {
        // SAFETY: a constant or checked string and flags.
        let fd = unsafe {
            libc::open(
                path.as_ptr(),
                libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC,
            )
        };
        check(step, fd)?;
        // SAFETY: the descriptor was just opened and is nobody else's.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    };
    let old = open("opening the old root", c"/")?;
    // Through the link again: it leads to the folder as it is mounted now.
    // SAFETY: descriptors and constant strings only, here and below.
    check("changing to the folder", unsafe {
        libc::fchdir(root.as_raw_fd())
    })?;
    check("changing to the mounted folder", unsafe {
        libc::chdir(path.as_ptr())
    })?;
    let dot = c".".as_ptr();
    // SAFETY: as above.
    let pivoted = unsafe { libc::syscall(libc::SYS_pivot_root, dot, dot) };
    check("pivot_root", if pivoted < 0 { -1 } else { 0 })?;
    // SAFETY: as above.
    check("changing to the old root", unsafe {
        libc::fchdir(old.as_raw_fd())
    })?;
    mount(
        "cutting the old root off",
        None,
        c".",
        libc::MS_REC | libc::MS_SLAVE,
    )?;
    // SAFETY: as above.
    check("unmounting the old root", unsafe {
        libc::umount2(dot, libc::MNT_DETACH)
    })?;
    // SAFETY: as above.
    check("changing to the new root", unsafe {
        libc::chdir(c"/".as_ptr())
    })
}

fn mount(
    step: &'static str,
    from: Option<&CStr>,
    to: &CStr,
    flags: libc::c_ulong,
) -> Result<(), SandboxError> {
    let from = from.map_or(std::ptr::null(), CStr::as_ptr);
    let none = std::ptr::null();
    // SAFETY: the strings end with a nul and outlive the call; no file system data is passed.
    check(step, unsafe {
        libc::mount(from, to.as_ptr(), none, flags, none.cast())
    })
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
