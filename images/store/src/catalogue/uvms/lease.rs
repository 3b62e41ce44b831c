//! Leases on μVMs.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use kiln_vmm_saved::PageRun;

use super::{Kind, Manifest, Object, Parent, Uvms, WorkingSet};
use crate::content::packed::Memory;
use crate::content::{Content, lease};
use crate::error::Context;
use crate::{Digest, Error, Store};

/// Longest wait for those who have locked manifests to remove them. They are done at once, or a dry run was all it was.
const LEASE_WAIT: Duration = Duration::from_secs(2);

/// The right to use a μVM: a shared lock on its manifest, and on those of its parents. While it lives, none of them is
/// removed.
///
/// The kernel drops it with its last file descriptor, so a holder that is killed holds nothing. It
/// may be handed to another process (the VMM) by passing the descriptor on: that holds the parents, too, since nobody
/// removes a μVM that has children.
#[derive(Debug)]
pub struct Lease {
    id: Digest,
    manifest: Manifest,
    file: File,
    _parents: Vec<File>,
    content: Content,
}

impl Store {
    /// Takes a lease on a μVM, to use it.
    pub fn lease(&self, id: Digest) -> Result<Lease, Error> {
        let lease = self.uvms().hold(id)?;
        // When it was last used is a hint for garbage collection; a read-only store does without.
        // Kept as the time of modification, since any reader changes the time of access.
        let times = std::fs::FileTimes::new().set_modified(SystemTime::now());
        let _ = lease.file.set_times(times);
        Ok(lease)
    }
}

impl Uvms {
    /// Takes a lease that does not count as use.
    pub(super) fn hold(&self, id: Digest) -> Result<Lease, Error> {
        let end = Instant::now() + LEASE_WAIT;
        let gone = || Error::NotFound(id.to_string());
        let mut file = lease::open(&self.path(&id))?.ok_or_else(gone)?;
        // Read before it is locked, for it tells what else is to be. Its content never changes.
        let manifest = self.read_manifest(id, &mut file)?;
        // A parent is removed after its children only: if it is gone, this one may be gone as well.
        let lost = |parent| match file.metadata() {
            Ok(meta) if meta.nlink() > 0 => Error::NoParent { id, parent },
            _ => gone(),
        };
        let mut parents = Vec::with_capacity(manifest.parents.len());
        for Parent { uvm, .. } in &manifest.parents {
            let opened = lease::open(&self.path(uvm))?;
            parents.push((*uvm, opened.ok_or_else(|| lost(*uvm))?));
        }
        // All who take several locks take them in one order.
        let mut held = vec![(id, &file)];
        held.extend(parents.iter().map(|(parent, file)| (*parent, file)));
        held.sort_by_key(|(locked, _)| *locked);
        for (locked, file) in held {
            let left = end.saturating_duration_since(Instant::now());
            if lease::hold_open(file, &self.path(&locked), left)?.is_none() {
                return Err(if locked == id { gone() } else { lost(locked) });
            }
        }
        Ok(Lease {
            id,
            manifest,
            file,
            _parents: parents.into_iter().map(|(_, file)| file).collect(),
            content: self.content.clone(),
        })
    }
}

impl Lease {
    /// The μVM's name.
    pub fn id(&self) -> Digest {
        self.id
    }

    /// What is known of it.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Where an object of it is. Memory that is packed is rebuilt first if need be, and stays there until others need the
    /// room: who opens it soon finds it, and who wants to be sure calls [`Lease::open`].
    pub fn path(&self, kind: Kind) -> Result<PathBuf, Error> {
        let object = self.object(kind)?;
        let packed = self.open_packed(object)?;
        match packed {
            Some(_) => self.content.flat_path(&object.digest),
            None => Ok(self.content.object_path(&object.digest)),
        }
    }

    /// An object of it, open for reading. Its length is checked, its content is not: that would
    /// read all of it. Memory that is packed is rebuilt first, if it was not since the machine was started, and so are the
    /// parents' that it refers to; then its content is checked, too.
    pub fn open(&self, kind: Kind) -> Result<File, Error> {
        let object = self.object(kind)?;
        if let Some(file) = self.open_packed(object)? {
            return Ok(file);
        }
        let path = self.content.object_path(&object.digest);
        let file = File::open(&path).context("opening", &path)?;
        let length = file.metadata().context("reading", &path)?.len();
        if length != object.length {
            let source = io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "the {kind} object is {length} bytes long, not {}: see `kiln verify`",
                    object.length
                ),
            );
            return Err(source).context("opening", &path);
        }
        Ok(file)
    }

    fn object(&self, kind: Kind) -> Result<&Object, Error> {
        self.manifest.object(kind).ok_or(Error::Incomplete(kind))
    }

    /// None if it is not packed.
    fn open_packed(&self, object: &Object) -> Result<Option<File>, Error> {
        if !object.is_packed() {
            return Ok(None);
        }
        let parents = self.manifest.parents.iter();
        let parents: Vec<Memory> = parents.map(Parent::memory).collect();
        self.content.open_packed(object.memory(), &parents)
    }
}

impl Lease {
    /// The pages of `memory` that a resumed guest touches first, if it is known which they are. Those that are not in
    /// the page cache are being read when this comes back.
    pub fn touched_first(&self, memory: &File) -> Result<Vec<PageRun>, Error> {
        if self.manifest.object(Kind::WorkingSet).is_none() {
            return Ok(Vec::new());
        }
        let file = self.open(Kind::WorkingSet)?;
        let set = WorkingSet::read(&file).and_then(|set| {
            set.read_ahead(memory)?;
            Ok(set)
        });
        let set = set.context("reading ahead by", &self.path(Kind::WorkingSet)?)?;
        Ok(set.into_runs())
    }
}

impl AsFd for Lease {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
