//! Writing packs: what is needed to make one, and the order in which its parts are made.

mod frames;
mod plan;
mod prefix;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::content::{Content, pages_of};
use crate::error::WriteError;
use crate::header::{CHECKSUM, Header, Origin};
use crate::image_index::ImageIndex;
use crate::map::Source;
use crate::table::Coding;
use crate::{FRAME_PAGES, MAX_IMAGES, MAX_PAGES, MAX_PARENTS, PAGE};

use frames::FrameWriter;
use plan::Plan;

/// Level of compression unless the caller says otherwise: higher ones take much longer for little.
pub const DEFAULT_LEVEL: i32 = 3;

/// A memory whose pages a pack can refer to, such as that of the bake that a μVM came from.
#[derive(Clone, Copy)]
pub struct Parent<'a> {
    /// What the caller calls it; readers find it in [`Pack::parents`](crate::Pack::parents).
    pub id: [u8; 32],
    /// Its flat memory.
    pub memory: &'a dyn Content,
}

/// An image whose blocks a pack can refer to. The index has the image's id.
#[derive(Clone, Copy)]
pub struct Image<'a> {
    /// The image.
    pub content: &'a dyn Content,
    /// Its index.
    pub index: ImageIndex<'a>,
}

/// How a pack is made. Any choice gives a pack that every reader reads.
#[derive(Debug, Clone)]
pub struct Options {
    /// zstd's level.
    pub level: i32,
    /// Whether frames may be compressed against a parent's pages. Reading such a frame reads the parent, too: only for
    /// parents whose flat memory is kept.
    pub prefix: bool,
    /// Which pages of the working set are literals although something else has them.
    pub copies: Copies,
}

/// Pages of the working set that are literals although a parent or an image has them. They make the pack longer, and
/// spare whoever resumes reading other files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copies {
    /// None.
    None,
    /// Those that are blocks of images: for a memory that is resumed over a parent that is in RAM already.
    OfImages,
    /// All, in frames that are not compressed against a parent: for a memory that may be the first on its node.
    All,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            level: DEFAULT_LEVEL,
            prefix: true,
            copies: Copies::All,
        }
    }
}

/// What a pack that was written has in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// Length of the pack in bytes.
    pub length: u64,
    /// Runs of its page map.
    pub runs: usize,
    /// Pages of the memory that are not zero.
    pub data_pages: u64,
    /// Pages that are a parent's.
    pub parent_pages: u64,
    /// Pages that are blocks of images.
    pub image_pages: u64,
    /// Literal pages, each content counted once.
    pub literals: u32,
    /// Frames.
    pub frames: u32,
    /// Frames that hold literal pages of the working set.
    pub working_set_frames: u32,
    /// Bytes of those.
    pub working_set_length: u64,
    /// Frames that are compressed against a parent's pages.
    pub prefix_frames: u32,
    /// Frames that are not compressed.
    pub raw_frames: u32,
}

/// Makes a pack of a memory.
pub struct Writer<'a> {
    memory: &'a dyn Content,
    parents: Vec<Parent<'a>>,
    images: Vec<Image<'a>>,
    working_set: &'a [u32],
    unchanged: &'a [Range<u32>],
    options: Options,
}

