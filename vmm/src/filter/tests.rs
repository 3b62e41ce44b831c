//! Each attempt in a process of its own, which its filter is to end.

use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};

use super::*;

mod serving;

/// Forks a child that installs the filter of a kind and makes an attempt: its exit code and what it said.
fn attempt(kind: Kind, attempt: impl FnOnce()) -> (Option<i32>, String) {
    attempt_after(kind, || (), |()| attempt())
}

/// As above, after something that is done without the filter.
fn attempt_after<T>(
    kind: Kind,
    prepare: impl FnOnce() -> T,
    attempt: impl FnOnce(T),
) -> (Option<i32>, String) {
    let (mut output, input) = io::pipe().unwrap();
    // SAFETY: the child only makes system calls (and allocates, which the C library makes possible after a fork)
    // and ends by `_exit`.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        let input: OwnedFd = input.into();
        // SAFETY: as above.
        unsafe {
            libc::dup2(input.as_raw_fd(), libc::STDERR_FILENO);
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        }
        let prepared = prepare();
        if install_handler().and_then(|()| install(kind)).is_err() {
            // SAFETY: as above.
            unsafe { libc::_exit(99) };
        }
        attempt(prepared);
        // SAFETY: as above.
        unsafe { libc::_exit(0) };
    }
    drop(input);
    let mut said = String::new();
    output.read_to_string(&mut said).unwrap();
    let mut status = 0;
    // SAFETY: waits for our own child.
    unsafe { libc::waitpid(pid, &raw mut status, 0) };
    let code = libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status));
    (code, said)
}

const FAILED: Option<i32> = Some(kiln_vmm_control::exit::FAILED);
const KINDS: [Kind; 4] = [Kind::Control, Kind::Devices, Kind::Vcpu, Kind::Files];
const NOT_FILES: [Kind; 3] = [Kind::Control, Kind::Devices, Kind::Vcpu];

#[track_caller]
fn is_refused(kind: Kind, name: &str, what: impl FnOnce()) {
    let (code, said) = attempt(kind, what);
    assert_eq!(code, FAILED, "{kind:?} {name}: {said}");
    assert!(said.contains(&format!("({name})")), "{kind:?}: {said}");
}

/// A system call; pointers among the arguments are null or to constants.
fn call(number: libc::c_long, arguments: [usize; 6]) {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: none of the calls made here writes to memory of this process.
    unsafe { libc::syscall(number, a, b, c, d, e, f) };
}

#[test]
fn a_file_outside_is_refused_and_named() {
    let path = c"/etc/passwd".as_ptr() as usize;
    for kind in [Kind::Control, Kind::Devices, Kind::Vcpu] {
        is_refused(kind, "openat", || {
            call(libc::SYS_openat, [0, path, 0, 0, 0, 0]);
        });
        is_refused(kind, "open", || call(libc::SYS_open, [path, 0, 0, 0, 0, 0]));
    }
}

#[test]
fn a_socket_is_refused_and_named() {
    // AF_INET, SOCK_STREAM.
    for kind in KINDS {
        is_refused(kind, "socket", || {
            call(libc::SYS_socket, [2, 1, 0, 0, 0, 0]);
        });
        is_refused(kind, "connect", || call(libc::SYS_connect, [0; 6]));
    }
}

#[test]
fn a_ring_that_could_make_sockets_is_refused() {
    for kind in KINDS {
        is_refused(kind, "io_uring_setup", || {
            call(libc::SYS_io_uring_setup, [0; 6]);
        });
        is_refused(kind, "io_uring_register", || {
            call(libc::SYS_io_uring_register, [0; 6]);
        });
    }
}

#[test]
fn another_program_or_process_is_refused_and_named() {
    let path = c"/bin/true".as_ptr() as usize;
    for kind in KINDS {
        is_refused(kind, "execve", || {
            call(libc::SYS_execve, [path, 0, 0, 0, 0, 0]);
        });
        is_refused(kind, "fork", || call(libc::SYS_fork, [0; 6]));
    }
    for kind in [Kind::Control, Kind::Devices] {
        is_refused(kind, "clone", || {
            call(libc::SYS_clone, [17, 0, 0, 0, 0, 0]);
        });
    }
    for kind in [Kind::Vcpu, Kind::Files] {
        is_refused(kind, "clone3", || call(libc::SYS_clone3, [0; 6]));
    }
}

