//! An open pack: everything of it but the frames.

use std::io;

use crate::content::{Content, pages_of};
use crate::error::Error;
use crate::header::{CHECKSUM, HEADER, Header, Limits, ORIGIN_BYTES, Origin};
use crate::map::{PageMap, Run, Source, frame_of};
use crate::table::{self, FrameEntry};
use crate::{FRAME_PAGES, PAGE};

/// A pack's header, page map and frame table, read and verified. The frames stay in the file: see [`FrameReader`].
///
/// [`FrameReader`]: crate::FrameReader
#[derive(Debug, Clone)]
pub struct Pack {
    header: Header,
    parents: Vec<Origin>,
    images: Vec<Origin>,
    map: PageMap,
    frames: Vec<FrameEntry>,
}

impl Pack {
    /// Reads a pack up to its frames, and checks all of that. A file that is cut short is refused, too.
    pub fn open(file: &dyn Content) -> Result<Pack, Error> {
        let io = |action| move |source: io::Error| Error::Io { action, source };
        let found = file.length().map_err(io("asking for the pack's length"))?;
        if found < HEADER as u64 {
            return Err(Error::NotAPack);
        }
        let mut head = [0; HEADER];
        file.read_into(&mut head, 0)
            .map_err(io("reading the pack's header"))?;
        let header = Header::decode(&head)?;
        let expected = header.file_length();
        if found != expected {
            return Err(Error::Length { expected, found });
        }
        // The header's bounds keep this below 250 MiB, and the file has as much.
        let mut rest = vec![0; header.frames_offset() as usize - HEADER];
        file.read_into(&mut rest, HEADER as u64)
            .map_err(io("reading the pack's page map and frame table"))?;
        let mut checksum = blake3::Hasher::new();
        checksum.update(&head[..CHECKSUM.start]).update(&rest);
        if *checksum.finalize().as_bytes() != header.checksum {
            return Err(Error::Checksum);
        }
        let origins = usize::from(header.parents) + usize::from(header.images);
        let (origins, rest) = rest.split_at(origins * ORIGIN_BYTES);
        let (map, frames) = rest.split_at(header.map_length as usize);
        let (origins, _) = origins.as_chunks();
        let mut parents: Vec<Origin> = origins.iter().map(Origin::decode).collect();
        let images = parents.split_off(usize::from(header.parents));
        let lengths = |origins: &[Origin]| origins.iter().map(|o| pages_of(o.length)).collect();
        let limits = Limits {
            pages: pages_of(header.memory),
            literals: header.literals,
            parents: lengths(&parents),
            images: lengths(&images),
        };
        Ok(Pack {
            map: PageMap::decode(map, &limits)?,
            frames: table::decode(frames, &limits, header.frames_length)?,
            header,
            parents,
            images,
        })
    }

    /// Length of the flat memory in bytes.
    pub fn length(&self) -> u64 {
        self.header.memory
    }

    /// Pages of the memory.
    pub fn pages(&self) -> u32 {
        pages_of(self.header.memory)
    }

    /// Parents that the pack was made with, in the order in which readers give them.
    pub fn parents(&self) -> &[Origin] {
        &self.parents
    }

    /// Images that the pack was made with, in the order in which readers give them.
    pub fn images(&self) -> &[Origin] {
        &self.images
    }

    /// The page map.
    pub fn map(&self) -> &PageMap {
        &self.map
    }

    /// The page map's runs, by address.
    pub fn runs(&self) -> &[Run] {
        self.map.runs()
    }

    /// Where a page comes from; `None` beyond the end of the memory.
    pub fn source_of(&self, page: u32) -> Option<Source> {
        self.map.source_of(page)
    }

    /// How many literal pages there are.
    pub fn literals(&self) -> u32 {
        self.header.literals
    }

    /// The frame that a literal page lies in, and the offset of the page in it.
    pub fn place_of(literal: u32) -> (u32, usize) {
        let (frame, slot) = frame_of(literal);
        (frame, slot * PAGE)
    }

    /// The frames.
    pub fn frames(&self) -> &[FrameEntry] {
        &self.frames
    }

    /// How many of the frames, from the first one on, hold the literal pages of the working set, in the order in which
    /// they are needed.
    pub fn working_set_frames(&self) -> u32 {
        self.header.working_set_frames
    }

    /// Where the literal pages of each frame go.
    pub fn placements(&self) -> Placements {
        Placements::new(&self.map)
    }

    pub(crate) fn frame(&self, frame: u32) -> Result<&FrameEntry, Error> {
        self.frames.get(frame as usize).ok_or(Error::NoSuchFrame {
            frame,
            frames: self.header.frames(),
        })
    }

    pub(crate) fn frames_offset(&self) -> u64 {
        self.header.frames_offset()
    }
}

/// Pages of memory that follow each other, and whose content follows each other in a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Placement {
    /// Number of the frame.
    pub frame: u32,
    /// Offset of the first page in the frame, in bytes.
    pub offset: usize,
    /// First page of memory.
    pub page: u32,
    /// How many pages.
    pub pages: u32,
}

/// The page map the other way round: where in memory each frame's pages belong. A page may belong to several places.
#[derive(Debug, Clone)]
pub struct Placements {
    all: Vec<Placement>,
}

impl Placements {
    fn new(map: &PageMap) -> Placements {
        let mut all = Vec::new();
        for run in map.runs() {
            let Source::Literal(first) = run.source else {
                continue;
            };
            let mut done = 0;
            while done < run.pages {
                let (frame, slot) = frame_of(first + done);
                let pages = (run.pages - done).min((FRAME_PAGES - slot) as u32);
                all.push(Placement {
                    frame,
                    offset: slot * PAGE,
                    page: run.page + done,
                    pages,
                });
                done += pages;
            }
        }
        all.sort_unstable();
        Placements { all }
    }

    /// Where the pages of a frame go.
    pub fn of_frame(&self, frame: u32) -> &[Placement] {
        let start = self.all.partition_point(|place| place.frame < frame);
        let rest = &self.all[start..];
        &rest[..rest.partition_point(|place| place.frame == frame)]
    }
}
