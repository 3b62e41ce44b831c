//! Comparing what a pack gives with the memory that it was made of, without writing it anywhere.

use std::io;

use crate::content::{Content, WALK_PAGES, Walk, is_zero, offset_of, pages_of};
use crate::error::Error;
use crate::map::Source;
use crate::pack::Pack;
use crate::rebuild::{Origins, for_each_literal};
use crate::{FRAME_PAGES, PAGE};

/// The first page that a pack gives otherwise than `memory` has it; `None` if they are equal.
///
/// Whoever has made a pack asks this before the memory goes. Parameters are those of [`rebuild_flat`]: the pack is read as
/// it is for that.
///
/// [`rebuild_flat`]: crate::rebuild_flat
pub fn first_difference(
    pack: &Pack,
    file: &dyn Content,
    parents: &[&dyn Content],
    images: &[&dyn Content],
    memory: &dyn Content,
) -> Result<Option<u32>, Error> {
    let origins = Origins::check(pack, parents, images)?;
    let length = memory.length().map_err(read_failed)?;
    if length != pack.length() {
        return Ok(Some(pages_of(length).min(pack.pages())));
    }
    let mut comparison = Comparison {
        memory,
        other: vec![0; WALK_PAGES.max(FRAME_PAGES) * PAGE],
        first: None,
    };
    let mut buffer = vec![0; WALK_PAGES * PAGE];
    for run in pack.runs() {
        if run.source == Source::Zero {
            comparison.zero(run.page, run.end())?;
            continue;
        }
        let mut done = 0;
        while done < run.pages {
            let pages = (run.pages - done).min(WALK_PAGES as u32);
            let bytes = &mut buffer[..pages as usize * PAGE];
            if !origins.read(run.source.after(done), bytes)? {
                break;
            }
            comparison.same(run.page + done, bytes)?;
            done += pages;
        }
    }
    for_each_literal(pack, file, parents, |page, bytes| {
        comparison.same(page, bytes)
    })?;
    Ok(comparison.first)
}

struct Comparison<'a> {
    memory: &'a dyn Content,
    other: Vec<u8>,
    /// First page that differs.
    first: Option<u32>,
}

impl Comparison<'_> {
    /// The memory's pages from this one on should be these.
    fn same(&mut self, page: u32, bytes: &[u8]) -> Result<(), Error> {
        let other = &mut self.other[..bytes.len()];
        self.memory
            .read_into(other, offset_of(page))
            .map_err(read_failed)?;
        if other != bytes {
            let pairs = bytes.chunks_exact(PAGE).zip(other.chunks_exact(PAGE));
            let equal = pairs.take_while(|(one, other)| one == other).count();
            self.differs(page + equal as u32);
        }
        Ok(())
    }

    /// The memory's pages from one to another should be zero.
    fn zero(&mut self, start: u32, end: u32) -> Result<(), Error> {
        let mut first = None;
        let mut walk = Walk::new(self.memory, start..end);
        while let Some((page, bytes)) = walk.next().map_err(read_failed)? {
            let mut pages = (page..).zip(bytes.chunks_exact(PAGE));
            if let Some((page, _)) = pages.find(|(_, bytes)| !is_zero(bytes)) {
                first = Some(page);
                break;
            }
        }
        if let Some(page) = first {
            self.differs(page);
        }
        Ok(())
    }

    fn differs(&mut self, page: u32) {
        self.first = Some(self.first.map_or(page, |first| first.min(page)));
    }
}

fn read_failed(source: io::Error) -> Error {
    Error::Io {
        action: "reading the memory that was packed",
        source,
    }
}