#[test]
fn memory_that_can_be_executed_is_refused() {
    // PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS.
    for kind in KINDS {
        is_refused(kind, "mmap", || {
            call(libc::SYS_mmap, [0, 4096, 5, 0x22, usize::MAX, 0]);
        });
        is_refused(kind, "mprotect", || {
            call(libc::SYS_mprotect, [0x1000, 4096, 5, 0, 0, 0]);
        });
    }
}

#[test]
fn signals_to_others_new_handlers_and_terminals_are_refused() {
    for kind in KINDS {
        is_refused(kind, "tgkill", || {
            call(libc::SYS_tgkill, [1, 1, 0, 0, 0, 0]);
        });
        is_refused(kind, "rt_sigaction", || {
            call(libc::SYS_rt_sigaction, [31, 0, 0, 8, 0, 0]);
        });
        // TIOCSTI
        is_refused(kind, "ioctl", || {
            call(libc::SYS_ioctl, [0, 0x5412, 0, 0, 0, 0]);
        });
    }
}

/// From linux/fcntl.h.
const F_SETSIG: i32 = 10;
const F_SETOWN_EX: i32 = 15;

#[test]
fn signals_and_locks_by_fcntl_are_refused() {
    for kind in KINDS {
        for command in [libc::F_SETOWN, F_SETOWN_EX, F_SETSIG, libc::F_SETLEASE] {
            is_refused(kind, "fcntl", || fcntl(command, 1));
        }
        for command in [
            libc::F_SETLK,
            libc::F_SETLKW,
            libc::F_OFD_SETLKW,
            libc::F_NOTIFY,
        ] {
            is_refused(kind, "fcntl", || fcntl(command, 0));
        }
    }
    for kind in NOT_FILES {
        for command in [libc::F_OFD_GETLK, libc::F_OFD_SETLK] {
            is_refused(kind, "fcntl", || fcntl(command, 0));
        }
    }
}

#[test]
fn the_file_server_locks_its_own_files_and_does_not_wait_for_them() {
    let file = tempfile::tempfile().unwrap();
    let (code, said) = attempt(Kind::Files, || {
        // SAFETY: all-zero is a valid flock, which the kernel reads and writes.
        unsafe {
            let mut range: libc::flock = std::mem::zeroed();
            range.l_type = libc::F_WRLCK as libc::c_short;
            let fd = file.as_raw_fd();
            assert_eq!(libc::fcntl(fd, libc::F_OFD_SETLK, &raw mut range), 0);
            assert_eq!(libc::fcntl(fd, libc::F_OFD_GETLK, &raw mut range), 0);
            assert_eq!(libc::flock(fd, libc::LOCK_EX | libc::LOCK_NB), 0);
        }
    });
    assert_eq!(code, Some(0), "{said}");
}

fn fcntl(command: i32, argument: usize) {
    let command = usize::try_from(command).unwrap();
    call(libc::SYS_fcntl, [0, command, argument, 0, 0, 0]);
}

#[test]
fn signals_on_input_can_not_be_asked_for_but_other_flags_can() {
    for kind in KINDS {
        let (input, _output) = io::pipe().unwrap();
        let (code, said) = attempt(kind, || {
            let set = |flags: i32| {
                // SAFETY: numbers only.
                let done = unsafe { libc::fcntl(input.as_raw_fd(), libc::F_SETFL, flags) };
                (done, io::Error::last_os_error().raw_os_error())
            };
            assert_eq!(set(libc::O_ASYNC), (-1, Some(libc::EINVAL)));
            assert_eq!(set(libc::O_NONBLOCK).0, 0);
            // SAFETY: as above.
            let flags = unsafe { libc::fcntl(input.as_raw_fd(), libc::F_GETFL) };
            assert_eq!(flags, libc::O_NONBLOCK);
            assert!(input.try_clone().is_ok());
        });
        assert_eq!(code, Some(0), "{kind:?}: {said}");
    }
}

