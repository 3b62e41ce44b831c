//! Deciding where each page comes from. What counts is that bytes are equal now; hashes only say where to look.

use std::collections::HashMap;
use std::ops::Range;

use super::{Copies, IMAGE, MEMORY, PARENT, Writer, failed};
use crate::PAGE;
use crate::blocks;
use crate::content::{Content, WALK_PAGES, Walk, is_zero, offset_of, pages_of};
use crate::error::WriteError;
use crate::map::{MapBuilder, PageMap, Source};

/// Where each page comes from, and which pages the frames hold.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) map: PageMap,
    /// Page of memory that has the content of each literal.
    pub(super) literals: Vec<u32>,
    /// How many of the literals, from the first one on, are of the working set.
    pub(super) working_set: u32,
}

impl Plan {
    pub(super) fn make(writer: &Writer<'_>, pages: u32) -> Result<Plan, WriteError> {
        let mut scan = Scan::new(writer)?;
        let mut done = 0;
        for range in writer.unchanged {
            scan.compare(done..range.start)?;
            scan.take_over(range.clone())?;
            done = range.end;
        }
        scan.compare(done..pages)?;
        scan.zeroes_up_to(pages)?;
        Plan::number(scan, writer.working_set)
    }

    /// Numbers the literals: those of the working set in its order, then all others by address.
    fn number(scan: Scan<'_>, working_set: &[u32]) -> Result<Plan, WriteError> {
        const NONE: u32 = u32::MAX;
        let draft = scan.draft.finish();
        // They were found by address, so they are sorted.
        let pages = scan.literals;
        let mut numbers = vec![NONE; pages.len()];
        let mut literals = Vec::with_capacity(pages.len());
        let mut take = |index: usize| {
            if numbers[index] == NONE {
                numbers[index] = literals.len() as u32;
                literals.push(pages[index]);
            }
            literals.len() as u32
        };
        let mut of_working_set = 0;
        for page in working_set {
            if let Some(Source::Literal(content)) = draft.source_of(*page)
                && let Ok(index) = pages.binary_search(&content)
            {
                of_working_set = take(index);
            }
        }
        for index in 0..pages.len() {
            take(index);
        }
        let mut map = MapBuilder::default();
        for run in draft.runs() {
            let Source::Literal(first) = run.source else {
                map.push(run.pages, run.source)?;
                continue;
            };
            for content in first..first + run.pages {
                let index = pages.partition_point(|page| *page < content);
                map.push(1, Source::Literal(numbers[index]))?;
            }
        }
        Ok(Plan {
            map: map.finish(),
            literals,
            working_set: of_working_set,
        })
    }
}

/// A walk through the memory. In its draft of the map, a literal is known by the first page that has its content.
struct Scan<'a> {
    writer: &'a Writer<'a>,
    draft: MapBuilder,
    literals: Vec<u32>,
    literal_of: HashMap<u64, u32>,
    /// Pages of which there are to be copies, ascending.
    copied: Vec<u32>,
    parents: Vec<ParentPages<'a>>,
    /// For a page to compare with.
    other: Vec<u8>,
}

/// A parent, and what was read of it.
struct ParentPages<'a> {
    memory: &'a dyn Content,
    pages: u32,
    /// Its pages by content; scanned when first needed.
    by_hash: Option<Vec<(u64, u32)>>,
    /// Its pages with the same numbers as those of the memory that are looked at.
    alike: Vec<u8>,
}

