//! Advisory whole-file locks (`flock`), which the kernel drops when their holder dies.
//!
//! Nobody waits for one without an end: the holder may hang, or be hostile. Who gives up says who
//! holds the lock.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Who waits longer than this says in the log for whom.
const TELL_AFTER: Duration = Duration::from_secs(5);
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// A process that holds a lock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its id.
    pub pid: u32,
    /// What it runs; none if it has ended and the lock's descriptor lives on in another process.
    pub command: Option<String>,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.command {
            Some(command) => write!(f, "process {} ({command})", self.pid),
            None => write!(f, "whoever process {} passed it on to", self.pid),
        }
    }
}

/// A lock that could not be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody held it for all the time there was.
    #[error(
        "cannot lock {path} within {waited:.1?}: {holder} holds it; if that hangs, end it",
        path = path.display(),
        holder = named(holder.as_ref())
    )]
    Held {
        /// The file.
        path: PathBuf,
        /// The one that the kernel names first, if it shows any.
        holder: Option<Holder>,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The system refused.
    #[error("cannot lock {}", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn named(holder: Option<&Holder>) -> String {
    holder.map_or_else(
        || "a process that is not in /proc/locks".to_owned(),
        Holder::to_string,
    )
}

/// Takes the lock for this file description alone, and waits for it at most so long.
pub fn exclusive(file: &File, limit: Duration) -> Result<(), LockError> {
    wait(file, libc::LOCK_EX, limit)
}

/// Takes the lock beside others that share it, and waits at most so long for one that doesn't.
pub fn shared(file: &File, limit: Duration) -> Result<(), LockError> {
    wait(file, libc::LOCK_SH, limit)
}

/// Takes the lock unless another file description holds it; says whether it did.
pub fn try_exclusive(file: &File) -> io::Result<bool> {
    flock(file, libc::LOCK_EX)
}

/// Takes a lock that others may share, unless one holds it exclusively; says whether it did.
pub fn try_shared(file: &File) -> io::Result<bool> {
    flock(file, libc::LOCK_SH)
}

fn flock(file: &File, operation: libc::c_int) -> io::Result<bool> {
    loop {
        // SAFETY: a system call on an open descriptor; no memory is involved.
        if unsafe { libc::flock(file.as_raw_fd(), operation | libc::LOCK_NB) } == 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock => return Ok(false),
            _ => return Err(error),
        }
    }
}

/// `flock` knows no time limit, and only a signal ends one that waits, which is not a library's to
/// send. So it is asked again and again.
fn wait(file: &File, operation: libc::c_int, limit: Duration) -> Result<(), LockError> {
    let begun = Instant::now();
    let mut told = false;
    loop {
        let taken = flock(file, operation).map_err(|source| LockError::Refused {
            path: path_of(file),
            source,
        })?;
        if taken {
            return Ok(());
        }
        let waited = begun.elapsed();
        if waited >= limit {
            return Err(LockError::Held {
                path: path_of(file),
                holder: holder(file),
                waited,
            });
        }
        if waited >= TELL_AFTER && !told {
            told = true;
            let (path, holder) = (path_of(file), named(holder(file).as_ref()));
            tracing::warn!(path = %path.display(), holder, "waiting for a lock");
        }
        std::thread::sleep(pause_after(waited).min(limit - waited));
    }
}

/// Never more than an eighth of the time that was waited already, so that asking costs little time
/// in a short wait and little work in a long one.
fn pause_after(waited: Duration) -> Duration {
    (waited / 8).clamp(SHORTEST_PAUSE, LONGEST_PAUSE)
}

fn path_of(file: &File) -> PathBuf {
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    fs::read_link(&link).unwrap_or_else(|_| link.into())
}

/// Who holds a lock on the file now.
pub fn holder(file: &File) -> Option<Holder> {
    let pid = find(&fs::read_to_string("/proc/locks").ok()?, identity(file)?)?;
    let command = fs::read_to_string(format!("/proc/{pid}/comm")).ok();
    Some(Holder {
        pid,
        // Everybody chooses the name of his own process.
        command: command.map(|name| name.trim_end().escape_debug().to_string()),
    })
}

/// What `/proc/locks` calls a file: its device, as major and minor number, and its inode.
type Identity = (u64, u64, u64);

