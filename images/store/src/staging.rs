//! Entering a μVM: it is put together in a directory of its own on the store's file system, and
//! becomes visible by one rename when everything it needs is on the disk.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::Context;
use crate::{
    Description, Digest, Error, Kind, Manifest, Object, Store, WRITER_WAIT, WriteLock, digest, lock,
};

/// A μVM in the making. Dropping it throws it away.
#[derive(Debug)]
pub struct Staging {
    store: Store,
    dir: PathBuf,
    /// Locked for as long as this process works on it: one that nobody holds is garbage.
    _owner: File,
}

const OWNER: &str = "owner";
const MANIFEST: &str = "manifest";

impl Store {
    /// Begins a μVM that is expected to take about `expected` bytes on disk.
    pub fn begin(&self, expected: u64) -> Result<Staging, Error> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        // Nobody looks for stale directories between the making of this one and its locking.
        let write_lock = self.write_lock()?;
        self.sweep_staging(&write_lock)?;
        self.check_budget(expected)?;
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let dir = self
            .root
            .join("tmp")
            .join(format!("{}-{number}", std::process::id()));
        self.disk.create_dir(&dir).context("making", &dir)?;
        let owner = dir.join(OWNER);
        let locked = self
            .disk
            .write_new(&owner, b"")
            .and_then(|()| File::open(&owner))
            .context("making", &owner)
            .and_then(|file| Ok(lock::exclusive(&file, WRITER_WAIT).map(|()| file)?));
        match locked {
            Ok(file) => Ok(Staging {
                store: self.clone(),
                dir,
                _owner: file,
            }),
            Err(error) => {
                let _ = self.remove_staging(&dir);
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
                self.remove_staging(&path)?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// Its owner and a sweeping writer may do this at the same time, so what is gone is no error.
    fn remove_staging(&self, dir: &Path) -> Result<(), Error> {
        let unless_gone = |result: io::Result<()>| match result {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        };
        let entries = match fs::read_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.context("reading", dir)?,
        };
        for entry in entries {
            let entry = entry.context("reading", dir)?;
            let path = entry.path();
            // A bake has folders in it for a while.
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                self.remove_staging(&path)?;
            } else {
                unless_gone(self.disk.remove_file(&path)).context("removing", &path)?;
            }
        }
        unless_gone(self.disk.remove_dir(dir)).context("removing", dir)
    }
}

impl Staging {
    /// The directory it is put together in. What else is written there goes away with it.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the file of this kind is to be written.
    pub fn path(&self, kind: Kind) -> PathBuf {
        self.dir.join(kind.name())
    }

    /// Makes the file of this kind, for a program that is handed descriptors, not paths.
    pub fn create(&self, kind: Kind) -> Result<File, Error> {
        let path = self.path(kind);
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .context("making", &path)
    }

    /// Enters the μVM in the store and returns its name. State and memory must be there.
    ///
    /// Zero pages of the files become holes. On failure nothing is entered.
    pub fn commit(self, about: Description) -> Result<Digest, Error> {
        let disk = &self.store.disk;
        let mut objects = Vec::new();
        for kind in Kind::ALL {
            match self.finish_object(kind) {
                Ok(object) => objects.push(object),
                Err(Error::Incomplete(Kind::WorkingSet | Kind::Scratch)) => {}
                Err(error) => return Err(error),
            }
        }
        let manifest = Manifest { about, objects };
        let bytes = manifest.encode().map_err(|source| Error::Manifest {
            id: manifest.about.recipe,
            source,
        })?;
        let id = Digest::of_bytes(&bytes);
        let fresh = self.dir.join(MANIFEST);
        disk.write_new(&fresh, &bytes).context("writing", &fresh)?;
        disk.sync_file(&fresh).context("syncing", &fresh)?;
        disk.seal(&fresh).context("sealing", &fresh)?;

        let write_lock = self.store.write_lock()?;
        // What is staged counts as used already.
        self.store.check_budget(0)?;
        if let Err(error) = self.enter(&manifest, &fresh, &id) {
            // Objects that made it in belong to nobody now.
            let _ = self.store.sweep_objects(&write_lock);
            return Err(error);
        }
        Ok(id)
    }

    /// Digests one file and sees that it is on the disk.
    fn finish_object(&self, kind: Kind) -> Result<Object, Error> {
        let disk = &self.store.disk;
        let path = self.path(kind);
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::Incomplete(kind));
            }
            other => other.context("opening", &path)?,
        };
        let scan = digest::scan(&file, &mut |zeros| {
            disk.punch_hole(&file, zeros.offset, zeros.length)
        })
        .context("reading", &path)?;
        disk.sync_file(&path).context("syncing", &path)?;
        disk.seal(&path).context("sealing", &path)?;
        Ok(Object {
            kind,
            digest: scan.digest,
            length: scan.length,
            data: scan.data,
        })
    }

    /// Moves everything into place, the manifest last. Each step is on the disk before the next.
    fn enter(&self, manifest: &Manifest, fresh: &Path, id: &Digest) -> Result<(), Error> {
        let disk = &self.store.disk;
        let all = self.store.root.join("objects");
        for object in &manifest.objects {
            let target = self.store.object_path(&object.digest);
            let dir = target.parent().unwrap_or(&all);
            if !dir.is_dir() {
                self.store.ensure_dir(dir)?;
                disk.sync_dir(&all).context("syncing", &all)?;
            }
            // An object that is there already is replaced: it might be damaged, this one is not.
            disk.rename(&self.path(object.kind), &target)
                .context("entering", &target)?;
            disk.sync_dir(dir).context("syncing", dir)?;
        }
        let target = self.store.uvm_path(id);
        disk.rename(fresh, &target).context("entering", &target)?;
        let dir = self.store.root.join("uvms");
        disk.sync_dir(&dir).context("syncing", &dir)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // What cannot be removed now is swept up by the next writer.
        let _ = self.store.remove_staging(&self.dir);
    }
}
