//! The μVM that a new one is stored as the difference to.
//!
//! Two bakes of one kernel are much alike, although it lies at another address in each. A bake that stays when the new
//! one is there costs nothing to refer to. One that the new one supersedes would be kept for its child alone, and be
//! rebuilt for it after each start of the machine; so such a one is a parent only if it is pinned, or asked for by name.

use std::fs::File;

use super::{Description, Kind, Lease, Manifest, Object, Parent, Uvms, supersedes};
use crate::content::digest;
use crate::error::Context;
use crate::{Digest, Error, Store};

/// Whose memory a new μVM's is stored as the difference to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Basis {
    /// That of the newest μVM of the same kernel release that has no parent itself, and that collection keeps beside the
    /// new one: it serves another purpose, or is pinned. Nobody's if there is none that can be read.
    #[default]
    Sibling,
    /// Nobody's.
    None,
    /// This one's, which has no parent itself.
    Of(Digest),
}

/// How a new μVM is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Storage {
    /// Its parent.
    pub basis: Basis,
    /// Whether the pages of the working set can be had from its own pack alone: for one that may be the first on its node
    /// to be resumed.
    pub starts_alone: bool,
}

impl Default for Storage {
    fn default() -> Self {
        Storage {
            basis: Basis::default(),
            starts_alone: true,
        }
    }
}

/// A parent, to be read. It is not removed meanwhile.
#[derive(Debug)]
pub(super) struct Sibling {
    pub(super) parent: Parent,
    /// Its flat memory.
    pub(super) file: File,
    _lease: Lease,
}

impl Store {
    /// Whether a μVM can be another one's parent. What needs a parent by name asks early, since a bake takes long.
    pub fn check_parent(&self, id: Digest) -> Result<(), Error> {
        let lease = self.uvms().hold(id)?;
        as_parent(&lease).map(drop)
    }
}

impl Uvms {
    pub(super) fn parent_for(
        &self,
        about: &Description,
        basis: Basis,
    ) -> Result<Option<Sibling>, Error> {
        let candidates = match basis {
            Basis::None => Vec::new(),
            Basis::Of(id) => return self.open_parent(id).map(Some),
            Basis::Sibling => self.siblings(about)?,
        };
        for id in candidates {
            match self.open_parent(id) {
                Ok(sibling) => return Ok(Some(sibling)),
                // The bake takes more room without it, and is as good.
                Err(error) => tracing::warn!(
                    %id,
                    error = &error as &dyn std::error::Error,
                    "a sibling that cannot be read is no parent"
                ),
            }
        }
        Ok(None)
    }

    /// The newest first.
    fn siblings(&self, about: &Description) -> Result<Vec<Digest>, Error> {
        let is_sibling = |manifest: &Manifest, pinned: bool| {
            manifest.about.kernel.release == about.kernel.release
                && !manifest.is_saved()
                && manifest.parents.is_empty()
                && packed_memory(manifest).is_some()
                && (pinned || !supersedes(about, &manifest.about))
                && self.is_whole(manifest)
        };
        let entries = self.list()?.into_iter();
        Ok(entries
            .filter(|entry| {
                let manifest = entry.manifest.as_ref();
                manifest.is_ok_and(|manifest| is_sibling(manifest, entry.pinned))
            })
            .map(|entry| entry.id)
            .collect())
    }

    fn open_parent(&self, id: Digest) -> Result<Sibling, Error> {
        let lease = self.hold(id)?;
        let parent = as_parent(&lease)?;
        let is_parents = |file: &File| -> Result<bool, Error> {
            let path = self.content.flat_path(&parent.memory)?;
            let scan = digest::of_file(file).context("reading", &path)?;
            Ok(scan.digest == parent.memory)
        };
        // A child refers to what will be rebuilt later, and this file may have changed since it was.
        let mut file = lease.open(Kind::Memory)?;
        if !is_parents(&file)? {
            self.content.drop_wrong_flat(&parent.memory)?;
            file = lease.open(Kind::Memory)?;
            if !is_parents(&file)? {
                return Err(Error::OtherContent(parent.memory));
            }
        }
        Ok(Sibling {
            parent,
            file,
            _lease: lease,
        })
    }
}

/// A μVM as its children name it.
fn as_parent(lease: &Lease) -> Result<Parent, Error> {
    let id = lease.id();
    let manifest = lease.manifest();
    if let [parent, ..] = manifest.parents.as_slice() {
        let of = parent.uvm.short();
        let why = format!("it is itself stored as what differs from μVM {of}; name that");
        return Err(Error::NotAParent { id, why });
    }
    let refused = |why: &str| Error::NotAParent {
        id,
        why: why.to_owned(),
    };
    if manifest.is_saved() {
        return Err(refused(
            "it was saved with a container in it; name one that was baked",
        ));
    }
    let memory = packed_memory(manifest)
        .ok_or_else(|| refused("its memory is not stored as a pack; name another"))?;
    Ok(Parent {
        uvm: id,
        memory: memory.digest,
        length: memory.length,
    })
}

fn packed_memory(manifest: &Manifest) -> Option<&Object> {
    let memory = manifest.object(Kind::Memory)?;
    memory.is_packed().then_some(memory)
}
