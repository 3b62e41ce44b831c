//! Baked μVMs: a manifest each, which names the objects that it consists of, and an index to pick one by.

mod index;
mod lease;
pub(crate) mod manifest;
mod pick;
mod staging;
mod working_set;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use kiln_vmm_saved::cpu::Fingerprint;

pub use lease::Lease;
pub use manifest::{
    Class, Cpu, Description, Kernel, Kind, Manifest, ManifestError, Object, VERSION,
};
pub use pick::{Host, Mismatch, Miss, Wanted};
pub use staging::Staging;
pub use working_set::WorkingSet;

use crate::content::catalogue::{Candidate, Catalogue, Doomed, Survey};
use crate::content::verify::{Damage, Expected, Verified};
use crate::content::{Content, WRITER_WAIT, WriteLock, lease as content_lease};
use crate::error::Context;
use crate::{Digest, Error, Named, Policy, Store, Why};

const NOUN: &str = "μVM";

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

/// The catalogue of them.
#[derive(Debug, Clone)]
pub(crate) struct Uvms {
    content: Content,
}

impl Store {
    /// All μVMs, the newest first. One with a damaged manifest is listed as such.
    pub fn list(&self) -> Result<Vec<Entry>, Error> {
        self.uvms().list()
    }

    /// One μVM.
    pub fn entry(&self, id: Digest) -> Result<Entry, Error> {
        self.uvms().entry(id)
    }

    /// The newest μVM that `wanted` accepts and whose objects are all there. Reads every manifest.
    pub fn find(&self, wanted: impl Fn(&Manifest) -> bool) -> Result<Option<Digest>, Error> {
        let uvms = self.uvms();
        let good = |manifest: &Manifest| wanted(manifest) && uvms.is_whole(manifest);
        let found = uvms.list()?.into_iter();
        Ok(found
            .filter(|entry| entry.manifest.as_ref().is_ok_and(good))
            .map(|entry| entry.id)
            .next())
    }

    /// Keeps a μVM from garbage collection and removal until it is unpinned.
    pub fn pin(&self, id: Digest) -> Result<(), Error> {
        let uvms = self.uvms();
        let _lock = self.content.write_lock(WRITER_WAIT)?;
        if !uvms.path(&id).exists() {
            return Err(Error::NotFound(id.to_string()));
        }
        let path = uvms.pin_path(&id);
        match self.content.disk.write_new(&path, b"") {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => other.context("writing", &path)?,
        }
        let dir = self.content.root.join("pins");
        self.content.disk.sync_dir(&dir).context("syncing", &dir)
    }

    /// Takes a pin away. None there is no error.
    pub fn unpin(&self, id: Digest) -> Result<(), Error> {
        let _lock = self.content.write_lock(WRITER_WAIT)?;
        let path = self.uvms().pin_path(&id);
        self.content.remove_if_there(&path).map(|_| ())
    }
}

impl Uvms {
    pub(crate) fn of(content: Content) -> Uvms {
        Uvms { content }
    }

    fn dir(&self) -> PathBuf {
        self.content.root.join("uvms")
    }

    fn path(&self, id: &Digest) -> PathBuf {
        self.dir().join(id.to_string())
    }

    fn pin_path(&self, id: &Digest) -> PathBuf {
        self.content.root.join("pins").join(id.to_string())
    }

    fn list(&self) -> Result<Vec<Entry>, Error> {
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

    pub(crate) fn latest(&self) -> Result<Option<Digest>, Error> {
        let mut entries = self.list()?.into_iter();
        Ok(entries
            .find(|entry| entry.manifest.is_ok())
            .map(|entry| entry.id))
    }

    fn entry(&self, id: Digest) -> Result<Entry, Error> {
        let path = self.path(&id);
        let mut file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::NotFound(id.to_string()));
            }
            other => other.context("opening", &path)?,
        };
        let meta = file.metadata().context("reading", &path)?;
        let used_at = meta.mtime().cast_unsigned();
        let pinned = self.is_pinned(&id);
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
            .context("reading", &self.path(&id))?;
        if Digest::of_bytes(&bytes) != id {
            return Err(Error::ManifestDigest(id));
        }
        Manifest::decode(&bytes).map_err(|source| match source {
            ManifestError::Version(found) if found < VERSION => Error::Older { id, found },
            ManifestError::Version(found) => Error::Newer { id, found },
            source => Error::Manifest { id, source },
        })
    }

    /// Whether all objects of a μVM are there, and as long as they should be.
    fn is_whole(&self, manifest: &Manifest) -> bool {
        manifest.objects.iter().all(|object| {
            // A pack has a length of its own, which is checked when it is read.
            (object.is_packed() && self.content.pack_path(&object.digest).exists())
                || fs::metadata(self.content.object_path(&object.digest))
                    .is_ok_and(|meta| meta.len() == object.length)
        })
    }
}

