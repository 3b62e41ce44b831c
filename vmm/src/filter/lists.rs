//! What each kind of thread may ask of the kernel.
//!
//! Not on any list: making sockets, or rings of io_uring, whose operations pass no filter; opening files (but for the
//! file server's thread, which sees one folder); executing programs, making processes, changing signal handlers, memory
//! that can be executed.

use std::collections::BTreeMap;

use super::program::Rule;

/// Kinds of threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The thread that answers the client, and `hotplug`. While the machine is paused it does devices' work, and
    /// its new threads start with its list: so it has everything the others have, but for the file server.
    Control,
    /// The device thread, and the threads of disks and overlays, which it starts.
    Devices,
    /// A vCPU's: exits, which reach into devices when a driver configures one.
    Vcpu,
    /// The file server's.
    Files,
}

const PROT_EXEC: u32 = libc::PROT_EXEC.unsigned_abs();
/// A thread's own name.
const NAMES: [u32; 2] = [
    libc::PR_SET_NAME.unsigned_abs(),
    libc::PR_GET_NAME.unsigned_abs(),
];
const CLONE_THREAD: u32 = libc::CLONE_THREAD.unsigned_abs();

const PRIVATE: u32 = libc::FUTEX_PRIVATE_FLAG.unsigned_abs();
const REALTIME: u32 = libc::FUTEX_CLOCK_REALTIME.unsigned_abs();
const WAIT: u32 = libc::FUTEX_WAIT.unsigned_abs();
const WAIT_BITSET: u32 = libc::FUTEX_WAIT_BITSET.unsigned_abs();
const WAKE: u32 = libc::FUTEX_WAKE.unsigned_abs();
/// What the standard library, the C library and the overlay wait and wake by. None that moves those who sleep on one
/// word to another: on the overlays' budget other pods' VMMs sleep, too.
const FUTEX: [u32; 8] = [
    WAIT,
    WAIT | PRIVATE,
    WAKE,
    WAKE | PRIVATE,
    WAIT_BITSET,
    WAIT_BITSET | PRIVATE,
    WAIT_BITSET | REALTIME,
    WAIT_BITSET | REALTIME | PRIVATE,
];
/// What is said of memory. Not `MADV_REMOVE`, which takes pages away from the file that is mapped: others read the page
/// of the overlays' budget.
const ADVICE: [u32; 9] = [
    libc::MADV_RANDOM.unsigned_abs(),
    libc::MADV_DONTNEED.unsigned_abs(),
    libc::MADV_HUGEPAGE.unsigned_abs(),
    libc::MADV_NOHUGEPAGE.unsigned_abs(),
    libc::MADV_DONTDUMP.unsigned_abs(),
    libc::MADV_POPULATE_READ.unsigned_abs(),
    libc::MADV_POPULATE_WRITE.unsigned_abs(),
    // MADV_GUARD_INSTALL and MADV_GUARD_REMOVE, by which newer C libraries guard threads' stacks.
    102,
    103,
];

/// What any thread does: wait, keep its memory, take signals, log, end.
const ALL: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_munmap,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_write,
    libc::SYS_writev,
];

/// What configuring, starting and resetting a device takes.
const CONFIGURING: &[libc::c_long] = &[libc::SYS_epoll_ctl, libc::SYS_eventfd2];

/// What running devices takes.
const DEVICES: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_io_uring_enter,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_rseq,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_sync_file_range,
];

/// What answering the client takes besides: new files, and writing snapshots, without cutting files short. New vCPUs'
/// threads put their own list on.
const CONTROL: &[libc::c_long] = &[
    libc::SYS_fstat,
    libc::SYS_fsync,
    libc::SYS_lseek,
    libc::SYS_newfstatat,
    libc::SYS_seccomp,
    libc::SYS_statx,
];

