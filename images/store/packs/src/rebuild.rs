//! Making files that can be mapped: a memory's flat file, or a patch over its parent's.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::content::{Content, WALK_PAGES, Walk, is_zero, offset_of, pages_of};
use crate::error::Error;
use crate::header::Origin;
use crate::map::{Run, Source};
use crate::pack::Pack;
use crate::{FrameReader, PAGE};

/// Gaps between changed pages that are not worth a mapping's border: so many pages of the parent are copied instead.
const MAX_GAP: u32 = 16;

/// Writes a memory's flat file: byte N of the file is byte N of memory, and what is zero is a hole.
///
/// `file` is the pack's; parents and images are given in the pack's order. What was in `out` before is gone, also when
/// this fails: then `out` is to be removed. Nothing is synced.
pub fn rebuild_flat(
    pack: &Pack,
    file: &dyn Content,
    parents: &[&dyn Content],
    images: &[&dyn Content],
    out: &File,
) -> Result<(), Error> {
    let mut copier = Copier::new(pack, parents, images, out)?;
    for run in pack.runs() {
        copier.copy(run)?;
    }
    copier.write_literals(file)
}

/// Writes a patch file, and gives the ranges of pages that are to be mapped from it over the flat memory of parent 0,
/// at the same offsets. The rest of the memory is the parent's.
///
/// Parameters are those of [`rebuild_flat`]. The patch is as long as the memory. Short gaps between ranges are filled
/// in with the parent's pages. Where the parent has data and the memory has zeroes, the range is a hole of the patch.
pub fn rebuild_patch(
    pack: &Pack,
    file: &dyn Content,
    parents: &[&dyn Content],
    images: &[&dyn Content],
    out: &File,
) -> Result<Vec<Range<u32>>, Error> {
    let base = pack.parents().first().ok_or(Error::NoParent)?;
    let mut copier = Copier::new(pack, parents, images, out)?;
    let ranges = changed_ranges(pack, copier.origins.parents[0], pages_of(base.length))?;
    for run in pack.runs() {
        let first = ranges.partition_point(|range| range.end <= run.page);
        let overlapping = ranges[first..]
            .iter()
            .take_while(|range| range.start < run.end());
        for range in overlapping {
            let page = range.start.max(run.page);
            copier.copy(&Run {
                page,
                pages: range.end.min(run.end()) - page,
                source: run.source.after(page - run.page),
            })?;
        }
    }
    copier.write_literals(file)?;
    Ok(ranges)
}

/// Pages that differ from the parent's of the same numbers, with short gaps filled in.
fn changed_ranges(
    pack: &Pack,
    parent: &dyn Content,
    parent_pages: u32,
) -> Result<Vec<Range<u32>>, Error> {
    let mut ranges: Vec<Range<u32>> = Vec::new();
    let mut add = |pages: Range<u32>| match ranges.last_mut() {
        _ if pages.is_empty() => {}
        Some(last) if pages.start - last.end <= MAX_GAP => last.end = pages.end,
        _ => ranges.push(pages),
    };
    for run in pack.runs() {
        match run.source {
            Source::Parent { parent: 0, page } if page == run.page => {}
            Source::Zero => {
                let common = run.end().min(parent_pages).max(run.page);
                let mut walk = Walk::new(parent, run.page..common);
                let failed = |source| Error::ReadParent {
                    parent: 0,
                    page: run.page,
                    source,
                };
                while let Some((first, bytes)) = walk.next().map_err(failed)? {
                    for (page, bytes) in (first..).zip(bytes.chunks_exact(PAGE)) {
                        if !is_zero(bytes) {
                            add(page..page + 1);
                        }
                    }
                }
                add(common..run.end());
            }
            _ => add(run.page..run.end()),
        }
    }
    Ok(ranges)
}

/// Copies pages into the file that is made.
struct Copier<'a> {
    pack: &'a Pack,
    origins: Origins<'a>,
    out: &'a File,
    buffer: Vec<u8>,
}

