//! The system calls that no crate here wraps, and descriptors sent over Unix sockets.
//!
//! Everything that needs `unsafe` for the kernel's sake is in this module or, for what may only be
//! done in a fresh child, in [`crate::helper::child`].

use std::ffi::CString;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};
use tokio::io::unix::AsyncFd;

/// Most descriptors that one message carries.
pub(crate) const MAX_FDS: usize = 8;

/// The `NULL` address of messages on connected sockets.
const NO_ADDRESS: Option<&UnixAddr> = None;

/// Turns a C return value into a result.
pub(crate) fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// A path as C wants it.
pub(crate) fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a path contains a NUL byte"))
}

/// Memory of this process's own. Dropping it gives the pages back.
#[derive(Debug)]
pub(crate) struct Pages {
    start: *mut libc::c_void,
    length: usize,
}

impl Pages {
    /// Room for that many bytes; no page is taken.
    pub(crate) fn room_for(length: usize) -> io::Result<Self> {
        // SAFETY: a new anonymous mapping at an address that the kernel chooses touches nothing that is
        // there.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start, length })
    }

    /// Has the kernel give each page by itself, and no huge one.
    pub(crate) fn one_by_one(&self) -> io::Result<()> {
        self.advise(0..self.length, libc::MADV_NOHUGEPAGE)
    }

    /// Takes pages from the kernel, which clears them.
    pub(crate) fn take(&self, bytes: Range<usize>) -> io::Result<()> {
        self.advise(bytes, libc::MADV_POPULATE_WRITE)
    }

    /// Gives pages back.
    pub(crate) fn give_back(&self, bytes: Range<usize>) -> io::Result<()> {
        self.advise(bytes, libc::MADV_DONTNEED)
    }

    fn advise(&self, bytes: Range<usize>, advice: libc::c_int) -> io::Result<()> {
        if bytes.end > self.length || bytes.start > bytes.end {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the range is within the mapping, which is this value's and which nobody reads or has a reference into.
        let result =
            unsafe { libc::madvise(self.start.byte_add(bytes.start), bytes.len(), advice) };
        check(result.into())?;
        Ok(())
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and nobody has a reference into it.
        unsafe { libc::munmap(self.start, self.length) };
    }
}

/// Sends bytes and descriptors as one message.
pub(crate) fn send_with_fds(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[RawFd]) -> io::Result<()> {
    let rights = [ControlMessage::ScmRights(fds)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    loop {
        let slices = [IoSlice::new(bytes)];
        match sendmsg(
            socket.as_raw_fd(),
            &slices,
            control,
            MsgFlags::MSG_NOSIGNAL,
            NO_ADDRESS,
        ) {
            Ok(_) => return Ok(()),
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Receives one message into `buffer`: how many bytes it had, and its descriptors (close-on-exec).
/// Zero bytes and no descriptor is the end.
pub(crate) fn receive_with_fds(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = cmsg_space!([RawFd; MAX_FDS]);
    loop {
        let mut slices = [IoSliceMut::new(buffer)];
        let message = match recvmsg::<UnixAddr>(
            socket.as_raw_fd(),
            &mut slices,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        ) {
            Ok(message) => message,
            Err(nix::Error::EINTR) => continue,
            Err(error) => return Err(error.into()),
        };
        let mut fds = Vec::new();
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = control {
                // SAFETY: the kernel has just put these descriptors into our table for this message;
                // nobody else knows of them, so each gets exactly one owner here.
                fds.extend(
                    raw.into_iter()
                        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                );
            }
        }
        return Ok((message.bytes, fds));
    }
}

/// An anonymous file with `bytes` in it, at its start.
pub(crate) fn memory_file(name: &str, bytes: &[u8]) -> io::Result<OwnedFd> {
    use std::io::{Seek, Write};

    let name = CString::new(name).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: `name` is NUL-terminated and outlives the call.
    let fd =
        check(unsafe { libc::c_long::from(libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC)) })?;
    // SAFETY: the call returned this descriptor to us and nobody else has it.
    let mut file = unsafe { std::fs::File::from_raw_fd(fd as RawFd) };
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file.into())
}

/// A descriptor that stands for a process whatever happens to its number.
pub(crate) fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the kernel checks the number.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: the call returned this descriptor to us and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Loads a kernel module from an open file.
pub(crate) fn load_module(
    module: BorrowedFd<'_>,
    parameters: &str,
    compressed: bool,
) -> io::Result<()> {
    /// `MODULE_INIT_COMPRESSED_FILE` of linux/module.h.
    const COMPRESSED: libc::c_int = 4;

    let parameters = CString::new(parameters).map_err(|_| io::ErrorKind::InvalidInput)?;
    let flags = if compressed { COMPRESSED } else { 0 };
    // SAFETY: `parameters` is NUL-terminated and outlives the call; the descriptor is borrowed.
    check(unsafe {
        libc::syscall(
            libc::SYS_finit_module,
            module.as_raw_fd(),
            parameters.as_ptr(),
            flags,
        )
    })?;
    Ok(())
}

/// Mixes `entropy` into the kernel's pool, credits it, and reseeds the generator from it now.
pub(crate) fn add_entropy(entropy: &[u8]) -> io::Result<()> {
    /// `_IOW('R', 0x03, int[2])` of linux/random.h.
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    /// `_IO('R', 0x07)` of linux/random.h.
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    const HEADER: usize = 2 * size_of::<libc::c_int>();

    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    let bytes = i32::try_from(entropy.len()).map_err(|_| invalid())?;
    let bits = bytes.checked_mul(8).ok_or_else(invalid)?;
    // struct rand_pool_info: two ints, then the bytes.
    let mut info = Vec::with_capacity(HEADER + entropy.len());
    info.extend(bits.to_ne_bytes());
    info.extend(bytes.to_ne_bytes());
    info.extend(entropy);
    let random = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/urandom")?;
    // SAFETY: `info` is a rand_pool_info whose buf_size is the number of bytes that follow it; the
    // kernel only reads it, during the call.
    check(unsafe {
        libc::c_long::from(libc::ioctl(
            random.as_raw_fd(),
            RNDADDENTROPY,
            info.as_ptr(),
        ))
    })?;
    // SAFETY: this request has no argument.
    check(unsafe { libc::c_long::from(libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG)) })?;
    Ok(())
}

/// Random bytes of the kernel's generator.
pub(crate) fn random_bytes<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0_u8; N];
    // SAFETY: the buffer is ours, writable, and N bytes long.
    let got = check(unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) as libc::c_long })?;
    if got as usize == N {
        Ok(bytes)
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

/// Sets the wall clock.
pub(crate) fn set_wall_clock(nanoseconds: i64) -> io::Result<()> {
    let time = libc::timespec {
        tv_sec: nanoseconds.div_euclid(1_000_000_000),
        tv_nsec: nanoseconds.rem_euclid(1_000_000_000),
    };
    // SAFETY: `time` is a valid timespec that outlives the call.
    check(unsafe {
        libc::c_long::from(libc::clock_settime(libc::CLOCK_REALTIME, &raw const time))
    })?;
    Ok(())
}

/// A clock's value in nanoseconds.
pub(crate) fn clock_ns(clock: libc::clockid_t) -> i64 {
    let mut time = MaybeUninit::<libc::timespec>::zeroed();
    // SAFETY: the pointer is to a timespec of ours; zeroed is a valid one should the call fail,
    // which it can't for the clocks used here.
    let time = unsafe {
        libc::clock_gettime(clock, time.as_mut_ptr());
        time.assume_init()
    };
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}

/// The wall clock, nanoseconds since the epoch.
pub(crate) fn now_ns() -> i64 {
    clock_ns(libc::CLOCK_REALTIME)
}

/// Microseconds since the kernel started.
pub(crate) fn since_boot_us() -> u64 {
    u64::try_from(clock_ns(libc::CLOCK_MONOTONIC) / 1000).unwrap_or(0)
}

/// Sets a terminal's size.
pub(crate) fn set_terminal_size(
    terminal: BorrowedFd<'_>,
    width: u16,
    height: u16,
) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: height,
        ws_col: width,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: `size` is a valid winsize that outlives the call.
    check(unsafe {
        libc::c_long::from(libc::ioctl(
            terminal.as_raw_fd(),
            libc::TIOCSWINSZ,
            &raw const size,
        ))
    })?;
    Ok(())
}

