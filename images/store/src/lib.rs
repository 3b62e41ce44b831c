//! Where baked μVMs are kept: a directory of plain files, addressed by content.
//!
//! A μVM is a manifest and the objects it names: its state, its memory, the pages it touches
//! first. Readers need no daemon and no index: a shim opens a manifest, holds it by a [`Lease`],
//! and maps the memory file. Writers are rare (`kiln bake`, `kiln gc`) and take turns by a lock
//! file. Whatever interrupts a writer, a kill, a full disk or a power cut, leaves a store in which
//! every μVM that is listed is whole.
//!
//! This crate trusts the store's directory to be writable by root alone, and nothing that is in it
//! to be undamaged: `verify` finds out. `docs/store.md` has the layout.

#![deny(missing_docs)]

mod collect;
mod digest;
mod disk;
mod error;
mod host;
mod lease;
pub mod lock;
mod manifest;
pub mod private;
mod staging;
mod verify;
mod working_set;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use collect::{Collected, Policy, Removed, Why};
pub use digest::{CHUNK, Digest, NotADigest, Scan, of_file};
pub use error::Error;
pub use host::{Host, Mismatch, Miss};
pub use lease::Lease;
pub use manifest::{
    Class, Cpu, Description, Kernel, Kind, Manifest, ManifestError, Object, VERSION,
};
pub use staging::Staging;
pub use verify::{Damage, Verified};
pub use working_set::WorkingSet;

use disk::{Disk, RealDisk};
use error::Context;

/// Where the store lies unless someone says otherwise.
pub const DEFAULT_ROOT: &str = "/var/lib/kiln/store";

const FORMAT: &str = "kiln-store 1";

/// How long a writer waits for another one, which may be removing gigabytes. No pod waits for it, and a bake
/// that gives up has been for nothing.
const WRITER_WAIT: Duration = Duration::from_secs(120);

/// A μVM in the store.
#[derive(Debug)]
pub struct Entry {
    /// Its name: the digest of its manifest.
    pub id: Digest,
    /// Its manifest, if it is undamaged.
    pub manifest: Result<Manifest, Error>,
    /// When it was last leased, or entered if never, in seconds since 1970.
    pub used_at: u64,
    /// Whether garbage collection must leave it alone.
    pub pinned: bool,
}

/// How much room the store takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Bytes on disk, everything included.
    pub used: u64,
    /// The most there may be.
    pub budget: Option<u64>,
}

/// A store.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
    disk: Arc<dyn Disk>,
}

/// Held while the store is changed. Dropping it lets the next writer in.
pub(crate) struct WriteLock {
    _file: File,
}

impl Store {
    /// Opens the store at `root`, and makes one there if there is none.
    pub fn open_or_create(root: impl Into<PathBuf>) -> Result<Store, Error> {
        Store::create_with(root.into(), Arc::new(RealDisk))
    }

    /// Opens the store at `root`. Nothing is written.
    pub fn open(root: impl Into<PathBuf>) -> Result<Store, Error> {
        let store = Store {
            root: root.into(),
            disk: Arc::new(RealDisk),
        };
        store.check_format()?;
        Ok(store)
    }

    pub(crate) fn create_with(root: PathBuf, disk: Arc<dyn Disk>) -> Result<Store, Error> {
        let store = Store { root, disk };
        match store.check_format() {
            Err(Error::NoStore(_)) => store.create()?,
            other => other?,
        }
        Ok(store)
    }

    /// The store's directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn check_format(&self) -> Result<(), Error> {
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
    fn create(&self) -> Result<(), Error> {
        if let Some(parent) = self.root.parent() {
            fs::create_dir_all(parent).context("making", parent)?;
        }
        self.ensure_dir(&self.root)?;
        let _lock = self.write_lock()?;
        for name in ["objects", "uvms", "pins", "tmp"] {
            self.ensure_dir(&self.root.join(name))?;
        }
        self.replace_file("format", format!("{FORMAT}\n").as_bytes())
    }

