//! Packed objects: compressed on the disk, and rebuilt into flat files that can be mapped.
//!
//! A flat file is a cache. It is not synced: a power cut can leave one that has its length and none of its content. So
//! each boot has a directory of its own for them, and those of other boots are removed before they can be mistaken for good.
//!
//! A pack can refer to other memories, its *parents*. Who opens it says which ones it may refer to; they are rebuilt
//! first.

mod flat;
mod write;

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kiln_packs::{PAGE, Pack, Source, rebuild_flat};

use super::digest::{self, Scan};
use super::{Content, lock};
use crate::error::Context;
use crate::{Digest, Error};

use flat::open_flat;
pub(crate) use write::Packing;

/// Longest wait for other processes that rebuild the same object and its parents. That takes a second for each GiB, on
/// a busy machine some times that.
const REBUILD_WAIT: Duration = Duration::from_secs(60);

/// Stands in the name of a file that is being rebuilt, after the object's name.
const UNFINISHED: &str = ".new-";

/// A memory, by its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    pub(crate) object: Digest,
    pub(crate) length: u64,
}

impl Content {
    pub(crate) fn pack_path(&self, object: &Digest) -> PathBuf {
        let name = object.to_string();
        self.root.join("packs").join(&name[..2]).join(name)
    }

    /// Where the flat file of a packed object is, if this boot has one.
    pub(crate) fn flat_path(&self, object: &Digest) -> Result<PathBuf, Error> {
        Ok(self.boot_dir()?.join(object.to_string()))
    }

    /// The flat file of a packed object. It is rebuilt if this boot has none; several processes that need it at once wait
    /// for the one that does. None if there is no pack. `parents` are the memories that the pack may refer to.
    pub(crate) fn open_packed(
        &self,
        memory: Memory,
        parents: &[Memory],
    ) -> Result<Option<File>, Error> {
        self.open_packed_until(memory, parents, Instant::now() + REBUILD_WAIT)
    }

    fn open_packed_until(
        &self,
        memory: Memory,
        parents: &[Memory],
        end: Instant,
    ) -> Result<Option<File>, Error> {
        let path = self.flat_path(&memory.object)?;
        if let Some(file) = open_flat(&path, memory.length)? {
            return Ok(Some(file));
        }
        let Some(file) = self.lock_pack(&memory.object, end)? else {
            return Ok(None);
        };
        // The previous holder of the lock may have rebuilt it.
        if let Some(file) = open_flat(&path, memory.length)? {
            return Ok(Some(file));
        }
        let _span = tracing::info_span!("memory-rebuild").entered();
        let pack = OpenPack::open(memory.object, file)?;
        // The pack stays locked meanwhile, so that all who need this memory wait for one process. That process waits for
        // parents' packs, and who holds one of those waits for none: a parent's parents are none.
        let parents = pack.open_parents(parents, &mut |parent| self.open_parent(parent, end))?;
        self.rebuild(&pack, &parents, &path).map(Some)
    }

    /// The flat memory of a parent.
    fn open_parent(&self, parent: Memory, end: Instant) -> Result<File, Error> {
        if let Some(file) = self.open_packed_until(parent, &[], end)? {
            return Ok(file);
        }
        let path = self.object_path(&parent.object);
        File::open(&path).context("opening", &path)
    }

