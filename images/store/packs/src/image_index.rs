//! An image's index: finds the block of an image that has a page's content.

use std::io;

use crate::blocks;
use crate::content::{Content, pages_of};
use crate::error::IndexError;
use crate::header::{Fields, Origin};

/// The index format that this code writes and reads.
pub const INDEX_VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"kilnidx\n";
const HEADER: usize = 96;
/// The checksum is over all bytes but its own.
const CHECKSUM: std::ops::Range<usize> = 64..96;
/// Bytes of an entry: hash, block.
const ENTRY: usize = 12;

/// An index, in the bytes of its file: mapped or read.
#[derive(Debug, Clone, Copy)]
pub struct ImageIndex<'a> {
    image: Origin,
    entries: &'a [[u8; ENTRY]],
}

impl<'a> ImageIndex<'a> {
    /// Makes an index's file of an image. `id` is what the caller calls the image, the same as in a pack.
    pub fn build(image: &dyn Content, id: [u8; 32]) -> io::Result<Vec<u8>> {
        let table = blocks::scan(image)?;
        let mut bytes = Vec::with_capacity(HEADER + table.len() * ENTRY);
        bytes.extend(MAGIC);
        bytes.extend(INDEX_VERSION.to_le_bytes());
        bytes.extend((table.len() as u32).to_le_bytes());
        bytes.extend(image.length()?.to_le_bytes());
        bytes.extend([0; 8]);
        bytes.extend(id);
        bytes.extend([0; 32]);
        for (hash, block) in table {
            bytes.extend(hash.to_le_bytes());
            bytes.extend(block.to_le_bytes());
        }
        let checksum = checksum(&bytes);
        bytes[CHECKSUM].copy_from_slice(checksum.as_bytes());
        Ok(bytes)
    }

    /// Reads an index, and checks all of it.
    pub fn parse(bytes: &'a [u8]) -> Result<ImageIndex<'a>, IndexError> {
        let (head, rest) = bytes
            .split_first_chunk::<HEADER>()
            .ok_or(IndexError::NotAnIndex)?;
        let mut fields = Fields(head);
        if fields.array() != MAGIC {
            return Err(IndexError::NotAnIndex);
        }
        let found = fields.u32();
        if found != INDEX_VERSION {
            return Err(IndexError::Version { found });
        }
        let count = fields.u32();
        let length = fields.u64();
        let reserved = fields.u64();
        let image = Origin {
            id: fields.array(),
            length,
        };
        let expected = HEADER as u64 + u64::from(count) * ENTRY as u64;
        let found = bytes.len() as u64;
        if found != expected {
            return Err(IndexError::Length { expected, found });
        }
        if checksum(bytes).as_bytes()[..] != head[CHECKSUM] || reserved != 0 {
            return Err(IndexError::Checksum);
        }
        let (entries, _) = rest.as_chunks::<ENTRY>();
        let blocks = pages_of(length);
        let mut before = None;
        for (number, entry) in entries.iter().enumerate() {
            let (hash, block) = decode(entry);
            if before.is_some_and(|before| before >= hash) || block >= blocks {
                return Err(IndexError::Entry { entry: number });
            }
            before = Some(hash);
        }
        Ok(ImageIndex { image, entries })
    }

    /// The image that the index belongs to.
    pub fn image(&self) -> Origin {
        self.image
    }

    /// How many different blocks the index knows.
    pub fn blocks(&self) -> usize {
        self.entries.len()
    }

    /// The block that may have the content of this page. The caller compares.
    pub fn find(&self, page: &[u8]) -> Option<u32> {
        self.find_hash(blocks::hash_of(page))
    }

    pub(crate) fn find_hash(&self, hash: u64) -> Option<u32> {
        let by_hash = self
            .entries
            .binary_search_by_key(&hash, |entry| decode(entry).0);
        by_hash.ok().map(|found| decode(&self.entries[found]).1)
    }
}

fn checksum(bytes: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[..CHECKSUM.start]);
    hasher.update(&bytes[CHECKSUM.end..]);
    hasher.finalize()
}

fn decode(entry: &[u8; ENTRY]) -> (u64, u32) {
    let mut fields = Fields(entry);
    (fields.u64(), fields.u32())
}