    fn ensure_dir(&self, path: &Path) -> Result<(), Error> {
        match self.disk.create_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
            other => other.context("making", path),
        }
    }

    /// Gives a file of the root directory new content, all of it or nothing. Needs the lock.
    fn replace_file(&self, name: &str, content: &[u8]) -> Result<(), Error> {
        let target = self.root.join(name);
        let fresh = self.root.join("tmp").join(format!("{name}.new"));
        match self.disk.remove_file(&fresh) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other.context("removing", &fresh)?,
        }
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

    /// Waits until no other program changes the store, but not for one that hangs.
    fn write_lock(&self) -> Result<WriteLock, Error> {
        let path = self.root.join("lock");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .context("opening", &path)?;
        lock::exclusive(&file, WRITER_WAIT)?;
        Ok(WriteLock { _file: file })
    }

    fn uvm_path(&self, id: &Digest) -> PathBuf {
        self.root.join("uvms").join(id.to_string())
    }

    fn pin_path(&self, id: &Digest) -> PathBuf {
        self.root.join("pins").join(id.to_string())
    }

    fn object_path(&self, digest: &Digest) -> PathBuf {
        let name = digest.to_string();
        self.root.join("objects").join(&name[..2]).join(name)
    }

    /// The names of all μVMs, in no order.
    fn ids(&self) -> Result<Vec<Digest>, Error> {
        let dir = self.root.join("uvms");
        let mut ids = Vec::new();
        for entry in fs::read_dir(&dir).context("reading", &dir)? {
            let name = entry.context("reading", &dir)?.file_name();
            if let Some(id) = name.to_str().and_then(|name| name.parse().ok()) {
                ids.push(id);
            }
        }
        Ok(ids)
    }

    /// All μVMs, the newest first. One with a damaged manifest is listed as such.
    pub fn list(&self) -> Result<Vec<Entry>, Error> {
        let mut entries = Vec::new();
        for id in self.ids()? {
            match self.entry(id) {
                Err(Error::NotFound(_)) => {} // removed meanwhile
                entry => entries.push(entry?),
            }
        }
        let age = |entry: &Entry| entry.manifest.as_ref().map_or(0, |m| m.about.baked_at);
        entries.sort_by(|a, b| age(b).cmp(&age(a)).then(a.id.cmp(&b.id)));
        Ok(entries)
    }

    /// One μVM.
    pub fn entry(&self, id: Digest) -> Result<Entry, Error> {
        let path = self.uvm_path(&id);
        let mut file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::NotFound(id.to_string()));
            }
            other => other.context("opening", &path)?,
        };
        let meta = file.metadata().context("reading", &path)?;
        let used_at = meta.mtime().cast_unsigned();
        let pinned = self.pin_path(&id).exists();
        Ok(Entry {
            id,
            manifest: self.read_manifest(id, &mut file),
            used_at,
            pinned,
        })
    }

    fn read_manifest(&self, id: Digest, file: &mut File) -> Result<Manifest, Error> {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)
            .context("reading", &self.uvm_path(&id))?;
        if Digest::of_bytes(&bytes) != id {
            return Err(Error::ManifestDigest(id));
        }
        Manifest::decode(&bytes).map_err(|source| match source {
            ManifestError::Version(found) if found < VERSION => Error::Older { id, found },
            ManifestError::Version(found) => Error::Newer { id, found },
            source => Error::Manifest { id, source },
        })
    }

    /// The μVM that a person means: by its digest, or by the first digits of it (4 at least), or
    /// `latest` for the newest.
    pub fn resolve(&self, name: &str) -> Result<Digest, Error> {
        let not_found = || Error::NotFound(name.to_owned());
        if name == "latest" {
            let newest = self
                .list()?
                .into_iter()
                .find(|entry| entry.manifest.is_ok());
            return newest.map(|entry| entry.id).ok_or_else(not_found);
        }
        if name.len() < 4 {
            return Err(not_found());
        }
        let matches: Vec<Digest> = self
            .ids()?
            .into_iter()
            .filter(|id| id.to_string().starts_with(name))
            .collect();
        match matches.as_slice() {
            [] => Err(not_found()),
            [only] => Ok(*only),
            _ => Err(Error::Ambiguous {
                name: name.to_owned(),
                matches,
            }),
        }
    }

    /// The newest μVM that `wanted` accepts and whose objects are all there.
    pub fn find(&self, wanted: impl Fn(&Manifest) -> bool) -> Result<Option<Digest>, Error> {
        let good = |manifest: &Manifest| wanted(manifest) && self.is_whole(manifest);
        Ok(self
            .list()?
            .into_iter()
            .find(|entry| entry.manifest.as_ref().is_ok_and(good))
            .map(|entry| entry.id))
    }

    /// How much room the store takes, and may take.
    pub fn usage(&self) -> Result<Usage, Error> {
        Ok(Usage {
            used: disk_bytes(&self.root)?,
            budget: self.budget()?,
        })
    }

    fn budget(&self) -> Result<Option<u64>, Error> {
        let path = self.root.join("budget");
        match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).context("reading", &path),
            Ok(text) => text
                .trim_end()
                .parse()
                .map(Some)
                .map_err(|_| Error::Budget(path)),
        }
    }

    /// Sets the most bytes the store may take on disk; `None` lifts the limit. What is there
    /// stays: see [`Store::collect`].
    pub fn set_budget(&self, budget: Option<u64>) -> Result<(), Error> {
        let _lock = self.write_lock()?;
        match budget {
            Some(bytes) => self.replace_file("budget", format!("{bytes}\n").as_bytes()),
            None => {
                let path = self.root.join("budget");
                match self.disk.remove_file(&path) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                    other => other.context("removing", &path),
                }
            }
        }
    }

    /// Fails if `needed` more bytes would exceed the budget. Needs the lock, to mean anything.
    fn check_budget(&self, needed: u64) -> Result<(), Error> {
        match self.usage()? {
            Usage {
                used,
                budget: Some(budget),
            } if used.saturating_add(needed) > budget => Err(Error::OverBudget {
                used,
                needed,
                budget,
            }),
            _ => Ok(()),
        }
    }

    /// Keeps a μVM from garbage collection and removal until it is unpinned.
    pub fn pin(&self, id: Digest) -> Result<(), Error> {
        let _lock = self.write_lock()?;
        if !self.uvm_path(&id).exists() {
            return Err(Error::NotFound(id.to_string()));
        }
        let path = self.pin_path(&id);
        match self.disk.write_new(&path, b"") {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => other.context("writing", &path)?,
        }
        let dir = self.root.join("pins");
        self.disk.sync_dir(&dir).context("syncing", &dir)
    }

    /// Takes a pin away. None there is no error.
    pub fn unpin(&self, id: Digest) -> Result<(), Error> {
        let _lock = self.write_lock()?;
        self.remove_pin(&id)
    }

    fn remove_pin(&self, id: &Digest) -> Result<(), Error> {
        let path = self.pin_path(id);
        match self.disk.remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.context("removing", &path),
        }
    }
}

/// Bytes on disk of everything below a directory.
fn disk_bytes(dir: &Path) -> Result<u64, Error> {
    let mut total = 0;
    let entries = match fs::read_dir(dir) {
        // A staging directory may go away while we look.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        other => other.context("reading", dir)?,
    };
    for entry in entries {
        let entry = entry.context("reading", dir)?;
        match entry.metadata() {
            Ok(meta) if meta.is_dir() => total += disk_bytes(&entry.path())?,
            Ok(meta) => total += meta.blocks() * 512,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).context("reading", &entry.path()),
        }
    }
    Ok(total)
}

#[cfg(test)]
mod tests;