    fn lock_pack(&self, object: &Digest, end: Instant) -> Result<Option<File>, Error> {
        let path = self.pack_path(object);
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
    fn rebuild(
        &self,
        pack: &OpenPack,
        parents: &[(Memory, File)],
        target: &Path,
    ) -> Result<File, Error> {
        let made = self.rebuild_into(pack, parents, target);
        made.map_err(|error| match error {
            error if is_full(&error) => self.no_room(pack),
            error @ (Error::Pack { .. } | Error::OtherContent(_)) => {
                self.name_changed_parent(pack, parents).unwrap_or(error)
            }
            error => error,
        })
    }

    fn rebuild_into(
        &self,
        pack: &OpenPack,
        parents: &[(Memory, File)],
        target: &Path,
    ) -> Result<File, Error> {
        self.sweep_other_boots()?;
        let fresh = {
            let dir = self.lock_boot_dir()?;
            let spared: Vec<Digest> = parents.iter().map(|(memory, _)| memory.object).collect();
            if !dir.make_room(&pack.object, &spared, pack.data(), true)? {
                return Err(self.no_room(pack));
            }
            dir.begin(&pack.object)?
        };
        fresh.fill(pack, parents)?;
        let scan = digest::of_file(&fresh.file).context("reading", &fresh.path)?;
        if scan.digest != pack.object {
            return Err(Error::OtherContent(pack.object));
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

    /// If it is a parent's flat file that is not what it was, the pack is not to blame: the file goes, and is rebuilt when
    /// it is needed again.
    fn name_changed_parent(&self, pack: &OpenPack, parents: &[(Memory, File)]) -> Option<Error> {
        let changed = parents.iter().find(|(memory, file)| {
            digest::of_file(file).is_ok_and(|scan| scan.digest != memory.object)
        });
        let parent = changed?.0.object;
        let _ = self.drop_wrong_flat(&parent);
        Some(Error::ChangedParent {
            object: pack.object,
            parent,
        })
    }

    fn no_room(&self, pack: &OpenPack) -> Error {
        Error::NoRoomToRebuild {
            object: pack.object,
            needed: pack.data(),
            root: self.root.clone(),
        }
    }

    /// Reads all of a pack, and tells what it gives, which is in the file that nobody else finds; none if there is no such
    /// pack. `open` opens parents, of those that the pack may refer to.
    pub(crate) fn scan_pack(
        &self,
        object: &Digest,
        parents: &[Memory],
        open: &mut dyn FnMut(Memory) -> Result<File, Error>,
    ) -> Result<Option<(Scan, File)>, Error> {
        let path = self.pack_path(object);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.context("opening", &path)?,
        };
        let pack = OpenPack::open(*object, file)?;
        let parents = pack.open_parents(parents, open)?;
        let fresh = self.lock_boot_dir()?.begin(object)?;
        // Nobody is to find it.
        self.remove_if_there(&fresh.path)?;
        fresh.fill(&pack, &parents).map_err(|error| {
            if is_full(&error) {
                self.no_room(&pack)
            } else {
                error
            }
        })?;
        let scan = digest::of_file(&fresh.file).context("reading", &fresh.path)?;
        Ok(Some((scan, fresh.keep().context("opening", &path)?)))
    }

    /// The memory of a pack without parents, in a file that nobody else finds, or the object that lies there as it is.
    pub(crate) fn open_once(&self, memory: Memory) -> Result<File, Error> {
        let mut none = |parent: Memory| {
            Err(Error::OtherParent {
                object: memory.object,
                parent: parent.object,
            })
        };
        if let Some((_, file)) = self.scan_pack(&memory.object, &[], &mut none)? {
            return Ok(file);
        }
        let path = self.object_path(&memory.object);
        File::open(&path).context("opening", &path)
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
}

/// A pack, open.
struct OpenPack {
    /// What it is the pack of.
    object: Digest,
    pack: Pack,
    file: File,
}

impl OpenPack {
    fn open(object: Digest, file: File) -> Result<OpenPack, Error> {
        let pack = Pack::open(&file).map_err(|source| Error::Pack {
            object,
            source: io::Error::other(source),
        })?;
        Ok(OpenPack { object, pack, file })
    }

    /// Opens the pack's parents, in its order, if all are among those that it may refer to.
    fn open_parents(
        &self,
        allowed: &[Memory],
        open: &mut dyn FnMut(Memory) -> Result<File, Error>,
    ) -> Result<Vec<(Memory, File)>, Error> {
        let parents = self.pack.parents().iter().map(|origin| {
            let parent = Memory {
                object: origin.id.into(),
                length: origin.length,
            };
            if !allowed.contains(&parent) {
                return Err(Error::OtherParent {
                    object: self.object,
                    parent: parent.object,
                });
            }
            open(parent)
                .map(|file| (parent, file))
                .map_err(|error| self.of_parent(parent.object, error))
        });
        parents.collect()
    }

    /// What keeps a parent from being opened: as it is if it passes, with this pack's name if it does not.
    fn of_parent(&self, parent: Digest, error: Error) -> Error {
        match error {
            Error::NoRoomToRebuild { .. } | Error::Rebuilding { .. } | Error::Lock(_) => error,
            source => Error::Parent {
                object: self.object,
                parent,
                source: Box::new(source),
            },
        }
    }

    /// Writes the flat memory.
    fn unpack(&self, parents: &[&dyn kiln_packs::Content], out: &File) -> io::Result<()> {
        rebuild_flat(&self.pack, &self.file, parents, &[], out).map_err(io::Error::other)
    }

    /// Bytes that the flat file takes on the disk.
    fn data(&self) -> u64 {
        let runs = self.pack.runs().iter();
        let data = runs.filter(|run| run.source != Source::Zero);
        data.map(|run| u64::from(run.pages) * PAGE as u64).sum()
    }
}

/// Whether the disk, or a quota on it, is full, as the last of the causes says.
fn is_full(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
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