impl<'a> Copier<'a> {
    fn new(
        pack: &'a Pack,
        parents: &'a [&'a dyn Content],
        images: &'a [&'a dyn Content],
        out: &'a File,
    ) -> Result<Self, Error> {
        let origins = Origins::check(pack, parents, images)?;
        // Cut first: what the file had before would show where no page is written.
        out.set_len(0)
            .and_then(|()| out.set_len(pack.length()))
            .map_err(write_failed)?;
        Ok(Copier {
            pack,
            origins,
            out,
            buffer: vec![0; WALK_PAGES * PAGE],
        })
    }

    /// Copies a run that comes from a parent or an image.
    fn copy(&mut self, run: &Run) -> Result<(), Error> {
        let mut done = 0;
        while done < run.pages {
            let pages = (run.pages - done).min(WALK_PAGES as u32);
            let bytes = &mut self.buffer[..pages as usize * PAGE];
            // The others are holes, and pages of frames.
            if !self.origins.read(run.source.after(done), bytes)? {
                return Ok(());
            }
            write_data(self.out, bytes, run.page + done)?;
            done += pages;
        }
        Ok(())
    }

    /// Writes all pages of the frames.
    fn write_literals(&mut self, file: &dyn Content) -> Result<(), Error> {
        for_each_literal(self.pack, file, self.origins.parents, |page, bytes| {
            self.out
                .write_all_at(bytes, offset_of(page))
                .map_err(write_failed)
        })
    }
}

/// Decodes all frames, and gives the pages at each place where they belong.
pub(crate) fn for_each_literal(
    pack: &Pack,
    file: &dyn Content,
    parents: &[&dyn Content],
    mut give: impl FnMut(u32, &[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    let placements = pack.placements();
    let mut reader = FrameReader::new()?;
    for (frame, _) in (0u32..).zip(pack.frames()) {
        let raw = reader.read(pack, file, frame, parents)?;
        for place in placements.of_frame(frame) {
            give(
                place.page,
                &raw[place.offset..][..place.pages as usize * PAGE],
            )?;
        }
    }
    Ok(())
}

/// Parents and images of a pack, as long as they should be.
pub(crate) struct Origins<'a> {
    parents: &'a [&'a dyn Content],
    images: &'a [&'a dyn Content],
}

impl<'a> Origins<'a> {
    pub(crate) fn check(
        pack: &Pack,
        parents: &'a [&'a dyn Content],
        images: &'a [&'a dyn Content],
    ) -> Result<Self, Error> {
        if parents.len() < pack.parents().len() {
            let parent = parents.len() as u16;
            return Err(Error::ParentMissing { parent });
        }
        if images.len() < pack.images().len() {
            let image = images.len() as u16;
            return Err(Error::ImageMissing { image });
        }
        check_lengths("parent", pack.parents(), parents)?;
        check_lengths("image", pack.images(), images)?;
        Ok(Origins { parents, images })
    }

    /// Reads pages from a parent or an image; says whether it is one of these that they come from.
    pub(crate) fn read(&self, source: Source, bytes: &mut [u8]) -> Result<bool, Error> {
        match source {
            Source::Zero | Source::Literal(_) => return Ok(false),
            Source::Parent { parent, page } => self.parents[usize::from(parent)]
                .read_into(bytes, offset_of(page))
                .map_err(|source| Error::ReadParent {
                    parent,
                    page,
                    source,
                })?,
            Source::Image { image, block } => self.images[usize::from(image)]
                .read_into(bytes, offset_of(block))
                .map_err(|source| Error::ReadImage {
                    image,
                    block,
                    source,
                })?,
        }
        Ok(true)
    }
}

fn check_lengths(
    what: &'static str,
    origins: &[Origin],
    given: &[&dyn Content],
) -> Result<(), Error> {
    for (number, (origin, content)) in origins.iter().zip(given).enumerate() {
        let found = content.length().map_err(|source| Error::Io {
            action: "asking for the length of a parent or an image",
            source,
        })?;
        let expected = origin.length;
        if found != expected {
            return Err(Error::OtherOrigin {
                what,
                number,
                expected,
                found,
            });
        }
    }
    Ok(())
}

/// Writes pages, but not those of zeroes: they are holes.
fn write_data(out: &File, bytes: &[u8], page: u32) -> Result<(), Error> {
    let zero: Vec<bool> = bytes.chunks_exact(PAGE).map(is_zero).collect();
    let mut at = 0;
    for group in zero.chunk_by(|a, b| a == b) {
        if !group[0] {
            let pages = &bytes[at * PAGE..][..group.len() * PAGE];
            out.write_all_at(pages, offset_of(page) + (at * PAGE) as u64)
                .map_err(write_failed)?;
        }
        at += group.len();
    }
    Ok(())
}

fn write_failed(source: io::Error) -> Error {
    Error::Io {
        action: "writing the rebuilt memory",
        source,
    }
}
