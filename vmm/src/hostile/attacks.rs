//! What a thread tries. Each attempt is what code that has taken over the thread could do.

use std::ffi::CStr;
use std::os::fd::RawFd;

use super::filter::Kind;
use super::raid::{self, Outcome, tell};

/// Descriptors that are looked at.
const MOST: RawFd = 256;
/// The first process of the node, or of the container that this runs in.
const FIRST: usize = 1;
/// From linux/fcntl.h and linux/ptrace.h.
const F_SETSIG: i32 = 10;
const PTRACE_SEIZE: usize = 0x4206;
const PAGE: usize = 4096;

/// A system call. Pointers among the arguments are null, or to what lives through the call.
fn call(number: libc::c_long, arguments: [usize; 6]) -> Result<i64, i32> {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: what is asked for harms others, if anybody; memory of this process is written to only where said.
    match unsafe { libc::syscall(number, a, b, c, d, e, f) } {
        -1 => Err(errno()),
        result => Ok(result),
    }
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

fn at(text: &CStr) -> usize {
    text.as_ptr() as usize
}

/// A number as an argument, its sign kept.
fn arg(number: i32) -> usize {
    number as usize
}

fn open_descriptors() -> Vec<RawFd> {
    let is_open = |n: &RawFd| call(libc::SYS_fcntl, [arg(*n), arg(libc::F_GETFD), 0, 0, 0, 0]);
    (0..MOST).filter(|n| is_open(n).is_ok()).collect()
}

/// An attempt by way of each descriptor: the first that succeeds, or the last error.
fn each(attempt: impl Fn(RawFd) -> Outcome) -> Outcome {
    let mut last = Err(libc::ENOENT);
    for fd in open_descriptors() {
        last = attempt(fd).map(|what| format!("through descriptor {fd}: {what}"));
        if last.is_ok() {
            break;
        }
    }
    last
}

/// Makes all attempts, one line each.
pub(crate) fn run(kind: Kind) {
    for (name, number, arguments) in calls(kind) {
        let outcome = call(number, arguments).map(|result| {
            if result == 0 && [libc::SYS_fork, libc::SYS_clone, libc::SYS_clone3].contains(&number)
            {
                // SAFETY: the new process; the old one tells.
                unsafe { libc::_exit(0) };
            }
            format!("the call returned {result}")
        });
        tell(kind, name, outcome);
    }
    files(kind);
    descriptors(kind);
    memory(kind);
}

type Call = (&'static str, libc::c_long, [usize; 6]);

/// Calls whose success alone is the harm.
fn calls(kind: Kind) -> Vec<Call> {
    let here = arg(libc::AT_FDCWD);
    let (passwd, program, device) = (at(c"/etc/passwd"), at(c"/bin/true"), at(c"hostile-device"));
    // Room for all that is written to: io_uring's parameters are the largest.
    static ROOM: [std::sync::atomic::AtomicU64; 64] =
        [const { std::sync::atomic::AtomicU64::new(0) }; 64];
    let room = ROOM.as_ptr() as usize;
    let (user, net) = (libc::CLONE_NEWUSER as usize, libc::CLONE_NEWNET as usize);
    let exec = (libc::PROT_READ | libc::PROT_EXEC) as usize;
    let anonymous = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;
    let node = (libc::S_IFCHR | 0o600) as usize;
    let mut calls = vec![
        ("open", libc::SYS_open, [passwd, 2, 0, 0, 0, 0]),
        ("openat", libc::SYS_openat, [here, passwd, 2, 0, 0, 0]),
        ("openat2", libc::SYS_openat2, [here, passwd, room, 24, 0, 0]),
        (
            "open-root-of-first-process",
            libc::SYS_openat,
            [here, at(c"/proc/1/root"), 0, 0, 0, 0],
        ),
        (
            "open-by-handle",
            libc::SYS_open_by_handle_at,
            [here, room, 0, 0, 0, 0],
        ),
        (
            "mknod-of-memory",
            libc::SYS_mknodat,
            [here, device, node, 0x101, 0, 0],
        ),
        (
            "io-uring-setup",
            libc::SYS_io_uring_setup,
            [8, room, 0, 0, 0, 0],
        ),
        ("socket-inet", libc::SYS_socket, [2, 1, 0, 0, 0, 0]),
        ("socket-unix", libc::SYS_socket, [1, 1, 0, 0, 0, 0]),
        ("socketpair", libc::SYS_socketpair, [1, 1, 0, room, 0, 0]),
        ("kill", libc::SYS_kill, [FIRST, 0, 0, 0, 0, 0]),
        ("tkill", libc::SYS_tkill, [FIRST, 0, 0, 0, 0, 0]),
        ("tgkill", libc::SYS_tgkill, [FIRST, FIRST, 0, 0, 0, 0]),
        ("pidfd-open", libc::SYS_pidfd_open, [FIRST, 0, 0, 0, 0, 0]),
        (
            "ptrace",
            libc::SYS_ptrace,
            [PTRACE_SEIZE, FIRST, 0, 0, 0, 0],
        ),
        (
            "process-vm-readv",
            libc::SYS_process_vm_readv,
            [FIRST, room, 1, room, 1, 0],
        ),
        (
            "process-vm-writev",
            libc::SYS_process_vm_writev,
            [FIRST, room, 1, room, 1, 0],
        ),
        ("execve", libc::SYS_execve, [program, 0, 0, 0, 0, 0]),
        ("execveat", libc::SYS_execveat, [here, program, 0, 0, 0, 0]),
        ("fork", libc::SYS_fork, [0; 6]),
        ("clone-process", libc::SYS_clone, [17, 0, 0, 0, 0, 0]),
        ("clone3", libc::SYS_clone3, [room, 64, 0, 0, 0, 0]),
        ("unshare-user", libc::SYS_unshare, [user, 0, 0, 0, 0, 0]),
        ("unshare-net", libc::SYS_unshare, [net, 0, 0, 0, 0, 0]),
        ("chroot", libc::SYS_chroot, [at(c"/"), 0, 0, 0, 0, 0]),
        (
            "mount",
            libc::SYS_mount,
            [at(c"none"), at(c"/"), at(c"tmpfs"), 0, 0, 0],
        ),
        (
            "open-tree",
            libc::SYS_open_tree,
            [here, at(c"/"), 1, 0, 0, 0],
        ),
        ("bpf", libc::SYS_bpf, [0, room, 48, 0, 0, 0]),
        (
            "perf-event",
            libc::SYS_perf_event_open,
            [room, 0, usize::MAX, usize::MAX, 0, 0],
        ),
        ("userfaultfd", libc::SYS_userfaultfd, [1, 0, 0, 0, 0, 0]),
        ("keyctl", libc::SYS_keyctl, [0, arg(-3), 0, 0, 0, 0]),
        ("dumpable", libc::SYS_prctl, [4, 1, 0, 0, 0, 0]),
        (
            "signal-handler",
            libc::SYS_rt_sigaction,
            [31, 0, room, 8, 0, 0],
        ),
        (
            "executable-memory",
            libc::SYS_mmap,
            [0, PAGE, exec, anonymous, usize::MAX, 0],
        ),
    ];
    if kind != Kind::Files {
        // The file server acts for users of the guest, so it may become any; in its folder.
        calls.push(("become-root", libc::SYS_setresuid, [0; 6]));
    }
    calls
}

/// Ways out of the folder, or of the empty root directory, by what is open.
fn files(kind: Kind) {
    let outside = |path: &'static CStr| {
        move |fd: RawFd| {
            call(libc::SYS_openat, [arg(fd), at(path), 0, 0, 0, 0])
                .map(|new| format!("opened as {new}"))
        }
    };
    tell(
        kind,
        "shadow-by-parents",
        each(outside(c"../../../etc/shadow")),
    );
    tell(
        kind,
        "passwd-by-parents",
        each(outside(c"../../../../../etc/passwd")),
    );
    tell(kind, "top-by-parents", each(top));
    tell(kind, "open-again-for-writing", each(open_again));
    let connect = |fd: RawFd| {
        let nowhere = [0u8; 16];
        let address = nowhere.as_ptr() as usize;
        call(libc::SYS_connect, [arg(fd), address, 16, 0, 0, 0]).map(|_| "connected".to_owned())
    };
    tell(kind, "connect", each(connect));
    let enter =
        |fd: RawFd| call(libc::SYS_setns, [arg(fd), 0, 0, 0, 0, 0]).map(|_| "entered".to_owned());
    tell(kind, "setns", each(enter));
}

fn stat(fd: RawFd) -> Result<libc::stat, i32> {
    // SAFETY: all-zero is a valid stat, which the kernel fills in.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    call(
        libc::SYS_fstat,
        [arg(fd), (&raw mut stat) as usize, 0, 0, 0, 0],
    )?;
    Ok(stat)
}