impl Catalogue for Uvms {
    fn noun(&self) -> &'static str {
        NOUN
    }

    fn is_remade(&self) -> bool {
        false
    }

    fn ids(&self) -> Result<Vec<Digest>, Error> {
        let dir = self.dir();
        let mut ids = Vec::new();
        for entry in fs::read_dir(&dir).context("reading", &dir)? {
            let name = entry.context("reading", &dir)?.file_name();
            if let Some(id) = name.to_str().and_then(|name| name.parse().ok()) {
                ids.push(id);
            }
        }
        Ok(ids)
    }

    fn survey(&self, policy: Policy) -> Result<Survey, Error> {
        let listed = self.list()?;
        let kept = newest_of_each(&listed);
        let mut survey = Survey::default();
        for entry in listed {
            let why = match &entry.manifest {
                Ok(_) if policy.all => Some(Why::All),
                _ if policy.keep_superseded && !policy.all => None,
                Ok(_) => (!kept.contains(&entry.id)).then_some(Why::Superseded),
                Err(Error::Older { .. }) => Some(Why::Older),
                Err(_) => None,
            };
            let stays = entry.pinned;
            let objects = match entry.manifest {
                Ok(manifest) => manifest.objects.iter().map(|o| o.digest).collect(),
                Err(_) if why.is_some() && !stays => Vec::new(),
                Err(_) => {
                    survey.unreadable.push(entry.id);
                    continue;
                }
            };
            survey.entries.push(Candidate {
                id: entry.id,
                why,
                stays,
                used_at: entry.used_at,
                objects,
                bytes: 0,
            });
        }
        Ok(survey)
    }

    fn needed(&self) -> Result<Option<BTreeSet<Digest>>, Error> {
        let mut needed = BTreeSet::new();
        for entry in self.list()? {
            let Ok(manifest) = entry.manifest else {
                return Ok(None);
            };
            needed.extend(manifest.objects.iter().map(|object| object.digest));
        }
        Ok(Some(needed))
    }

    fn is_pinned(&self, id: &Digest) -> bool {
        self.pin_path(id).exists()
    }

    fn doom(&self, id: Digest) -> Result<Option<Doomed>, Error> {
        let lock = content_lease::doom(&self.path(&id))?;
        Ok(lock.map(|file| Doomed {
            id,
            _lock: Some(file),
        }))
    }

    /// The manifest goes first: what is interrupted after that leaves objects that nobody needs.
    fn remove(&self, doomed: Doomed, lock: &WriteLock) -> Result<(), Error> {
        let disk = &self.content.disk;
        self.forget_index(lock)?;
        let path = self.path(&doomed.id);
        disk.remove_file(&path).context("removing", &path)?;
        let dir = self.dir();
        disk.sync_dir(&dir).context("syncing", &dir)?;
        self.content
            .remove_if_there(&self.pin_path(&doomed.id))
            .map(|_| ())
    }

    fn settle(&self, lock: &WriteLock) {
        self.renew_index(lock);
    }

    fn verify(&self, only: &[Digest], report: &mut Verified) -> Result<(), Error> {
        for entry in self.list()? {
            if !only.is_empty() && !only.contains(&entry.id) {
                continue;
            }
            let of = Named {
                kind: NOUN,
                id: entry.id,
            };
            match entry.manifest {
                // Held, so that it is not removed meanwhile and taken for damaged.
                Ok(_) => match self.hold(entry.id) {
                    Err(Error::NotFound(_)) => continue,
                    lease => {
                        for object in &lease?.manifest().objects {
                            let expected = Expected {
                                of,
                                part: object.kind.name(),
                                object: object.digest,
                                length: object.length,
                                packed: object.is_packed(),
                            };
                            report.object(&self.content, expected);
                        }
                    }
                },
                // As it was written.
                Err(Error::Older { .. }) => {}
                Err(source) => report.damage.push(Damage::Entry { of, source }),
            }
            report.uvms += 1;
        }
        Ok(())
    }
}

/// The newest ones of each class, kernel release and CPU. Entries come newest first.
fn newest_of_each(entries: &[Entry]) -> BTreeSet<Digest> {
    let mut newest: BTreeMap<(&Class, &str, &Fingerprint), Digest> = BTreeMap::new();
    for entry in entries {
        if let Ok(manifest) = &entry.manifest {
            let about = &manifest.about;
            newest
                .entry((&about.class, &about.kernel.release, &about.cpu.features))
                .or_insert(entry.id);
        }
    }
    newest.into_values().collect()
}

#[cfg(test)]
mod tests;
