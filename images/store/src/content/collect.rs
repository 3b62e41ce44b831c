//! Removal, and garbage collection.

use std::collections::{BTreeMap, BTreeSet};

use super::catalogue::{Candidate, Catalogue, Catalogues};
use super::{Content, WRITER_WAIT, WriteLock};
use crate::{Digest, Error};

/// Rules of a garbage collection. Entries that are pinned or in use always stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Policy {
    /// Remove everything.
    pub all: bool,
    /// Keep μVMs even if there is a newer one of the same class, kernel release and CPU.
    pub keep_superseded: bool,
    /// Remove the least recently used until the store takes no more bytes than this. Its budget
    /// counts in any case.
    pub target: Option<u64>,
    /// Change nothing; say what would be done.
    pub dry_run: bool,
}

/// Why something was removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Why {
    /// An older kiln baked it: this one can't resume it.
    Older,
    /// It can't be used, because it is damaged or another kiln made it, and is made again when it is needed.
    Unusable,
    /// All were to go.
    All,
    /// A newer one serves the same purpose.
    Superseded,
    /// It was the least recently used, and the store too large.
    Room,
}

/// An entry of the store, or a removed one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Named {
    /// Its kind: `μVM` or `image`.
    pub kind: &'static str,
    /// Its name.
    pub id: Digest,
}

/// A removed entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Removed {
    /// The entry.
    pub what: Named,
    /// The reason.
    pub why: Why,
}

/// Result of a garbage collection, or of a dry run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Collected {
    /// Entries that are gone.
    pub removed: Vec<Removed>,
    /// Entries that had to stay because they are in use.
    pub in_use: Vec<Named>,
    /// Entries that had to stay because others, which stay, are stored as what differs from them.
    pub parents: Vec<Named>,
    /// Entries that had to stay because they can't be read: their objects are unknown.
    pub damaged: Vec<Named>,
    /// Objects that are gone.
    pub objects: u32,
    /// Directories of interrupted bakes that are gone.
    pub interrupted: u32,
    /// Bytes on disk given back, flat files aside.
    pub freed: u64,
    /// Bytes the store takes now, flat files aside.
    pub used: u64,
}

/// Removes the entry of this name, unless it is pinned or in use.
pub(crate) fn remove(content: &Content, catalogues: &Catalogues, id: Digest) -> Result<(), Error> {
    let lock = content.write_lock(WRITER_WAIT)?;
    for catalogue in catalogues {
        if !catalogue.ids()?.contains(&id) {
            continue;
        }
        if catalogue.is_pinned(&id) {
            return Err(Error::Pinned(id));
        }
        // Only a writer makes children.
        let children = catalogue.children(&id)?;
        if let Some(child) = children.first() {
            return Err(Error::HasChildren {
                id,
                child: *child,
                count: children.len(),
            });
        }
        let kind = catalogue.noun();
        let doomed = catalogue.doom(id)?.ok_or(Error::InUse { kind, id })?;
        catalogue.remove(doomed, &lock)?;
        catalogue.settle(&lock);
        return sweep(content, catalogues, &lock).map(|_| ());
    }
    Err(Error::NotFound(id.to_string()))
}

/// Removes the objects that no catalogue needs; none as long as one catalogue can't tell.
pub(crate) fn sweep(
    content: &Content,
    catalogues: &Catalogues,
    lock: &WriteLock,
) -> Result<u32, Error> {
    let mut needed = BTreeSet::new();
    for catalogue in catalogues {
        match catalogue.needed()? {
            Some(objects) => needed.extend(objects),
            None => return Ok(0),
        }
    }
    content.sweep_objects(&needed, lock)
}

/// Removes entries by `policy`, and then everything that no entry needs.
pub(crate) fn collect(
    content: &Content,
    catalogues: &Catalogues,
    policy: Policy,
) -> Result<Collected, Error> {
    let lock = content.write_lock(WRITER_WAIT)?;
    let usage = content.usage()?;
    let mut surveyed = Vec::new();
    let mut report = Collected::default();
    for catalogue in catalogues {
        let survey = catalogue.survey(policy)?;
        let kind = catalogue.noun();
        let unreadable = survey.unreadable.into_iter();
        report
            .damaged
            .extend(unreadable.map(|id| Named { kind, id }));
        let entries = survey.entries.into_iter();
        surveyed.extend(entries.map(|entry| (catalogue.as_ref(), entry)));
    }
    let mut collection = Collection {
        shares: Shares::of(content, surveyed.iter().map(|(_, entry)| entry))?,
        children: children(surveyed.iter().map(|(_, entry)| entry)),
        waiting: BTreeMap::new(),
        used: usage.used,
        dry_run: policy.dry_run,
        lock: &lock,
        report,
    };
    surveyed.retain(|(_, entry)| !entry.stays);
    let (mut wanted, mut rest): (Vec<_>, Vec<_>) = surveyed
        .into_iter()
        .partition(|(_, entry)| entry.why.is_some());

    // μVMs of older kilns go first: their objects are unknown, and no object is removed as long as one of them is there.
    wanted.sort_by_key(|(_, entry)| (entry.why, entry.used_at));
    for (catalogue, entry) in wanted {
        collection.remove(catalogue, entry, None)?;
    }
    if !policy.dry_run {
        collection.report.interrupted = content.sweep_staging(&lock)?;
        content.sweep_stale_flat(&lock)?;
        collection.report.objects = sweep(content, catalogues, &lock)?;
        collection.used = content.usage()?.used;
    }

    let limit = match (policy.target, usage.budget) {
        (Some(target), Some(budget)) => Some(target.min(budget)),
        (target, budget) => target.or(budget),
    };
    // μVMs go last: somebody would have to bake them again.
    rest.sort_by_key(|(catalogue, entry)| (!catalogue.is_remade(), entry.used_at));
    for (catalogue, entry) in rest {
        if limit.is_none_or(|limit| collection.used <= limit) {
            break;
        }
        collection.remove(catalogue, entry, limit)?;
    }
    let used = collection.used;
    collection.name_parents(limit);
    let mut report = collection.report;
    if policy.dry_run {
        report.used = used;
    } else {
        report.objects += sweep(content, catalogues, &lock)?;
        for catalogue in catalogues {
            catalogue.settle(&lock);
        }
        report.used = content.usage()?.used;
    }
    report.freed = usage.used.saturating_sub(report.used);
    Ok(report)
}

