//! Read-only images of containers' root file systems: one per stack of layers, shared by all processes on the node.
//!
//! ```text
//! images/KEY/{image.erofs,record}   complete images, put here by one rename
//! making/KEY                        taken (flock) to make the image of this key
//! ```
//!
//! An image is made while a pod waits for it, and so it is not synced. Its record holds the stamp of its file when it was
//! finished, and the boot: as long as both still hold, no byte of it has to be read to trust it. A user of an image holds
//! a lease on its file, which follows the descriptor to another process.

mod key;
mod make;
mod record;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};

pub use key::ImageKey;
pub use make::{Making, Turn};
pub use record::SegmentDigest;

use crate::content::boot;
use crate::content::catalogue::{Candidate, Catalogue, Doomed, Survey};
use crate::content::disk::RealDisk;
use crate::content::verify::{Damage, Verified};
use crate::content::{Content, WriteLock, lease};
use crate::error::Context;
use crate::{Digest, Error, Named, Policy, Why};
use record::{Record, Stamp};

const NOUN: &str = "image";
const IMAGE: &str = "image.erofs";
const RECORD: &str = "record";

/// Limit of the wait for another process that makes an image: a large one takes minutes on a slow or throttled node.
const MAKING_WAIT: Duration = Duration::from_secs(600);
/// Limit of the wait for a lock that is held while files are moved and removed. A pod waits.
const WAIT: Duration = Duration::from_secs(30);

/// The images of a store. Several processes may have it open.
#[derive(Debug, Clone)]
pub struct Images {
    content: Content,
    waits: Waits,
}

/// Limits of waiting for locks.
#[derive(Debug, Clone, Copy)]
struct Waits {
    making: Duration,
    rest: Duration,
}

impl Default for Waits {
    fn default() -> Self {
        Waits {
            making: MAKING_WAIT,
            rest: WAIT,
        }
    }
}

/// An image in use. While the file is open, here or in a process it was passed to, the image stays.
#[derive(Debug)]
pub struct Image {
    /// Where the image lies.
    pub path: PathBuf,
    /// The image, open for reading.
    pub file: File,
    /// Its name.
    pub key: ImageKey,
    /// The digest of its content.
    pub content: Digest,
    /// Whether it had to be made.
    pub made: bool,
}

/// An image in the store.
#[derive(Debug)]
pub struct ImageEntry {
    /// Its name: what identifies the layers that it was made of.
    pub key: ImageKey,
    /// Length in bytes.
    pub length: u64,
    /// Bytes on disk.
    pub bytes: u64,
    /// When a lease on it was last taken, in seconds since 1970.
    pub used_at: u64,
    /// The digest of its content, if its record is good.
    pub content: Option<Digest>,
    /// Whether it survives a power cut without being read again.
    pub synced: bool,
}

impl Images {
    /// The images of the store at `root`. Nothing is touched before something is asked for, and the store is made when
    /// something has to be put there.
    pub fn at(root: impl Into<PathBuf>) -> Images {
        Images::of(Content::at(root.into(), Arc::new(RealDisk)))
    }

    pub(crate) fn of(content: Content) -> Images {
        Images {
            content,
            waits: Waits::default(),
        }
    }

    /// The image of `key`, if it is there and surely the one that was made. Never reads the image.
    pub fn lookup(&self, key: &ImageKey) -> Result<Option<Image>, Error> {
        let Some((image, record)) = self.take(key)? else {
            return Ok(None);
        };
        let trusted = record.synced || record.boot == boot_id()?;
        let meta = image.file.metadata().context("reading", &image.path)?;
        Ok((trusted && Stamp::of(&meta) == record.stamp).then_some(image))
    }

    /// The images, least recently used first.
    pub fn entries(&self) -> Result<Vec<ImageEntry>, Error> {
        let ids = self.ids()?.into_iter();
        // One may go while we look.
        let mut entries: Vec<_> = ids.filter_map(|id| self.entry(&id.into())).collect();
        entries.sort_unstable_by_key(|entry| (entry.used_at, entry.key.clone()));
        Ok(entries)
    }

    /// The entry of an image, if it is there.
    pub fn entry(&self, key: &ImageKey) -> Option<ImageEntry> {
        let dir = self.dir(key);
        let meta = fs::metadata(&dir).ok()?;
        let image = fs::metadata(dir.join(IMAGE)).ok();
        let record = self.record(key);
        Some(ImageEntry {
            key: key.clone(),
            length: image.as_ref().map_or(0, fs::Metadata::len),
            bytes: image.map_or(0, |image| image.blocks() * 512),
            used_at: meta.mtime().cast_unsigned(),
            content: record.as_ref().map(|record| record.digest.into()),
            synced: record.is_some_and(|record| record.synced),
        })
    }

    /// Makes the image of `key` survive a power failure without being read again. Not for the start path: it waits for
    /// the disk. An image that was never synced is hashed before its first use after a boot.
    pub fn sync(&self, key: &ImageKey) -> Result<(), Error> {
        let _lock = self.lock_key(key)?;
        let Some((image, mut record)) = self.take(key)? else {
            return Ok(());
        };
        let meta = image.file.metadata().context("reading", &image.path)?;
        if record.synced || Stamp::of(&meta) != record.stamp || record.boot != boot_id()? {
            return Ok(());
        }
        let dir = self.dir(key);
        image.file.sync_all().context("syncing", &image.path)?;
        record.synced = true;
        self.write_record(&dir, &record)?;
        for path in [dir.join(RECORD), dir, self.all()] {
            self.content
                .disk
                .sync_dir(&path)
                .context("syncing", &path)?;
        }
        Ok(())
    }

