//! Making an image that is missing: one process does, the others wait for it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::record::{Record, SegmentDigest, Stamp};
use super::{IMAGE, Image, ImageKey, Images, boot_id};
use crate::content::catalogue::{Catalogue, Doomed};
use crate::content::room::evict_one;
use crate::content::staging::StagingDir;
use crate::content::{Content, WriteLock, lease, lock};
use crate::error::Context;
use crate::{Error, Store};

/// Answer to a process that needs an image.
#[derive(Debug)]
pub enum Turn {
    /// It is there.
    There(Image),
    /// It has to be made, and nobody else does.
    Make(Making),
}

/// An image in the making, which nobody else makes meanwhile. Dropping it throws it away.
#[derive(Debug)]
pub struct Making {
    images: Images,
    key: ImageKey,
    staging: StagingDir,
    // Dropped last: a process that waits for it finds everything else done.
    _lock: KeyLock,
}

/// Subdirectory of the staging directory that becomes the image's own.
const FINISHED: &str = "finished";

impl Images {
    /// The image of `key`, or the turn to make it. When several processes ask at once, one gets the turn, and the others
    /// wait until the image is there.
    pub fn turn(&self, key: &ImageKey) -> Result<Turn, Error> {
        // The store is made if need be.
        Store::create_with(self.content.root.clone(), self.content.disk.clone())?;
        let key_lock = self.lock_key(key)?;
        // Someone else may have made it meanwhile; or it is there, and only has to be read again.
        if let Some(image) = self.lookup(key)? {
            return Ok(Turn::There(image));
        }
        if let Some(image) = self.verify_again(key)? {
            return Ok(Turn::There(image));
        }
        let write_lock = self.content.write_lock(self.waits.rest)?;
        let staging = self.content.stage(&write_lock)?;
        sweep_locks(&self.content, &write_lock)?;
        Ok(Turn::Make(Making {
            images: self.clone(),
            key: key.clone(),
            staging,
            _lock: key_lock,
        }))
    }

    /// An image that is there but may not be what it was: reads it, and keeps it if it is. Needs the key's lock.
    fn verify_again(&self, key: &ImageKey) -> Result<Option<Image>, Error> {
        let dir = self.dir(key);
        if !dir.exists() {
            return Ok(None);
        }
        let _span = tracing::info_span!("image-verify").entered();
        if let Some((image, mut record)) = self.take(key)? {
            let meta = image.file.metadata().context("reading", &image.path)?;
            if record
                .matches(&image.file)
                .context("reading", &image.path)?
            {
                // Not known to be on the disk any more: its pages may be dirty.
                (record.boot, record.synced) = (boot_id()?, false);
                record.stamp = Stamp::of(&meta);
                self.write_record(&dir, &record)?;
                return Ok(Some(image));
            }
            tracing::warn!(%key, "an image is damaged and is made again");
        }
        let write_lock = self.content.write_lock(self.waits.rest)?;
        // Its users keep their open files; nobody else finds it any more.
        let doomed = Doomed {
            id: key.digest(),
            _lock: None,
        };
        self.remove(doomed, &write_lock)?;
        Ok(None)
    }

    pub(super) fn lock_key(&self, key: &ImageKey) -> Result<KeyLock, Error> {
        let path = self.content.root.join("making").join(key.to_string());
        KeyLock::take(&path, self.waits.making)
    }
}

impl Making {
    /// A directory for intermediate files. It goes away with this.
    pub fn dir(&self) -> &Path {
        &self.staging.path
    }

