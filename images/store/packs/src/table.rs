//! The frame table: where each frame lies, how it is coded, and what it must be.

use crate::error::{Error, TableFault};
use crate::header::{Fields, Limits};
use crate::{FRAME_PAGES, PAGE, ShortDigest, WINDOW_PAGES};

/// Bytes of an entry.
pub(crate) const ENTRY_BYTES: usize = 44;

const RAW: u8 = 0;
const ZSTD: u8 = 1;
const ZSTD_WITH_PREFIX: u8 = 2;

/// Part of a parent's flat memory that a frame is compressed against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Number of the parent.
    pub parent: u16,
    /// First page.
    pub page: u32,
    /// How many: at most [`WINDOW_PAGES`].
    pub pages: u8,
}

/// How a frame's pages are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coding {
    /// As they are.
    Raw,
    /// As a zstd frame.
    Zstd,
    /// As a zstd frame that refers to a parent's pages.
    ZstdWithPrefix(Window),
}

/// A frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameEntry {
    /// Where it begins, from the first frame on.
    pub offset: u64,
    /// Bytes stored.
    pub stored: u32,
    /// Literal pages it holds.
    pub pages: u32,
    /// How they are stored.
    pub coding: Coding,
    /// First half of the BLAKE3 digest of the pages.
    pub raw_digest: [u8; 16],
    /// First half of the BLAKE3 digest of the stored bytes.
    pub stored_digest: [u8; 16],
}

impl FrameEntry {
    /// Bytes of its pages.
    pub fn raw_length(&self) -> usize {
        self.pages as usize * PAGE
    }

    pub(crate) fn encode(&self) -> [u8; ENTRY_BYTES] {
        let none = Window {
            parent: 0,
            page: 0,
            pages: 0,
        };
        let (coding, window) = match self.coding {
            Coding::Raw => (RAW, none),
            Coding::Zstd => (ZSTD, none),
            Coding::ZstdWithPrefix(window) => (ZSTD_WITH_PREFIX, window),
        };
        let mut bytes = [0; ENTRY_BYTES];
        bytes[..4].copy_from_slice(&self.stored.to_le_bytes());
        bytes[4] = coding;
        bytes[5] = window.pages;
        bytes[6..8].copy_from_slice(&window.parent.to_le_bytes());
        bytes[8..12].copy_from_slice(&window.page.to_le_bytes());
        bytes[12..28].copy_from_slice(&self.raw_digest);
        bytes[28..].copy_from_slice(&self.stored_digest);
        bytes
    }
}

/// Literal pages that a frame of a pack with so many literals holds.
pub(crate) fn pages_in_frame(frame: u32, literals: u32) -> u32 {
    let frame_pages = FRAME_PAGES as u32;
    (literals - frame * frame_pages).min(frame_pages)
}

/// Reads a frame table. The caller has checked that it has as many entries as the pack has frames.
pub(crate) fn decode(
    bytes: &[u8],
    limits: &Limits,
    frames_length: u64,
) -> Result<Vec<FrameEntry>, Error> {
    let (encoded, _) = bytes.as_chunks::<ENTRY_BYTES>();
    let mut entries = Vec::with_capacity(encoded.len());
    let mut offset = 0;
    for (frame, encoded) in (0u32..).zip(encoded) {
        let pages = pages_in_frame(frame, limits.literals);
        let entry = decode_entry(encoded, offset, pages, limits)
            .map_err(|fault| Error::Entry { frame, fault })?;
        offset += u64::from(entry.stored);
        entries.push(entry);
    }
    if offset != frames_length {
        return Err(Error::Header("length of the frames"));
    }
    Ok(entries)
}