/// What is at the top above an open directory, unless that is the thread's own root or the directory itself.
fn top(fd: RawFd) -> Outcome {
    const DEEP: usize = 64;
    let root = open_at(libc::AT_FDCWD, c"/", libc::O_PATH)?;
    let mut at = open_at(fd, c"..", libc::O_PATH)?;
    for _ in 0..DEEP {
        let above = open_at(at, c"..", libc::O_PATH)?;
        close(at)?;
        at = above;
    }
    let found = (identity(at)?, identity(root)?, identity(fd)?);
    close(at)?;
    close(root)?;
    match found {
        (top, root, own) if top == root || top == own => Err(libc::EXDEV),
        (top, ..) => Ok(format!("inode {} of device {}", top.1, top.0)),
    }
}

fn open_at(directory: RawFd, path: &CStr, flags: i32) -> Result<RawFd, i32> {
    let arguments = [arg(directory), at(path), arg(flags), 0, 0, 0];
    // A descriptor.
    call(libc::SYS_openat, arguments).map(|fd| fd as RawFd)
}

fn close(fd: RawFd) -> Result<(), i32> {
    call(libc::SYS_close, [arg(fd), 0, 0, 0, 0, 0]).map(drop)
}

/// Device and inode of what is open.
fn identity(fd: RawFd) -> Result<(u64, u64), i32> {
    let stat = stat(fd)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Files and disks that the thread has open.
pub(crate) fn held() -> Vec<(u64, u64)> {
    let is_data = |s: &libc::stat| {
        let kind = s.st_mode & libc::S_IFMT;
        [libc::S_IFREG, libc::S_IFBLK].contains(&kind)
    };
    let stats = open_descriptors()
        .into_iter()
        .filter_map(|fd| stat(fd).ok());
    let data = stats.filter(is_data);
    data.map(|s| (s.st_dev, s.st_ino)).collect()
}

/// Opens for writing, by way of a directory of `/proc`, what other threads have open.
fn open_again(directory: RawFd) -> Outcome {
    let held = raid::held_by_others();
    for number in 0..MOST {
        let path = std::ffi::CString::new(number.to_string()).map_err(|_| libc::EINVAL)?;
        match open_at(directory, &path, libc::O_RDWR | libc::O_NONBLOCK) {
            Err(errno @ super::filter::TRAPPED) => return Err(errno),
            Err(_) => {}
            Ok(again) => {
                let is = identity(again)?;
                close(again)?;
                if held.contains(&is) {
                    return Ok(format!("number {number}"));
                }
            }
        }
    }
    Err(libc::ENOENT)
}

/// Harm by descriptors that are open.
fn descriptors(kind: Kind) {
    let by = |command: i32, argument: usize| {
        move |fd: RawFd| {
            let arguments = [arg(fd), arg(command), argument, 0, 0, 0];
            call(libc::SYS_fcntl, arguments).map(|_| "done".to_owned())
        }
    };
    tell(kind, "owner-of-signals", each(by(libc::F_SETOWN, FIRST)));
    tell(kind, "kind-of-signal", each(by(F_SETSIG, 9)));
    tell(
        kind,
        "signals-on-input",
        each(by(libc::F_SETFL, arg(libc::O_ASYNC))),
    );
    for (name, how) in [
        ("lock-to-write", libc::F_WRLCK),
        ("lock-to-read", libc::F_RDLCK),
    ] {
        // SAFETY: all-zero is a valid flock.
        let mut range: libc::flock = unsafe { std::mem::zeroed() };
        // Small constants. Where nobody else locks, since the VMM goes on.
        range.l_type = how as libc::c_short;
        range.l_start = 1 << 40;
        let range = (&raw const range) as usize;
        // The file server locks files of its folder for its guest, but never for the process, and waits for none.
        let command = match kind {
            Kind::Files => libc::F_SETLK,
            _ => libc::F_OFD_SETLK,
        };
        tell(kind, name, each(by(command, range)));
    }
    let flock = |fd: RawFd| {
        let how = arg(libc::LOCK_EX | libc::LOCK_NB);
        call(libc::SYS_flock, [arg(fd), how, 0, 0, 0, 0]).map(|_| "locked".to_owned())
    };
    match kind {
        Kind::Files => tell(
            kind,
            "lease",
            each(by(libc::F_SETLEASE, arg(libc::F_RDLCK))),
        ),
        _ => tell(kind, "flock", each(flock)),
    }
    let cut = |fd: RawFd| {
        call(libc::SYS_ftruncate, [arg(fd), 0, 0, 0, 0, 0]).map(|_| "cut to nothing".to_owned())
    };
    tell(kind, "ftruncate", each(cut));
    let register = |fd: RawFd| {
        // IORING_UNREGISTER_BUFFERS
        call(libc::SYS_io_uring_register, [arg(fd), 1, 0, 0, 0, 0]).map(|_| "done".to_owned())
    };
    tell(kind, "io-uring-register", each(register));
    tell(kind, "budget-by-descriptor", each(write_budget));
}

/// Writes what is there already to a file that begins as the node's overlay budget does.
fn write_budget(fd: RawFd) -> Outcome {
    let mut start = [0u8; 8];
    let (to, len) = (start.as_mut_ptr() as usize, start.len());
    call(libc::SYS_pread64, [arg(fd), to, len, 0, 0, 0])?;
    if start != *b"kilnBUDG" {
        return Err(libc::ENOENT);
    }
    call(libc::SYS_pwrite64, [arg(fd), to, len, 0, 0, 0]).map(|_| "written".to_owned())
}

/// Harm by what is mapped of the overlay budget: everything but one page of the member's own.
fn memory(kind: Kind) {
    let each = |attempt: fn(raid::Region) -> Outcome| {
        let mut last = Err(libc::ENOENT);
        for region in raid::budget() {
            last = attempt(region).map(|what| format!("at {:#x}: {what}", region.start));
            if last.is_ok() {
                break;
            }
        }
        last
    };
    tell(kind, "budget-of-others", each(others_pages));
    tell(kind, "budget-made-writable", each(make_writable));
    tell(kind, "budget-grown", each(grow));
    tell(kind, "budget-punched", each(punch));
}

fn others_pages(region: raid::Region) -> Outcome {
    if region.writable && region.len > PAGE {
        return Ok(format!("{} bytes are writable", region.len));
    }
    Err(libc::EACCES)
}

fn make_writable(region: raid::Region) -> Outcome {
    if region.writable {
        return Err(libc::EACCES);
    }
    let rights = arg(libc::PROT_READ | libc::PROT_WRITE);
    let arguments = [region.start, region.len, rights, 0, 0, 0];
    call(libc::SYS_mprotect, arguments).map(|_| "made writable".to_owned())
}

/// A second mapping of the same memory, longer by a page. The first stays, for the VMM goes on.
fn grow(region: raid::Region) -> Outcome {
    if !region.writable {
        return Err(libc::EACCES);
    }
    let (len, may_move) = (region.len + PAGE, arg(libc::MREMAP_MAYMOVE));
    let grown = call(libc::SYS_mremap, [region.start, 0, len, may_move, 0, 0])?;
    Ok(format!("{len} bytes, at {grown:#x}"))
}

/// Nothing of it, since the VMM goes on; the filter can't tell that from all of it.
fn punch(region: raid::Region) -> Outcome {
    if !region.writable {
        return Err(libc::EACCES);
    }
    let arguments = [region.start, 0, arg(libc::MADV_REMOVE), 0, 0, 0];
    call(libc::SYS_madvise, arguments).map(|_| "can be taken out of the file".to_owned())
}