    /// The file to write the image to, with `length` bytes reserved, so that no write fails later for want of room. Other
    /// images go for the budget, and more if the disk is full. The budget bends rather than let a pod fail.
    pub fn reserve(&self, length: u64) -> Result<File, Error> {
        let content = &self.images.content;
        let finished = self.staging.path.join(FINISHED);
        content
            .disk
            .create_dir(&finished)
            .context("making", &finished)?;
        let path = finished.join(IMAGE);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .context("making", &path)?;
        let lock = content.write_lock(self.images.waits.rest)?;
        let images: [Box<dyn Catalogue>; 1] = [Box::new(self.images.clone())];
        let usage = content.make_room(length, &images, &lock)?;
        if usage.exceeded_by(length) {
            tracing::warn!(
                budget = usage.budget,
                needed = usage.used.saturating_add(length),
                "what is in use exceeds the store's budget"
            );
        }
        loop {
            match content.disk.reserve(&file, length) {
                Ok(()) => break,
                Err(error) if is_full(&error) => {
                    if !evict_one(&images, &lock)? {
                        return Err(self.no_space(length));
                    }
                }
                Err(error) => return Err(error).context("reserving space for", &path),
            }
        }
        Ok(file)
    }

    /// The error for a disk that turned out to be full after all.
    pub fn no_space(&self, needed: u64) -> Error {
        Error::NoSpace {
            needed,
            root: self.images.content.root.clone(),
        }
    }

    /// Puts the written image in place; a later write to the file would make it useless. Nothing is synced: a pod waits.
    pub fn finish(self, digest: [u8; 32], segments: Vec<SegmentDigest>) -> Result<Image, Error> {
        let (images, disk) = (&self.images, &self.images.content.disk);
        let finished = self.staging.path.join(FINISHED);
        let temporary = finished.join(IMAGE);
        let gone = || io::Error::from(io::ErrorKind::NotFound);
        let (file, meta) = lease::hold(&temporary, images.waits.rest)?
            .ok_or_else(gone)
            .context("opening", &temporary)?;
        let record = Record {
            boot: boot_id()?,
            synced: false,
            stamp: Stamp::of(&meta),
            digest,
            segments,
        };
        images.write_record(&finished, &record)?;
        let dir = images.dir(&self.key);
        disk.rename(&finished, &dir).context("entering", &dir)?;
        Ok(Image {
            path: dir.join(IMAGE),
            file,
            key: self.key.clone(),
            content: digest.into(),
            made: true,
        })
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// The lock of a key, in a file that goes with it.
#[derive(Debug)]
pub(super) struct KeyLock {
    path: PathBuf,
    _file: File,
}

impl KeyLock {
    fn take(path: &Path, limit: Duration) -> Result<KeyLock, Error> {
        let end = Instant::now() + limit;
        loop {
            let file = KeyLock::open(path)?;
            lock::exclusive(&file, end.saturating_duration_since(Instant::now()))?;
            if let Some(taken) = KeyLock::of(file, path)? {
                return Ok(taken);
            }
        }
    }

    fn try_take(path: &Path) -> Result<Option<KeyLock>, Error> {
        let file = KeyLock::open(path)?;
        if !lock::try_exclusive(&file).context("locking", path)? {
            return Ok(None);
        }
        KeyLock::of(file, path)
    }

    /// A file that was removed meanwhile locks nothing.
    fn of(file: File, path: &Path) -> Result<Option<KeyLock>, Error> {
        let meta = file.metadata().context("reading", path)?;
        Ok((meta.nlink() > 0).then(|| KeyLock {
            path: path.to_owned(),
            _file: file,
        }))
    }

    fn open(path: &Path) -> Result<File, Error> {
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .context("opening", path)
    }
}

impl Drop for KeyLock {
    fn drop(&mut self) {
        // Still locked. One that stays is removed by who makes an image next.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Removes the lock files of makers that were killed.
pub(super) fn sweep_locks(content: &Content, _lock: &WriteLock) -> Result<(), Error> {
    let dir = content.root.join("making");
    for found in std::fs::read_dir(&dir).context("reading", &dir)? {
        let path = found.context("reading", &dir)?.path();
        // Taken, it goes again, and its file with it.
        drop(KeyLock::try_take(&path)?);
    }
    Ok(())
}
