//! Page maps: where each page of a memory comes from.

use crate::error::{Error, RunFault, WriteError};
use crate::header::{Fields, Limits};
use crate::{FRAME_PAGES, MAX_RUNS};

/// Bytes of a run: pages, source, first page at the source.
pub(crate) const RUN_BYTES: usize = 10;

/// Numbers of sources in the file: these two, then the parents, then the images.
const ZERO: u16 = 0;
const LITERAL: u16 = 1;
const FIRST_PARENT: u16 = 2;

/// Where a page comes from. Of a run, where its first page comes from; the others follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Nowhere: it is zero.
    Zero,
    /// A literal page of the pack.
    Literal(u32),
    /// A page of a parent's flat memory.
    Parent {
        /// Number of the parent.
        parent: u16,
        /// Page of it.
        page: u32,
    },
    /// A block of an image.
    Image {
        /// Number of the image.
        image: u16,
        /// Block of it.
        block: u32,
    },
}

impl Source {
    /// Source of the page so many pages further on in a run.
    pub(crate) fn after(self, pages: u32) -> Source {
        match self {
            Source::Zero => Source::Zero,
            Source::Literal(literal) => Source::Literal(literal + pages),
            Source::Parent { parent, page } => Source::Parent {
                parent,
                page: page + pages,
            },
            Source::Image { image, block } => Source::Image {
                image,
                block: block + pages,
            },
        }
    }
}

/// Pages that follow each other in memory and at their source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First page.
    pub page: u32,
    /// How many.
    pub pages: u32,
    /// Where the first one comes from.
    pub source: Source,
}

impl Run {
    /// The page after the last one.
    pub fn end(&self) -> u32 {
        self.page + self.pages
    }
}

/// Sources of all pages of a memory. Runs cover it without gaps, and no two of them could be one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PageMap {
    runs: Vec<Run>,
}

impl PageMap {
    /// The runs, by address.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Source of a page; `None` beyond the end of the memory.
    pub fn source_of(&self, page: u32) -> Option<Source> {
        let after = self.runs.partition_point(|run| run.page <= page);
        let run = self.runs.get(after.checked_sub(1)?)?;
        (page < run.end()).then(|| run.source.after(page - run.page))
    }

    /// As it is stored. `parents` is how many parents the pack has.
    pub fn encode(&self, parents: u16) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.runs.len() * RUN_BYTES);
        for run in &self.runs {
            let (source, first) = match run.source {
                Source::Zero => (ZERO, 0),
                Source::Literal(literal) => (LITERAL, literal),
                Source::Parent { parent, page } => (FIRST_PARENT + parent, page),
                Source::Image { image, block } => (FIRST_PARENT + parents + image, block),
            };
            bytes.extend(run.pages.to_le_bytes());
            bytes.extend(source.to_le_bytes());
            bytes.extend(first.to_le_bytes());
        }
        bytes
    }

    /// Reads what [`PageMap::encode`] wrote. There is one form for each map: any other is an error.
    pub fn decode(bytes: &[u8], limits: &Limits) -> Result<PageMap, Error> {
        let (encoded, rest) = bytes.as_chunks::<RUN_BYTES>();
        if !rest.is_empty() || encoded.len() > MAX_RUNS {
            return Err(Error::Header("length of the page map"));
        }
        let mut runs: Vec<Run> = Vec::with_capacity(encoded.len());
        let mut covered = 0;
        for (number, encoded) in encoded.iter().enumerate() {
            let run = decode_run(encoded, covered, runs.last(), limits)
                .map_err(|fault| Error::Run { run: number, fault })?;
            covered = run.end();
            runs.push(run);
        }
        if covered != limits.pages {
            let pages = limits.pages;
            return Err(Error::MapShort { covered, pages });
        }
        Ok(PageMap { runs })
    }
}

fn decode_run(
    encoded: &[u8; RUN_BYTES],
    page: u32,
    before: Option<&Run>,
    limits: &Limits,
) -> Result<Run, RunFault> {
    let mut fields = Fields(encoded);
    let (pages, source, first) = (fields.u32(), fields.u16(), fields.u32());
    if pages == 0 {
        return Err(RunFault::Empty);
    }
    if pages > limits.pages - page {
        return Err(RunFault::BeyondMemory);
    }
    let (source, available) = match source {
        ZERO if first != 0 => return Err(RunFault::PlacedZeroes),
        ZERO => (Source::Zero, u32::MAX),
        LITERAL => (Source::Literal(first), limits.literals),
        other => {
            let number = usize::from(other - FIRST_PARENT);
            let parents = limits.parents.len();
            if let Some(length) = limits.parents.get(number) {
                let parent = other - FIRST_PARENT;
                let page = first;
                (Source::Parent { parent, page }, *length)
            } else if let Some(length) = limits.images.get(number - parents) {
                let image = (number - parents) as u16;
                let block = first;
                (Source::Image { image, block }, *length)
            } else {
                return Err(RunFault::UnknownSource);
            }
        }
    };
    if first.checked_add(pages).is_none_or(|end| end > available) {
        return Err(RunFault::BeyondSource);
    }
    if before.is_some_and(|before| before.source.after(before.pages) == source) {
        return Err(RunFault::NotMerged);
    }
    Ok(Run {
        page,
        pages,
        source,
    })
}

/// Makes a page map of pages in order.
#[derive(Debug, Default)]
pub(crate) struct MapBuilder {
    runs: Vec<Run>,
}

impl MapBuilder {
    /// The next page.
    pub(crate) fn page(&self) -> u32 {
        self.runs.last().map_or(0, Run::end)
    }

