//! Runs a piece of work in a child process of its own for a bounded time.
//!
//! A broken KVM can hang the thread that enters it, or kill the process. The child keeps both away
//! from the caller, whatever the caller is: it may have threads, signal handlers, a runtime, or
//! reap its children with `waitpid(-1)`.
//!
//! - The child is a plain copy (`clone3` without `CLONE_VM`) and does nothing but bare system
//!   calls until it exits, so locks that another thread held at the copy do not matter.
//! - It has no exit signal: no SIGCHLD is sent, and a `waitpid(-1)` elsewhere does not see it.
//! - The caller's signal handlers are reset in it, and it dies with its parent.
//! - It answers through a shared page. What it wrote last stands there even after a hang or crash.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// A page shared between the caller and its child.
#[derive(Debug)]
pub(crate) struct Shared<T> {
    at: *mut T,
}

impl<T> Shared<T> {
    /// A zeroed page. `T` consists of atomics only, for which zero is a valid value.
    pub(crate) fn zeroed() -> io::Result<Shared<T>> {
        const { assert!(size_of::<T>() <= 4096 && align_of::<T>() <= 4096) };
        // SAFETY: a new anonymous mapping, of which nothing else knows.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Shared { at: at.cast() })
    }
}

impl<T: Zeroable> std::ops::Deref for Shared<T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the mapping is page-aligned, large enough, alive as long as self, and was zeroed,
        // which `Zeroable` promises to be a valid T that may change behind a shared reference.
        unsafe { &*self.at }
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `zeroed`, which no reference outlives.
        unsafe { libc::munmap(self.at.cast(), 4096) };
    }
}

/// # Safety
/// All-zero bytes are a valid value, and every field is an atomic.
pub(crate) unsafe trait Zeroable {}

/// How the child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// By itself, with this exit code.
    Exited(i32),
    /// By this signal, not sent by us.
    Signalled(i32),
    /// Killed when its time was over.
    TimedOut,
    /// Killed when its time was over, but still inside the kernel a second later.
    Stuck,
}

/// Runs `work` in a child process, for at most `limit`, and says how it ended.
///
/// # Safety
/// `work` does only what is allowed in a signal handler: system calls and memory that is there
/// already. No allocation, no locks, no panic. It sees a private copy of memory, except
/// [`Shared`] pages.
pub(crate) unsafe fn run(work: impl FnOnce() -> i32, limit: Duration) -> io::Result<End> {
    let parent = std::process::id();
    let mut pidfd: libc::c_int = -1;
    // SAFETY: an all-zero clone_args asks for nothing and is a valid value.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = libc::CLONE_PIDFD as u64 | CLONE_CLEAR_SIGHAND;
    args.pidfd = &raw mut pidfd as u64;
    // SAFETY: without CLONE_VM this is a fork: the child goes on with a copy of this stack. It
    // keeps to what the caller promised and never returns from the block below.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    if pid == 0 {
        // SAFETY: bare system calls. A parent that died before the prctl is noticed by the second
        // call: the child then belongs to another process.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            if libc::getppid() as u32 != parent {
                libc::_exit(EXIT_ORPHAN);
            }
            libc::_exit(work());
        }
    }
    // SAFETY: clone3 succeeded with CLONE_PIDFD, so this is a new descriptor that we own.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(wait(&pidfd, limit))
}

const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const EXIT_ORPHAN: i32 = 101;

fn wait(pidfd: &OwnedFd, limit: Duration) -> End {
    if exits_within(pidfd, limit) {
        return reap(pidfd);
    }
    // SAFETY: a signal to our own child, by a descriptor that cannot mean another process.
    unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            0usize,
            0u32,
        )
    };
    if !exits_within(pidfd, Duration::from_secs(1)) {
        return End::Stuck;
    }
    reap(pidfd);
    End::TimedOut
}

fn exits_within(pidfd: &OwnedFd, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut poll = libc::pollfd {
            fd: pidfd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // Rounded up, so that the loop does not spin through the last millisecond.
        let timeout = i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX);
        // SAFETY: one pollfd, which outlives the call.
        let ready = unsafe { libc::poll(&raw mut poll, 1, timeout) };
        if ready > 0 {
            return true;
        }
        if left.is_zero() {
            return false;
        }
    }
}

fn reap(pidfd: &OwnedFd) -> End {
    // SAFETY: siginfo is plain data; the kernel fills it in.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // __WALL: a child without exit signal is waited for only on demand.
    loop {
        // SAFETY: `info` is valid for the call.
        let result = unsafe {
            libc::waitid(
                libc::P_PIDFD,
                pidfd.as_raw_fd() as libc::id_t,
                &raw mut info,
                libc::WEXITED | libc::__WALL,
            )
        };
        if result == 0 {
            break;
        }
        if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            // Reaped by someone who waits with __WALL: how it ended is lost.
            return End::Exited(-1);
        }
    }
    // SAFETY: waitid succeeded, so si_status is set.
    let status = unsafe { info.si_status() };
    if info.si_code == libc::CLD_EXITED {
        End::Exited(status)
    } else {
        End::Signalled(status)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    struct Word(AtomicU32);
    // SAFETY: one atomic, valid when zero.
    unsafe impl Zeroable for Word {}

    #[test]
    fn answer_and_exit_code_come_back() {
        let shared = Shared::<Word>::zeroed().unwrap();
        // SAFETY: a store and a return.
        let end = unsafe {
            run(
                || {
                    shared.0.store(7, Ordering::Relaxed);
                    42
                },
                Duration::from_secs(5),
            )
        };
        assert_eq!(end.unwrap(), End::Exited(42));
        assert_eq!(shared.0.load(Ordering::Relaxed), 7);
    }

    #[test]
    fn endless_child_is_killed_at_the_limit() {
        let start = Instant::now();
        // SAFETY: pause only.
        let end = unsafe {
            run(
                || loop {
                    libc::pause();
                },
                Duration::from_millis(50),
            )
        };
        assert_eq!(end.unwrap(), End::TimedOut);
        assert!(start.elapsed() < Duration::from_secs(2));
    }

    #[test]
    fn crash_of_the_child_is_reported_with_its_signal() {
        // SAFETY: the child kills itself.
        let end = unsafe {
            run(
                || libc::kill(libc::getpid(), libc::SIGSEGV),
                Duration::from_secs(5),
            )
            .unwrap()
        };
        assert_eq!(end, End::Signalled(libc::SIGSEGV));
    }

    #[test]
    fn child_is_invisible_to_a_waitpid_for_any_child() {
        let waiter = std::thread::spawn(|| {
            std::thread::sleep(Duration::from_millis(20));
            let mut status = 0;
            // SAFETY: status is valid for the call.
            unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) }
        });
        // SAFETY: a sleep and a return.
        let end = unsafe { run(|| libc::usleep(100_000), Duration::from_secs(5)) };
        assert_eq!(end.unwrap(), End::Exited(0));
        // -1: no child to wait for; a test runner's other tests may make 0 of it.
        assert!(waiter.join().unwrap() <= 0);
    }
}
