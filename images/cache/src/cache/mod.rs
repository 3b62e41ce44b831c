//! The node's images: one per stack of layers, shared by all processes on the node.
//!
//! ```text
//! DIR/images/KEY/{image.erofs,record}   complete images, put here by one rename
//! DIR/building/KEY/                     an image being made; whoever holds the key's lock owns it
//! DIR/locks/KEY                         taken (flock) to make the image of this key
//! DIR/trash/                            being deleted, by whoever holds DIR/lock
//! DIR/lock                              taken for making room
//! ```
//!
//! All locks are `flock`s: they end with the process that held them, so there is nothing to clean up after a crash
//! but files, and those are cleaned by the next process that finds them. None is waited for without an end: who
//! gives up says which process holds it. Whoever uses an image
//! holds a shared lock on its file. The lock belongs to the open file, so it follows the descriptor to
//! whomever it is passed.

mod error;
mod key;
mod record;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use kiln_store::lock;
use rustix::fs::{FallocateFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
use rustix::io::Errno;

pub use error::CacheError;
pub use key::ImageKey;
use record::{Record, Stamp};

use crate::erofs::{ImageError, Plan};
use crate::lowers::Lowers;

const IMAGE: &str = "image.erofs";
const RECORD: &str = "record";

/// How long others wait for who makes an image: a large one takes minutes on a slow or throttled node.
const MAKING_WAIT: Duration = Duration::from_secs(600);
/// How long a lock is waited for that is held while files are moved and removed.
const WAIT: Duration = Duration::from_secs(30);

/// The cache of one directory. Several processes may have it open.
#[derive(Debug, Clone)]
pub struct Cache {
    dir: PathBuf,
    budget: u64,
    waits: Waits,
}

/// How long locks are waited for.
#[derive(Debug, Clone, Copy)]
struct Waits {
    making: Duration,
    rest: Duration,
}

impl Default for Waits {
    fn default() -> Self {
        Waits {
            making: MAKING_WAIT,
            rest: WAIT,
        }
    }
}

/// An image in use. While the file is open, here or in a process it was passed to, the image stays.
#[derive(Debug)]
pub struct Lease {
    /// Where the image lies.
    pub path: PathBuf,
    /// The image, open for reading.
    pub file: File,
    /// Whether it had to be made.
    pub made: bool,
}

/// A cached image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name in the cache.
    pub key: String,
    /// Length in bytes.
    pub size: u64,
    /// When a lease on it was last taken.
    pub last_used: SystemTime,
}

impl Cache {
    /// The cache in `dir`, with room for `budget` bytes of images. The budget bends rather than let a pod fail: images in
    /// use are never removed for it. Nothing is touched before something is asked for.
    pub fn new(dir: impl Into<PathBuf>, budget: u64) -> Cache {
        Cache {
            dir: dir.into(),
            budget,
            waits: Waits::default(),
        }
    }

    /// The same, made if need be. What crashed processes left is removed.
    pub fn open(dir: impl Into<PathBuf>, budget: u64) -> Result<Cache, CacheError> {
        let cache = Cache::new(dir, budget);
        cache.prepare()?;
        Ok(cache)
    }

    /// What an image needs to be made, and a start with one that is there should not wait for.
    fn prepare(&self) -> Result<(), CacheError> {
        for sub in ["images", "building", "locks", "trash"] {
            let path = self.dir.join(sub);
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .map_err(failed("make the directory", &path))?;
        }
        self.clean()
    }

    /// The image of `lowers`, which `key` identifies; it is made if the cache has none. When several processes ask
    /// at once, one makes it and the others wait.
    pub fn image_for(&self, key: &ImageKey, lowers: &Lowers) -> Result<Lease, CacheError> {
        let span = tracing::info_span!("image", key = %key);
        let _span = span.entered();
        if let Some(lease) = self.lookup(key)? {
            return Ok(lease);
        }
        self.prepare()?;
        let _lock = self.lock_key(key)?;
        // Someone else may have made it meanwhile; or it is there, and only has to be read again.
        if let Some(lease) = self.lookup(key)? {
            return Ok(lease);
        }
        if let Some(lease) = self.verify_again(key)? {
            return Ok(lease);
        }
        self.make(key, lowers)
    }

