//! The seam between content and catalogues: which entries may go, which objects they need, whether they are good.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::fs::File;

use super::WriteLock;
use super::collect::{Policy, Why};
use super::verify::Verified;
use crate::{Digest, Error};

/// All catalogues of a store.
pub(crate) type Catalogues = [Box<dyn Catalogue>];

/// One kind of entries in the store, each under a name that no other entry of any kind has.
pub(crate) trait Catalogue: Debug {
    /// Its word for one entry, as a person says it.
    fn noun(&self) -> &'static str;

    /// Whether a missing entry is made again by the process that needs it. Such an entry may go at any time.
    fn is_remade(&self) -> bool;

    /// Names of all entries, in no order.
    fn ids(&self) -> Result<Vec<Digest>, Error>;

    /// All entries, each with the reason that `policy` gives to remove it.
    fn survey(&self, policy: Policy) -> Result<Survey, Error>;

    /// Objects that the entries need; no other is kept. None if an entry can't be read, as a newer kiln's: its objects are
    /// unknown.
    fn needed(&self) -> Result<Option<BTreeSet<Digest>>, Error>;

    /// Whether somebody asked for this entry to stay.
    fn is_pinned(&self, id: &Digest) -> bool;

    /// Entries that can't be used without this one.
    fn children(&self, id: &Digest) -> Result<Vec<Digest>, Error>;

    /// Locks an entry for removal; none if it is in use.
    fn doom(&self, id: Digest) -> Result<Option<Doomed>, Error>;

    /// Removes an entry. A removal that is interrupted after its first step leaves only files that nobody needs.
    fn remove(&self, doomed: Doomed, lock: &WriteLock) -> Result<(), Error>;

    /// Called once after removals, to renew whatever the catalogue keeps about all entries.
    fn settle(&self, lock: &WriteLock);

    /// Reads the named entries, or all if none is named, and adds the findings to the report.
    fn verify(&self, only: &[Digest], report: &mut Verified) -> Result<(), Error>;
}

/// Entries of a catalogue, as collection sees them.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    /// Entries whose objects are known, or that have a reason to go.
    pub(crate) entries: Vec<Candidate>,
    /// Entries that can't be read and stay.
    pub(crate) unreadable: Vec<Digest>,
}

/// An entry that may have to go.
#[derive(Debug)]
pub(crate) struct Candidate {
    pub(crate) id: Digest,
    /// Reason to go even if there is room.
    pub(crate) why: Option<Why>,
    /// It is pinned.
    pub(crate) stays: bool,
    /// Last use, in seconds since 1970.
    pub(crate) used_at: u64,
    /// Objects that it needs, perhaps together with other entries.
    pub(crate) objects: Vec<Digest>,
    /// Entries of its catalogue without which it can't be used: they stay as long as it does.
    pub(crate) parents: Vec<Digest>,
    /// Bytes on disk of its own files.
    pub(crate) bytes: u64,
}

/// An entry that is locked for removal: no lease on it exists, and none can be had.
#[derive(Debug)]
pub(crate) struct Doomed {
    pub(crate) id: Digest,
    /// None if the entry has no file that could be in use.
    pub(crate) _lock: Option<File>,
}
