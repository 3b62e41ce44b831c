//! Packed objects: compressed on the disk, and rebuilt into flat files that can be mapped.
//!
//! A flat file is a cache. It is not synced: a power cut can leave one that has its length and none of its content. So
//! each boot has a directory of its own for them, and those of other boots are removed before they can be mistaken for good.

use std::fs::{self, File, FileTimes, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime};

use kiln_packs::{PAGE, Pack, Source, Writer, rebuild_flat};

use super::digest::{self, Scan};
use super::staging::StagingDir;
use super::{Content, WriteLock, boot, lock};
use crate::error::Context;
use crate::{Digest, Error};

/// Longest wait for another process that rebuilds the same object. That takes a second for each GiB, on a busy machine
/// some times that.
const REBUILD_WAIT: Duration = Duration::from_secs(60);

/// Stands in the name of a file that is being rebuilt, after the object's name.
const UNFINISHED: &str = ".new-";

impl Content {
    pub(crate) fn pack_path(&self, object: &Digest) -> PathBuf {
        let name = object.to_string();
        self.root.join("packs").join(&name[..2]).join(name)
    }

    /// Where the flat file of a packed object is, if this boot has one.
    pub(crate) fn flat_path(&self, object: &Digest) -> Result<PathBuf, Error> {
        Ok(self.boot_dir()?.join(object.to_string()))
    }

    fn boot_dir(&self) -> Result<PathBuf, Error> {
        Ok(self.flat_root().join(boot::id()?))
    }

    /// The flat file of a packed object. It is rebuilt if this boot has none; several processes that need it at once wait
    /// for the one that does. None if there is no pack.
    pub(crate) fn open_packed(&self, object: &Digest, length: u64) -> Result<Option<File>, Error> {
        self.open_packed_within(object, length, REBUILD_WAIT)
    }

    fn open_packed_within(
        &self,
        object: &Digest,
        length: u64,
        limit: Duration,
    ) -> Result<Option<File>, Error> {
        let path = self.flat_path(object)?;
        if let Some(file) = open_flat(&path, length)? {
            return Ok(Some(file));
        }
        let Some(pack) = self.lock_pack(object, limit)? else {
            return Ok(None);
        };
        // The previous holder of the lock may have rebuilt it.
        if let Some(file) = open_flat(&path, length)? {
            return Ok(Some(file));
        }
        let _span = tracing::info_span!("memory-rebuild").entered();
        self.rebuild(object, &pack, &path).map(Some)
    }