fn decode_entry(
    encoded: &[u8; ENTRY_BYTES],
    offset: u64,
    pages: u32,
    limits: &Limits,
) -> Result<FrameEntry, TableFault> {
    let mut fields = Fields(encoded);
    let stored = fields.u32();
    let coding = fields.u8();
    let window = Window {
        pages: fields.u8(),
        parent: fields.u16(),
        page: fields.u32(),
    };
    let raw_digest: ShortDigest = fields.array();
    let stored_digest: ShortDigest = fields.array();
    let coding = match coding {
        RAW => Coding::Raw,
        ZSTD => Coding::Zstd,
        ZSTD_WITH_PREFIX => Coding::ZstdWithPrefix(window),
        _ => return Err(TableFault::UnknownCoding),
    };
    let entry = FrameEntry {
        offset,
        stored,
        pages,
        coding,
        raw_digest,
        stored_digest,
    };
    let raw_length = entry.raw_length();
    if coding == Coding::Raw {
        if stored as usize != raw_length {
            return Err(TableFault::RawLength);
        }
    } else if stored == 0 || stored as usize >= raw_length {
        return Err(TableFault::CompressedLength);
    }
    if matches!(coding, Coding::ZstdWithPrefix(_)) {
        let available = limits.parents.get(usize::from(window.parent));
        let end = window.page.checked_add(u32::from(window.pages));
        let fits = end.is_some_and(|end| available.is_some_and(|pages| end <= *pages));
        if window.pages == 0 || usize::from(window.pages) > WINDOW_PAGES || !fits {
            return Err(TableFault::Window);
        }
    } else if (window.pages, window.parent, window.page) != (0, 0, 0) {
        return Err(TableFault::NeedlessWindow);
    }
    Ok(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits {
            pages: 20,
            literals: 18,
            parents: vec![40],
            images: vec![],
        }
    }

    fn entry(stored: u32, coding: Coding) -> FrameEntry {
        FrameEntry {
            offset: 0,
            stored,
            pages: 0,
            coding,
            raw_digest: [0xAA; 16],
            stored_digest: [0xBB; 16],
        }
    }

    fn window(parent: u16, page: u32, pages: u8) -> Coding {
        Coding::ZstdWithPrefix(Window {
            parent,
            page,
            pages,
        })
    }

    #[test]
    fn entry_is_pinned() {
        let digests = [[0xAA; 16], [0xBB; 16]].concat();
        for (entry, head) in [
            (
                entry(0x10000, Coding::Raw),
                [0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            ),
            (
                entry(0x1234, Coding::Zstd),
                [0x34, 0x12, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
            ),
            (
                entry(7, window(0x0102, 0x0304_0506, 32)),
                [7, 0, 0, 0, 2, 32, 2, 1, 6, 5, 4, 3],
            ),
        ] {
            assert_eq!(entry.encode()[..], [&head[..], &digests].concat());
        }
    }

    #[test]
    fn frames_lie_end_to_end_and_the_last_one_may_be_shorter() {
        let entries = [entry(100, Coding::Zstd), entry(8191, window(0, 8, 32))];
        let bytes = entries.map(|entry| entry.encode()).concat();
        let table = decode(&bytes, &limits(), 8291).unwrap();
        let shape = |entry: &FrameEntry| (entry.offset, entry.stored, entry.pages, entry.coding);
        assert_eq!(shape(&table[0]), (0, 100, 16, Coding::Zstd));
        assert_eq!(shape(&table[1]), (100, 8191, 2, window(0, 8, 32)));
        let error = decode(&bytes, &limits(), 8292).unwrap_err();
        assert!(matches!(error, Error::Header(_)), "{error}");
    }

    #[test]
    fn entry_that_no_writer_writes_is_refused() {
        let with = |at: usize, byte: u8| {
            let mut bytes = entry(100, Coding::Zstd).encode();
            bytes[at] = byte;
            bytes
        };
        for (bytes, fault) in [
            (with(4, 3), TableFault::UnknownCoding),
            (with(5, 1), TableFault::NeedlessWindow),
            (with(6, 1), TableFault::NeedlessWindow),
            (with(8, 1), TableFault::NeedlessWindow),
            (entry(65535, Coding::Raw).encode(), TableFault::RawLength),
            (
                entry(0, Coding::Zstd).encode(),
                TableFault::CompressedLength,
            ),
            (
                entry(65536, Coding::Zstd).encode(),
                TableFault::CompressedLength,
            ),
            (
                entry(u32::MAX, Coding::Zstd).encode(),
                TableFault::CompressedLength,
            ),
            (entry(9, window(0, 0, 0)).encode(), TableFault::Window),
            (entry(9, window(0, 0, 33)).encode(), TableFault::Window),
            (entry(9, window(1, 0, 1)).encode(), TableFault::Window),
            (entry(9, window(0, 40, 1)).encode(), TableFault::Window),
            (
                entry(9, window(0, u32::MAX, 1)).encode(),
                TableFault::Window,
            ),
        ] {
            let error = decode(&bytes, &limits(), 0).unwrap_err();
            let Error::Entry {
                frame: 0,
                fault: found,
            } = error
            else {
                panic!("{error}");
            };
            assert_eq!(found, fault);
        }
    }
}
