//! A thread that sees nothing but one folder and has no rights but a file server's.
//!
//! The folder becomes the thread's root directory. The thread stays in the mount namespace it is in: what
//! counts is the mount that the folder's descriptor belongs to, so mounts that are made below it later, in the
//! namespace it comes from, are seen here too.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use thiserror::Error;

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
const SYS_CHROOT: u32 = 18;
/// Two words of 32 bits each (linux/capability.h).
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// What serving files takes: acting for any of the pod's users, whose rights the guest's kernel has checked. Not
/// among them: making devices, which would be the node's, not the pod's.
const SERVING: u64 =
    1 << CHOWN | 1 << DAC_OVERRIDE | 1 << FOWNER | 1 << FSETID | 1 << SETGID | 1 << SETUID;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Sets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Keeps those capabilities of the calling thread that a file server's thread needs or needs to confine itself.
pub fn keep_what_serving_needs() -> Result<(), SandboxError> {
    limit(SERVING | 1 << SYS_CHROOT)
}

/// Makes `root` (an open folder) the root and working directory of the calling thread, and of no other, and
/// leaves the thread only the capabilities that serving files takes.
pub(crate) fn enter(root: &OwnedFd) -> Result<(), SandboxError> {
    // SAFETY: flags only; a number of an open descriptor; a constant string.
    unsafe {
        check("unshare", libc::unshare(libc::CLONE_FS))?;
        check("changing to the folder", libc::fchdir(root.as_raw_fd()))?;
        check("making it the root", libc::chroot(c".".as_ptr()))?;
    }
    limit(SERVING)
}

/// Gives up all capabilities but these, as far as the thread has them.
fn limit(keep: u64) -> Result<(), SandboxError> {
    let header = Header {
        version: CAPABILITY_VERSION_3,
        pid: 0,
    };
    let mut sets = [Sets::default(); 2];
    // SAFETY: the kernel reads the header and writes two sets, which is what version 3 has.
    let got = unsafe { libc::syscall(libc::SYS_capget, &raw const header, sets.as_mut_ptr()) };
    check("reading capabilities", if got < 0 { -1 } else { 0 })?;
    // The lower and the upper half.
    for (set, keep) in sets.iter_mut().zip([keep as u32, (keep >> 32) as u32]) {
        set.permitted &= keep;
        set.effective = set.permitted;
        set.inheritable = 0;
    }
    // SAFETY: as above; the kernel only reads.
    let put = unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) };
    check("giving up capabilities", if put < 0 { -1 } else { 0 })
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