    fn lock_pack(&self, object: &Digest, limit: Duration) -> Result<Option<File>, Error> {
        let path = self.pack_path(object);
        let end = Instant::now() + limit;
        loop {
            let file = match File::open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                other => other.context("opening", &path)?,
            };
            let left = end.saturating_duration_since(Instant::now());
            lock::exclusive(&file, left).map_err(|source| Error::Rebuilding {
                object: *object,
                source,
            })?;
            // A bake may have replaced it meanwhile, perhaps because it was damaged.
            if file.metadata().context("reading", &path)?.nlink() > 0 {
                return Ok(Some(file));
            }
        }
    }

    /// Makes the flat file. Needs the pack's lock.
    fn rebuild(&self, object: &Digest, file: &File, target: &Path) -> Result<File, Error> {
        let damaged = |source| Error::Pack {
            object: *object,
            source: io::Error::other(source),
        };
        let pack = Pack::open(file).map_err(damaged)?;
        let needed = data_of(&pack);
        let made = self.rebuild_into(object, &pack, file, needed, target);
        made.map_err(|error| {
            if is_full(&error) {
                self.no_room(object, needed)
            } else {
                error
            }
        })
    }

    fn rebuild_into(
        &self,
        object: &Digest,
        pack: &Pack,
        file: &File,
        needed: u64,
        target: &Path,
    ) -> Result<File, Error> {
        self.sweep_other_boots()?;
        let fresh = {
            let dir = self.lock_boot_dir()?;
            if !dir.make_room(object, needed, true)? {
                return Err(self.no_room(object, needed));
            }
            dir.begin(object)?
        };
        fresh.fill(object, pack, file)?;
        let scan = digest::of_file(&fresh.file).context("reading", &fresh.path)?;
        if scan.digest != *object {
            return Err(Error::OtherContent(*object));
        }
        self.disk
            .seal(&fresh.path)
            .context("sealing", &fresh.path)?;
        // Opened under this name: under the other one it may be evicted at once.
        let reader = File::open(&fresh.path).context("opening", &fresh.path)?;
        self.disk
            .rename(&fresh.path, target)
            .context("entering", target)?;
        Ok(reader)
    }

    fn no_room(&self, object: &Digest, needed: u64) -> Error {
        Error::NoRoomToRebuild {
            object: *object,
            needed,
            root: self.root.clone(),
        }
    }

    /// Reads all of a pack, and tells what it gives; none if there is no such pack.
    pub(crate) fn scan_pack(&self, object: &Digest) -> Result<Option<Scan>, Error> {
        let path = self.pack_path(object);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.context("opening", &path)?,
        };
        let damaged = |source| Error::Pack {
            object: *object,
            source: io::Error::other(source),
        };
        let pack = Pack::open(&file).map_err(damaged)?;
        let fresh = self.lock_boot_dir()?.begin(object)?;
        // Nobody is to find it.
        self.remove_if_there(&fresh.path)?;
        fresh.fill(object, &pack, &file).map_err(|error| {
            if is_full(&error) {
                self.no_room(object, data_of(&pack))
            } else {
                error
            }
        })?;
        digest::of_file(&fresh.file)
            .context("reading", &fresh.path)
            .map(Some)
    }

    /// Removes this boot's flat file of an object if it is not the object; says whether it was another. None there is good.
    pub(crate) fn drop_wrong_flat(&self, object: &Digest) -> Result<bool, Error> {
        let path = self.flat_path(object)?;
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            other => other.context("opening", &path)?,
        };
        if digest::of_file(&file).context("reading", &path)?.digest == *object {
            return Ok(false);
        }
        self.remove_if_there(&path)
    }

    /// Makes a file of a staging directory the flat file of an object. What is there already is replaced.
    pub(crate) fn enter_flat(
        &self,
        from: &Path,
        object: &Digest,
        _lock: &WriteLock,
    ) -> Result<(), Error> {
        let dir = self.lock_boot_dir()?;
        let bytes = fs::metadata(from).context("reading", from)?.blocks() * 512;
        dir.make_room(object, bytes, false)?;
        let target = dir.path.join(object.to_string());
        self.disk.rename(from, &target).context("entering", &target)
    }

    /// Removes flat files that no entry needs.
    pub(crate) fn sweep_flat(&self, is_needed: &dyn Fn(&Digest) -> bool) -> Result<(), Error> {
        for file in flat_files(&self.boot_dir()?)? {
            if file.object.is_some_and(|object| !is_needed(&object)) {
                self.remove_if_there(&file.path)?;
            }
        }
        Ok(())
    }

    /// Removes what rebuilds that were killed left, and all flat files of other boots.
    pub(crate) fn sweep_stale_flat(&self, _lock: &WriteLock) -> Result<(), Error> {
        self.sweep_other_boots()?;
        self.lock_boot_dir().map(drop)
    }

    fn sweep_other_boots(&self) -> Result<(), Error> {
        let (all, this) = (self.flat_root(), boot::id()?);
        let entries = match fs::read_dir(&all) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.context("reading", &all)?,
        };
        for entry in entries {
            let entry = entry.context("reading", &all)?;
            if entry.file_name() == this {
                continue;
            }
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                self.remove_tree(&entry.path())?;
            } else {
                self.remove_if_there(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Locks the directory of this boot's flat files, for as short a time as it takes to make room and a file. What
    /// rebuilds left that were killed goes.
    fn lock_boot_dir(&self) -> Result<BootDir<'_>, Error> {
        let path = self.boot_dir()?;
        self.ensure_dir(&self.flat_root())?;
        self.ensure_dir(&path)?;
        let lock = File::open(&path).context("opening", &path)?;
        lock::exclusive(&lock, REBUILD_WAIT)?;
        let dir = BootDir {
            content: self,
            path,
            _lock: lock,
        };
        dir.sweep_unfinished()?;
        Ok(dir)
    }
}

impl StagingDir {
    /// Digests a file of it, and makes the pack of it, which is on the disk afterwards; the file itself need not be. None
    /// if there is no such file. `first` are the pages that are needed first.
    pub(crate) fn finish_packed(&self, name: &str, first: &[u32]) -> Result<Option<Scan>, Error> {
        let Some((file, scan)) = self.finish_content(name)? else {
            return Ok(None);
        };
        let (disk, path) = (self.disk(), self.pack_of(name));
        disk.write_new(&path, b"").context("making", &path)?;
        let pack = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .context("opening", &path)?;
        let writer = Writer::new(&file).working_set(first);
        disk.fill(&pack, &mut |out| {
            writer.write(out).map(drop).map_err(io::Error::other)
        })
        .context("packing", &self.path.join(name))?;
        disk.sync_file(&path).context("syncing", &path)?;
        disk.seal(&path).context("sealing", &path)?;
        Ok(Some(scan))
    }

    /// Where the pack of a file of it is.
    pub(crate) fn pack_of(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.pack"))
    }
}

/// This boot's directory of flat files, locked.
struct BootDir<'a> {
    content: &'a Content,
    path: PathBuf,
    _lock: File,
}

