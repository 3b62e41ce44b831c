//! Leases: shared `flock`s on files of the store. A writer that removes a file takes the exclusive one first.
//!
//! The kernel drops a lease with its last descriptor, so a holder that is killed holds nothing, and a process that is
//! passed a descriptor holds the file as well.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use super::lock;
use crate::Error;
use crate::error::Context;

/// Opens a file and takes a lease on it; none if the file isn't there, or is removed meanwhile. `limit` bounds the wait for
/// a remover's lock.
pub(crate) fn hold(path: &Path, limit: Duration) -> Result<Option<(File, Metadata)>, Error> {
    let Some(file) = open(path)? else {
        return Ok(None);
    };
    let held = hold_open(&file, path, limit)?;
    Ok(held.map(|meta| (file, meta)))
}

/// Opens a file that a lease is to be taken on; none if it isn't there.
pub(crate) fn open(path: &Path) -> Result<Option<File>, Error> {
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.context("opening", path).map(Some),
    }
}

/// Takes a lease on an open file; none if it was removed meanwhile. `limit` is that of [`hold`].
pub(crate) fn hold_open(
    file: &File,
    path: &Path,
    limit: Duration,
) -> Result<Option<Metadata>, Error> {
    lock::shared(file, limit)?;
    // The removal may have been quicker than the lock.
    let meta = file.metadata().context("reading", path)?;
    Ok((meta.nlink() > 0).then_some(meta))
}

/// Locks a file that is to be removed: no lease on it exists, and none can be had as long as the result lives. None if
/// it is in use.
pub(crate) fn doom(path: &Path) -> Result<Option<File>, Error> {
    let file = File::open(path).context("opening", path)?;
    let free = lock::try_exclusive(&file).context("locking", path)?;
    Ok(free.then_some(file))
}
