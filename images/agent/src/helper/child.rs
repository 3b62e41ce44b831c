//! What may only be done in a fresh, single-threaded child.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::unistd::{ForkResult, Pid, fork};

use super::Made;
use crate::sys;

/// Ends the process without running anything that its parent registered to run at exit.
pub(super) fn leave(code: i32) -> ! {
    // SAFETY: `_exit` takes a number and does not return.
    unsafe { libc::_exit(code) }
}

/// Gives every signal its default action and lets all of them through: a container's process must
/// not inherit that Rust ignores SIGPIPE.
pub(super) fn reset_signals() -> io::Result<()> {
    // The kernel's struct sigaction: handler 0 is SIG_DFL, no flags, no restorer, empty mask. By the
    // bare call, for the C library keeps two signals to itself.
    let default = [0_u64; 4];
    for number in 1..=64 {
        if number == libc::SIGKILL || number == libc::SIGSTOP {
            continue;
        }
        // SAFETY: the kernel reads one sigaction of four words, whose default action has no handler
        // that would have to be valid; the mask has the size it is said to have.
        sys::check(unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                number,
                default.as_ptr(),
                std::ptr::null::<u64>(),
                size_of::<u64>(),
            )
        })?;
    }
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
    Ok(())
}

/// Makes a PID namespace whose first process does nothing but collect children. It is a user namespace's, if there is
/// one: else its `/proc` could not be mounted there.
pub(super) fn pod_init(reply_socket: &OwnedFd, users: Option<&Path>) -> io::Result<Made> {
    if let Some(users) = users {
        setns(File::open(users)?, CloneFlags::CLONE_NEWUSER)?;
        sys::process::become_user(0, 0)?;
    }
    unshare(CloneFlags::CLONE_NEWPID)?;
    // SAFETY: workers have one thread.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(Made {
            pid: child.as_raw(),
            terminal: None,
        }),
        ForkResult::Child => {
            let _ = reply_socket;
            collect_for_ever()
        }
    }
}

/// The life of a shared PID namespace's first process. It holds nothing and is nobody's.
fn collect_for_ever() -> ! {
    if become_harmless().is_err() {
        // Without its first process the namespace is unusable: the pod's containers will say so.
        let _gone = kill(Pid::this(), Signal::SIGKILL);
    }
    loop {
        match sys::process::wait_any() {
            Ok(Some(_)) => {}
            _ => wait_for_child(),
        }
    }
}

fn become_harmless() -> io::Result<()> {
    sys::process::set_name(c"pause")?;
    sys::process::close_from(0)?;
    nix::unistd::setsid()?;
    nix::unistd::chdir("/")?;
    // A pending SIGCHLD ends the wait below even if it came before it.
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&children), None)?;
    sys::process::drop_all_privileges()
}

fn wait_for_child() {
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    // An interruption is as good as a signal: the caller looks again.
    let _either = children.wait();
}
