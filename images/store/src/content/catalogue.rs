//! What the content asks of a catalogue: which of its entries may go, what they need, and whether they are good.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::fs::File;

use super::WriteLock;
use super::collect::{Policy, Why};
use super::verify::Verified;
use crate::{Digest, Error};

/// Several kinds of things.
pub(crate) type Catalogues = [Box<dyn Catalogue>];

/// One kind of things in the store, each under a name that no other has.
pub(crate) trait Catalogue: Debug {
    /// What a person calls one of them.
    fn noun(&self) -> &'static str;

    /// Whether whoever misses one of them makes it again, so that it may go at any time.
    fn is_remade(&self) -> bool;

    /// The names of all of them, in no order.
    fn ids(&self) -> Result<Vec<Digest>, Error>;

    /// All of them, with what `policy` says.
    fn survey(&self, policy: Policy) -> Result<Survey, Error>;

    /// The objects they need, so that no other is kept. None if that can't be told, because one can't be read: it may be
    /// a newer kiln's.
    fn needed(&self) -> Result<Option<BTreeSet<Digest>>, Error>;

    /// Whether one must stay because somebody asked for that.
    fn is_pinned(&self, id: &Digest) -> bool;

    /// Locks one for removal; none if it is in use.
    fn doom(&self, id: Digest) -> Result<Option<Doomed>, Error>;

    /// Removes one. What is interrupted after the first step leaves nothing but files that nobody needs.
    fn remove(&self, doomed: Doomed, lock: &WriteLock) -> Result<(), Error>;

    /// Comes once after removals, for what is kept about all of them.
    fn settle(&self, lock: &WriteLock);

    /// Reads those that are named, or all if none is, and adds what it finds to the report.
    fn verify(&self, only: &[Digest], report: &mut Verified) -> Result<(), Error>;
}

/// What a catalogue holds.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    /// Those of which it is known what they need, and those that a reason is given for to go.
    pub(crate) entries: Vec<Candidate>,
    /// Those that can't be read and stay.
    pub(crate) unreadable: Vec<Digest>,
}

/// Something that may have to go.
#[derive(Debug)]
pub(crate) struct Candidate {
    pub(crate) id: Digest,
    /// Why it should go even if there is room.
    pub(crate) why: Option<Why>,
    /// It is pinned.
    pub(crate) stays: bool,
    /// In seconds since 1970.
    pub(crate) used_at: u64,
    /// What it needs, others perhaps too.
    pub(crate) objects: Vec<Digest>,
    /// Bytes on disk that are its alone.
    pub(crate) bytes: u64,
}

/// Something that is locked for removal: no lease on it exists, and none can be had.
#[derive(Debug)]
pub(crate) struct Doomed {
    pub(crate) id: Digest,
    /// None if there is nothing that could be in use.
    pub(crate) _lock: Option<File>,
}
