//! The index, by which a μVM is picked without reading the manifests.
//!
//! ```text
//! 0   magic, with the version                           8
//! 8   slots of the table, records of all groups          4 each
//! 16  stamp of uvms/: inode, seconds, nanoseconds        8 each
//! 40  zeros                                              8
//! 48  first half of the BLAKE3 digest of all that       16
//! 64  the table: slots, empty ones all zeros            64 each
//!       0   key of a group                              32
//!       32  where its records are                        8
//!       40  how many                                     4
//!       44  zeros                                        4
//!       48  first half of the BLAKE3 digest of all that, and of the records
//! …   records, in the order of preference               56 each
//!       0   vCPUs, MiB of memory it can grow to          4 each
//!       8   vCPUs, MiB of memory it begins with          4 each
//!       16  1 if it has a scratch disk                   4
//!       20  edition                                      4
//!       24  the μVM                                     32
//! ```
//!
//! A group holds the μVMs that resume on the same hosts. Its key gives the slot in which the search begins; the search
//! ends at an empty slot. A μVM is left out if one that is preferred to it meets every requirement that it meets: it is never
//! picked. So a group is short, however many μVMs there are, and a pick reads three places of one file.
//!
//! The index can't disagree with the manifests unnoticed. A writer removes it before it changes `uvms/`, and writes it anew
//! from the manifests afterwards, both under the writers' lock. A change by any other program changes the directory's
//! stamp. Each part that is read has a digest. An index that is missing, stale or damaged is not used, and the manifest
//! that it names is read and checked in any case.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use super::pick::{Extent, Traits, in_order};
use super::{Host, Manifest, Uvms, Wanted};
use crate::content::WriteLock;
use crate::content::catalogue::Catalogue;
use crate::error::Context;
use crate::{Digest, Error};

const MAGIC: [u8; 8] = *b"KILNIDX\x02";
const KEY_CONTEXT: &str = "kiln 2026-11-30 store index: protocol, CPU";
const HEADER: usize = 64;
const SLOT: usize = 64;
const RECORD: usize = 56;
/// Slots that are read at once: a table is half full at most.
const PROBE: usize = 4;

/// Tells one state of the directory of manifests from the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    inode: u64,
    seconds: i64,
    nanoseconds: i64,
}

/// Answer of the index.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// The μVM that is picked.
    This(Digest),
    /// No μVM fits.
    None,
    /// There is no index that can be relied on.
    Nothing,
}

impl Traits {
    /// Whether this one, which comes first, is picked wherever the other one would be.
    fn hides(&self, other: &Traits) -> bool {
        self.most.cpus >= other.most.cpus
            && self.most.memory_mib >= other.most.memory_mib
            && self.scratch >= other.scratch
            && (self.edition != other.edition || self.first == other.first)
    }
}

fn encode_record((id, traits): &(Digest, Traits), to: &mut Vec<u8>) {
    for Extent { cpus, memory_mib } in [traits.most, traits.first] {
        to.extend(cpus.to_le_bytes());
        to.extend(memory_mib.to_le_bytes());
    }
    to.extend(u32::from(traits.scratch).to_le_bytes());
    to.extend(traits.edition.to_le_bytes());
    to.extend(id.as_bytes());
}

fn decode_record(bytes: &[u8; RECORD]) -> (Digest, Traits) {
    let extent = |at| Extent {
        cpus: word(bytes, at),
        memory_mib: word(bytes, at + 4),
    };
    let mut id = [0; 32];
    id.copy_from_slice(&bytes[24..]);
    let traits = Traits {
        most: extent(0),
        first: extent(8),
        scratch: word(bytes, 16) != 0,
        edition: word(bytes, 20),
    };
    (id.into(), traits)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) | u64::from(word(bytes, at + 4)) << 32
}

fn check(parts: &[&[u8]]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    let mut half = [0; 16];
    half.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    half
}