impl std::fmt::Debug for Writer<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer")
            .field("parents", &self.parents.len())
            .field("images", &self.images.len())
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl<'a> Writer<'a> {
    /// Of a memory that refers to nothing.
    pub fn new(memory: &'a dyn Content) -> Self {
        Writer {
            memory,
            parents: Vec::new(),
            images: Vec::new(),
            working_set: &[],
            unchanged: &[],
            options: Options::default(),
        }
    }

    /// Adds a parent. The first one is the one that a patch is mapped over.
    #[must_use]
    pub fn parent(mut self, parent: Parent<'a>) -> Self {
        self.parents.push(parent);
        self
    }

    /// Adds an image.
    #[must_use]
    pub fn image(mut self, image: Image<'a>) -> Self {
        self.images.push(image);
        self
    }

    /// Names the pages that a resumed guest touches, in the order of first touch. Their frames come first.
    #[must_use]
    pub fn working_set(mut self, pages: &'a [u32]) -> Self {
        self.working_set = pages;
        self
    }

    /// Names pages that are known to be equal to those of parent 0 with the same numbers, in ranges that ascend. They
    /// are not compared: of a running μVM, only the pages that it has written need be.
    #[must_use]
    pub fn unchanged(mut self, pages: &'a [Range<u32>]) -> Self {
        self.unchanged = pages;
        self
    }

    /// Sets how the pack is made.
    #[must_use]
    pub fn options(mut self, options: Options) -> Self {
        self.options = options;
        self
    }

    /// Writes the pack. What was in `out` before is gone, also when this fails: then `out` is no pack. Nothing is
    /// synced.
    ///
    /// The memory and all that it is compared with is read once, literal pages twice. RAM that this takes: about 20
    /// bytes for each page that is not zero, of parents too, and 40 MiB.
    pub fn write(&self, out: &File) -> Result<Summary, WriteError> {
        let length = self.memory.length().map_err(failed(MEMORY))?;
        if !length.is_multiple_of(PAGE as u64) || length / PAGE as u64 > u64::from(MAX_PAGES) {
            return Err(WriteError::MemoryLength { length });
        }
        let (parents, images) = self.origins()?;
        self.check_lists(pages_of(length), &parents)?;
        let plan = Plan::make(self, pages_of(length))?;
        let map = plan.map.encode(parents.len() as u16);
        let mut header = Header {
            memory: length,
            literals: plan.literals.len() as u32,
            working_set_frames: plan.working_set.div_ceil(FRAME_PAGES as u32),
            parents: parents.len() as u16,
            images: images.len() as u16,
            map_length: map.len() as u64,
            frames_length: 0,
            checksum: [0; 32],
        };
        out.set_len(0).map_err(writing)?;
        let table = FrameWriter::new(self, &plan, header.working_set_frames)
            .write(out, header.frames_offset())?;
        header.frames_length = table.last().map_or(0, |e| e.offset + u64::from(e.stored));

        let mut head = header.encode().to_vec();
        head.extend(parents.iter().chain(&images).flat_map(Origin::encode));
        head.extend(map);
        head.extend(table.iter().flat_map(|entry| entry.encode()));
        let mut checksum = blake3::Hasher::new();
        checksum
            .update(&head[..CHECKSUM.start])
            .update(&head[CHECKSUM.end..]);
        head[CHECKSUM].copy_from_slice(checksum.finalize().as_bytes());
        // Last: a pack that was not written to its end begins otherwise.
        out.write_all_at(&head, 0).map_err(writing)?;

        let pages_from = |wanted: fn(Source) -> bool| -> u64 {
            let runs = plan.map.runs().iter().filter(|run| wanted(run.source));
            runs.map(|run| u64::from(run.pages)).sum()
        };
        let frames_with = |wanted: fn(Coding) -> bool| {
            let frames = table.iter().filter(|entry| wanted(entry.coding));
            frames.count() as u32
        };
        let working_set = table.iter().take(header.working_set_frames as usize);
        Ok(Summary {
            length: header.file_length(),
            runs: plan.map.runs().len(),
            data_pages: pages_from(|source| source != Source::Zero),
            parent_pages: pages_from(|source| matches!(source, Source::Parent { .. })),
            image_pages: pages_from(|source| matches!(source, Source::Image { .. })),
            literals: header.literals,
            frames: header.frames(),
            working_set_frames: header.working_set_frames,
            working_set_length: working_set.map(|entry| u64::from(entry.stored)).sum(),
            prefix_frames: frames_with(|coding| matches!(coding, Coding::ZstdWithPrefix(_))),
            raw_frames: frames_with(|coding| coding == Coding::Raw),
        })
    }

    fn origins(&self) -> Result<(Vec<Origin>, Vec<Origin>), WriteError> {
        let (parents, images) = (self.parents.len(), self.images.len());
        if parents > MAX_PARENTS || images > MAX_IMAGES {
            return Err(WriteError::TooManyOrigins { parents, images });
        }
        let of_parent = |parent: &Parent<'_>| -> Result<Origin, WriteError> {
            Ok(Origin {
                id: parent.id,
                length: parent.memory.length().map_err(failed(PARENT))?,
            })
        };
        let of_image = |(number, image): (usize, &Image<'_>)| {
            let origin = image.index.image();
            if image.content.length().map_err(failed(IMAGE))? == origin.length {
                Ok(origin)
            } else {
                Err(WriteError::ForeignIndex { image: number })
            }
        };
        let parents = self.parents.iter().map(of_parent);
        let images = self.images.iter().enumerate().map(of_image);
        Ok((
            parents.collect::<Result<_, _>>()?,
            images.collect::<Result<_, _>>()?,
        ))
    }

    fn check_lists(&self, pages: u32, parents: &[Origin]) -> Result<(), WriteError> {
        if let Some(page) = self.working_set.iter().copied().find(|page| *page >= pages) {
            return Err(WriteError::WorkingSet { page, pages });
        }
        let common = parents.first().map_or(0, |parent| pages_of(parent.length));
        let mut before = 0;
        for range in self.unchanged {
            let Range { start, end } = *range;
            if start < before || end < start || end > pages.min(common) {
                return Err(WriteError::Unchanged { start, end });
            }
            before = end;
        }
        Ok(())
    }
}

/// What was being done, in errors.
const MEMORY: &str = "reading the memory";
const PARENT: &str = "reading a parent";
const IMAGE: &str = "reading an image";

fn failed(action: &'static str) -> impl Fn(io::Error) -> WriteError {
    move |source| WriteError::Io { action, source }
}

fn writing(source: io::Error) -> WriteError {
    WriteError::Io {
        action: "writing the pack",
        source,
    }
}
