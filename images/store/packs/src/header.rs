//! The head of a pack: the fixed header, and what the pack refers to. It needs no codec.

use crate::error::Error;
use crate::map::RUN_BYTES;
use crate::table::ENTRY_BYTES;
use crate::{FRAME_PAGES, MAX_IMAGES, MAX_PAGES, MAX_PARENTS, MAX_RUNS, PAGE};

/// The pack format that this code writes and reads.
pub const VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"kilnpck\n";
/// Where the checksum lies. It is over all bytes before the frames but its own.
pub(crate) const CHECKSUM: std::ops::Range<usize> = 88..120;
/// Bytes of the fixed header.
pub(crate) const HEADER: usize = 120;
/// Bytes of an [`Origin`].
pub(crate) const ORIGIN_BYTES: usize = 40;

/// A parent or an image that a pack refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// What the writer's caller calls it. To use the pack with another one than that is the caller's mistake.
    pub id: [u8; 32],
    /// Its length in bytes.
    pub length: u64,
}

/// What the numbers in a page map or a frame table are checked against.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// Pages of the memory.
    pub pages: u32,
    /// Literal pages of the pack.
    pub literals: u32,
    /// Pages of each parent.
    pub parents: Vec<u32>,
    /// Blocks of each image.
    pub images: Vec<u32>,
}

/// The fixed header. Where the parts lie follows from their lengths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) memory: u64,
    pub(crate) literals: u32,
    pub(crate) working_set_frames: u32,
    pub(crate) parents: u16,
    pub(crate) images: u16,
    pub(crate) map_length: u64,
    pub(crate) frames_length: u64,
    pub(crate) checksum: [u8; 32],
}

impl Header {
    pub(crate) fn frames(&self) -> u32 {
        self.literals.div_ceil(FRAME_PAGES as u32)
    }

    pub(crate) fn map_offset(&self) -> u64 {
        let origins = u64::from(self.parents) + u64::from(self.images);
        HEADER as u64 + origins * ORIGIN_BYTES as u64
    }

    pub(crate) fn table_offset(&self) -> u64 {
        self.map_offset() + self.map_length
    }

    pub(crate) fn table_length(&self) -> u64 {
        u64::from(self.frames()) * ENTRY_BYTES as u64
    }

    pub(crate) fn frames_offset(&self) -> u64 {
        self.table_offset() + self.table_length()
    }

    pub(crate) fn file_length(&self) -> u64 {
        self.frames_offset() + self.frames_length
    }

    pub(crate) fn encode(&self) -> [u8; HEADER] {
        let mut bytes = Vec::with_capacity(HEADER);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(0u32.to_le_bytes());
        bytes.extend(self.memory.to_le_bytes());
        bytes.extend(self.literals.to_le_bytes());
        bytes.extend(self.working_set_frames.to_le_bytes());
        bytes.extend(self.parents.to_le_bytes());
        bytes.extend(self.images.to_le_bytes());
        bytes.extend(self.frames().to_le_bytes());
        bytes.extend(self.map_offset().to_le_bytes());
        bytes.extend(self.map_length.to_le_bytes());
        bytes.extend(self.table_offset().to_le_bytes());
        bytes.extend(self.table_length().to_le_bytes());
        bytes.extend(self.frames_offset().to_le_bytes());
        bytes.extend(self.frames_length.to_le_bytes());
        bytes.extend(self.checksum);
        let mut fixed = [0; HEADER];
        fixed.copy_from_slice(&bytes);
        fixed
    }