    /// The image of `key`, if it is there and surely the one that was made. Never reads the image.
    pub fn lookup(&self, key: &ImageKey) -> Result<Option<Lease>, CacheError> {
        let Some((lease, record)) = self.take(key)? else {
            return Ok(None);
        };
        let trusted = record.synced || record.boot == boot_id()?;
        let stamp = Stamp::of(&lease.file).map_err(CacheError::Verify)?;
        Ok((trusted && stamp == record.stamp).then_some(lease))
    }

    /// Reads a cached image whole and compares it with its record. A damaged one is removed.
    /// `None` if the cache has none.
    pub fn verify(&self, key: &ImageKey) -> Result<Option<bool>, CacheError> {
        let _lock = self.lock_key(key)?;
        let Some((lease, record)) = self.take(key)? else {
            return Ok(None);
        };
        let good = record.matches(&lease.file)?;
        if !good {
            self.discard(key.as_str(), &self.lock()?)?;
        }
        Ok(Some(good))
    }

    /// The cached images, least recently used first.
    pub fn entries(&self) -> Result<Vec<Entry>, CacheError> {
        let images = self.dir.join("images");
        let mut entries = Vec::new();
        for found in fs::read_dir(&images).map_err(failed("list", &images))? {
            let found = found.map_err(failed("list", &images))?;
            let path = found.path();
            // It may go while we look.
            let (Ok(image), Ok(dir)) = (fs::metadata(path.join(IMAGE)), fs::metadata(&path)) else {
                continue;
            };
            entries.push(Entry {
                key: found.file_name().to_string_lossy().into_owned(),
                size: image.len(),
                last_used: dir.modified().unwrap_or(SystemTime::UNIX_EPOCH),
            });
        }
        entries.sort_unstable_by(|a, b| (a.last_used, &a.key).cmp(&(b.last_used, &b.key)));
        Ok(entries)
    }

    /// Removes the least recently used images that no one uses until at most `bytes` are left, counting those
    /// being made; says how many bytes are left.
    pub fn shrink(&self, bytes: u64) -> Result<u64, CacheError> {
        self.shrink_locked(bytes, &self.lock()?)
    }

    fn shrink_locked(&self, bytes: u64, lock: &Lock) -> Result<u64, CacheError> {
        let entries = self.entries()?;
        let mut total = self.reserved()? + entries.iter().map(|entry| entry.size).sum::<u64>();
        for entry in entries {
            if total <= bytes {
                break;
            }
            if self.evict(&entry.key, lock)? {
                total -= entry.size;
            }
        }
        Ok(total)
    }

    /// Bytes of images being made.
    fn reserved(&self) -> Result<u64, CacheError> {
        let building = self.dir.join("building");
        let list = fs::read_dir(&building).map_err(failed("list", &building))?;
        Ok(list
            .flatten()
            .filter_map(|found| fs::metadata(found.path().join(IMAGE)).ok())
            .map(|meta| meta.len())
            .sum())
    }

    /// Removes an image unless it is in use.
    fn evict(&self, key: &str, lock: &Lock) -> Result<bool, CacheError> {
        let path = self.image_path(key);
        let Ok(file) = File::open(&path) else {
            return Ok(false);
        };
        if !lock::try_exclusive(&file).map_err(failed("lock", &path))? {
            return Ok(false);
        }
        // The lock is held to the end: who finds the file meanwhile waits, and then sees that it is gone.
        self.discard(key, lock)?;
        tracing::info!(key, "evicted an image");
        Ok(true)
    }

    fn discard(&self, key: &str, _lock: &Lock) -> Result<(), CacheError> {
        let (path, trash) = (
            self.dir.join("images").join(key),
            self.dir.join("trash").join(key),
        );
        remove_tree(&trash)?;
        fs::rename(&path, &trash).map_err(failed("move away", &path))?;
        remove_tree(&trash)
    }

    /// Removes what crashed processes left.
    fn clean(&self) -> Result<(), CacheError> {
        let _lock = self.lock()?;
        for sub in ["trash", "building", "locks"] {
            let dir = self.dir.join(sub);
            for found in fs::read_dir(&dir).map_err(failed("list", &dir))?.flatten() {
                let name = found.file_name();
                if sub == "trash" {
                    remove_tree(&found.path())?;
                    continue;
                }
                // Whoever makes an image has its key locked.
                let lock_path = self.dir.join("locks").join(&name);
                let Some(_owner) = Lock::try_take(&lock_path)? else {
                    continue;
                };
                remove_tree(&self.dir.join("building").join(&name))?;
                fs::remove_file(&lock_path).map_err(failed("remove", &lock_path))?;
            }
        }
        Ok(())
    }

