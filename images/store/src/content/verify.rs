//! Verification: everything is read and compared with the digests under which it was written.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;

use super::Content;
use super::catalogue::Catalogues;
use super::digest::{self, Scan};
use super::packed::Memory;
use crate::error::Context;
use crate::{Digest, Error, Named};

/// A difference between the store and what was written.
#[derive(Debug, thiserror::Error)]
pub enum Damage {
    /// A manifest or a record cannot be read.
    #[error("{} {}: its manifest", of.kind, of.id.short())]
    Entry {
        /// The μVM or image.
        of: Named,
        /// The reason.
        #[source]
        source: Error,
    },
    /// An object is not there.
    #[error("{} {}: its {part} object {} is missing", of.kind, of.id.short(), object.short())]
    Missing {
        /// The μVM or image.
        of: Named,
        /// The object's part in it, such as `memory`.
        part: &'static str,
        /// The object's name.
        object: Digest,
    },
    /// An object is longer or shorter than it was.
    #[error(
        "{} {}: its {part} object {} is {found} bytes long, not {wanted}",
        of.kind, of.id.short(),
        object.short()
    )]
    Length {
        /// The μVM or image.
        of: Named,
        /// The object's part in it, such as `memory`.
        part: &'static str,
        /// The object's name.
        object: Digest,
        /// Its length.
        found: u64,
        /// The length it had.
        wanted: u64,
    },
    /// What a μVM is stored as the difference to is not there.
    #[error("{} {}: its parent, μVM {}, is missing", of.kind, of.id.short(), parent.short())]
    Parent {
        /// The μVM.
        of: Named,
        /// The one that is missing.
        parent: Digest,
    },
    /// An object's content has changed.
    #[error("{} {}: the content of its {part} object {} has changed", of.kind, of.id.short(), object.short())]
    Content {
        /// The μVM or image.
        of: Named,
        /// The object's part in it, such as `memory`.
        part: &'static str,
        /// The object's name.
        object: Digest,
    },
    /// The flat file that was rebuilt from an object's pack differs from it. It was removed: the next use makes it anew.
    #[error(
        "{} {}: the rebuilt file of its {part} object {} has changed; it is removed, and is rebuilt when it is needed",
        of.kind, of.id.short(),
        object.short()
    )]
    Flat {
        /// The μVM or image.
        of: Named,
        /// The object's part in it, such as `memory`.
        part: &'static str,
        /// The object's name.
        object: Digest,
    },
    /// An object's pack is damaged.
    #[error("{} {}: its {part} object {} is damaged", of.kind, of.id.short(), object.short())]
    Pack {
        /// The μVM or image.
        of: Named,
        /// The object's part in it, such as `memory`.
        part: &'static str,
        /// The object's name.
        object: Digest,
        /// What is wrong with the pack.
        #[source]
        source: io::Error,
    },
    /// An object cannot be read.
    #[error("{} {}: its {part} object {} cannot be read", of.kind, of.id.short(), object.short())]
    Unreadable {
        /// The μVM or image.
        of: Named,
        /// The object's part in it, such as `memory`.
        part: &'static str,
        /// The object's name.
        object: Digest,
        /// The reason.
        #[source]
        source: io::Error,
    },
}

impl Damage {
    /// The μVM or image that is damaged.
    pub fn of(&self) -> Named {
        match self {
            Damage::Entry { of, .. }
            | Damage::Missing { of, .. }
            | Damage::Length { of, .. }
            | Damage::Parent { of, .. }
            | Damage::Content { of, .. }
            | Damage::Flat { of, .. }
            | Damage::Pack { of, .. }
            | Damage::Unreadable { of, .. } => *of,
        }
    }
}

/// Result of a verification.
#[derive(Debug, Default)]
pub struct Verified {
    /// μVMs looked at.
    pub uvms: u32,
    /// Images looked at.
    pub images: u32,
    /// Objects read, each once, images' files among them.
    pub objects: u32,
    /// Bytes of data in them.
    pub data: u64,
    /// All differences.
    pub damage: Vec<Damage>,
    /// Objects that nothing needs, left by an interrupted bake. Harmless: `collect` removes them.
    pub orphans: u32,
    seen: BTreeMap<Digest, Found>,
    /// Memories that others were compared with, rebuilt in files without names.
    parents: BTreeMap<Digest, File>,
}

/// State of an object that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Good,
    Missing,
    Length(u64),
    Content,
}

/// What an object should be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Expected<'a> {
    pub(crate) of: Named,
    pub(crate) part: &'static str,
    pub(crate) memory: Memory,
    /// Whether it is kept packed.
    pub(crate) packed: bool,
    /// What its pack may refer to.
    pub(crate) parents: &'a [Memory],
}

/// What a μVM's messages call the memory of its parent.
const PARENTS: &str = "parent's memory";

