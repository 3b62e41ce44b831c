//! The filter as it is, and an attack behind it.

#[path = "../filter/mod.rs"]
#[allow(
    dead_code,
    reason = "its handler would end the process at the first attempt"
)]
mod real;

use std::io;

pub(crate) use real::Kind;

use super::raid;

/// What a system call that was refused by a filter fails with: no call of the kernel does.
pub(crate) const TRAPPED: i32 = 4095;

/// As the real one, and makes an attacker of the same kind.
pub(crate) fn install(kind: Kind) -> io::Result<()> {
    raid::begin(kind, move || real::install(kind))?;
    real::install(kind)
}

/// The filter alone.
pub(crate) fn confine(kind: Kind) -> io::Result<()> {
    real::install(kind)
}

/// Has a call that is refused fail, rather than end the process, so that one process can make all attempts.
pub(crate) fn install_handler() -> io::Result<()> {
    // SAFETY: all-zero is a valid sigaction; the handler changes nothing but the context it is given.
    let done = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = refused;
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut())
    };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

extern "C" fn refused(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes the thread's context; the register is where a call's result is found.
    unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        context.uc_mcontext.gregs[libc::REG_RAX as usize] = -i64::from(TRAPPED);
    }
}