    /// Opens an image with its lease taken, and its record.
    fn take(&self, key: &ImageKey) -> Result<Option<(Lease, Record)>, CacheError> {
        let path = self.image_path(key.as_str());
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(failed("open", &path)(e)),
        };
        lock::shared(&file, self.waits.rest)?;
        // It may have been evicted before the lock was ours.
        if !is_still(&file, &path) {
            return Ok(None);
        }
        let Some(record) = fs::read(path.with_file_name(RECORD))
            .ok()
            .and_then(|bytes| Record::decode(&bytes))
        else {
            return Ok(None);
        };
        if let Some(dir) = path.parent() {
            touch(dir).map_err(failed("note the use of", dir))?;
        }
        let lease = Lease {
            path,
            file,
            made: false,
        };
        Ok(Some((lease, record)))
    }

    /// An image that is there but may not be what it was: read it, and keep it if it is. Needs the key's lock.
    fn verify_again(&self, key: &ImageKey) -> Result<Option<Lease>, CacheError> {
        let dir = self.dir.join("images").join(key.as_str());
        if !dir.exists() {
            return Ok(None);
        }
        let _span = tracing::info_span!("image-verify").entered();
        if let Some((lease, mut record)) = self.take(key)?
            && record.matches(&lease.file)?
        {
            record.boot = boot_id()?;
            record.stamp = Stamp::of(&lease.file).map_err(CacheError::Verify)?;
            write_record(&dir, &record)?;
            return Ok(Some(lease));
        }
        tracing::warn!(key = %key, "a cached image is damaged; it is made again");
        self.discard(key.as_str(), &self.lock()?)?;
        Ok(None)
    }

    /// Makes an image. Needs the key's lock.
    fn make(&self, key: &ImageKey, lowers: &Lowers) -> Result<Lease, CacheError> {
        let building = self.dir.join("building").join(key.as_str());
        let result = self.make_in(&building, key, lowers);
        if result.is_err() {
            // The error that matters is the first one.
            let _ = remove_tree(&building);
        }
        result
    }

    fn make_in(
        &self,
        building: &Path,
        key: &ImageKey,
        lowers: &Lowers,
    ) -> Result<Lease, CacheError> {
        let plan = Plan::new(lowers)?;
        remove_tree(building)?;
        fs::create_dir(building).map_err(failed("make the directory", building))?;
        let temporary = building.join(IMAGE);
        let out = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(failed("make", &temporary))?;
        let out = OwnedFd::from(out);
        self.make_room(&out, &temporary, plan.size())?;
        let written = plan.write(&out).map_err(|e| match e {
            ImageError::Write(e) if e.kind() == io::ErrorKind::StorageFull => {
                self.no_space(plan.size())
            }
            e => e.into(),
        })?;
        drop(out);

        let file = File::open(&temporary).map_err(failed("open", &temporary))?;
        lock::shared(&file, self.waits.rest)?;
        let stamp = Stamp::of(&file).map_err(CacheError::Verify)?;
        let record = Record::new(&written, stamp, boot_id()?);
        write_record(building, &record)?;
        let dir = self.dir.join("images").join(key.as_str());
        fs::rename(building, &dir).map_err(failed("put in place", &dir))?;
        Ok(Lease {
            path: dir.join(IMAGE),
            file,
            made: true,
        })
    }

    /// Removes other images for the budget, and more if the disk is full; reserves the space, so that no write fails
    /// later for want of it.
    fn make_room(&self, out: &OwnedFd, path: &Path, size: u64) -> Result<(), CacheError> {
        let lock = self.lock()?;
        let left = self.shrink_locked(self.budget.saturating_sub(size), &lock)?;
        if left.saturating_add(size) > self.budget {
            tracing::warn!(
                budget = self.budget,
                needed = left.saturating_add(size),
                "images in use exceed the cache's budget"
            );
        }
        loop {
            match rustix::fs::fallocate(out, FallocateFlags::empty(), 0, size) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP) => {
                    return rustix::fs::ftruncate(out, size)
                        .map_err(|e| failed("size", path)(e.into()));
                }
                Err(Errno::NOSPC | Errno::DQUOT) => {
                    let mut evicted = false;
                    for entry in self.entries()? {
                        if self.evict(&entry.key, &lock)? {
                            evicted = true;
                            break;
                        }
                    }
                    if !evicted {
                        return Err(self.no_space(size));
                    }
                }
                Err(e) => return Err(failed("reserve space for", path)(e.into())),
            }
        }
    }

    /// Makes the image of `key` survive a power failure without being read again. Not for the start path: it waits for
    /// the disk. An image that was never synced is hashed before its first use after a boot.
    pub fn sync(&self, key: &ImageKey) -> Result<(), CacheError> {
        let _lock = self.lock_key(key)?;
        let Some((lease, mut record)) = self.take(key)? else {
            return Ok(());
        };
        let stamp = Stamp::of(&lease.file).map_err(CacheError::Verify)?;
        if record.synced || stamp != record.stamp || record.boot != boot_id()? {
            return Ok(());
        }
        let dir = self.dir.join("images").join(key.as_str());
        lease.file.sync_all().map_err(failed("sync", &lease.path))?;
        record.synced = true;
        write_record(&dir, &record)?;
        for path in [dir.join(RECORD), dir, self.dir.join("images")] {
            File::open(&path)
                .and_then(|file| file.sync_all())
                .map_err(failed("sync", &path))?;
        }
        Ok(())
    }

    fn no_space(&self, needed: u64) -> CacheError {
        CacheError::NoSpace {
            needed,
            dir: self.dir.clone(),
        }
    }

    fn image_path(&self, key: &str) -> PathBuf {
        self.dir.join("images").join(key).join(IMAGE)
    }

    fn lock(&self) -> Result<Lock, CacheError> {
        Lock::take(&self.dir.join("lock"), self.waits.rest)
    }

    fn lock_key(&self, key: &ImageKey) -> Result<Lock, CacheError> {
        Lock::take(
            &self.dir.join("locks").join(key.as_str()),
            self.waits.making,
        )
    }
}

