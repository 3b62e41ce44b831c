//! Removing μVMs, and garbage collection.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;

use kiln_vmm_control::cpu::Fingerprint;

use crate::error::Context;
use crate::{Class, Digest, Entry, Error, Store, WriteLock, disk_bytes, lock};

/// What garbage collection may remove. Pinned μVMs and those in use always stay.
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

/// Why a μVM was removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// A newer one serves the same purpose.
    Superseded,
    /// It was the least recently used, and the store too large.
    Room,
    /// An older kiln baked it: this one can't resume it.
    Older,
    /// All were to go.
    All,
}

/// A μVM that was removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Removed {
    /// Its name.
    pub id: Digest,
    /// Why.
    pub why: Why,
}

/// What garbage collection did, or would do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Collected {
    /// μVMs that are gone.
    pub removed: Vec<Removed>,
    /// μVMs that had to stay because they are in use.
    pub in_use: Vec<Digest>,
    /// μVMs that had to stay because their manifest can't be read: what they consist of is unknown.
    pub damaged: Vec<Digest>,
    /// Objects that are gone.
    pub objects: u32,
    /// Directories of interrupted bakes that are gone.
    pub interrupted: u32,
    /// Bytes on disk given back.
    pub freed: u64,
    /// Bytes the store takes now.
    pub used: u64,
}

/// A μVM that is locked for removal: no lease exists, and none can be had.
struct Doomed {
    id: Digest,
    _lock: File,
}

impl Store {
    /// Removes a μVM, unless it is pinned or in use.
    pub fn remove(&self, id: Digest) -> Result<(), Error> {
        let write_lock = self.write_lock()?;
        if self.pin_path(&id).exists() {
            return Err(Error::Pinned(id));
        }
        let doomed = self.doom(id)?.ok_or(Error::InUse(id))?;
        self.remove_doomed(doomed)?;
        self.sweep_objects(&write_lock).map(|_| ())
    }