impl<'a> BootDir<'a> {
    /// Begins a flat file that nobody takes for garbage as long as this process works on it.
    fn begin(&self, object: &Digest) -> Result<Unfinished<'a>, Error> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        loop {
            let number = COUNTER.fetch_add(1, Ordering::Relaxed);
            let name = format!("{object}{UNFINISHED}{}-{number}", std::process::id());
            let path = self.path.join(name);
            match self.content.disk.write_new(&path, b"") {
                // Of a process with the same number in another container.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                made => return self.hold(path, made),
            }
        }
    }

    fn hold(&self, path: PathBuf, made: io::Result<()>) -> Result<Unfinished<'a>, Error> {
        let open = || OpenOptions::new().read(true).write(true).open(&path);
        let opened = made.and_then(|()| open()).context("making", &path);
        match opened.and_then(|file| Ok(lock::exclusive(&file, REBUILD_WAIT).map(|()| file)?)) {
            Ok(file) => Ok(Unfinished {
                content: self.content,
                path,
                file,
            }),
            Err(error) => {
                let _ = self.content.remove_if_there(&path);
                Err(error)
            }
        }
    }

    /// Removes what nobody works on any more.
    fn sweep_unfinished(&self) -> Result<(), Error> {
        for file in flat_files(&self.path)? {
            if file.object.is_some() {
                continue;
            }
            let abandoned = match File::open(&file.path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => lock::try_exclusive(&other.context("opening", &file.path)?)
                    .context("locking", &file.path)?,
            };
            if abandoned {
                self.content.remove_if_there(&file.path)?;
            }
        }
        Ok(())
    }

    /// Makes room for a file of so many bytes: other objects' flat files go, the least recently used first. Who has one
    /// mapped keeps it. The budget bends rather than let a pod fail; the result tells whether the disk has room, if that
    /// is asked.
    fn make_room(&self, object: &Digest, needed: u64, on_disk: bool) -> Result<bool, Error> {
        let content = self.content;
        let budget = content.flat_budget()?;
        let mut files = flat_files(&self.path)?;
        files.retain(|file| file.object != Some(*object));
        let mut used: u64 = files.iter().map(|file| file.bytes).sum();
        files.sort_by(|a, b| (a.used_at, &a.path).cmp(&(b.used_at, &b.path)));
        let mut files = files.iter().filter(|file| file.object.is_some());
        loop {
            let fits = budget.is_none_or(|budget| used.saturating_add(needed) <= budget);
            let there = !on_disk || free_bytes(&self.path)? >= needed;
            if fits && there {
                return Ok(true);
            }
            let Some(file) = files.next() else {
                if !fits {
                    tracing::warn!(
                        budget,
                        needed,
                        "a rebuilt memory exceeds the budget of flat files"
                    );
                }
                return Ok(there);
            };
            content.remove_if_there(&file.path)?;
            used -= file.bytes;
            tracing::info!(path = %file.path.display(), "evicted a flat file, to make room");
        }
    }
}

/// A flat file in the making. Dropping it throws it away, unless it was renamed.
struct Unfinished<'a> {
    content: &'a Content,
    path: PathBuf,
    /// Locked.
    file: File,
}

impl Unfinished<'_> {
    fn fill(&self, object: &Digest, pack: &Pack, from: &File) -> Result<(), Error> {
        let filled = self.content.disk.fill(&self.file, &mut |out| {
            rebuild_flat(pack, from, &[], &[], out).map_err(io::Error::other)
        });
        filled.map_err(|source| Error::Pack {
            object: *object,
            source,
        })
    }
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        // What cannot be removed now is swept up by the next one.
        let _ = self.content.remove_if_there(&self.path);
    }
}

/// A file in the directory of flat files.
struct FlatFile {
    path: PathBuf,
    /// None if it is unfinished.
    object: Option<Digest>,
    bytes: u64,
    used_at: (i64, i64),
}

fn flat_files(dir: &Path) -> Result<Vec<FlatFile>, Error> {
    let mut files = Vec::new();
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(files),
        other => other.context("reading", dir)?,
    };
    for entry in entries {
        let entry = entry.context("reading", dir)?;
        let meta = match entry.metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other.context("reading", &entry.path())?,
        };
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let object = name.parse().ok();
        // What somebody else put here stays.
        if object.is_none() && !name.contains(UNFINISHED) {
            continue;
        }
        files.push(FlatFile {
            path: entry.path(),
            object,
            bytes: meta.blocks() * 512,
            used_at: (meta.mtime(), meta.mtime_nsec()),
        });
    }
    Ok(files)
}

/// Opens a flat file, and notes its use; none if there is none of this length.
fn open_flat(path: &Path, length: u64) -> Result<Option<File>, Error> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.context("opening", path)?,
    };
    if file.metadata().context("reading", path)?.len() != length {
        return Ok(None);
    }
    // A hint for eviction; a read-only store does without.
    let _ = file.set_times(FileTimes::new().set_modified(SystemTime::now()));
    Ok(Some(file))
}

/// Bytes that the flat file of a pack takes on the disk.
fn data_of(pack: &Pack) -> u64 {
    let data = pack.runs().iter().filter(|run| run.source != Source::Zero);
    data.map(|run| u64::from(run.pages) * PAGE as u64).sum()
}

fn free_bytes(dir: &Path) -> Result<u64, Error> {
    let stat = rustix::fs::statvfs(dir)
        .map_err(io::Error::from)
        .context("asking for the free space of", dir)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Whether the disk, or a quota on it, is full, as the last of the causes says.
fn is_full(error: &Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>()
            && matches!(
                error.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            )
        {
            return true;
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod tests;
