//! What programs do with files beside reading and writing them.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::Result;

use crate::text::say;

type Try = fn(&Path) -> io::Result<()>;

const ALL: [(&str, Try); 13] = [
    ("xattr", |path| attribute(path, "user.kiln", b"value")),
    ("capability", |path| {
        // Version 2, cap_net_bind_service permitted and effective.
        let words = [0x0200_0001_u32, 1 << 10, 0, 0, 0];
        let value: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
        attribute(path, "security.capability", &value)
    }),
    ("acl", |path| {
        // Version 2; owner, user 1, group, mask, others: each a tag, rights and an id.
        let mut value = 2_u32.to_le_bytes().to_vec();
        for (tag, rights, id) in [
            (1, 6, u32::MAX),
            (2, 4, 1),
            (4, 4, u32::MAX),
            (16, 4, u32::MAX),
            (32, 4, u32::MAX),
        ] {
            value.extend_from_slice(&u16::to_le_bytes(tag));
            value.extend_from_slice(&u16::to_le_bytes(rights));
            value.extend_from_slice(&u32::to_le_bytes(id));
        }
        attribute(path, "system.posix_acl_access", &value)
    }),
    ("unnamed", unnamed),
    ("punch", |path| {
        resize(path, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
    }),
    ("collapse", |path| {
        resize(path, libc::FALLOC_FL_COLLAPSE_RANGE)
    }),
    ("insert", |path| resize(path, libc::FALLOC_FL_INSERT_RANGE)),
    ("socket", socket),
    ("flock", flock),
    ("fcntl", fcntl),
    ("mapped", mapped),
    ("exchange", exchange),
    ("link", |path| {
        let other = path.with_extension("link");
        fs::hard_link(path, &other)?;
        fs::remove_file(other)
    }),
];

/// Tries each in a directory, and prints what does not work and why, or that all does.
pub(crate) fn try_all(dir: &str) -> Result<()> {
    let mut failed = false;
    for (name, attempt) in ALL {
        let path = Path::new(dir).join(format!("feature-{name}"));
        fs::write(&path, [7; 16 << 10])?;
        if let Err(error) = attempt(&path) {
            failed = true;
            say(&format!("no {name}: {error}"))?;
        }
        fs::remove_file(&path)?;
    }
    if !failed {
        say("all")?;
    }
    Ok(())
}

fn text(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

fn check(result: i64) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn wrong(what: &str) -> io::Error {
    io::Error::other(what.to_owned())
}

fn attribute(path: &Path, name: &str, value: &[u8]) -> io::Result<()> {
    let (path, name) = (text(path)?, CString::new(name)?);
    let (at, length) = (value.as_ptr().cast(), value.len());
    // SAFETY: both strings and the value live until the call returns.
    let set = unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), at, length, 0) };
    check(set.into())?;
    let mut found = [0_u8; 64];
    // SAFETY: as above; the kernel writes no more than the buffer has room for.
    let got = unsafe {
        libc::getxattr(
            path.as_ptr(),
            name.as_ptr(),
            found.as_mut_ptr().cast(),
            found.len(),
        )
    };
    match found.get(..check(got as i64)?) {
        Some(found) if found == value => Ok(()),
        _ => Err(wrong("it has another value")),
    }
}

fn unnamed(path: &Path) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let file = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .open(dir)?;
    let open = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let named = path.with_extension("named");
    let to = text(&named)?;
    let (here, follow) = (libc::AT_FDCWD, libc::AT_SYMLINK_FOLLOW);
    // SAFETY: both strings live until the call returns.
    let linked = unsafe { libc::linkat(here, open.as_ptr(), here, to.as_ptr(), follow) };
    check(linked.into())?;
    fs::remove_file(named)
}

fn resize(path: &Path, mode: i32) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    // SAFETY: takes numbers only.
    let done = unsafe { libc::fallocate(file.as_raw_fd(), mode, 4096, 4096) };
    check(done.into()).map(drop)
}

fn socket(path: &Path) -> io::Result<()> {
    let path = path.with_extension("socket");
    let listener = UnixListener::bind(&path)?;
    let mut client = UnixStream::connect(&path)?;
    client.write_all(b"x")?;
    let mut got = [0];
    listener.accept()?.0.read_exact(&mut got)?;
    fs::remove_file(path)
}

fn flock(path: &Path) -> io::Result<()> {
    let (first, second) = (File::open(path)?, File::open(path)?);
    first.lock()?;
    match second.try_lock() {
        Err(fs::TryLockError::WouldBlock) => Ok(()),
        Err(fs::TryLockError::Error(error)) => Err(error),
        Ok(()) => Err(wrong("it is held twice")),
    }
}

fn fcntl(path: &Path) -> io::Result<()> {
    let open = || OpenOptions::new().read(true).write(true).open(path);
    let (first, second) = (open()?, open()?);
    let lock = |file: &File| {
        // SAFETY: all zeroes is a valid value of this struct of numbers.
        let mut what: libc::flock = unsafe { std::mem::zeroed() };
        what.l_type = libc::F_WRLCK as i16;
        // SAFETY: the struct lives until the call returns.
        let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw mut what) };
        check(done.into())
    };
    lock(&first)?;
    match lock(&second) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
        Err(error) => Err(error),
        Ok(_) => Err(wrong("it is held twice")),
    }
}

fn mapped(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let (both, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
    // SAFETY: a new mapping of a file that is long enough.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            both,
            shared,
            file.as_raw_fd(),
            0,
        )
    };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the page was just mapped, writable, and nobody else has it.
    unsafe { at.cast::<u8>().write_volatile(9) };
    let mut found = [0];
    file.read_exact_at(&mut found, 0)?;
    // SAFETY: the mapping made above, which nothing uses any more.
    unsafe { libc::munmap(at, 4096) };
    match found {
        [9] => Ok(()),
        _ => Err(wrong("what is written by a mapping is not read")),
    }
}

fn exchange(path: &Path) -> io::Result<()> {
    let other = path.with_extension("other");
    fs::write(&other, "other")?;
    let (a, b) = (text(path)?, text(&other)?);
    let (here, swap) = (libc::AT_FDCWD, libc::RENAME_EXCHANGE);
    // SAFETY: both strings live until the call returns.
    let done = unsafe { libc::renameat2(here, a.as_ptr(), here, b.as_ptr(), swap) };
    check(done.into())?;
    fs::remove_file(other)
}