#[test]
fn files_are_locked_cut_and_given_attributes_by_the_file_server_alone() {
    for kind in NOT_FILES {
        is_refused(kind, "flock", || call(libc::SYS_flock, [0, 2, 0, 0, 0, 0]));
        is_refused(kind, "ftruncate", || {
            call(libc::SYS_ftruncate, [0; 6]);
        });
        is_refused(kind, "syncfs", || call(libc::SYS_syncfs, [0; 6]));
        is_refused(kind, "setxattr", || call(libc::SYS_setxattr, [0; 6]));
        is_refused(kind, "getxattr", || call(libc::SYS_getxattr, [0; 6]));
        is_refused(kind, "listxattr", || call(libc::SYS_listxattr, [0; 6]));
        is_refused(kind, "removexattr", || {
            call(libc::SYS_removexattr, [0; 6]);
        });
    }
}

#[test]
fn what_threads_need_is_allowed() {
    for kind in KINDS {
        let (code, said) = attempt(kind, || {
            let data = vec![1u8; 4 << 20];
            std::thread::yield_now();
            call(libc::SYS_futex, [0; 6]);
            assert_eq!(data.len(), 4 << 20);
        });
        assert_eq!(code, Some(0), "{kind:?}: {said}");
    }
    for kind in [Kind::Control, Kind::Devices] {
        let (code, said) = attempt(kind, || {
            let thread = std::thread::Builder::new().name("more".to_owned());
            assert_eq!(thread.spawn(|| 7).unwrap().join().unwrap(), 7);
        });
        assert_eq!(code, Some(0), "{kind:?}: {said}");
    }
}

#[test]
fn mappings_do_not_grow_and_reallocation_copies() {
    for kind in KINDS {
        let (code, said) = attempt(kind, || {
            // Far beyond what the allocator maps singly, and so would grow in place.
            let mut data = vec![7u8; 4 << 20];
            data.reserve_exact(64 << 20);
            data.resize(68 << 20, 8);
            assert_eq!((data[0], data[(4 << 20) - 1], data[4 << 20]), (7, 7, 8));
            data.truncate(1 << 20);
            data.shrink_to_fit();
            assert_eq!(data, vec![7u8; 1 << 20]);
            let at = data.as_mut_ptr().cast();
            // SAFETY: it fails, and changes nothing.
            let grown = unsafe { libc::mremap(at, 4096, 8192, libc::MREMAP_MAYMOVE) };
            assert_eq!(grown, libc::MAP_FAILED);
            assert_eq!(
                io::Error::last_os_error().raw_os_error(),
                Some(libc::ENOMEM)
            );
        });
        assert_eq!(code, Some(0), "{kind:?}: {said}");
        is_refused(kind, "remap_file_pages", || {
            call(libc::SYS_remap_file_pages, [0; 6]);
        });
    }
}

#[test]
fn pages_are_not_taken_from_files_nor_sleepers_from_their_words() {
    for kind in KINDS {
        is_refused(kind, "madvise", || {
            call(libc::SYS_madvise, [0, 0, 9, 0, 0, 0]);
        });
        for requeue in [
            libc::FUTEX_REQUEUE,
            libc::FUTEX_CMP_REQUEUE,
            libc::FUTEX_WAKE_OP,
        ] {
            is_refused(kind, "futex", || {
                call(libc::SYS_futex, [0, requeue as usize, 0, 0, 0, 0]);
            });
        }
    }
}

#[test]
fn waiting_with_and_without_a_limit_is_allowed() {
    use std::sync::{Arc, Condvar, Mutex, mpsc};
    use std::time::Duration;
    for kind in [Kind::Control, Kind::Devices] {
        let (code, said) = attempt(kind, || {
            let pair = Arc::new((Mutex::new(0), Condvar::new()));
            let (tell, told) = mpsc::channel();
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    let (pair, tell) = (Arc::clone(&pair), tell.clone());
                    std::thread::spawn(move || {
                        for _ in 0..1000 {
                            *pair.0.lock().unwrap() += 1;
                            pair.1.notify_all();
                        }
                        tell.send(()).unwrap();
                        std::thread::park_timeout(Duration::from_millis(2));
                    })
                })
                .collect();
            let mut count = pair.0.lock().unwrap();
            while *count < 4000 {
                let waited = pair.1.wait_timeout(count, Duration::from_millis(1));
                count = waited.unwrap().0;
            }
            drop(count);
            assert_eq!(told.iter().take(4).count(), 4);
            for thread in threads {
                thread.join().unwrap();
            }
        });
        assert_eq!(code, Some(0), "{kind:?}: {said}");
    }
}