/// A lock file, locked.
#[derive(Debug)]
struct Lock {
    _file: File,
}

impl Lock {
    fn take(path: &Path, limit: Duration) -> Result<Lock, CacheError> {
        let end = Instant::now() + limit;
        loop {
            let file = Lock::open(path)?;
            lock::exclusive(&file, end.saturating_duration_since(Instant::now()))?;
            // A file that was removed meanwhile locks nothing.
            if is_still(&file, path) {
                return Ok(Lock { _file: file });
            }
        }
    }

    fn try_take(path: &Path) -> Result<Option<Lock>, CacheError> {
        let file = Lock::open(path)?;
        let taken = lock::try_exclusive(&file).map_err(failed("lock", path))?;
        Ok((taken && is_still(&file, path)).then_some(Lock { _file: file }))
    }

    fn open(path: &Path) -> Result<File, CacheError> {
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(failed("open", path))
    }
}

/// Whether `path` still names the open file.
fn is_still(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(open), Ok(named)) => (open.dev(), open.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

fn write_record(dir: &Path, record: &Record) -> Result<(), CacheError> {
    let (new, path) = (dir.join("record.new"), dir.join(RECORD));
    fs::write(&new, record.encode()).map_err(failed("write", &new))?;
    if record.synced {
        File::open(&new)
            .and_then(|file| file.sync_all())
            .map_err(failed("sync", &new))?;
    }
    fs::rename(&new, &path).map_err(failed("replace", &path))
}

fn remove_tree(path: &Path) -> Result<(), CacheError> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(e)),
        _ => Ok(()),
    }
}

fn touch(dir: &Path) -> io::Result<()> {
    let time = |nsec| Timespec {
        tv_sec: 0,
        tv_nsec: nsec,
    };
    let times = Timestamps {
        last_access: time(UTIME_OMIT),
        last_modification: time(UTIME_NOW),
    };
    let flags = rustix::fs::AtFlags::empty();
    rustix::fs::utimensat(rustix::fs::CWD, dir, &times, flags).map_err(io::Error::from)
}

fn boot_id() -> Result<[u8; 16], CacheError> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    let text = fs::read_to_string(PATH).map_err(failed("read", Path::new(PATH)))?;
    let hex: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    u128::from_str_radix(&hex, 16)
        .map(u128::to_be_bytes)
        .map_err(|e| failed("understand", Path::new(PATH))(io::Error::other(e)))
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CacheError + use<> {
    let path = path.to_owned();
    move |source| CacheError::File {
        action,
        path,
        source,
    }
}

#[cfg(test)]
mod tests;
