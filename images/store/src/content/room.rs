//! The budget: how much room the store takes and may take, and making some.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::catalogue::{Candidate, Catalogue, Catalogues};
use super::{Content, WriteLock};
use crate::error::Context;
use crate::{Error, Policy};

/// The most a store may take on disk whose budget nobody has set.
pub const DEFAULT_BUDGET: u64 = 20 << 30;

/// The most the flat files of packed objects may take on disk unless somebody has set it.
pub const DEFAULT_FLAT_BUDGET: u64 = 8 << 30;

const FILE: &str = "budget";
const FLAT_FILE: &str = "flat-budget";
/// Directory of flat files, which are a cache with a budget of its own.
const FLAT: &str = "flat";
const UNLIMITED: &str = "none";

/// How much room the store takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Bytes on disk of everything but flat files.
    pub used: u64,
    /// Bytes on disk of flat files: what was rebuilt from packs since the machine was started.
    pub flat: u64,
    /// The most there may be.
    pub budget: Option<u64>,
}

impl Usage {
    /// Whether so many more bytes would be too many.
    pub(crate) fn exceeded_by(&self, needed: u64) -> bool {
        self.budget
            .is_some_and(|budget| self.used.saturating_add(needed) > budget)
    }
}

impl Content {
    pub(crate) fn flat_root(&self) -> PathBuf {
        self.root.join(FLAT)
    }

    pub(crate) fn usage(&self) -> Result<Usage, Error> {
        let flat_root = self.flat_root();
        Ok(Usage {
            used: disk_bytes(&self.root, &flat_root)?,
            flat: disk_bytes(&flat_root, &flat_root)?,
            budget: self.budget()?,
        })
    }

    pub(crate) fn budget(&self) -> Result<Option<u64>, Error> {
        self.read_budget(FILE, DEFAULT_BUDGET)
    }

    /// The most that flat files may take.
    pub(crate) fn flat_budget(&self) -> Result<Option<u64>, Error> {
        self.read_budget(FLAT_FILE, DEFAULT_FLAT_BUDGET)
    }

    fn read_budget(&self, file: &str, default: u64) -> Result<Option<u64>, Error> {
        let path = self.root.join(file);
        match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Some(default)),
            Err(error) => Err(error).context("reading", &path),
            Ok(text) if text.trim_end() == UNLIMITED => Ok(None),
            Ok(text) => text
                .trim_end()
                .parse()
                .map(Some)
                .map_err(|_| Error::Budget(path)),
        }
    }

    pub(crate) fn set_budget(&self, budget: Option<u64>, lock: &WriteLock) -> Result<(), Error> {
        self.write_budget(FILE, budget, lock)
    }

    pub(crate) fn set_flat_budget(
        &self,
        budget: Option<u64>,
        lock: &WriteLock,
    ) -> Result<(), Error> {
        self.write_budget(FLAT_FILE, budget, lock)
    }

    fn write_budget(&self, file: &str, budget: Option<u64>, lock: &WriteLock) -> Result<(), Error> {
        let text = budget.map_or(UNLIMITED.to_owned(), |bytes| bytes.to_string());
        self.replace_file(file, format!("{text}\n").as_bytes(), lock)
    }

    /// Makes room for `needed` more bytes in the budget: entries that are made again when they are missed go, the least
    /// recently used first, but none in use. The result tells whether that was enough.
    pub(crate) fn make_room(
        &self,
        needed: u64,
        catalogues: &Catalogues,
        lock: &WriteLock,
    ) -> Result<Usage, Error> {
        let mut usage = self.usage()?;
        if !usage.exceeded_by(needed) {
            return Ok(usage);
        }
        for (catalogue, candidate) in disposable(catalogues)? {
            if !usage.exceeded_by(needed) {
                break;
            }
            if evict(catalogue, &candidate, lock)? {
                usage.used = usage.used.saturating_sub(candidate.bytes);
            }
        }
        Ok(usage)
    }

    /// The same for a bake, for which the budget is a hard limit: no pod waits for it.
    pub(crate) fn room_or_fail(
        &self,
        needed: u64,
        catalogues: &Catalogues,
        lock: &WriteLock,
    ) -> Result<(), Error> {
        let usage = self.make_room(needed, catalogues, lock)?;
        match usage.budget {
            Some(budget) if usage.exceeded_by(needed) => Err(Error::OverBudget {
                used: usage.used,
                needed,
                budget,
            }),
            _ => Ok(()),
        }
    }
}

/// Removes one entry because the disk is full, whatever the budget says; returns whether there was one.
pub(crate) fn evict_one(catalogues: &Catalogues, lock: &WriteLock) -> Result<bool, Error> {
    for (catalogue, candidate) in disposable(catalogues)? {
        if evict(catalogue, &candidate, lock)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Entries that are made again when they are missed, in the order in which they go.
fn disposable(catalogues: &Catalogues) -> Result<Vec<(&dyn Catalogue, Candidate)>, Error> {
    let mut all = Vec::new();
    for catalogue in catalogues.iter().filter(|catalogue| catalogue.is_remade()) {
        let survey = catalogue.survey(Policy::default())?;
        let free = survey.entries.into_iter().filter(|entry| !entry.stays);
        all.extend(free.map(|entry| (catalogue.as_ref(), entry)));
    }
    all.sort_by_key(|(_, entry)| (entry.why.is_none(), entry.used_at));
    Ok(all)
}

fn evict(catalogue: &dyn Catalogue, entry: &Candidate, lock: &WriteLock) -> Result<bool, Error> {
    let Some(doomed) = catalogue.doom(entry.id)? else {
        return Ok(false);
    };
    catalogue.remove(doomed, lock)?;
    tracing::info!(id = %entry.id, kind = catalogue.noun(), "evicted, to make room");
    Ok(true)
}

/// Bytes on disk of everything below a directory but what is below `without`.
fn disk_bytes(dir: &Path, without: &Path) -> Result<u64, Error> {
    let mut total = 0;
    let entries = match fs::read_dir(dir) {
        // A staging directory may go away while we look.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        other => other.context("reading", dir)?,
    };
    for entry in entries {
        let entry = entry.context("reading", dir)?;
        match entry.metadata() {
            Ok(meta) if meta.is_dir() => {
                let path = entry.path();
                if path != without {
                    total += disk_bytes(&path, without)?;
                }
            }
            Ok(meta) => total += meta.blocks() * 512,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).context("reading", &entry.path()),
        }
    }
    Ok(total)
}
