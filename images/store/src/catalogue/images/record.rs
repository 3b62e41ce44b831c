//! The record beside an image: enough to tell that the image is the one that was made.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

/// A part of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentDigest {
    /// Length in bytes. Segments follow one another without gaps.
    pub len: u64,
    /// BLAKE3 of the bytes.
    pub hash: [u8; 32],
}

/// Changes with the record's layout, and with anything about images that makes older ones unusable.
const MAGIC: &[u8; 8] = b"KILNIMG1";
const SEGMENT_LEN: usize = 40;
const HASH_LEN: usize = 32;

/// Size, inode and times of an image's file when it was finished. Any later write changes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    size: u64,
    ino: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl Stamp {
    pub(super) fn of(meta: &Metadata) -> Stamp {
        Stamp {
            size: meta.size(),
            ino: meta.ino(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            ctime: (meta.ctime(), meta.ctime_nsec()),
        }
    }

    fn fields(&self) -> [[u8; 8]; 6] {
        [
            self.size.to_le_bytes(),
            self.ino.to_le_bytes(),
            self.mtime.0.to_le_bytes(),
            self.mtime.1.to_le_bytes(),
            self.ctime.0.to_le_bytes(),
            self.ctime.1.to_le_bytes(),
        ]
    }
}

/// ```text
/// 0   magic, with the version        8
/// 8   boot in which it was written  16
/// 24  1 if the image was synced      8
/// 32  stamp: six numbers            48
/// 80  digest of the image           32
/// 112 segments: length, BLAKE3      40 each
/// end BLAKE3 of all that            32
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    /// The machine may have crashed since an earlier boot.
    pub(super) boot: [u8; 16],
    pub(super) synced: bool,
    pub(super) stamp: Stamp,
    pub(super) digest: [u8; 32],
    pub(super) segments: Vec<SegmentDigest>,
}

const FIXED_LEN: usize = 8 + 16 + 8 + 48 + 32;

impl Record {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(FIXED_LEN + SEGMENT_LEN * self.segments.len() + HASH_LEN);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&self.boot);
        out.extend_from_slice(&u64::from(self.synced).to_le_bytes());
        for field in self.stamp.fields() {
            out.extend_from_slice(&field);
        }
        out.extend_from_slice(&self.digest);
        for segment in &self.segments {
            out.extend_from_slice(&segment.len.to_le_bytes());
            out.extend_from_slice(&segment.hash);
        }
        let hash = blake3::hash(&out);
        out.extend_from_slice(hash.as_bytes());
        out
    }

    /// `None` for anything but a whole record of this version.
    pub(super) fn decode(bytes: &[u8]) -> Option<Record> {
        let (body, hash) = bytes.split_last_chunk::<HASH_LEN>()?;
        if blake3::hash(body).as_bytes() != hash || body.len() < FIXED_LEN {
            return None;
        }
        let (fixed, segments) = body.split_at(FIXED_LEN);
        if !fixed.starts_with(MAGIC) || segments.len() % SEGMENT_LEN != 0 {
            return None;
        }
        let number = |at: usize| {
            fixed
                .get(at..at + 8)?
                .try_into()
                .ok()
                .map(u64::from_le_bytes)
        };
        let signed = |at: usize| {
            fixed
                .get(at..at + 8)?
                .try_into()
                .ok()
                .map(i64::from_le_bytes)
        };
        Some(Record {
            boot: fixed.get(8..24)?.try_into().ok()?,
            synced: number(24)? == 1,
            stamp: Stamp {
                size: number(32)?,
                ino: number(40)?,
                mtime: (signed(48)?, signed(56)?),
                ctime: (signed(64)?, signed(72)?),
            },
            digest: fixed.get(80..112)?.try_into().ok()?,
            segments: segments
                .chunks_exact(SEGMENT_LEN)
                .map(|segment| {
                    Some(SegmentDigest {
                        len: u64::from_le_bytes(segment.get(..8)?.try_into().ok()?),
                        hash: segment.get(8..)?.try_into().ok()?,
                    })
                })
                .collect::<Option<_>>()?,
        })
    }

    /// Reads the whole image and compares every byte's hash.
    pub(super) fn matches(&self, image: &File) -> io::Result<bool> {
        let mut buffer = vec![0; 256 * 1024];
        let mut at = 0;
        for segment in &self.segments {
            let mut hasher = blake3::Hasher::new();
            let end = at + segment.len;
            while at < end {
                let len = usize::try_from(end - at)
                    .unwrap_or(usize::MAX)
                    .min(buffer.len());
                let read = image.read_at(&mut buffer[..len], at)?;
                if read == 0 {
                    return Ok(false);
                }
                hasher.update(&buffer[..read]);
                at += read as u64;
            }
            if hasher.finalize().as_bytes() != &segment.hash {
                return Ok(false);
            }
        }
        Ok(at == image.metadata()?.size())
    }
}
