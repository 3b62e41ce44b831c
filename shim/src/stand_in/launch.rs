//! How it is started.
//!
//! A fork would copy each page that the shim writes to afterwards, and the library's `posix_spawn` asks for each of 64
//! signals. The process shares the shim's memory until its program runs, and the thread that starts it stands still as
//! long. Signals are held back meanwhile, for the shim's handlers would run in it; its program lets them come.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use nix::sys::signal::{SigSet, SigmaskHow, pthread_sigmask};
use nix::sys::wait::{Id, WaitPidFlag, waitid};

use crate::cleanup::pidfd_kill;

/// A child; ended and reaped when this is dropped.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) pid: i32,
    pub(super) handle: OwnedFd,
    #[allow(
        dead_code,
        reason = "held: when the shim ends it is closed, and the process ends"
    )]
    pub(super) stdin: Option<OwnedFd>,
}

/// What the child does before its program runs: numbers and pointers, for it must not allocate.
struct Plan {
    program: RawFd,
    netns: Option<RawFd>,
    stdin: RawFd,
    null: RawFd,
    arguments: [*const libc::c_char; 2],
    environment: [*const libc::c_char; 1],
    /// Why it did not get there.
    error: i32,
}

/// Enough for a few calls of the system.
const STACK: usize = 16 << 10;

impl Process {
    /// Starts `program` under a name, with nothing open but a pipe to this process and the null device.
    pub(super) fn start(program: &File, name: &str, netns: Option<&File>) -> io::Result<Self> {
        let name = CString::new(name)?;
        let null = File::options().read(true).write(true).open("/dev/null")?;
        let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        let mut plan = Plan {
            program: program.as_raw_fd(),
            netns: netns.map(AsRawFd::as_raw_fd),
            stdin: reader.as_raw_fd(),
            null: null.as_raw_fd(),
            arguments: [name.as_ptr(), ptr::null()],
            environment: [ptr::null()],
            error: 0,
        };
        let mut stack = vec![0u128; STACK / size_of::<u128>()];
        let mut handle: RawFd = -1;
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
        let mut before = SigSet::empty();
        pthread_sigmask(
            SigmaskHow::SIG_BLOCK,
            Some(&SigSet::all()),
            Some(&mut before),
        )?;
        // SAFETY: the child runs `follow` on a stack of its own, with a plan that outlives it, for this thread stands still
        // until the child's program runs or the child has ended. The kernel writes the descriptor before that.
        let pid = unsafe {
            libc::clone(
                follow,
                stack.as_mut_ptr_range().end.cast(),
                flags,
                (&raw mut plan).cast(),
                &raw mut handle,
            )
        };
        let error = io::Error::last_os_error();
        pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
        if pid < 0 {
            return Err(error);
        }
        let process = Process {
            pid,
            // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
            handle: unsafe { OwnedFd::from_raw_fd(handle) },
            stdin: Some(writer),
        };
        match plan.error {
            0 => Ok(process),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only if it has ended and was reaped.
        let _ = pidfd_kill(&self.handle);
        let _ = waitid(Id::PIDFd(self.handle.as_fd()), WaitPidFlag::WEXITED);
    }
}

/// The child, until its program runs.
extern "C" fn follow(plan: *mut libc::c_void) -> libc::c_int {
    // SAFETY: it is the plan of `start`, whose thread does not run meanwhile.
    let plan = unsafe { &mut *plan.cast::<Plan>() };
    let enters = |netns| {
        // SAFETY: numbers only.
        unsafe { libc::setns(netns, libc::CLONE_NEWNET) == 0 }
    };
    let becomes = |from, to| {
        // SAFETY: numbers only; the table of descriptors is a copy.
        unsafe { libc::dup2(from, to) == to }
    };
    if plan.netns.is_none_or(enters)
        && becomes(plan.stdin, 0)
        && becomes(plan.null, 1)
        && becomes(plan.null, 2)
    {
        // SAFETY: strings and lists with ends.
        unsafe {
            libc::syscall(
                libc::SYS_execveat,
                plan.program,
                c"".as_ptr(),
                plan.arguments.as_ptr(),
                plan.environment.as_ptr(),
                libc::AT_EMPTY_PATH,
            )
        };
    }
    plan.error = io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or(libc::EIO);
    // SAFETY: ends this process alone, and runs nothing of the shim's.
    unsafe { libc::_exit(1) }
}