/// A subvolume has a device number of its own in `stat`, and its mount's in the table of locks.
fn identity(file: &File) -> Option<Identity> {
    let meta = file.metadata().ok()?;
    let device = device_of_mount(file).unwrap_or_else(|| {
        let (major, minor) = (libc::major(meta.dev()), libc::minor(meta.dev()));
        (major.into(), minor.into())
    });
    Some((device.0, device.1, meta.ino()))
}

fn device_of_mount(file: &File) -> Option<(u64, u64)> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).ok()?;
    let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let mut mount = mounts
        .lines()
        .map(|line| line.split(' '))
        .find_map(|mut fields| (fields.next()? == id.trim()).then_some(fields))?;
    let (major, minor) = mount.nth(1)?.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// A line is `3: FLOCK  ADVISORY  WRITE 812 00:19:1234 0 EOF`; one who waits has an arrow before the kind.
fn find(locks: &str, wanted: Identity) -> Option<u32> {
    locks.lines().find_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let [_, "FLOCK", _, _, pid, file, ..] = fields.as_slice() else {
            return None;
        };
        let mut parts = file.split(':');
        let mut hex = || u64::from_str_radix(parts.next()?, 16).ok();
        let device = (hex()?, hex()?);
        let inode = parts.next()?.parse().ok()?;
        ((device.0, device.1, inode) == wanted)
            .then(|| pid.parse().ok())
            .flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    const SOON: Duration = Duration::from_millis(20);
    const LONG: Duration = Duration::from_secs(60);

    fn opened_twice(directory: &Path) -> (File, File) {
        let path = directory.join("lock");
        fs::write(&path, "").unwrap();
        (File::open(&path).unwrap(), File::open(&path).unwrap())
    }

    #[test]
    fn who_gives_up_names_file_and_holder() {
        let dir = tempfile::tempdir().unwrap();
        let (mine, other) = opened_twice(dir.path());
        exclusive(&mine, SOON).unwrap();
        for attempt in [exclusive(&other, SOON), shared(&other, SOON)] {
            let error = attempt.unwrap_err();
            let text = error.to_string();
            let LockError::Held { path, holder, .. } = error else {
                panic!("{error:?}");
            };
            assert_eq!(path, dir.path().join("lock"));
            let holder = holder.expect("the kernel shows who holds it");
            assert_eq!(holder.pid, std::process::id());
            let own = fs::read_to_string("/proc/self/comm").unwrap();
            assert!(text.contains(own.trim()), "{text}");
        }
    }

    #[test]
    fn a_lock_that_is_given_back_is_had_by_who_waits() {
        let dir = tempfile::tempdir().unwrap();
        let (mine, other) = opened_twice(dir.path());
        exclusive(&mine, SOON).unwrap();
        let waiting = std::thread::spawn(move || exclusive(&other, LONG));
        std::thread::sleep(SOON);
        drop(mine);
        waiting.join().unwrap().unwrap();
    }

    #[test]
    fn shared_locks_keep_out_the_exclusive_one_only() {
        let dir = tempfile::tempdir().unwrap();
        let (mine, other) = opened_twice(dir.path());
        shared(&mine, SOON).unwrap();
        shared(&other, SOON).unwrap();
        assert!(!try_exclusive(&mine).unwrap());
    }

    #[test]
    fn holders_are_found_by_device_and_inode_and_not_among_those_who_wait() {
        let locks = "1: POSIX  ADVISORY  WRITE 7 fd:0a:99 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 8 fd:0a:99 0 EOF\n\
                     3: FLOCK  ADVISORY  READ 9 fd:0b:99 0 EOF\n\
                     4: FLOCK  ADVISORY  WRITE 10 fd:0a:99 0 EOF\n";
        assert_eq!(find(locks, (0xfd, 10, 99)), Some(10));
        assert_eq!(find(locks, (0xfd, 10, 98)), None);
    }

    #[test]
    fn pauses_grow_with_the_wait_and_have_an_end() {
        assert_eq!(pause_after(Duration::ZERO), SHORTEST_PAUSE);
        assert_eq!(
            pause_after(Duration::from_millis(80)),
            Duration::from_millis(10)
        );
        assert_eq!(pause_after(LONG), LONGEST_PAUSE);
    }
}
