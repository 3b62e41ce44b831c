//! Entering a μVM: its objects are put together in a staging directory, and its manifest makes it visible when
//! everything it needs is on the disk.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::{Description, Kind, Manifest, Object};
use crate::content::collect::sweep;
use crate::content::staging::StagingDir;
use crate::content::{WRITER_WAIT, WriteLock};
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
            match self.dir.finish_object(kind.name())? {
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
        // What is staged counts as used already.
        content.room_or_fail(0, &catalogues, &lock)?;
        let entered = self.enter(&manifest, &fresh, &id, &lock);
        self.store.uvms().renew_index(&lock);
        if let Err(error) = entered {
            // Objects that made it in belong to nobody now.
            let _ = sweep(content, &catalogues, &lock);
            return Err(error);
        }
        Ok(id)
    }

    /// Moves everything into place, the manifest last. Each step is on the disk before the next.
    fn enter(
        &self,
        manifest: &Manifest,
        fresh: &Path,
        id: &Digest,
        lock: &WriteLock,
    ) -> Result<(), Error> {
        for object in &manifest.objects {
            self.dir
                .enter_object(object.kind.name(), &object.digest, lock)?;
        }
        let uvms = self.store.uvms();
        uvms.forget_index(lock)?;
        self.dir.enter(fresh, &uvms.path(id))
    }
}
