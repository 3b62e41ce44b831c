//! Whom the thread acts for, and by which rights: each guard ends with its scope, on every path.
//!
//! System calls are made without the C library, whose functions would change all threads of the process.

use crate::host::{Answer, Errno, done, number};

/// May keep the bits that set user and group ids (linux/capability.h).
const FSETID: u32 = 4;
/// Two words of 32 bits each (linux/capability.h).
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
/// An id that says "as it is".
const UNCHANGED: u32 = u32::MAX;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

static SELF: Header = Header {
    version: CAPABILITY_VERSION_3,
    pid: 0,
};

/// One word of each set of capabilities.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sets {
    pub(crate) effective: u32,
    pub(crate) permitted: u32,
    pub(crate) inheritable: u32,
}

/// The calling thread's capabilities, the lower word first.
pub(crate) fn capabilities() -> Answer<[Sets; 2]> {
    let mut sets = [Sets::default(); 2];
    // SAFETY: the kernel reads the header and writes two sets, which is what version 3 has.
    let got = unsafe { libc::syscall(libc::SYS_capget, &raw const SELF, sets.as_mut_ptr()) };
    number(got).map(|_| sets)
}

/// Changes the calling thread's capabilities.
pub(crate) fn set_capabilities(sets: &[Sets; 2]) -> Answer<()> {
    // SAFETY: as above; the kernel only reads.
    let put = unsafe { libc::syscall(libc::SYS_capset, &raw const SELF, sets.as_ptr()) };
    number(put).map(drop)
}

fn set_effective(call: libc::c_long, id: u32) -> Answer<()> {
    // SAFETY: plain numbers.
    let result = unsafe { libc::syscall(call, UNCHANGED, id, UNCHANGED) };
    number(result).map(drop)
}

/// The user and group that the thread is when it acts for nobody.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Own {
    uid: u32,
    gid: u32,
}

impl Own {
    pub(crate) fn of_this_thread() -> Self {
        // SAFETY: no arguments.
        let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
        Own { uid, gid }
    }

    /// Acts for a user and a group from now on, and masks modes of new files as they do.
    pub(crate) fn act_for(self, uid: u32, gid: u32, umask: u32) -> Answer<Acting> {
        // It would say "as it is", which is root.
        if uid == UNCHANGED || gid == UNCHANGED {
            return Err(Errno(libc::EINVAL));
        }
        // The thread's own: its file system attributes are shared with no other. The host applies it, as only that knows
        // whether a folder's default list takes its place.
        // SAFETY: a number.
        unsafe { libc::umask(umask & 0o777) };
        let mut acting = Acting {
            own: self,
            uid: false,
            gid: false,
        };
        // The group first: another user may have no right to it.
        if gid != self.gid {
            set_effective(libc::SYS_setresgid, gid)?;
            acting.gid = true;
        }
        if uid != self.uid {
            set_effective(libc::SYS_setresuid, uid)?;
            acting.uid = true;
        }
        Ok(acting)
    }
}

/// The thread acts for somebody until this is dropped.
#[derive(Debug)]
pub(crate) struct Acting {
    own: Own,
    uid: bool,
    gid: bool,
}

impl Drop for Acting {
    fn drop(&mut self) {
        let uid = !self.uid || set_effective(libc::SYS_setresuid, self.own.uid).is_ok();
        let gid = !self.gid || set_effective(libc::SYS_setresgid, self.own.gid).is_ok();
        if !(uid && gid) {
            // What comes next would be done as somebody else.
            std::process::abort();
        }
    }
}

/// The kernel takes the bits that set ids away where it should, until this is dropped.
#[derive(Debug)]
pub(crate) struct Unprivileged([Sets; 2]);

impl Unprivileged {
    pub(crate) fn new() -> Answer<Self> {
        let own = capabilities()?;
        let mut less = own;
        less[0].effective &= !(1 << FSETID);
        set_capabilities(&less)?;
        Ok(Unprivileged(own))
    }
}

impl Drop for Unprivileged {
    fn drop(&mut self) {
        if set_capabilities(&self.0).is_err() {
            std::process::abort();
        }
    }
}

/// Gives the calling thread a root directory, working directory and mask of its own.
pub(crate) fn separate() -> Answer<()> {
    // SAFETY: flags only.
    done(unsafe { libc::unshare(libc::CLONE_FS) })
}