/// fcntl's commands besides `F_SETFL`: none that sends signals (`F_SETOWN`, `F_SETSIG`), which need no right but root's
/// user id and reach any process, and none that locks.
const COMMANDS: &[u32] = &[
    libc::F_GETFD.unsigned_abs(),
    libc::F_GETFL.unsigned_abs(),
    libc::F_DUPFD_CLOEXEC.unsigned_abs(),
];
/// The file server's: it also asks for locks that belong to an open file of its own, without waiting for them.
const FILES_COMMANDS: &[u32] = &[
    libc::F_GETFD.unsigned_abs(),
    libc::F_GETFL.unsigned_abs(),
    libc::F_DUPFD_CLOEXEC.unsigned_abs(),
    libc::F_OFD_GETLK.unsigned_abs(),
    libc::F_OFD_SETLK.unsigned_abs(),
];
/// Requests besides KVM's: of sockets, disks and taps.
const REQUESTS: &[u32] = &[
    0x5421,      // FIONBIO
    0x8008_1272, // BLKGETSIZE64
    0x800454d2,  // TUNGETIFF
    0x400454d0,  // TUNSETOFFLOAD
    0x400454d8,  // TUNSETVNETHDRSZ
    0x400454d9,  // TUNSETQUEUE
];

/// What serving files takes, below the folder that is the thread's root directory. `ftruncate`, which cuts files of
/// volumes, locks (`flock`, and fcntl's) and `syncfs` are harmless here: what the thread has open are files of the folder,
/// for its table of descriptors is its own. So are extended attributes, whose calls take paths: what a path leads to from
/// the thread's root and working directory is the folder's, or one of those descriptors.
const FILES: &[libc::c_long] = &[
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_copy_file_range,
    libc::SYS_dup,
    libc::SYS_fallocate,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_getxattr,
    libc::SYS_linkat,
    libc::SYS_listxattr,
    libc::SYS_lseek,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_poll,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_readlinkat,
    libc::SYS_removexattr,
    libc::SYS_renameat2,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_setxattr,
    libc::SYS_statx,
    libc::SYS_symlinkat,
    libc::SYS_syncfs,
    libc::SYS_umask,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
];

/// The rules of one kind of thread, by system call.
pub(super) fn rules(kind: Kind) -> BTreeMap<u32, Rule> {
    let lists: &[&[libc::c_long]] = match kind {
        Kind::Control => &[ALL, CONFIGURING, DEVICES, CONTROL],
        Kind::Devices => &[ALL, CONFIGURING, DEVICES],
        Kind::Vcpu => &[ALL, CONFIGURING],
        Kind::Files => &[ALL, FILES],
    };
    // System calls have small numbers.
    let number = |call: libc::c_long| call as u32;
    let mut rules: BTreeMap<u32, Rule> = lists
        .iter()
        .copied()
        .flatten()
        .map(|call| (number(*call), Rule::Allow))
        .collect();
    let mut add = |call, rule| rules.insert(number(call), rule);
    add(libc::SYS_mmap, Rule::Without(2, PROT_EXEC));
    add(libc::SYS_mprotect, Rule::Without(2, PROT_EXEC));
    add(libc::SYS_prctl, Rule::Among(0, &NAMES));
    let commands = match kind {
        Kind::Files => FILES_COMMANDS,
        _ => COMMANDS,
    };
    add(libc::SYS_fcntl, Rule::Commands(commands));
    // Kicks of vCPUs, and abort.
    add(libc::SYS_tgkill, Rule::OnSelf);
    if kind != Kind::Files {
        add(libc::SYS_ioctl, Rule::Requests(REQUESTS));
    }
    if matches!(kind, Kind::Control | Kind::Devices) {
        // Its flags are behind a pointer; the C library falls back to the one whose flags can be seen.
        add(libc::SYS_clone3, Rule::Fail(libc::ENOSYS));
        add(libc::SYS_clone, Rule::Holding(0, CLONE_THREAD));
    }
    add(libc::SYS_futex, Rule::Among(1, &FUTEX));
    add(libc::SYS_madvise, Rule::Among(2, &ADVICE));
    // It makes a mapping of one page of the overlays' budget one of the next pages, too, which are other pods'. The C
    // library's realloc copies if it fails.
    add(libc::SYS_mremap, Rule::Fail(libc::ENOMEM));
    rules
}