    /// Locks a μVM for removal; `None` if it is in use.
    fn doom(&self, id: Digest) -> Result<Option<Doomed>, Error> {
        let path = self.uvm_path(&id);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::NotFound(id.to_string()));
            }
            other => other.context("opening", &path)?,
        };
        let free = lock::try_exclusive(&file).context("locking", &path)?;
        Ok(free.then_some(Doomed { id, _lock: file }))
    }

    /// The manifest goes first: what is interrupted after that leaves objects that nobody needs.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "the lock ends with the removal"
    )]
    fn remove_doomed(&self, doomed: Doomed) -> Result<(), Error> {
        let path = self.uvm_path(&doomed.id);
        self.disk.remove_file(&path).context("removing", &path)?;
        let dir = self.root.join("uvms");
        self.disk.sync_dir(&dir).context("syncing", &dir)?;
        self.remove_pin(&doomed.id)
    }

    /// Removes μVMs by `policy`, objects that no μVM needs, and what interrupted bakes left.
    pub fn collect(&self, policy: Policy) -> Result<Collected, Error> {
        let write_lock = self.write_lock()?;
        let mut report = Collected::default();
        let before = disk_bytes(&self.root)?;
        self.remove_older(policy, &mut report)?;
        if !policy.dry_run {
            report.interrupted = self.sweep_staging(&write_lock)?;
            report.objects = self.sweep_objects(&write_lock)?;
        }
        let entries = self.list()?;
        report.damaged = entries
            .iter()
            .filter(|e| e.manifest.is_err() && !report.removed.iter().any(|r| r.id == e.id))
            .map(|e| e.id)
            .collect();
        let budget = self.budget()?;
        let limit = match (policy.target, budget) {
            (Some(target), Some(budget)) => Some(target.min(budget)),
            (target, budget) => target.or(budget),
        };
        let mut shares = Shares::of(self, &entries)?;
        let mut used = disk_bytes(&self.root)?;
        for (entry, reason) in candidates(&entries, policy) {
            let over = limit.is_some_and(|limit| used > limit);
            let why = match reason {
                Some(why) => why,
                None if over => Why::Room,
                None => continue,
            };
            let Some(doomed) = self.doom(entry.id)? else {
                report.in_use.push(entry.id);
                continue;
            };
            used = used.saturating_sub(shares.release(entry));
            report.removed.push(Removed { id: entry.id, why });
            if !policy.dry_run {
                self.remove_doomed(doomed)?;
            }
        }
        if policy.dry_run {
            report.used = used;
        } else {
            report.objects += self.sweep_objects(&write_lock)?;
            report.used = disk_bytes(&self.root)?;
        }
        report.freed = before.saturating_sub(report.used);
        Ok(report)
    }

    /// Removes μVMs of older kilns. First of all, because what they consist of is unknown, and no object is removed
    /// as long as there is one.
    fn remove_older(&self, policy: Policy, report: &mut Collected) -> Result<(), Error> {
        if policy.keep_superseded && !policy.all {
            return Ok(());
        }
        for entry in self.list()? {
            if entry.pinned || !matches!(entry.manifest, Err(Error::Older { .. })) {
                continue;
            }
            let Some(doomed) = self.doom(entry.id)? else {
                report.in_use.push(entry.id);
                continue;
            };
            report.removed.push(Removed {
                id: entry.id,
                why: Why::Older,
            });
            if !policy.dry_run {
                self.remove_doomed(doomed)?;
            }
        }
        Ok(())
    }

    /// Removes the objects that no μVM needs. As long as a manifest is damaged, nothing is
    /// removed: it may be a newer kiln's. Returns how many it was.
    pub(crate) fn sweep_objects(&self, _lock: &WriteLock) -> Result<u32, Error> {
        let mut needed = BTreeSet::new();
        for entry in self.list()? {
            let Ok(manifest) = entry.manifest else {
                return Ok(0);
            };
            needed.extend(manifest.objects.iter().map(|object| object.digest));
        }
        let mut removed = 0;
        for digest in self.objects()? {
            if !needed.contains(&digest) {
                let path = self.object_path(&digest);
                self.disk.remove_file(&path).context("removing", &path)?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// The names of all objects, needed or not.
    pub(crate) fn objects(&self) -> Result<Vec<Digest>, Error> {
        let all = self.root.join("objects");
        let mut objects = Vec::new();
        for dir in fs::read_dir(&all).context("reading", &all)? {
            let dir = dir.context("reading", &all)?.path();
            for file in fs::read_dir(&dir).context("reading", &dir)? {
                let name = file.context("reading", &dir)?.file_name();
                objects.extend(name.to_str().and_then(|name| name.parse::<Digest>().ok()));
            }
        }
        Ok(objects)
    }
}

/// What may go, in the order in which it should: superseded ones first, then the least recently
/// used. `None` says: only if room is short.
fn candidates(entries: &[Entry], policy: Policy) -> Vec<(&Entry, Option<Why>)> {
    let mut newest: BTreeMap<(&Class, &str, &Fingerprint), Digest> = BTreeMap::new();
    for entry in entries {
        // Entries come newest first.
        if let Ok(manifest) = &entry.manifest {
            let about = &manifest.about;
            newest
                .entry((&about.class, &about.kernel.release, &about.cpu.features))
                .or_insert(entry.id);
        }
    }
    let kept: BTreeSet<Digest> = newest.into_values().collect();
    let mut candidates: Vec<(&Entry, Option<Why>)> = entries
        .iter()
        .filter(|entry| !entry.pinned && entry.manifest.is_ok())
        .map(|entry| {
            let superseded = !policy.keep_superseded && !kept.contains(&entry.id);
            let why = match (policy.all, superseded) {
                (true, _) => Some(Why::All),
                (false, true) => Some(Why::Superseded),
                (false, false) => None,
            };
            (entry, why)
        })
        .collect();
    candidates.sort_by_key(|(entry, why)| (why.is_none(), entry.used_at));
    candidates
}

/// Which objects are shared by how many μVMs, to know what removing one gives back.
struct Shares {
    objects: BTreeMap<Digest, (u32, u64)>,
}

impl Shares {
    fn of(store: &Store, entries: &[Entry]) -> Result<Shares, Error> {
        let mut objects = BTreeMap::new();
        for manifest in entries
            .iter()
            .filter_map(|entry| entry.manifest.as_ref().ok())
        {
            for object in &manifest.objects {
                let path = store.object_path(&object.digest);
                let bytes = match fs::metadata(&path) {
                    Ok(meta) => meta.blocks() * 512,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
                    Err(error) => return Err(error).context("reading", &path),
                };
                objects.entry(object.digest).or_insert((0, bytes)).0 += 1;
            }
        }
        Ok(Shares { objects })
    }

    /// Takes one μVM's share away; returns the bytes that nobody needs any more.
    fn release(&mut self, entry: &Entry) -> u64 {
        let mut freed = 0;
        for object in entry.manifest.iter().flat_map(|manifest| &manifest.objects) {
            if let Some((users, bytes)) = self.objects.get_mut(&object.digest) {
                *users -= 1;
                if *users == 0 {
                    freed += *bytes;
                }
            }
        }
        freed
    }
}