/// Lets the runtime tell when a descriptor, which must be non-blocking, is ready.
pub(crate) fn watch(fd: impl Into<OwnedFd>) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` stands for the same open descriptor until it is dropped, which for this one
    // is when the `AsyncFd` that owns it is.
    unsafe { AsyncFd::register(fd.into()) }.map_err(Into::into)
}

/// The same for one that is only lent, until what comes back is dropped.
pub(crate) fn watch_lent(fd: BorrowedFd<'_>) -> io::Result<AsyncFd<BorrowedFd<'_>>> {
    // SAFETY: a `BorrowedFd` stands for the same open descriptor as long as it lives, and the `AsyncFd` lives no longer.
    unsafe { AsyncFd::register(fd) }.map_err(Into::into)
}

/// Makes a descriptor non-blocking, for all who share it.
pub(crate) fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(fd.as_fd(), FcntlArg::F_GETFL)?);
    fcntl(fd.as_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// The raw calls about processes that a caller wants to be plain functions.
pub(crate) mod process {
    use std::ffi::CStr;

    use super::{AsRawFd, FromRawFd, OwnedFd, RawFd, check, io};

    /// Sends a signal, any number (real-time ones too). A process that is gone is an error.
    pub(crate) fn kill(pid: i32, signal: i32) -> io::Result<()> {
        // SAFETY: no pointers; the kernel checks both numbers.
        check(unsafe { libc::c_long::from(libc::kill(pid, signal)) })?;
        Ok(())
    }

    /// Collects one child that has ended, whichever: its number, and its exit code as a shell has it
    /// (128 + signal for a signal, real-time ones included). `None`: none has.
    pub(crate) fn wait_any() -> io::Result<Option<(i32, u32)>> {
        loop {
            let mut status = 0;
            // SAFETY: `status` is ours and outlives the call.
            let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
            if pid > 0 {
                let code = if libc::WIFEXITED(status) {
                    libc::WEXITSTATUS(status)
                } else if libc::WIFSIGNALED(status) {
                    128 + libc::WTERMSIG(status)
                } else {
                    continue;
                };
                return Ok(Some((pid, code.cast_unsigned())));
            }
            if pid == 0 {
                return Ok(None);
            }
            match io::Error::last_os_error().raw_os_error() {
                Some(libc::ECHILD) => return Ok(None),
                Some(libc::EINTR) => {}
                _ => return Err(io::Error::last_os_error()),
            }
        }
    }

    /// Closes every descriptor from `first` on.
    pub(crate) fn close_from(first: u32) -> io::Result<()> {
        // SAFETY: called where no descriptor is used afterwards; closing is all it does.
        check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) })?;
        Ok(())
    }

    /// Lets every descriptor from `first` on be closed by the next `exec`.
    pub(crate) fn close_on_exec_from(first: u32) -> io::Result<()> {
        let flags = libc::CLOSE_RANGE_CLOEXEC;
        // SAFETY: no pointers; nothing is closed now.
        check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, flags) })?;
        Ok(())
    }

    /// Sets what `ps` shows.
    pub(crate) fn set_name(name: &CStr) -> io::Result<()> {
        // SAFETY: the kernel reads at most 16 bytes of the NUL-terminated `name`, during the call.
        check(unsafe {
            libc::c_long::from(libc::prctl(libc::PR_SET_NAME, name.as_ptr(), 0, 0, 0))
        })?;
        Ok(())
    }

    /// Changes user and group but keeps the permitted capabilities, for the caller to narrow down.
    pub(crate) fn become_user(uid: u32, gid: u32) -> io::Result<()> {
        let (uid, gid) = (
            nix::unistd::Uid::from_raw(uid),
            nix::unistd::Gid::from_raw(gid),
        );
        nix::sys::prctl::set_keepcaps(true)?;
        nix::unistd::setresgid(gid, gid, gid)?;
        nix::unistd::setresuid(uid, uid, uid)?;
        nix::sys::prctl::set_keepcaps(false)?;
        Ok(())
    }

    /// Drops user, groups and every capability, for good.
    pub(crate) fn drop_all_privileges() -> io::Result<()> {
        const NOBODY: u32 = 65_534;
        let nobody = (
            nix::unistd::Uid::from_raw(NOBODY),
            nix::unistd::Gid::from_raw(NOBODY),
        );
        nix::unistd::setgroups(&[])?;
        nix::unistd::setresgid(nobody.1, nobody.1, nobody.1)?;
        // Leaving root clears every capability set but the bounding one, which no_new_privs makes moot.
        nix::unistd::setresuid(nobody.0, nobody.0, nobody.0)?;
        nix::sys::prctl::set_no_new_privs()?;
        Ok(())
    }

    /// The other end of a terminal, whatever mount namespace its file is in.
    pub(crate) fn open_slave(master: &OwnedFd) -> io::Result<OwnedFd> {
        let unlock: libc::c_int = 0;
        // SAFETY: the request reads one int, which outlives the call.
        check(unsafe {
            libc::c_long::from(libc::ioctl(
                master.as_raw_fd(),
                libc::TIOCSPTLCK,
                &raw const unlock,
            ))
        })?;
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        // SAFETY: the request takes its flags by value.
        let fd = check(unsafe {
            libc::c_long::from(libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags))
        })?;
        // SAFETY: the call returned this descriptor to us and nobody else has it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
    }

    /// Makes a terminal the session's.
    pub(crate) fn make_controlling_terminal(terminal: &OwnedFd) -> io::Result<()> {
        // SAFETY: the request takes its argument by value.
        check(unsafe {
            libc::c_long::from(libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0))
        })?;
        Ok(())
    }

    /// Lets orphans of our descendants become our children, as they do for PID 1.
    pub(crate) fn become_subreaper() -> io::Result<()> {
        // SAFETY: no pointers.
        check(unsafe {
            libc::c_long::from(libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
        })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn descriptors_travel_with_their_message() {
        let (left, right) = UnixDatagram::pair().expect("pair");
        let file = memory_file("test", b"through").expect("memfd");
        send_with_fds(left.as_fd(), b"hello", &[file.as_raw_fd()]).expect("send");
        let mut buffer = [0; 16];
        let (length, mut fds) = receive_with_fds(right.as_fd(), &mut buffer).expect("receive");
        assert_eq!(&buffer[..length], b"hello");
        assert_eq!(fds.len(), 1);
        let mut text = String::new();
        std::fs::File::from(fds.remove(0))
            .read_to_string(&mut text)
            .expect("read");
        assert_eq!(text, "through");
    }

    #[test]
    fn random_bytes_differ() {
        let one: [u8; 16] = random_bytes().expect("random");
        let two: [u8; 16] = random_bytes().expect("random");
        assert_ne!(one, two);
    }

    #[test]
    fn a_missing_process_cannot_be_signalled() {
        let error = process::kill(i32::MAX, 0).expect_err("no such process");
        assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
    }
}
