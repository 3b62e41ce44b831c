//! The disk of a μVM's writable layers: an overlay over the empty file system that was baked, with a file to spill to and
//! a seat in the node's budget of RAM.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_agent_api::slots;
use kiln_overlay::{Budget, Seat};
use kiln_vmm_control::Flush;

use crate::Error;
use crate::baked::Baked;
use crate::ends::{Ends, Pool};

/// Where spill files lie unless something else is said: on the node's disk.
pub const DEFAULT_SPILL_DIRECTORY: &str = "/var/lib/kiln/spill";

/// How much of the node the writable layers of one μVM may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScratchLimits {
    /// Bytes of RAM; what is beyond spills.
    pub ram: u64,
    /// Bytes of the node's disk; none means that nothing spills.
    pub disk: u64,
}

impl ScratchLimits {
    /// How much the guest's file system may hold, so that it is full before the overlay is: a quarter of the RAM is
    /// never full for long, because content moves to the disk before.
    pub fn content(&self) -> u64 {
        self.disk.saturating_add(self.ram / 4 * 3)
    }
}

impl Default for ScratchLimits {
    fn default() -> Self {
        Self {
            ram: 128 << 20,
            disk: 16 << 30,
        }
    }
}

/// A spill file can't be had.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot make a file without a name in {}, for what containers write beyond the overlay's RAM; \
     name a directory on a local disk", directory.display()
)]
pub struct SpillError {
    /// Where.
    pub directory: PathBuf,
    /// Why not.
    #[source]
    pub source: io::Error,
}

/// A file for one μVM to spill to. It has no name, so it goes with the VMM, whatever ends it.
pub fn spill_file(directory: &Path) -> Result<File, SpillError> {
    let open = || {
        OpenOptions::new()
            .read(true)
            .write(true)
            .mode(0o600)
            .custom_flags(libc::O_TMPFILE)
            .open(directory)
    };
    let made = open().or_else(|error| match error.kind() {
        io::ErrorKind::NotFound => fs::create_dir_all(directory).and_then(|()| open()),
        _ => Err(error),
    });
    made.map_err(|source| SpillError {
        directory: directory.to_owned(),
        source,
    })
}

/// Takes a place in the budget of RAM that all μVMs of a node share, which is `total` from now on, for one that may take
/// at most `limit`.
pub fn join_budget(path: &Path, total: u64, limit: u64) -> Result<Seat, Error> {
    let budget = Budget::open_or_make(path, total).map_err(Error::Budget)?;
    budget.set_total(total);
    budget.join(limit).map_err(Error::Budget)
}

/// What the writable layers of one μVM lie on.
#[derive(Debug, Clone)]
pub struct Scratch {
    /// How much it may take.
    pub limits: ScratchLimits,
    /// What flushes of it do.
    pub flush: Flush,
    /// Where what has no room in RAM goes.
    pub spill: Option<Arc<File>>,
    /// The VMM's place in the node's budget of RAM.
    pub seat: Option<Arc<Seat>>,
}

impl Scratch {
    /// Room for a guest that writes next to nothing, which nothing is spilled of.
    pub fn small() -> Scratch {
        Scratch {
            limits: ScratchLimits {
                disk: 0,
                ..ScratchLimits::default()
            },
            flush: Flush::None,
            spill: None,
            seat: None,
        }
    }

    /// Adds the disk to the machine's ends.
    pub(crate) fn end<'a>(&'a self, ends: &mut Ends<'a>, baked: &'a Baked) {
        let pool = Pool {
            ram: self.limits.ram,
            spill: self.spill.as_deref().map(|file| (file, self.limits.disk)),
            seat: self.seat.as_deref(),
            flush: self.flush,
        };
        let (base, size) = (Some(&baked.scratch), baked.scratch_bytes);
        ends.overlay(slots::SCRATCH, base, size, Some(&pool));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn spill_file_has_no_name_and_its_directory_is_made() {
        let directory = tempfile::tempdir().unwrap();
        let deeper = directory.path().join("a/b");
        let file = spill_file(&deeper).unwrap();
        assert_eq!(file.metadata().unwrap().nlink(), 0);
        assert_eq!(fs::read_dir(&deeper).unwrap().count(), 0);
    }

    #[test]
    fn directory_that_cannot_be_made_is_named() {
        let error = spill_file(Path::new("/proc/none")).unwrap_err();
        assert!(error.to_string().contains("/proc/none"), "{error}");
    }
}
