//! Parents and children, and what each μVM alone makes the store hold.

use std::collections::{BTreeMap, BTreeSet};

use super::{Entry, Manifest, Uvms};
use crate::{Digest, Error, Store};

/// Bytes on disk of what a μVM needs: its objects, and the memory of its parents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Holding {
    /// Of what no other μVM needs.
    pub alone: u64,
    /// Of what others need as well.
    pub shared: u64,
}

impl Store {
    /// Bytes on disk of what each of these μVMs needs, for itself and together with others of them. One whose manifest
    /// can't be read is left out.
    pub fn holdings(&self, entries: &[Entry]) -> Result<BTreeMap<Digest, Holding>, Error> {
        let readable = || {
            let manifests = entries.iter().map(|e| (e.id, e.manifest.as_ref()));
            manifests.filter_map(|(id, manifest)| Some((id, needs(manifest.ok()?))))
        };
        let mut users: BTreeMap<Digest, u32> = BTreeMap::new();
        for object in readable().flat_map(|(_, objects)| objects) {
            *users.entry(object).or_default() += 1;
        }
        let mut holdings = BTreeMap::new();
        for (id, objects) in readable() {
            let holding: &mut Holding = holdings.entry(id).or_default();
            for object in objects {
                let bytes = self.content.object_bytes(&object)?;
                match users.get(&object) {
                    Some(1) => holding.alone += bytes,
                    _ => holding.shared += bytes,
                }
            }
        }
        Ok(holdings)
    }

    /// The μVMs that are stored as what differs from this one, the newest first.
    pub fn children(&self, id: Digest) -> Result<Vec<Digest>, Error> {
        self.uvms().children_of(&id)
    }
}

/// Objects without which a μVM can't be resumed.
fn needs(manifest: &Manifest) -> BTreeSet<Digest> {
    let own = manifest.objects.iter().map(|object| object.digest);
    let parents = manifest.parents.iter().map(|parent| parent.memory);
    own.chain(parents).collect()
}

impl Uvms {
    pub(super) fn children_of(&self, id: &Digest) -> Result<Vec<Digest>, Error> {
        let all = self.readable()?.into_iter();
        let children = all.filter(|(_, manifest)| manifest.parents.iter().any(|p| p.uvm == *id));
        Ok(children.map(|(child, _)| child).collect())
    }

    /// Whether the store has this memory, or a μVM that needs it.
    ///
    /// A memory has one pack, although several μVMs may have that memory. What the pack refers to, each of them must name
    /// as its parent, so the second one is packed without parents.
    pub(super) fn is_known(&self, memory: &Digest) -> Result<bool, Error> {
        let all = self.readable()?;
        let mut needed = all.iter().map(|(_, manifest)| needs(manifest));
        Ok(self.content.pack_path(memory).exists() || needed.any(|needs| needs.contains(memory)))
    }
}