/// Key of the group that resumes on this host.
fn key_of(host: &Host) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key(KEY_CONTEXT);
    hasher.update(&host.protocol.to_le_bytes());
    for word in host.cpu.0 {
        hasher.update(&word.to_le_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// The slot in which the search for a group begins.
fn slot_of(key: &[u8], slots: u32) -> u64 {
    long(key, 0) % u64::from(slots.max(1))
}

/// The index of these μVMs, the newest of which comes first.
pub(super) fn encode<'a>(
    stamp: Stamp,
    uvms: impl Iterator<Item = (Digest, &'a Manifest)>,
) -> Vec<u8> {
    let mut groups: BTreeMap<[u8; 32], Vec<(Digest, Traits)>> = BTreeMap::new();
    for (id, manifest) in uvms.filter(|(_, manifest)| !manifest.is_saved()) {
        let host = Host {
            cpu: manifest.about.cpu.features,
            protocol: manifest.about.protocol,
        };
        let group = groups.entry(key_of(&host)).or_default();
        group.push((id, Traits::of(manifest)));
    }
    for group in groups.values_mut() {
        in_order(group);
        let mut kept: Vec<(Digest, Traits)> = Vec::new();
        for (id, traits) in group.drain(..) {
            if !kept.iter().any(|(_, first)| first.hides(&traits)) {
                kept.push((id, traits));
            }
        }
        *group = kept;
    }
    let slots = u32::try_from(groups.len() * 2).unwrap_or(u32::MAX).max(2);
    let mut table: Vec<Option<&[u8; 32]>> = vec![None; slots as usize];
    let mut places = BTreeMap::new();
    for key in groups.keys() {
        let mut at = slot_of(key, slots) as usize;
        while table.get(at).is_some_and(Option::is_some) {
            at += 1;
        }
        table.resize(table.len().max(at + 1), None);
        table[at] = Some(key);
        places.insert(key, at);
    }
    // After the last slot in use there is an empty one, and no read of several goes beyond the table.
    table.resize(table.len() + PROBE, None);

    let mut bytes = vec![0; HEADER + table.len() * SLOT];
    let mut all = 0u32;
    for (key, group) in &groups {
        let (offset, count) = (bytes.len() as u64, group.len() as u32);
        let mut records = Vec::with_capacity(group.len() * RECORD);
        group
            .iter()
            .for_each(|one| encode_record(one, &mut records));
        let mut slot = Vec::with_capacity(SLOT);
        slot.extend(key);
        slot.extend(offset.to_le_bytes());
        slot.extend(count.to_le_bytes());
        slot.extend([0; 4]);
        slot.extend(check(&[&slot, &records]));
        let at = HEADER + places[key] * SLOT;
        bytes[at..at + SLOT].copy_from_slice(&slot);
        bytes.extend(records);
        all += count;
    }
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&slots.to_le_bytes());
    bytes[12..16].copy_from_slice(&all.to_le_bytes());
    bytes[16..24].copy_from_slice(&stamp.inode.to_le_bytes());
    bytes[24..32].copy_from_slice(&stamp.seconds.to_le_bytes());
    bytes[32..40].copy_from_slice(&stamp.nanoseconds.to_le_bytes());
    let half = check(&[&bytes[..48]]);
    bytes[48..64].copy_from_slice(&half);
    bytes
}

fn wrong() -> io::Error {
    io::ErrorKind::InvalidData.into()
}

/// Number of slots and of all records. An error says that the file is no index, or the index of another state of the
/// directory.
fn open(file: &File, now: Stamp) -> io::Result<(u32, u32)> {
    let mut header = [0; HEADER];
    file.read_exact_at(&mut header, 0)?;
    let stamp = Stamp {
        inode: long(&header, 16),
        seconds: long(&header, 24).cast_signed(),
        nanoseconds: long(&header, 32).cast_signed(),
    };
    if header[..8] != MAGIC || check(&[&header[..48]]) != header[48..] || stamp != now {
        return Err(wrong());
    }
    Ok((word(&header, 8), word(&header, 12)))
}

/// The μVM that is picked, by an open index.
fn ask(file: &File, now: Stamp, host: &Host, wanted: &Wanted) -> io::Result<Option<Digest>> {
    let (slots, records) = open(file, now)?;
    let key = key_of(host);
    let mut at = HEADER as u64 + slot_of(&key, slots) * SLOT as u64;
    loop {
        let mut read = [0; PROBE * SLOT];
        file.read_exact_at(&mut read, at)?;
        for slot in read.as_chunks::<SLOT>().0 {
            if slot[..32] == key {
                let count = word(slot, 40);
                if count > records {
                    return Err(wrong());
                }
                let mut group = vec![0; count as usize * RECORD];
                file.read_exact_at(&mut group, long(slot, 32))?;
                if check(&[&slot[..48], &group]) != slot[48..] {
                    return Err(wrong());
                }
                let group = group.as_chunks::<RECORD>().0.iter();
                return Ok(wanted.nearest(group.map(decode_record)));
            }
            if *slot == [0; SLOT] {
                return Ok(None);
            }
        }
        at += read.len() as u64;
    }
}

impl Uvms {
    fn index_path(&self) -> PathBuf {
        self.content.root.join("index")
    }

    /// The present stamp of the directory of manifests.
    pub(super) fn stamp(&self) -> Result<Stamp, Error> {
        let dir = self.dir();
        let meta = fs::metadata(&dir).context("reading", &dir)?;
        Ok(Stamp {
            inode: meta.ino(),
            seconds: meta.mtime(),
            nanoseconds: meta.mtime_nsec(),
        })
    }

    pub(super) fn ask_index(&self, host: &Host, wanted: &Wanted) -> Result<Said, Error> {
        let Ok(file) = File::open(self.index_path()) else {
            return Ok(Said::Nothing);
        };
        Ok(match ask(&file, self.stamp()?, host, wanted) {
            Ok(Some(id)) => Said::This(id),
            Ok(None) => Said::None,
            Err(_) => Said::Nothing,
        })
    }

    /// Removes the index. Called before every change of the manifests.
    pub(super) fn forget_index(&self, _lock: &WriteLock) -> Result<(), Error> {
        if self.content.remove_if_there(&self.index_path())? {
            // A power cut must not bring it back beside manifests that it does not know.
            let root = &self.content.root;
            self.content.disk.sync_dir(root).context("syncing", root)?;
        }
        Ok(())
    }

    /// Writes the index anew, unless it is good. Called after every change of the manifests; a failure costs picks time and
    /// nothing else.
    pub(super) fn renew_index(&self, lock: &WriteLock) {
        let renewed = self.stamp().and_then(|stamp| {
            if self.index_is_of(stamp) {
                return Ok(());
            }
            self.write_index(stamp, &self.readable()?, lock)
        });
        if let Err(error) = renewed {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "no index of the μVMs"
            );
        }
    }

    /// The same by a reader that found no index and has read all manifests. It does not wait for a writer at work.
    pub(super) fn mend_index(
        &self,
        stamp: Stamp,
        uvms: &[(Digest, Manifest)],
        all: &BTreeSet<Digest>,
    ) {
        let mended = self.content.try_write_lock().and_then(|lock| {
            let Some(lock) = lock else {
                return Ok(());
            };
            // Only if the manifests are still the ones that were read.
            let there: BTreeSet<Digest> = self.ids()?.into_iter().collect();
            if self.stamp()? != stamp || there != *all {
                return Ok(());
            }
            self.write_index(stamp, uvms, &lock)
        });
        if let Err(error) = mended {
            tracing::debug!(
                error = &error as &dyn std::error::Error,
                "no index of the μVMs"
            );
        }
    }

    fn index_is_of(&self, stamp: Stamp) -> bool {
        File::open(self.index_path()).is_ok_and(|file| open(&file, stamp).is_ok())
    }

    /// The file is not synced: if a power cut leaves half of it, its digests are wrong.
    fn write_index(
        &self,
        stamp: Stamp,
        uvms: &[(Digest, Manifest)],
        _lock: &WriteLock,
    ) -> Result<(), Error> {
        let bytes = encode(stamp, uvms.iter().map(|(id, manifest)| (*id, manifest)));
        let fresh = self.content.root.join("tmp/index.new");
        self.content.remove_if_there(&fresh)?;
        let disk = &self.content.disk;
        disk.write_new(&fresh, &bytes).context("writing", &fresh)?;
        let path = self.index_path();
        disk.rename(&fresh, &path).context("writing", &path)
    }
}

#[cfg(test)]
mod tests;
