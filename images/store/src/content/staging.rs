//! Staging: a new entry is put together in a directory of its own on the store's file system, and becomes visible by one
//! rename.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::digest::{self, Scan};
use super::disk::Disk;
use super::{Content, WRITER_WAIT, WriteLock, lock};
use crate::error::Context;
use crate::{Digest, Error};

const OWNER: &str = "owner";

/// A staging directory. Dropping it throws away what is in it.
#[derive(Debug)]
pub(crate) struct StagingDir {
    content: Content,
    pub(crate) path: PathBuf,
    /// Locked for as long as this process works on it: one that nobody holds is garbage.
    _owner: File,
}

impl Content {
    /// Makes a staging directory, and removes what interrupted writers left.
    pub(crate) fn stage(&self, write_lock: &WriteLock) -> Result<StagingDir, Error> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        // Nobody looks for stale directories between the making of this one and its locking.
        self.sweep_staging(write_lock)?;
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = self
            .root
            .join("tmp")
            .join(format!("{}-{number}", std::process::id()));
        self.disk.create_dir(&path).context("making", &path)?;
        let owner = path.join(OWNER);
        let locked = self
            .disk
            .write_new(&owner, b"")
            .and_then(|()| File::open(&owner))
            .context("making", &owner)
            .and_then(|file| Ok(lock::exclusive(&file, WRITER_WAIT).map(|()| file)?));
        match locked {
            Ok(file) => Ok(StagingDir {
                content: self.clone(),
                path,
                _owner: file,
            }),
            Err(error) => {
                let _ = self.remove_tree(&path);
                Err(error)
            }
        }
    }

    /// Removes what interrupted writers left behind. Returns how many it was.
    pub(crate) fn sweep_staging(&self, _lock: &WriteLock) -> Result<u32, Error> {
        let tmp = self.root.join("tmp");
        let mut removed = 0;
        for entry in fs::read_dir(&tmp).context("reading", &tmp)? {
            let entry = entry.context("reading", &tmp)?;
            let path = entry.path();
            // By what the listing says: an owner may end its own at any moment.
            let kind = match entry.file_type() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => other.context("looking at", &path)?,
            };
            if !kind.is_dir() {
                self.disk.remove_file(&path).context("removing", &path)?;
                removed += 1;
                continue;
            }
            let abandoned = match File::open(path.join(OWNER)) {
                Ok(file) => lock::try_exclusive(&file).context("locking", &path)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => true,
                Err(error) => return Err(error).context("opening", &path),
            };
            if abandoned {
                self.remove_tree(&path)?;
                removed += 1;
            }
        }
        Ok(removed)
    }
}

impl StagingDir {
    /// Makes a file in it, for a program that is handed descriptors, not paths.
    pub(crate) fn create(&self, name: &str) -> Result<File, Error> {
        let path = self.path.join(name);
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .context("making", &path)
    }

    /// Digests a file of it and sees that it is on the disk; none if there is no such file. Zero pages become holes.
    pub(crate) fn finish_object(&self, name: &str) -> Result<Option<(File, Scan)>, Error> {
        let finished = self.finish_content(name)?;
        if finished.is_some() {
            let path = self.path.join(name);
            self.disk().sync_file(&path).context("syncing", &path)?;
        }
        Ok(finished)
    }

    /// The same for a file that need not be on the disk.
    pub(crate) fn finish_content(&self, name: &str) -> Result<Option<(File, Scan)>, Error> {
        let disk = self.disk();
        let path = self.path.join(name);
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.context("opening", &path)?,
        };
        let scan = digest::scan(&file, &mut |zeros| {
            disk.punch_hole(&file, zeros.offset, zeros.length)
        })
        .context("reading", &path)?;
        disk.seal(&path).context("sealing", &path)?;
        Ok(Some((file, scan)))
    }

    pub(crate) fn content(&self) -> &Content {
        &self.content
    }

    pub(crate) fn disk(&self) -> &dyn Disk {
        self.content.disk.as_ref()
    }

    /// Writes a small file that is to enter the store, and sees that it is on the disk. It takes the place of an earlier one.
    pub(crate) fn finish_file(&self, name: &str, bytes: &[u8]) -> Result<PathBuf, Error> {
        let disk = &self.content.disk;
        let path = self.path.join(name);
        self.content.remove_if_there(&path)?;
        disk.write_new(&path, bytes).context("writing", &path)?;
        disk.sync_file(&path).context("syncing", &path)?;
        disk.seal(&path).context("sealing", &path)?;
        Ok(path)
    }

    /// Moves an object into place. An object that is there already is replaced: it might be damaged, this one is not.
    pub(crate) fn enter_object(
        &self,
        name: &str,
        digest: &Digest,
        _lock: &WriteLock,
    ) -> Result<(), Error> {
        self.enter_below(
            "objects",
            &self.path.join(name),
            &self.content.object_path(digest),
        )
    }

    /// The same for the pack of a packed object.
    pub(crate) fn enter_pack(
        &self,
        name: &str,
        digest: &Digest,
        _lock: &WriteLock,
    ) -> Result<(), Error> {
        self.enter_below(
            "packs",
            &self.pack_of(name),
            &self.content.pack_path(digest),
        )
    }

    /// Gives a file its place in a directory below one of the root's.
    fn enter_below(&self, all: &str, from: &Path, target: &Path) -> Result<(), Error> {
        let all = self.content.root.join(all);
        let dir = target.parent().unwrap_or(&all);
        if !dir.is_dir() {
            self.content.ensure_dir(dir)?;
            self.disk().sync_dir(&all).context("syncing", &all)?;
        }
        self.enter(from, target)
    }

    /// Gives a file its place in the store; it is on the disk there when this comes back.
    pub(crate) fn enter(&self, from: &Path, target: &Path) -> Result<(), Error> {
        let disk = &self.content.disk;
        disk.rename(from, target).context("entering", target)?;
        let dir = target.parent().unwrap_or(&self.content.root);
        disk.sync_dir(dir).context("syncing", dir)
    }
}

impl Drop for StagingDir {
    fn drop(&mut self) {
        // What cannot be removed now is swept up by the next writer.
        let _ = self.content.remove_tree(&self.path);
    }
}
