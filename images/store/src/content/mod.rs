//! The store's files, the ground on which every catalogue stands: the writers' lock, objects named by their content,
//! staging directories, leases, the budget, and collection. Nothing here knows the purpose of a file.

pub(crate) mod boot;
pub(crate) mod catalogue;
pub(crate) mod collect;
pub(crate) mod digest;
pub(crate) mod disk;
pub(crate) mod lease;
pub mod lock;
pub(crate) mod objects;
pub(crate) mod packed;
pub(crate) mod room;
pub(crate) mod staging;
pub(crate) mod verify;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::Error;
use crate::error::Context;
use disk::Disk;

const FORMAT: &str = "kiln-store 3";

/// How long a writer waits for another one, which may be removing gigabytes. No pod waits for it, and a bake
/// that gives up has been for nothing.
pub(crate) const WRITER_WAIT: Duration = Duration::from_secs(120);

/// The files of a store.
#[derive(Debug, Clone)]
pub(crate) struct Content {
    pub(crate) root: PathBuf,
    pub(crate) disk: Arc<dyn Disk>,
}

/// Held while the store is changed. Dropping it lets the next writer in.
#[derive(Debug)]
pub(crate) struct WriteLock {
    _file: File,
}

impl Content {
    pub(crate) fn at(root: PathBuf, disk: Arc<dyn Disk>) -> Content {
        Content { root, disk }
    }

    pub(crate) fn check_format(&self) -> Result<(), Error> {
        let path = self.root.join("format");
        let found = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::NoStore(self.root.clone()));
            }
            Err(error) => return Err(error).context("reading", &path),
        };
        if found.trim_end() == FORMAT {
            return Ok(());
        }
        let found = found
            .lines()
            .next()
            .unwrap_or_default()
            .chars()
            .take(40)
            .collect();
        Err(Error::Format {
            path: self.root.clone(),
            found,
            wanted: FORMAT,
        })
    }

    /// Makes the layout. The format file comes last: without it there is no store, and the next
    /// call starts over.
    pub(crate) fn create(&self, directories: &[&str]) -> Result<(), Error> {
        if let Some(parent) = self.root.parent() {
            fs::create_dir_all(parent).context("making", parent)?;
        }
        self.ensure_dir(&self.root)?;
        let lock = self.write_lock(WRITER_WAIT)?;
        for name in ["objects", "packs", "flat", "tmp"]
            .iter()
            .chain(directories)
        {
            self.ensure_dir(&self.root.join(name))?;
        }
        self.replace_file("format", format!("{FORMAT}\n").as_bytes(), &lock)
    }

    pub(crate) fn ensure_dir(&self, path: &Path) -> Result<(), Error> {
        match self.disk.create_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
            other => other.context("making", path),
        }
    }

    /// Gives a file of the root directory new content, all of it or nothing.
    pub(crate) fn replace_file(
        &self,
        name: &str,
        content: &[u8],
        _lock: &WriteLock,
    ) -> Result<(), Error> {
        let target = self.root.join(name);
        let fresh = self.root.join("tmp").join(format!("{name}.new"));
        self.remove_if_there(&fresh)?;
        self.disk
            .write_new(&fresh, content)
            .context("writing", &fresh)?;
        self.disk.sync_file(&fresh).context("syncing", &fresh)?;
        self.disk
            .rename(&fresh, &target)
            .context("writing", &target)?;
        self.disk
            .sync_dir(&self.root)
            .context("syncing", &self.root)
    }

    /// Removes a file; says whether there was one.
    pub(crate) fn remove_if_there(&self, path: &Path) -> Result<bool, Error> {
        match self.disk.remove_file(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            other => other.context("removing", path).map(|()| true),
        }
    }

    /// Removes a directory with all there is in it. Somebody else may do the same at this moment, so what is gone is no
    /// error.
    pub(crate) fn remove_tree(&self, dir: &Path) -> Result<(), Error> {
        let entries = match fs::read_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.context("reading", dir)?,
        };
        for entry in entries {
            let entry = entry.context("reading", dir)?;
            let path = entry.path();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                self.remove_tree(&path)?;
            } else {
                self.remove_if_there(&path)?;
            }
        }
        match self.disk.remove_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.context("removing", dir),
        }
    }

    /// Waits until no other program changes the store, but not for one that hangs.
    pub(crate) fn write_lock(&self, limit: Duration) -> Result<WriteLock, Error> {
        let file = self.lock_file()?;
        lock::exclusive(&file, limit)?;
        Ok(WriteLock { _file: file })
    }

    /// The same without waiting: none while another program changes the store.
    pub(crate) fn try_write_lock(&self) -> Result<Option<WriteLock>, Error> {
        let file = self.lock_file()?;
        let taken = lock::try_exclusive(&file).context("locking", &self.root.join("lock"))?;
        Ok(taken.then_some(WriteLock { _file: file }))
    }

    fn lock_file(&self) -> Result<File, Error> {
        let path = self.root.join("lock");
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .context("opening", &path)
    }
}
