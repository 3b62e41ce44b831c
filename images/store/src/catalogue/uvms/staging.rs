//! Entering a μVM: its objects are put together in a staging directory, and its manifest makes it visible when
//! everything it needs is on the disk.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::manifest::is_packed;
use super::{Description, Kind, Manifest, Object, WorkingSet};
use crate::content::collect::sweep;
use crate::content::digest::Scan;
use crate::content::staging::StagingDir;
use crate::content::{WRITER_WAIT, WriteLock};
use crate::error::Context;
use crate::{Digest, Error, Store};

/// A μVM in the making. Dropping it throws it away.
#[derive(Debug)]
pub struct Staging {
    store: Store,
    dir: StagingDir,
}

const MANIFEST: &str = "manifest";

impl Store {
    /// Begins a μVM that is expected to take about `expected` bytes on disk.
    pub fn begin(&self, expected: u64) -> Result<Staging, Error> {
        let lock = self.content.write_lock(WRITER_WAIT)?;
        let dir = self.content.stage(&lock)?;
        self.content.sweep_stale_flat(&lock)?;
        self.content
            .room_or_fail(expected, &self.catalogues(), &lock)?;
        Ok(Staging {
            store: self.clone(),
            dir,
        })
    }
}

impl Staging {
    /// The directory it is put together in. What else is written there goes away with it.
    pub fn dir(&self) -> &Path {
        &self.dir.path
    }

    /// Where the file of this kind is to be written.
    pub fn path(&self, kind: Kind) -> PathBuf {
        self.dir.path.join(kind.name())
    }

    /// Makes the file of this kind, for a program that is handed descriptors, not paths.
    pub fn create(&self, kind: Kind) -> Result<File, Error> {
        self.dir.create(kind.name())
    }

    /// Enters the μVM in the store and returns its name. State and memory must be there.
    ///
    /// Zero pages of the files become holes. On failure nothing is entered.
    pub fn commit(self, about: Description) -> Result<Digest, Error> {
        let mut objects = Vec::new();
        for kind in Kind::ALL {
            match self.finish(kind)? {
                Some(scan) => objects.push(Object {
                    kind,
                    digest: scan.digest,
                    length: scan.length,
                    data: scan.data,
                }),
                None if matches!(kind, Kind::WorkingSet | Kind::Scratch | Kind::Modules) => {}
                None => return Err(Error::Incomplete(kind)),
            }
        }
        let manifest = Manifest { about, objects };
        let bytes = manifest.encode().map_err(|source| Error::Manifest {
            id: manifest.about.recipe,
            source,
        })?;
        let id = Digest::of_bytes(&bytes);
        let fresh = self.dir.finish_file(MANIFEST, &bytes)?;

        let (content, catalogues) = (&self.store.content, self.store.catalogues());
        let lock = content.write_lock(WRITER_WAIT)?;
        let entered = self.enter(&manifest, &fresh, &id, &lock);
        self.store.uvms().renew_index(&lock);
        if let Err(error) = entered {
            // Objects that made it in belong to nobody now.
            let _ = sweep(content, &catalogues, &lock);
            return Err(error);
        }
        Ok(id)
    }

    /// Finishes the file of a kind; none if there is none.
    fn finish(&self, kind: Kind) -> Result<Option<Scan>, Error> {
        let length = match fs::metadata(self.path(kind)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.context("reading", &self.path(kind))?.len(),
        };
        if is_packed(kind, length) {
            self.dir.finish_packed(kind.name(), &self.touched_first()?)
        } else {
            self.dir.finish_object(kind.name())
        }
    }

    /// Pages of the working set, in its order.
    fn touched_first(&self) -> Result<Vec<u32>, Error> {
        let path = self.path(Kind::WorkingSet);
        let set = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.and_then(|file| WorkingSet::read(&file)),
        };
        let runs = set.context("reading", &path)?.into_runs();
        let pages = runs
            .iter()
            .flat_map(|run| run.first..run.first.saturating_add(run.pages));
        Ok(pages.collect())
    }

    /// Moves everything into place, the manifest last. Each step is on the disk before the next, but for the flat file.
    fn enter(
        &self,
        manifest: &Manifest,
        fresh: &Path,
        id: &Digest,
        lock: &WriteLock,
    ) -> Result<(), Error> {
        let content = &self.store.content;
        for object in manifest.objects.iter().filter(|o| o.is_packed()) {
            let from = self.path(object.kind);
            content.enter_flat(&from, &object.digest, lock)?;
        }
        // What is staged counts as used already; what is flat now does not.
        content.room_or_fail(0, &self.store.catalogues(), lock)?;
        for object in &manifest.objects {
            let name = object.kind.name();
            if object.is_packed() {
                self.dir.enter_pack(name, &object.digest, lock)?;
            } else {
                self.dir.enter_object(name, &object.digest, lock)?;
            }
        }
        let uvms = self.store.uvms();
        uvms.forget_index(lock)?;
        self.dir.enter(fresh, &uvms.path(id))
    }
}
