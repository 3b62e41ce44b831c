//! The disk of a μVM's writable layers, as whoever resumes one gives it: an overlay, with a file to spill to.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::api::{BudgetSeat, End, FdIndex, Flush, Overlay, OverlayPool};

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

impl End {
    /// The overlay over the scratch disk of a baked μVM, `base`, which is `size` bytes long.
    pub fn scratch(
        base: FdIndex,
        size: u64,
        spill: Option<FdIndex>,
        budget: Option<BudgetSeat>,
        limits: ScratchLimits,
    ) -> End {
        End::Overlay(Overlay {
            base: Some(base),
            size,
            pool: Some(OverlayPool {
                ram: limits.ram,
                spill,
                spill_limit: limits.disk,
                budget,
                flush: Flush::None,
            }),
        })
    }

    /// The same overlay with what its flushes do.
    #[must_use]
    pub fn flushing(mut self, flush: Flush) -> End {
        if let End::Overlay(Overlay {
            pool: Some(pool), ..
        }) = &mut self
        {
            pool.flush = flush;
        }
        self
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
