//! Finding damage: reads everything and compares it with its name.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;

use crate::{Digest, Error, Kind, Lease, Object, Store, digest};

/// Something in the store that is not what was written.
#[derive(Debug, thiserror::Error)]
pub enum Damage {
    /// A manifest.
    #[error("μVM {}: its manifest", uvm.short())]
    Manifest {
        /// The μVM.
        uvm: Digest,
        /// What is wrong.
        #[source]
        source: Error,
    },
    /// An object is not there.
    #[error("μVM {}: its {kind} object {} is missing", uvm.short(), object.short())]
    Missing {
        /// The μVM.
        uvm: Digest,
        /// What the object is to it.
        kind: Kind,
        /// The object's name.
        object: Digest,
    },
    /// An object is longer or shorter than it was.
    #[error(
        "μVM {}: its {kind} object {} is {found} bytes long, not {wanted}",
        uvm.short(),
        object.short()
    )]
    Length {
        /// The μVM.
        uvm: Digest,
        /// What the object is to it.
        kind: Kind,
        /// The object's name.
        object: Digest,
        /// Its length.
        found: u64,
        /// The length it had.
        wanted: u64,
    },
    /// An object's content has changed.
    #[error("μVM {}: the content of its {kind} object {} has changed", uvm.short(), object.short())]
    Content {
        /// The μVM.
        uvm: Digest,
        /// What the object is to it.
        kind: Kind,
        /// The object's name.
        object: Digest,
    },
    /// An object cannot be read.
    #[error("μVM {}: its {kind} object {} cannot be read", uvm.short(), object.short())]
    Unreadable {
        /// The μVM.
        uvm: Digest,
        /// What the object is to it.
        kind: Kind,
        /// The object's name.
        object: Digest,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Damage {
    /// The μVM that is damaged.
    pub fn uvm(&self) -> Digest {
        match self {
            Damage::Manifest { uvm, .. }
            | Damage::Missing { uvm, .. }
            | Damage::Length { uvm, .. }
            | Damage::Content { uvm, .. }
            | Damage::Unreadable { uvm, .. } => *uvm,
        }
    }
}

/// What verification found.
#[derive(Debug, Default)]
pub struct Verified {
    /// μVMs looked at.
    pub uvms: u32,
    /// Objects read, each once.
    pub objects: u32,
    /// Bytes of data in them.
    pub data: u64,
    /// What is damaged.
    pub damage: Vec<Damage>,
    /// Objects that no μVM needs, left by an interrupted bake. Harmless: `collect` removes them.
    pub orphans: u32,
}

/// What an object turned out to be.
#[derive(Clone, Copy)]
enum Found {
    Good,
    Missing,
    Length(u64),
    Content,
}

impl Store {
    /// Reads the μVMs that are named, or all if none is, and reports what is damaged.
    pub fn verify(&self, only: &[Digest]) -> Result<Verified, Error> {
        let mut report = Verified::default();
        let mut seen: BTreeMap<Digest, Found> = BTreeMap::new();
        let entries = self.list()?;
        if let Some(id) = only
            .iter()
            .find(|id| !entries.iter().any(|entry| entry.id == **id))
        {
            return Err(Error::NotFound(id.to_string()));
        }
        let mut needed = std::collections::BTreeSet::new();
        let mut all_readable = true;
        for entry in entries {
            let wanted = only.is_empty() || only.contains(&entry.id);
            match entry.manifest {
                Ok(manifest) => {
                    needed.extend(manifest.objects.iter().map(|object| object.digest));
                    if wanted {
                        // Held, so that it is not removed meanwhile and taken for damaged.
                        match self.hold(entry.id) {
                            Err(Error::NotFound(_)) => continue,
                            lease => self.verify_uvm(&lease?, &mut seen, &mut report),
                        }
                    }
                }
                Err(source) => {
                    all_readable = false;
                    // An older kiln's is as it was written.
                    if wanted && !matches!(source, Error::Older { .. }) {
                        report.damage.push(Damage::Manifest {
                            uvm: entry.id,
                            source,
                        });
                    }
                }
            }
            report.uvms += u32::from(wanted);
        }
        if all_readable {
            let orphans = self
                .objects()?
                .into_iter()
                .filter(|digest| !needed.contains(digest));
            report.orphans = u32::try_from(orphans.count()).unwrap_or(u32::MAX);
        }
        Ok(report)
    }

    fn verify_uvm(&self, lease: &Lease, seen: &mut BTreeMap<Digest, Found>, report: &mut Verified) {
        let uvm = lease.id();
        for wanted in &lease.manifest().objects {
            let (kind, object) = (wanted.kind, wanted.digest);
            let found = match seen.get(&object) {
                Some(found) => *found,
                None => match self.verify_object(wanted, report) {
                    Ok(found) => {
                        seen.insert(object, found);
                        found
                    }
                    Err(source) => {
                        report.damage.push(Damage::Unreadable {
                            uvm,
                            kind,
                            object,
                            source,
                        });
                        continue;
                    }
                },
            };
            report.damage.extend(match found {
                Found::Good => None,
                Found::Missing => Some(Damage::Missing { uvm, kind, object }),
                Found::Content => Some(Damage::Content { uvm, kind, object }),
                Found::Length(found) => Some(Damage::Length {
                    uvm,
                    kind,
                    object,
                    found,
                    wanted: wanted.length,
                }),
            });
        }
    }

    fn verify_object(&self, wanted: &Object, report: &mut Verified) -> io::Result<Found> {
        let file = match File::open(self.object_path(&wanted.digest)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Missing),
            other => other?,
        };
        let length = file.metadata()?.len();
        if length != wanted.length {
            return Ok(Found::Length(length));
        }
        let scan = digest::of_file(&file)?;
        report.objects += 1;
        report.data += scan.data;
        Ok(if scan.digest == wanted.digest {
            Found::Good
        } else {
            Found::Content
        })
    }
}
