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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::is_zero;
    use crate::testing::{file_of, noise, text, zeroes};
    use proptest::prelude::*;

    #[test]
    fn block_is_found_by_its_content() {
        let image = [noise(1), zeroes(), text(2), noise(1), noise(4)];
        let bytes = ImageIndex::build(&file_of(&image), [3; 32]).unwrap();
        let index = ImageIndex::parse(&bytes).unwrap();
        let found = image.each_ref().map(|page| index.find(page));
        assert_eq!(found, [Some(0), None, Some(2), Some(0), Some(4)]);
        assert_eq!(index.find(&noise(5)), None);
        assert_eq!(index.blocks(), 3);
        let image = Origin {
            id: [3; 32],
            length: 5 * 4096,
        };
        assert_eq!(index.image(), image);
    }

    #[test]
    fn tail_that_is_no_whole_block_is_not_found() {
        let image = [noise(1), noise(2)].concat()[..5000].to_vec();
        let bytes = ImageIndex::build(&image, [3; 32]).unwrap();
        assert_eq!(ImageIndex::parse(&bytes).unwrap().blocks(), 1);
    }

    #[test]
    fn any_flipped_bit_and_any_cut_is_found() {
        let bytes = ImageIndex::build(&file_of(&[noise(1), noise(2)]), [3; 32]).unwrap();
        for at in 0..bytes.len() {
            assert!(ImageIndex::parse(&bytes[..at]).is_err(), "{at} bytes");
            for bit in 0..8 {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1 << bit;
                assert!(
                    ImageIndex::parse(&damaged).is_err(),
                    "bit {bit} of byte {at}"
                );
            }
        }
    }

    /// Bytes of an index with these entries, as an enemy can make them.
    fn forged(entries: &[(u64, u32)]) -> Vec<u8> {
        let mut bytes = ImageIndex::build(&file_of(&[zeroes(), zeroes()]), [3; 32]).unwrap();
        bytes[12..16].copy_from_slice(&(entries.len() as u32).to_le_bytes());
        for (hash, block) in entries {
            bytes.extend(hash.to_le_bytes());
            bytes.extend(block.to_le_bytes());
        }
        let checksum = checksum(&bytes);
        bytes[CHECKSUM].copy_from_slice(checksum.as_bytes());
        bytes
    }

    #[test]
    fn entries_that_no_writer_writes_are_refused() {
        assert!(ImageIndex::parse(&forged(&[(1, 0), (2, 1)])).is_ok());
        for (entries, entry) in [
            (&[(1, 0), (1, 1)][..], 1),
            (&[(2, 0), (1, 1)], 1),
            (&[(1, 2)], 0),
        ] {
            let error = ImageIndex::parse(&forged(entries)).unwrap_err();
            assert_eq!(error, IndexError::Entry { entry });
        }
    }

    proptest! {
        #[test]
        fn all_blocks_of_any_image_are_found(
            kinds in prop::collection::vec((0u8..3, 0u64..20), 0..60),
        ) {
            let pages: Vec<_> = kinds.iter().map(|(kind, number)| match kind {
                0 => zeroes(),
                1 => text(*number),
                _ => noise(*number),
            }).collect();
            let bytes = ImageIndex::build(&file_of(&pages), [3; 32]).unwrap();
            let index = ImageIndex::parse(&bytes).unwrap();
            for page in pages.iter().filter(|page| !is_zero(page)) {
                let block = index.find(page).unwrap();
                prop_assert_eq!(&pages[block as usize], page);
            }
        }
    }
}