    /// Opens an image with a lease on it, and its record.
    fn take(&self, key: &ImageKey) -> Result<Option<(Image, Record)>, Error> {
        let dir = self.dir(key);
        let path = dir.join(IMAGE);
        let Some((file, _)) = lease::hold(&path, self.waits.rest)? else {
            return Ok(None);
        };
        let Some(record) = self.record(key) else {
            return Ok(None);
        };
        touch(&dir).context("noting the use of", &dir)?;
        let image = Image {
            path,
            file,
            key: key.clone(),
            content: record.digest.into(),
            made: false,
        };
        Ok(Some((image, record)))
    }

    fn record(&self, key: &ImageKey) -> Option<Record> {
        let bytes = fs::read(self.dir(key).join(RECORD)).ok()?;
        Record::decode(&bytes)
    }

    fn write_record(&self, dir: &Path, record: &Record) -> Result<(), Error> {
        let (fresh, path) = (dir.join("record.new"), dir.join(RECORD));
        let disk = &self.content.disk;
        self.content.remove_if_there(&fresh)?;
        disk.write_new(&fresh, &record.encode())
            .context("writing", &fresh)?;
        if record.synced {
            disk.sync_file(&fresh).context("syncing", &fresh)?;
        }
        disk.rename(&fresh, &path).context("writing", &path)
    }

    fn all(&self) -> PathBuf {
        self.content.root.join("images")
    }

    fn dir(&self, key: &ImageKey) -> PathBuf {
        self.all().join(key.to_string())
    }
}

impl Catalogue for Images {
    fn noun(&self) -> &'static str {
        NOUN
    }

    fn is_remade(&self) -> bool {
        true
    }

    fn ids(&self) -> Result<Vec<Digest>, Error> {
        let all = self.all();
        let mut ids = Vec::new();
        for found in fs::read_dir(&all).context("reading", &all)? {
            let name = found.context("reading", &all)?.file_name();
            ids.extend(name.to_str().and_then(|name| name.parse::<Digest>().ok()));
        }
        Ok(ids)
    }

    fn survey(&self, policy: Policy) -> Result<Survey, Error> {
        let entries = self.entries()?.into_iter().map(|entry| Candidate {
            id: entry.key.digest(),
            why: match entry.content {
                _ if policy.all => Some(Why::All),
                Some(_) => None,
                None => Some(Why::Unusable),
            },
            stays: false,
            used_at: entry.used_at,
            objects: Vec::new(),
            parents: Vec::new(),
            bytes: entry.bytes,
        });
        Ok(Survey {
            entries: entries.collect(),
            unreadable: Vec::new(),
        })
    }

    /// An image is a file of its own.
    fn needed(&self) -> Result<Option<BTreeSet<Digest>>, Error> {
        Ok(Some(BTreeSet::new()))
    }

    fn is_pinned(&self, _id: &Digest) -> bool {
        false
    }

    /// An image is whole by itself.
    fn children(&self, _id: &Digest) -> Result<Vec<Digest>, Error> {
        Ok(Vec::new())
    }

    fn doom(&self, id: Digest) -> Result<Option<Doomed>, Error> {
        let path = self.dir(&id.into()).join(IMAGE);
        let doomed = |lock| Doomed { id, _lock: lock };
        match lease::doom(&path) {
            Ok(lock) => Ok(lock.map(|file| doomed(Some(file)))),
            // A removal was interrupted there.
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(Some(doomed(None)))
            }
            Err(error) => Err(error),
        }
    }

    /// The record goes first: an image without one is not used. A process that has opened the file meanwhile waits for the
    /// lock, and then sees that the file is gone.
    fn remove(&self, doomed: Doomed, _lock: &WriteLock) -> Result<(), Error> {
        let dir = self.dir(&doomed.id.into());
        self.content.remove_if_there(&dir.join(RECORD))?;
        self.content.remove_tree(&dir)
    }

    fn settle(&self, lock: &WriteLock) {
        // They are empty.
        let _ = make::sweep_locks(&self.content, lock);
    }

    fn verify(&self, only: &[Digest], report: &mut Verified) -> Result<(), Error> {
        for id in self.ids()? {
            if !only.is_empty() && !only.contains(&id) {
                continue;
            }
            let key = ImageKey::from(id);
            let path = self.dir(&key).join(IMAGE);
            let Some((file, meta)) = lease::hold(&path, self.waits.rest)? else {
                continue;
            };
            // One without a good record is never used.
            let Some(record) = self.record(&key) else {
                continue;
            };
            let of = Named { kind: NOUN, id };
            let (part, object) = (NOUN, Digest::from(record.digest));
            match record.matches(&file) {
                Ok(true) => {}
                Ok(false) => report.damage.push(Damage::Content { of, part, object }),
                Err(source) => report.damage.push(Damage::Unreadable {
                    of,
                    part,
                    object,
                    source,
                }),
            }
            report.images += 1;
            report.objects += 1;
            report.data += meta.len();
        }
        Ok(())
    }
}

/// Notes that the image in this directory is used: its own times are what its record knows.
fn touch(dir: &Path) -> io::Result<()> {
    let time = |nsec| Timespec {
        tv_sec: 0,
        tv_nsec: nsec,
    };
    let times = Timestamps {
        last_access: time(UTIME_OMIT),
        last_modification: time(UTIME_NOW),
    };
    rustix::fs::utimensat(CWD, dir, &times, AtFlags::empty()).map_err(io::Error::from)
}

fn boot_id() -> Result<[u8; 16], Error> {
    let hex: String = boot::id()?.chars().filter(|c| *c != '-').collect();
    u128::from_str_radix(&hex, 16)
        .map(u128::to_be_bytes)
        .map_err(io::Error::other)
        .context("understanding the boot id of", Path::new("/proc/sys"))
}

#[cfg(test)]
mod tests;