impl<'a> Scan<'a> {
    fn new(writer: &'a Writer<'a>) -> Result<Self, WriteError> {
        let parent = |parent: &super::Parent<'a>| {
            Ok(ParentPages {
                memory: parent.memory,
                pages: pages_of(parent.memory.length().map_err(failed(PARENT))?),
                by_hash: None,
                alike: vec![0; WALK_PAGES * PAGE],
            })
        };
        let mut copied = Vec::new();
        if writer.options.copies != Copies::None {
            copied.extend(writer.working_set);
            copied.sort_unstable();
        }
        Ok(Scan {
            writer,
            draft: MapBuilder::default(),
            literals: Vec::new(),
            literal_of: HashMap::new(),
            copied,
            parents: writer
                .parents
                .iter()
                .map(parent)
                .collect::<Result<_, _>>()?,
            other: vec![0; PAGE],
        })
    }

    /// Which copies are wanted of a page.
    fn copies(&self, page: u32) -> Copies {
        match self.copied.binary_search(&page) {
            Ok(_) => self.writer.options.copies,
            Err(_) => Copies::None,
        }
    }

    fn zeroes_up_to(&mut self, page: u32) -> Result<(), WriteError> {
        self.draft.push(page - self.draft.page(), Source::Zero)
    }

    /// Pages that are known to be those of parent 0. Which of them are zero is not.
    fn take_over(&mut self, pages: Range<u32>) -> Result<(), WriteError> {
        let Some(parent) = self.writer.parents.first() else {
            return Ok(());
        };
        let mut walk = Walk::new(parent.memory, pages);
        while let Some((first, bytes)) = walk.next().map_err(failed(PARENT))? {
            for (page, bytes) in (first..).zip(bytes.chunks_exact(PAGE)) {
                if is_zero(bytes) {
                    continue;
                }
                let source = if self.copies(page) == Copies::All {
                    self.literal(page, bytes, blocks::hash_of(bytes))?
                } else {
                    Source::Parent { parent: 0, page }
                };
                self.zeroes_up_to(page)?;
                self.draft.push(1, source)?;
            }
        }
        Ok(())
    }

    /// Pages of which nothing is known.
    fn compare(&mut self, pages: Range<u32>) -> Result<(), WriteError> {
        let mut walk = Walk::new(self.writer.memory, pages);
        while let Some((first, bytes)) = walk.next().map_err(failed(MEMORY))? {
            for parent in &mut self.parents {
                let common = parent.pages.saturating_sub(first) as usize * PAGE;
                let (alike, beyond) = parent.alike.split_at_mut(common.min(bytes.len()));
                parent
                    .memory
                    .read_into(alike, offset_of(first))
                    .map_err(failed(PARENT))?;
                beyond.fill(0);
            }
            for (index, bytes) in bytes.chunks_exact(PAGE).enumerate() {
                if is_zero(bytes) {
                    continue;
                }
                let page = first + index as u32;
                self.zeroes_up_to(page)?;
                let source = self.source_of(page, index, bytes)?;
                self.draft.push(1, source)?;
            }
        }
        Ok(())
    }

    /// Where a page that is not zero comes from. It is the one at `index` of those that are looked at.
    fn source_of(&mut self, page: u32, index: usize, bytes: &[u8]) -> Result<Source, WriteError> {
        let copies = self.copies(page);
        if copies == Copies::All {
            return self.literal(page, bytes, blocks::hash_of(bytes));
        }
        for (number, parent) in (0u16..).zip(&self.parents) {
            // What is beyond a parent's end was read as zeroes, which this page is not.
            if &parent.alike[index * PAGE..][..PAGE] == bytes {
                return Ok(Source::Parent {
                    parent: number,
                    page,
                });
            }
        }
        // Before anything else, so that what was moved or cached as a whole is one run, although some of its pages are
        // found elsewhere as well.
        let next = self
            .draft
            .continuation()
            .filter(|next| copies == Copies::None || !matches!(next, Source::Image { .. }));
        if let Some(next) = next
            && self.is_equal(next, bytes)?
        {
            return Ok(next);
        }
        let hash = blocks::hash_of(bytes);
        for number in 0..self.parents.len() {
            if let Some(page) = self.find_in_parent(number, hash)? {
                let parent = number as u16;
                let candidate = Source::Parent { parent, page };
                if self.is_equal(candidate, bytes)? {
                    return Ok(candidate);
                }
            }
        }
        let images = match copies {
            Copies::None => self.writer.images.as_slice(),
            Copies::OfImages | Copies::All => &[],
        };
        for (number, image) in (0u16..).zip(images) {
            if let Some(block) = image.index.find_hash(hash) {
                let image = number;
                let candidate = Source::Image { image, block };
                if self.is_equal(candidate, bytes)? {
                    return Ok(candidate);
                }
            }
        }
        self.literal(page, bytes, hash)
    }

    fn find_in_parent(&mut self, number: usize, hash: u64) -> Result<Option<u32>, WriteError> {
        let parent = &mut self.parents[number];
        if parent.by_hash.is_none() {
            parent.by_hash = Some(blocks::scan(parent.memory).map_err(failed(PARENT))?);
        }
        let table = parent.by_hash.as_deref().unwrap_or_default();
        let found = table.binary_search_by_key(&hash, |(hash, _)| *hash);
        Ok(found.ok().map(|index| table[index].1))
    }

    /// Whether a parent's page or an image's block is this page.
    fn is_equal(&mut self, source: Source, bytes: &[u8]) -> Result<bool, WriteError> {
        let (content, page, pages, action) = match source {
            Source::Zero | Source::Literal(_) => return Ok(false),
            Source::Parent { parent, page } => {
                let parent = &self.parents[usize::from(parent)];
                (parent.memory, page, parent.pages, PARENT)
            }
            Source::Image { image, block } => {
                let image = &self.writer.images[usize::from(image)];
                let blocks = pages_of(image.index.image().length);
                (image.content, block, blocks, IMAGE)
            }
        };
        if page >= pages {
            return Ok(false);
        }
        content
            .read_into(&mut self.other, offset_of(page))
            .map_err(failed(action))?;
        Ok(self.other == bytes)
    }

    /// A page that is a literal: one with this content, or a new one.
    fn literal(&mut self, page: u32, bytes: &[u8], hash: u64) -> Result<Source, WriteError> {
        if let Some(first) = self.literal_of.get(&hash) {
            self.writer
                .memory
                .read_into(&mut self.other, offset_of(*first))
                .map_err(failed(MEMORY))?;
            if self.other == bytes {
                return Ok(Source::Literal(*first));
            }
        } else {
            self.literal_of.insert(hash, page);
        }
        self.literals.push(page);
        Ok(Source::Literal(page))
    }
}