pub(crate) fn verify(
    content: &Content,
    catalogues: &Catalogues,
    only: &[Digest],
) -> Result<Verified, Error> {
    let mut unknown: BTreeSet<Digest> = only.iter().copied().collect();
    for catalogue in catalogues {
        for id in catalogue.ids()? {
            unknown.remove(&id);
        }
    }
    if let Some(id) = unknown.first() {
        return Err(Error::NotFound(id.to_string()));
    }
    let mut report = Verified::default();
    let mut needed = Some(BTreeSet::new());
    for catalogue in catalogues {
        catalogue.verify(only, &mut report)?;
        needed = needed.zip(catalogue.needed()?).map(|(mut all, more)| {
            all.extend(more);
            all
        });
    }
    if let Some(needed) = needed {
        let objects = content.objects()?.into_iter();
        let orphans = objects.filter(|digest| !needed.contains(digest)).count();
        report.orphans = u32::try_from(orphans).unwrap_or(u32::MAX);
    }
    Ok(report)
}

impl Verified {
    /// Reads an object of the store, unless it was read already.
    pub(crate) fn object(&mut self, content: &Content, expected: Expected<'_>) {
        if !expected.packed {
            self.read_once(content, expected);
            return;
        }
        let mut readable = true;
        for memory in expected.parents {
            let parent = Expected {
                part: PARENTS,
                memory: *memory,
                parents: &[],
                ..expected
            };
            readable &=
                self.read_once(content, parent) == Some(Found::Good) && self.keep(content, parent);
        }
        // What depends on something that is damaged can't be told from something that is damaged itself.
        if readable {
            self.read_once(content, expected);
        }
    }

    /// Notes what is wrong with an object. None if it cannot be read.
    fn read_once(&mut self, content: &Content, expected: Expected<'_>) -> Option<Found> {
        let Expected {
            of, part, memory, ..
        } = expected;
        let object = memory.object;
        let found = match self.seen.get(&object) {
            Some(found) => *found,
            None => match self.read(content, expected) {
                Ok(found) => {
                    self.seen.insert(object, found);
                    found
                }
                Err(error) => {
                    self.damage.push(unreadable(expected, error));
                    return None;
                }
            },
        };
        self.damage.extend(match found {
            Found::Good => None,
            Found::Missing => Some(Damage::Missing { of, part, object }),
            Found::Content => Some(Damage::Content { of, part, object }),
            Found::Length(found) => Some(Damage::Length {
                of,
                part,
                object,
                found,
                wanted: memory.length,
            }),
        });
        Some(found)
    }

    /// Sees that a parent's memory that is good can be read. Says whether it can.
    fn keep(&mut self, content: &Content, expected: Expected<'_>) -> bool {
        let object = expected.memory.object;
        if self.parents.contains_key(&object) {
            return true;
        }
        // It was read before it was known to be one.
        match content.open_once(expected.memory) {
            Ok(file) => {
                self.parents.insert(object, file);
                true
            }
            Err(error) => {
                self.damage.push(unreadable(expected, error));
                false
            }
        }
    }

    fn read(&mut self, content: &Content, expected: Expected<'_>) -> Result<Found, Error> {
        let Expected {
            of, part, memory, ..
        } = expected;
        let object = memory.object;
        if expected.packed {
            if content.drop_wrong_flat(&object)? {
                self.damage.push(Damage::Flat { of, part, object });
            }
            let kept = &self.parents;
            let mut open = |parent: Memory| match kept.get(&parent.object) {
                Some(file) => file
                    .try_clone()
                    .context("opening", &content.pack_path(&parent.object)),
                None => content.open_once(parent),
            };
            if let Some((scan, file)) = content.scan_pack(&object, expected.parents, &mut open)? {
                let found = self.judge(scan, object);
                if part == PARENTS {
                    self.parents.insert(object, file);
                }
                return Ok(found);
            }
        }
        let path = content.object_path(&object);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Missing),
            other => other.context("opening", &path)?,
        };
        let length = file.metadata().context("reading", &path)?.len();
        if length != memory.length {
            return Ok(Found::Length(length));
        }
        let scan = digest::of_file(&file).context("reading", &path)?;
        Ok(self.judge(scan, object))
    }

    fn judge(&mut self, scan: Scan, object: Digest) -> Found {
        self.objects += 1;
        self.data += scan.data;
        if scan.digest == object {
            Found::Good
        } else {
            Found::Content
        }
    }
}

fn unreadable(expected: Expected<'_>, error: Error) -> Damage {
    let Expected {
        of, part, memory, ..
    } = expected;
    let object = memory.object;
    match error {
        Error::Pack { source, .. } => Damage::Pack {
            of,
            part,
            object,
            source,
        },
        Error::Io { source, .. } => Damage::Unreadable {
            of,
            part,
            object,
            source,
        },
        other => Damage::Unreadable {
            of,
            part,
            object,
            source: io::Error::other(other),
        },
    }
}
