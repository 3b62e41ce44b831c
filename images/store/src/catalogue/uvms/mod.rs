//! Baked μVMs: a manifest each, which names the objects that it consists of, and an index to pick one by.

mod family;
mod index;
mod lease;
pub(crate) mod manifest;
mod pick;
mod sibling;
mod staging;
mod working_set;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use kiln_vmm_saved::cpu::Fingerprint;

pub use family::Holding;
pub use lease::Lease;
pub use manifest::{
    Class, Cpu, Description, Kernel, Kind, Manifest, ManifestError, Object, Parent, Saved,
    SavedDisk, VERSION,
};
pub use pick::{Host, Mismatch, Miss, Wanted};
pub use sibling::{Basis, Storage};
pub use staging::Staging;
pub use working_set::WorkingSet;

use crate::content::catalogue::{Candidate, Catalogue, Doomed, Survey};
use crate::content::packed::Memory;
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

    /// Whether a μVM can be saved by this name. What saves one asks early, since it stands still meanwhile.
    pub fn check_name(&self, name: &str) -> Result<(), Error> {
        self.uvms().check_name(name)
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

    /// The saved μVMs that people call so.
    pub(crate) fn called(&self, name: &str) -> Result<Vec<Digest>, Error> {
        let all = self.readable()?.into_iter();
        let is_called = |manifest: &Manifest| {
            let saved = manifest.about.saved.as_ref();
            saved.is_some_and(|saved| saved.name == name)
        };
        Ok(all
            .filter(|(_, manifest)| is_called(manifest))
            .map(|(id, _)| id)
            .collect())
    }

    /// Whether a μVM can be saved by this name: there is none of that name.
    fn check_name(&self, name: &str) -> Result<(), Error> {
        match self.called(name)?.first() {
            None => Ok(()),
            Some(id) => Err(Error::NameTaken {
                name: name.to_owned(),
                id: *id,
            }),
        }
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

    /// Whether all objects of a μVM are there, and as long as they should be, and its parents with their memory.
    fn is_whole(&self, manifest: &Manifest) -> bool {
        let is_there = |packed: bool, digest: &Digest, length: u64| {
            // A pack has a length of its own, which is checked when it is read.
            (packed && self.content.pack_path(digest).exists())
                || fs::metadata(self.content.object_path(digest))
                    .is_ok_and(|meta| meta.len() == length)
        };
        let mut objects = manifest.objects.iter();
        let mut parents = manifest.parents.iter();
        objects.all(|object| is_there(object.is_packed(), &object.digest, object.length))
            && parents.all(|parent| {
                is_there(true, &parent.memory, parent.length) && self.path(&parent.uvm).exists()
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
                // Nobody bakes it again.
                Ok(manifest) if manifest.is_saved() => None,
                Ok(_) => (!kept.contains(&entry.id)).then_some(Why::Superseded),
                Err(Error::Older { .. }) => Some(Why::Older),
                Err(_) => None,
            };
            let saved = entry.manifest.as_ref().is_ok_and(Manifest::is_saved);
            let stays = entry.pinned || (saved && !policy.all);
            let bytes = fs::metadata(self.path(&entry.id)).map_or(0, |meta| meta.blocks() * 512);
            let (objects, parents) = match entry.manifest {
                Ok(manifest) => (
                    manifest.objects.iter().map(|o| o.digest).collect(),
                    manifest.parents.iter().map(|p| p.uvm).collect(),
                ),
                Err(_) if why.is_some() && !stays => (Vec::new(), Vec::new()),
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
                parents,
                bytes,
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

    fn children(&self, id: &Digest) -> Result<Vec<Digest>, Error> {
        self.children_of(id)
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
                    Err(Error::NoParent { parent, .. }) => {
                        report.damage.push(Damage::Parent { of, parent });
                    }
                    lease => verify_objects(&self.content, of, lease?.manifest(), report),
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

fn verify_objects(content: &Content, of: Named, manifest: &Manifest, report: &mut Verified) {
    let parents: Vec<Memory> = manifest.parents.iter().map(Parent::memory).collect();
    for object in &manifest.objects {
        let expected = Expected {
            of,
            part: object.kind.name(),
            memory: object.memory(),
            packed: object.is_packed(),
            parents: &parents,
        };
        report.object(content, expected);
    }
}

/// The newest ones of those that serve one purpose. Entries come newest first.
fn newest_of_each(entries: &[Entry]) -> BTreeSet<Digest> {
    let mut newest: BTreeMap<_, Digest> = BTreeMap::new();
    for entry in entries {
        if let Ok(manifest) = &entry.manifest
            && !manifest.is_saved()
        {
            newest.entry(purpose(&manifest.about)).or_insert(entry.id);
        }
    }
    newest.into_values().collect()
}

/// Whether a new μVM takes the place of an older one.
fn supersedes(new: &Description, old: &Description) -> bool {
    new.saved.is_none() && old.saved.is_none() && purpose(new) == purpose(old)
}

/// Class, kernel release and CPU.
fn purpose(about: &Description) -> (&Class, &str, &Fingerprint) {
    (&about.class, &about.kernel.release, &about.cpu.features)
}

#[cfg(test)]
mod tests;
