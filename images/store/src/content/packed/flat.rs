//! The directory of flat files: one for each start of the machine, with a budget of its own.

use std::fs::{self, File, FileTimes, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::SystemTime;

use super::{Memory, OpenPack, REBUILD_WAIT, UNFINISHED};
use crate::content::{Content, WriteLock, boot, lock};
use crate::error::Context;
use crate::{Digest, Error};

impl Content {
    pub(super) fn boot_dir(&self) -> Result<PathBuf, Error> {
        Ok(self.flat_root().join(boot::id()?))
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
        dir.make_room(object, &[], bytes, false)?;
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

    pub(super) fn sweep_other_boots(&self) -> Result<(), Error> {
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
    pub(super) fn lock_boot_dir(&self) -> Result<BootDir<'_>, Error> {
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

/// This boot's directory of flat files, locked.
pub(super) struct BootDir<'a> {
    content: &'a Content,
    path: PathBuf,
    _lock: File,
}

impl<'a> BootDir<'a> {
    /// Begins a flat file that nobody takes for garbage as long as this process works on it.
    pub(super) fn begin(&self, object: &Digest) -> Result<Unfinished<'a>, Error> {
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

    /// Makes room for a file of so many bytes: other objects' flat files go, the least recently used first, but for those
    /// to spare. Who has one mapped keeps it. The budget bends rather than let a pod fail; the result tells whether the
    /// disk has room, if that is asked.
    pub(super) fn make_room(
        &self,
        object: &Digest,
        spared: &[Digest],
        needed: u64,
        on_disk: bool,
    ) -> Result<bool, Error> {
        let content = self.content;
        let budget = content.flat_budget()?;
        let mut files = flat_files(&self.path)?;
        files.retain(|file| file.object != Some(*object));
        let mut used: u64 = files.iter().map(|file| file.bytes).sum();
        files.sort_by(|a, b| (a.used_at, &a.path).cmp(&(b.used_at, &b.path)));
        let goes = |object: &Digest| !spared.contains(object);
        let mut files = files
            .iter()
            .filter(|file| file.object.as_ref().is_some_and(goes));
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
pub(super) struct Unfinished<'a> {
    content: &'a Content,
    pub(super) path: PathBuf,
    /// Locked.
    pub(super) file: File,
}

impl Unfinished<'_> {
    pub(super) fn fill(&self, from: &OpenPack, parents: &[(Memory, File)]) -> Result<(), Error> {
        let parents: Vec<&dyn kiln_packs::Content> =
            parents.iter().map(|(_, file)| file as _).collect();
        let filled = self
            .content
            .disk
            .fill(&self.file, &mut |out| from.unpack(&parents, out));
        filled.map_err(|source| Error::Pack {
            object: from.object,
            source,
        })
    }

    /// The file, which is to have no name.
    pub(super) fn keep(self) -> io::Result<File> {
        self.file.try_clone()
    }
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        // What cannot be removed now is swept up by the next one.
        let _ = self.content.remove_if_there(&self.path);
    }
}

/// A file in the directory of flat files.
pub(super) struct FlatFile {
    pub(super) path: PathBuf,
    /// None if it is unfinished.
    pub(super) object: Option<Digest>,
    bytes: u64,
    used_at: (i64, i64),
}

pub(super) fn flat_files(dir: &Path) -> Result<Vec<FlatFile>, Error> {
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
pub(super) fn open_flat(path: &Path, length: u64) -> Result<Option<File>, Error> {
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

fn free_bytes(dir: &Path) -> Result<u64, Error> {
    let stat = rustix::fs::statvfs(dir)
        .map_err(io::Error::from)
        .context("asking for the free space of", dir)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
