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

/// Opens a file and takes a lease on it; none if the file isn't there, or is being removed. `limit` bounds the wait for a
/// remover's lock; with none, a locked file counts as gone.
pub(crate) fn hold(path: &Path, limit: Duration) -> Result<Option<(File, Metadata)>, Error> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.context("opening", path)?,
    };
    if limit.is_zero() {
        if !lock::try_shared(&file).context("locking", path)? {
            return Ok(None);
        }
    } else {
        lock::shared(&file, limit)?;
    }
    // The removal may have been quicker than the lock.
    let meta = file.metadata().context("reading", path)?;
    Ok((meta.nlink() > 0).then_some((file, meta)))
}

/// Locks a file that is to be removed: no lease on it exists, and none can be had as long as the result lives. None if
/// it is in use.
pub(crate) fn doom(path: &Path) -> Result<Option<File>, Error> {
    let file = File::open(path).context("opening", path)?;
    let free = lock::try_exclusive(&file).context("locking", path)?;
    Ok(free.then_some(file))
}
