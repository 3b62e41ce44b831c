//! Calls of the host's kernel, each with its error. Names and numbers that come from a guest have been checked before,
//! as far as the kernel does not check them itself.

use std::ffi::CStr;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// An error as the guest is told it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Errno(pub(crate) i32);

impl Errno {
    /// Of the call that failed last on this thread.
    pub(crate) fn last() -> Self {
        Errno(
            io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or(libc::EIO),
        )
    }
}

pub(crate) type Answer<T> = Result<T, Errno>;

/// The result of a call that gives a number, or -1 and an error.
pub(crate) fn number(result: libc::c_long) -> Answer<u64> {
    u64::try_from(result).map_err(|_| Errno::last())
}

/// The result of a call that gives 0, or -1 and an error.
pub(crate) fn done(result: libc::c_int) -> Answer<()> {
    if result < 0 {
        Err(Errno::last())
    } else {
        Ok(())
    }
}

/// Opens a name in a folder. Never waits for a lease that somebody has on the file.
pub(crate) fn open_at(dir: RawFd, name: &CStr, flags: i32, mode: u32) -> Answer<OwnedFd> {
    let flags = flags | libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: a string that lives through the call; numbers.
    let fd = unsafe { libc::openat(dir, name.as_ptr(), flags, mode) };
    done(fd)?;
    // SAFETY: a new descriptor, which is ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What is known of a file.
pub(crate) struct Stat(pub(crate) libc::statx);

/// What a file is known by for as long as somebody has it open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) device: u64,
    pub(crate) ino: u64,
    pub(crate) mount: u64,
}

/// A point in time: seconds and nanoseconds.
pub(crate) type Time = (i64, u32);

impl Stat {
    /// The type bits of the mode.
    pub(crate) fn kind(&self) -> u32 {
        u32::from(self.0.stx_mode) & libc::S_IFMT
    }

    pub(crate) fn key(&self) -> Key {
        let has_mount = self.0.stx_mask & libc::STATX_MNT_ID != 0;
        Key {
            device: u64::from(self.0.stx_dev_major) << 32 | u64::from(self.0.stx_dev_minor),
            ino: self.0.stx_ino,
            mount: if has_mount { self.0.stx_mnt_id } else { 0 },
        }
    }

    /// When the file was made, where the file system knows it: what tells it from a later one of the same number.
    pub(crate) fn born(&self) -> Option<Time> {
        let time = self.0.stx_btime;
        (self.0.stx_mask & libc::STATX_BTIME != 0).then_some((time.tv_sec, time.tv_nsec))
    }

    pub(crate) fn sets_ids(&self) -> bool {
        u32::from(self.0.stx_mode) & (libc::S_ISUID | libc::S_ISGID) != 0
    }
}

const ALL_OF_IT: u32 = libc::STATX_BASIC_STATS | libc::STATX_BTIME | libc::STATX_MNT_ID;

fn statx(dir: RawFd, name: &CStr, flags: i32) -> Answer<Stat> {
    // SAFETY: all-zero is a valid statx, which the kernel fills in; the string lives through the call.
    let (result, stat) = unsafe {
        let mut stat: libc::statx = std::mem::zeroed();
        let flags = flags | libc::AT_NO_AUTOMOUNT;
        let result = libc::statx(dir, name.as_ptr(), flags, ALL_OF_IT, &raw mut stat);
        (result, stat)
    };
    done(result).map(|()| Stat(stat))
}

pub(crate) fn stat(fd: RawFd) -> Answer<Stat> {
    statx(fd, c"", libc::AT_EMPTY_PATH)
}

/// Of a name in a folder, which is not followed if it is a link.
pub(crate) fn stat_at(dir: RawFd, name: &CStr) -> Answer<Stat> {
    statx(dir, name, libc::AT_SYMLINK_NOFOLLOW)
}

/// The thread's open files by their numbers: a descriptor that stands for a file without being open for anything is
/// made one that is by way of this directory.
#[derive(Debug)]
pub(crate) struct Numbers {
    dir: OwnedFd,
    /// What leads to the directory where no call takes its descriptor: nothing if it is the working directory.
    prefix: &'static str,
}

/// A path in the directory of numbers.
pub(crate) struct Path([u8; 32]);

impl Path {
    fn new(prefix: &str, fd: RawFd) -> Self {
        let mut bytes = [0; 32];
        // Prefix and number are shorter than that, with a zero left.
        let _ = write!(&mut bytes[..31], "{prefix}{fd}");
        Path(bytes)
    }

    pub(crate) fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).unwrap_or_default()
    }
}

impl Numbers {
    /// The directory is the thread's working directory.
    pub(crate) fn here(dir: OwnedFd) -> Self {
        Numbers { dir, prefix: "" }
    }

    /// Of the whole process, where there is a `/proc`.
    pub(crate) fn of_process() -> Answer<Self> {
        let path = c"/proc/self/fd";
        let dir = open_at(libc::AT_FDCWD, path, libc::O_PATH | libc::O_DIRECTORY, 0)?;
        Ok(Numbers {
            dir,
            prefix: "/proc/self/fd/",
        })
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.dir.as_raw_fd()
    }

    /// The name of a descriptor in [`Numbers::fd`].
    pub(crate) fn name(fd: RawFd) -> Path {
        Path::new("", fd)
    }

    /// A path to what a descriptor stands for.
    pub(crate) fn path(&self, fd: RawFd) -> Path {
        Path::new(self.prefix, fd)
    }

    /// Opens what a descriptor stands for. Only for regular files and folders: to open another file is to use a device
    /// or to wait.
    pub(crate) fn open(&self, fd: RawFd, flags: i32) -> Answer<OwnedFd> {
        open_at(self.fd(), Self::name(fd).as_c_str(), flags, 0)
    }
}