/// How many children each entry has.
fn children<'a>(entries: impl Iterator<Item = &'a Candidate>) -> BTreeMap<Digest, u32> {
    let mut children = BTreeMap::new();
    for parent in entries.flat_map(|entry| &entry.parents) {
        *children.entry(*parent).or_default() += 1;
    }
    children
}

/// A collection on its way.
struct Collection<'a> {
    shares: Shares,
    /// How many children of each entry are there.
    children: BTreeMap<Digest, u32>,
    /// Entries that are to go, but have children.
    waiting: BTreeMap<Digest, (&'a dyn Catalogue, Candidate)>,
    /// Bytes that the store takes, when the objects are gone that nobody needs any more.
    used: u64,
    dry_run: bool,
    lock: &'a WriteLock,
    report: Collected,
}

impl<'a> Collection<'a> {
    /// Removes an entry unless it is in use. One that has children is removed after the last of them. If there is a limit,
    /// an entry goes only as long as the store is larger than that, unless there is a reason for it to go in any case.
    fn remove(
        &mut self,
        catalogue: &'a dyn Catalogue,
        entry: Candidate,
        limit: Option<u64>,
    ) -> Result<(), Error> {
        let mut next = vec![(catalogue, entry)];
        while let Some((catalogue, entry)) = next.pop() {
            if self.children.get(&entry.id).is_some_and(|count| *count > 0) {
                self.waiting.insert(entry.id, (catalogue, entry));
                continue;
            }
            let enough = limit.is_some_and(|limit| self.used <= limit);
            if enough && entry.why.is_none() {
                continue;
            }
            if !self.remove_one(catalogue, &entry)? {
                continue;
            }
            for parent in &entry.parents {
                if let Some(count) = self.children.get_mut(parent) {
                    *count -= 1;
                }
                next.extend(self.waiting.remove(parent));
            }
        }
        Ok(())
    }

    fn remove_one(&mut self, catalogue: &dyn Catalogue, entry: &Candidate) -> Result<bool, Error> {
        let what = Named {
            kind: catalogue.noun(),
            id: entry.id,
        };
        let Some(doomed) = catalogue.doom(entry.id)? else {
            self.report.in_use.push(what);
            return Ok(false);
        };
        let why = entry.why.unwrap_or(Why::Room);
        self.report.removed.push(Removed { what, why });
        if !self.dry_run {
            catalogue.remove(doomed, self.lock)?;
        }
        // If not now, then with its objects.
        let freed = entry.bytes + self.shares.release(entry);
        self.used = self.used.saturating_sub(freed);
        Ok(true)
    }

    /// Notes who was to go, and is needed by a child that stays.
    fn name_parents(&mut self, limit: Option<u64>) {
        let too_large = limit.is_some_and(|limit| self.used > limit);
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.retain(|_, (_, entry)| too_large || entry.why.is_some());
        let parents = waiting.into_iter().map(|(id, (catalogue, _))| Named {
            kind: catalogue.noun(),
            id,
        });
        self.report.parents.extend(parents);
    }
}

/// Which objects are shared by how many, to know what removing one gives back.
struct Shares {
    objects: BTreeMap<Digest, (u32, u64)>,
}

impl Shares {
    fn of<'a>(
        content: &Content,
        entries: impl Iterator<Item = &'a Candidate>,
    ) -> Result<Shares, Error> {
        let mut objects = BTreeMap::new();
        for object in entries.flat_map(|entry| &entry.objects) {
            match objects.get_mut(object) {
                Some((users, _)) => *users += 1,
                None => drop(objects.insert(*object, (1, content.object_bytes(object)?))),
            }
        }
        Ok(Shares { objects })
    }

    /// Takes one entry's share away; returns the bytes that nobody needs any more.
    fn release(&mut self, entry: &Candidate) -> u64 {
        let mut freed = 0;
        for object in &entry.objects {
            if let Some((users, bytes)) = self.objects.get_mut(object) {
                *users -= 1;
                if *users == 0 {
                    freed += *bytes;
                }
            }
        }
        freed
    }
}
