//! System call filters: what each kind of thread may ask of the kernel.
//!
//! A thread's filter is what its parent had, and its own kind's on top. A call that is not on the list is not made:
//! the process says which one it was, and ends.

mod lists;
mod names;
mod program;

use std::io;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicUsize, Ordering};

pub(crate) use lists::Kind;

/// Has the process end with a line on standard error when a filter refuses a call.
pub(crate) fn install_handler() -> io::Result<()> {
    // SAFETY: all-zero is a valid sigaction; the handler is async-signal-safe, see there.
    let done = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = refused;
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        libc::sigaction(libc::SIGSYS, &raw const action, null_mut())
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Confines the calling thread, and threads it makes from now on, to the list of its kind. `no_new_privs` must be set.
pub(crate) fn install(kind: Kind) -> io::Result<()> {
    let program = program::build(&lists::rules(kind), std::process::id());
    let filter = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(io::Error::other)?,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel copies the program, whose length is as said.
    let done = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            &raw const filter,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A line put together without allocating.
struct Line {
    bytes: [u8; 160],
    len: usize,
}

impl Line {
    fn add(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(place) = self.bytes.get_mut(self.len) {
                *place = *byte;
                self.len += 1;
            }
        }
    }

    fn number(&mut self, mut n: usize) {
        let mut digits = [0u8; 20];
        let mut at = digits.len();
        while at > 0 {
            at -= 1;
            // A digit.
            let digit = b'0' + (n % 10) as u8;
            if let Some(place) = digits.get_mut(at) {
                *place = digit;
            }
            n /= 10;
            if n == 0 {
                break;
            }
        }
        self.add(digits.get(at..).unwrap_or_default());
    }
}

/// Runs on the thread that made the call. Only system calls, atomics and the stack, as in a signal handler.
extern "C" fn refused(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    /// `si_syscall` stands after the three ints of the header, their padding, and the call's address (linux/signal.h).
    const SYSCALL_AT: usize = 24;
    /// Set by the first thread to come here.
    static SEEN: AtomicUsize = AtomicUsize::new(0);
    // SAFETY: the kernel passes a whole siginfo, which is larger than that.
    let number = unsafe { info.cast::<u8>().add(SYSCALL_AT).cast::<i32>().read() };
    let number = usize::try_from(number).unwrap_or(usize::MAX);
    if SEEN.swap(1, Ordering::SeqCst) == 0 {
        let mut name = [0u8; 16];
        let line = &mut Line {
            bytes: [0; 160],
            len: 0,
        };
        line.add(b"kiln-vmm: ");
        thread_name(&mut name);
        line.add(name.split(|b| *b == 0).next().unwrap_or_default());
        line.add(b" made the system call ");
        line.number(number);
        line.add(b" (");
        line.add(names::name(number).as_bytes());
        line.add(b"), which its filter forbids; the machine ends here\n");
        // SAFETY: a buffer of the length that is said.
        unsafe { libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.len) };
    }
    // SAFETY: ends the process.
    unsafe { libc::_exit(kiln_vmm_control::exit::FAILED) }
}

fn thread_name(name: &mut [u8; 16]) {
    // SAFETY: the kernel writes at most 16 bytes. It is on every thread's list.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr(), 0, 0, 0) };
}

#[cfg(test)]
mod tests;