    /// Source that would make the next page part of the last run.
    pub(crate) fn continuation(&self) -> Option<Source> {
        self.runs.last().map(|run| run.source.after(run.pages))
    }

    /// Appends so many pages, of which the first one has this source.
    pub(crate) fn push(&mut self, pages: u32, source: Source) -> Result<(), WriteError> {
        if pages == 0 {
            return Ok(());
        }
        let page = self.page();
        if let Some(last) = self.runs.last_mut()
            && last.source.after(last.pages) == source
        {
            last.pages += pages;
            return Ok(());
        }
        if self.runs.len() == MAX_RUNS {
            return Err(WriteError::TooManyRuns);
        }
        self.runs.push(Run {
            page,
            pages,
            source,
        });
        Ok(())
    }

    pub(crate) fn finish(self) -> PageMap {
        PageMap { runs: self.runs }
    }
}

/// Frame that a literal page lies in, and which of its pages it is.
pub(crate) fn frame_of(literal: u32) -> (u32, usize) {
    let frame_pages = FRAME_PAGES as u32;
    (literal / frame_pages, (literal % frame_pages) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limits() -> Limits {
        Limits {
            pages: 10,
            literals: 4,
            parents: vec![8],
            images: vec![5],
        }
    }

    fn bytes_of(runs: &[(u32, u16, u32)]) -> Vec<u8> {
        let encode = |&(pages, source, first): &(u32, u16, u32)| {
            let mut bytes = pages.to_le_bytes().to_vec();
            bytes.extend(source.to_le_bytes());
            bytes.extend(first.to_le_bytes());
            bytes
        };
        runs.iter().flat_map(encode).collect()
    }

    #[test]
    fn each_page_has_its_source() {
        let bytes = bytes_of(&[(2, 0, 0), (4, 1, 0), (3, 2, 5), (1, 3, 4)]);
        let map = PageMap::decode(&bytes, &limits()).unwrap();
        let parent = |page| Source::Parent { parent: 0, page };
        for (page, source) in [
            (0, Source::Zero),
            (1, Source::Zero),
            (2, Source::Literal(0)),
            (5, Source::Literal(3)),
            (6, parent(5)),
            (8, parent(7)),
            (9, Source::Image { image: 0, block: 4 }),
        ] {
            assert_eq!(map.source_of(page), Some(source), "page {page}");
        }
        assert_eq!(map.source_of(10), None);
        assert_eq!(map.encode(1), bytes);
    }

    #[test]
    fn map_that_no_writer_writes_is_refused() {
        for (runs, run, fault) in [
            (vec![(0, 0, 0)], 0, RunFault::Empty),
            (vec![(4, 0, 0), (7, 2, 0)], 1, RunFault::BeyondMemory),
            (vec![(u32::MAX, 0, 0)], 0, RunFault::BeyondMemory),
            (vec![(10, 0, 1)], 0, RunFault::PlacedZeroes),
            (vec![(10, 4, 0)], 0, RunFault::UnknownSource),
            (vec![(10, u16::MAX, 0)], 0, RunFault::UnknownSource),
            (vec![(5, 1, 0)], 0, RunFault::BeyondSource),
            (vec![(2, 1, u32::MAX)], 0, RunFault::BeyondSource),
            (vec![(2, 2, 7)], 0, RunFault::BeyondSource),
            (vec![(1, 3, 5)], 0, RunFault::BeyondSource),
            (vec![(5, 0, 0), (5, 0, 0)], 1, RunFault::NotMerged),
            (vec![(1, 2, 3), (1, 2, 4)], 1, RunFault::NotMerged),
        ] {
            let error = PageMap::decode(&bytes_of(&runs), &limits()).unwrap_err();
            let Error::Run {
                run: at,
                fault: why,
            } = error
            else {
                panic!("{error}");
            };
            assert_eq!((at, why), (run, fault), "{runs:?}");
        }
        let error = PageMap::decode(&bytes_of(&[(9, 0, 0)]), &limits()).unwrap_err();
        assert!(
            matches!(
                error,
                Error::MapShort {
                    covered: 9,
                    pages: 10
                }
            ),
            "{error}"
        );
        let error = PageMap::decode(&[0; 11], &limits()).unwrap_err();
        assert!(matches!(error, Error::Header(_)), "{error}");
    }

    proptest! {
        #[test]
        fn map_that_is_read_has_one_form(
            runs in prop::collection::vec((1u32..4, 0u16..5, 0u32..6), 0..8),
        ) {
            let bytes = bytes_of(&runs);
            let mut limits = limits();
            limits.pages = runs.iter().map(|run| run.0).sum();
            if let Ok(map) = PageMap::decode(&bytes, &limits) {
                prop_assert_eq!(map.encode(1), bytes);
            }
        }

        #[test]
        fn map_of_any_sources_is_read_again(
            sources in prop::collection::vec((0u8..4, 0u32..4), 0..60),
        ) {
            let sources: Vec<Source> = sources.iter().map(|(kind, at)| match kind {
                0 => Source::Zero,
                1 => Source::Literal(*at),
                2 => Source::Parent { parent: 0, page: *at },
                _ => Source::Image { image: 0, block: *at },
            }).collect();
            let mut builder = MapBuilder::default();
            for source in &sources {
                builder.push(1, *source).unwrap();
            }
            let map = builder.finish();
            let mut limits = limits();
            limits.pages = sources.len() as u32;
            prop_assert_eq!(&PageMap::decode(&map.encode(1), &limits).unwrap(), &map);
            for (page, source) in (0u32..).zip(&sources) {
                prop_assert_eq!(map.source_of(page), Some(*source));
            }
        }

        #[test]
        fn arbitrary_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = PageMap::decode(&bytes, &limits());
        }
    }
}
