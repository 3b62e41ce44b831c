//! Entering a μVM: its objects are put together in a staging directory, and its manifest makes it visible when
//! everything it needs is on the disk.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::manifest::is_packed;
use super::sibling::Sibling;
use super::{Basis, Description, Kind, Manifest, Object, Storage, WorkingSet};
use crate::content::collect::sweep;
use crate::content::digest::Scan;
use crate::content::packed::Packing;
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
        self.commit_as(about, Storage::default())
    }

    /// The same, stored in this way.
    pub fn commit_as(self, about: Description, storage: Storage) -> Result<Digest, Error> {
        let mut objects = Vec::new();
        let mut memory = None;
        for kind in Kind::ALL {
            match self.finish(kind)? {
                Some((file, scan)) => {
                    let object = Object {
                        kind,
                        digest: scan.digest,
                        length: scan.length,
                        data: scan.data,
                    };
                    if object.is_packed() {
                        memory = Some((file, scan));
                    }
                    objects.push(object);
                }
                None if matches!(kind, Kind::WorkingSet | Kind::Scratch | Kind::Modules) => {}
                None => return Err(Error::Incomplete(kind)),
            }
        }
        let mut manifest = Manifest {
            about,
            parents: Vec::new(),
            objects,
        };
        let uvms = self.store.uvms();
        let mut basis = storage.basis;
        loop {
            let mut sibling = None;
            if let Some(memory) = &memory {
                if uvms.is_known(&memory.1.digest)? {
                    basis = Basis::None;
                }
                sibling = uvms.parent_for(&manifest.about, basis)?;
                self.pack(memory, sibling.as_ref(), storage.starts_alone)?;
            }
            manifest.parents = sibling.iter().map(|sibling| sibling.parent).collect();
            if let Some(id) = self.try_enter(&manifest)? {
                return Ok(id);
            }
            basis = Basis::None;
        }
    }

    /// Finishes the file of a kind; none if there is none.
    fn finish(&self, kind: Kind) -> Result<Option<(File, Scan)>, Error> {
        let length = match fs::metadata(self.path(kind)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.context("reading", &self.path(kind))?.len(),
        };
        match is_packed(kind, length) {
            true => self.dir.finish_content(kind.name()),
            false => self.dir.finish_object(kind.name()),
        }
    }

    fn pack(
        &self,
        memory: &(File, Scan),
        sibling: Option<&Sibling>,
        starts_alone: bool,
    ) -> Result<(), Error> {
        let parents = sibling.map(|sibling| (sibling.parent.memory(), &sibling.file));
        let packing = Packing {
            first: &self.touched_first()?,
            parents: parents.as_slice(),
            starts_alone,
        };
        self.dir.pack(Kind::Memory.name(), memory, &packing)
    }

    /// Enters the μVM as it is packed now. None if the store has its memory already, so that it must be packed without
    /// parents.
    fn try_enter(&self, manifest: &Manifest) -> Result<Option<Digest>, Error> {
        let bytes = manifest.encode().map_err(|source| Error::Manifest {
            id: manifest.about.recipe,
            source,
        })?;
        let id = Digest::of_bytes(&bytes);
        let fresh = self.dir.finish_file(MANIFEST, &bytes)?;

        let (content, catalogues) = (&self.store.content, self.store.catalogues());
        let lock = content.write_lock(WRITER_WAIT)?;
        let uvms = self.store.uvms();
        if let Some(saved) = &manifest.about.saved {
            uvms.check_name(&saved.name)?;
        }
        for object in manifest.objects.iter().filter(|o| o.is_packed()) {
            // One was entered meanwhile. Its pack is to be replaced, and its manifest does not name this one's parents.
            if !manifest.parents.is_empty() && uvms.is_known(&object.digest)? {
                return Ok(None);
            }
        }
        let entered = self.enter(manifest, &fresh, &id, &lock);
        uvms.renew_index(&lock);
        if let Err(error) = entered {
            // Objects that made it in belong to nobody now.
            let _ = sweep(content, &catalogues, &lock);
            return Err(error);
        }
        Ok(Some(id))
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