    /// Reads a header, and checks every number in it against the format's bounds and against each other.
    pub(crate) fn decode(bytes: &[u8; HEADER]) -> Result<Header, Error> {
        let mut fields = Fields(bytes);
        if fields.array() != MAGIC {
            return Err(Error::NotAPack);
        }
        let version = fields.u32();
        if version != VERSION {
            return Err(Error::Version { found: version });
        }
        let flags = fields.u32();
        let memory = fields.u64();
        let literals = fields.u32();
        let working_set_frames = fields.u32();
        let parents = fields.u16();
        let images = fields.u16();
        let frames = fields.u32();
        let map_offset = fields.u64();
        let map_length = fields.u64();
        let table_offset = fields.u64();
        let table_length = fields.u64();
        let frames_offset = fields.u64();
        let frames_length = fields.u64();
        let header = Header {
            memory,
            literals,
            working_set_frames,
            parents,
            images,
            map_length,
            frames_length,
            checksum: fields.array(),
        };
        let check = |holds: bool, what| holds.then_some(()).ok_or(Error::Header(what));
        let pages = memory / PAGE as u64;
        check(flags == 0, "unknown flags")?;
        check(
            memory.is_multiple_of(PAGE as u64) && pages <= u64::from(MAX_PAGES),
            "length of the memory",
        )?;
        check(u64::from(literals) <= pages, "number of literal pages")?;
        check(usize::from(parents) <= MAX_PARENTS, "number of parents")?;
        check(usize::from(images) <= MAX_IMAGES, "number of images")?;
        check(frames == header.frames(), "number of frames")?;
        check(
            working_set_frames <= frames,
            "number of frames of the working set",
        )?;
        check(
            map_length.is_multiple_of(RUN_BYTES as u64)
                && map_length / RUN_BYTES as u64 <= pages.min(MAX_RUNS as u64),
            "length of the page map",
        )?;
        // No frame takes more than its pages, so no sum below can overflow.
        check(
            frames_length <= u64::from(literals) * PAGE as u64,
            "length of the frames",
        )?;
        check(
            (map_offset, table_offset, frames_offset)
                == (
                    header.map_offset(),
                    header.table_offset(),
                    header.frames_offset(),
                )
                && table_length == header.table_length(),
            "places of its parts",
        )?;
        Ok(header)
    }
}

impl Origin {
    pub(crate) fn encode(&self) -> [u8; ORIGIN_BYTES] {
        let mut bytes = [0; ORIGIN_BYTES];
        bytes[..32].copy_from_slice(&self.id);
        bytes[32..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; ORIGIN_BYTES]) -> Origin {
        let mut fields = Fields(bytes);
        Origin {
            id: fields.array(),
            length: fields.u64(),
        }
    }
}

/// Takes little-endian numbers off the front of bytes whose length the caller knows.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl Fields<'_> {
    /// The next bytes; zeroes if there are none left.
    pub(crate) fn array<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk() {
            Some((first, rest)) => {
                self.0 = rest;
                *first
            }
            None => [0; N],
        }
    }

    pub(crate) fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            memory: 100 * PAGE as u64,
            literals: 33,
            working_set_frames: 2,
            parents: 1,
            images: 2,
            map_length: 50,
            frames_length: 4000,
            checksum: [7; 32],
        }
    }

    #[test]
    fn header_is_read_again() {
        assert_eq!(Header::decode(&header().encode()).unwrap(), header());
    }

    #[test]
    fn header_that_no_writer_writes_is_refused() {
        let with = |change: fn(&mut Header)| {
            let mut header = header();
            change(&mut header);
            Header::decode(&header.encode())
        };
        for decoded in [
            with(|header| header.memory += 1),
            with(|header| header.memory = 1 << 63),
            with(|header| header.literals = 101),
            with(|header| header.working_set_frames = 4),
            with(|header| header.parents = 17),
            with(|header| header.images = 257),
            with(|header| header.map_length = 51),
            with(|header| header.map_length = 101 * 10),
            with(|header| header.frames_length = 33 * 4096 + 1),
        ] {
            let error = decoded.unwrap_err();
            assert!(matches!(error, Error::Header(_)), "{error}");
        }
        // Fields that follow from others, each with a bit too many.
        for at in [12, 15, 36, 40, 56, 64, 72] {
            let mut bytes = header().encode();
            bytes[at] ^= 1;
            let error = Header::decode(&bytes).unwrap_err();
            assert!(matches!(error, Error::Header(_)), "{at}: {error}");
        }
    }

    #[test]
    fn another_version_is_named_with_the_remedy() {
        let mut bytes = header().encode();
        bytes[8] = 9;
        let text = Header::decode(&bytes).unwrap_err().to_string();
        assert_eq!(
            text,
            "the pack has format 9, this kiln reads format 1: make it anew with this kiln"
        );
        bytes[0] = 0;
        let error = Header::decode(&bytes).unwrap_err();
        assert!(matches!(error, Error::NotAPack), "{error}");
    }
}
