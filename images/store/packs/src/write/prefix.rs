//! Finding the part of a parent that a frame resembles most.
//!
//! A kernel that lies elsewhere (KASLR) makes almost every page of a bake differ from its sibling's by some pointers.
//! Between the pointers, pieces of 64 bytes are equal. Some of the parent's pieces are kept by hash; each piece of a
//! frame votes for the pages of the parent that have it too, and the window with the most votes is tried.

use std::io;

use crate::content::{Content, Walk, pages_of};
use crate::table::Window;
use crate::{PAGE, WINDOW_PAGES};

// A frame table counts a window's pages in a byte.
const _: () = assert!(WINDOW_PAGES <= u8::MAX as usize);

/// Bytes of a piece.
const PIECE: usize = 64;
/// Most pieces of all parents that are kept, 16 bytes each. When there are more, every other one is dropped.
const MAX_PIECES: usize = 1 << 20;
/// What occurs more often than this says nothing about where it came from.
const MAX_PLACES: usize = 8;

/// A piece of a parent's page.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Piece {
    hash: u64,
    parent: u16,
    page: u32,
}

/// Finds windows.
pub(super) struct WindowFinder {
    /// By hash.
    pieces: Vec<Piece>,
    sample: Sample,
    /// Pages of each parent.
    parents: Vec<u32>,
}

impl WindowFinder {
    pub(super) fn new(parents: &[&dyn Content]) -> io::Result<Self> {
        Self::with_room(parents, MAX_PIECES)
    }

    fn with_room(parents: &[&dyn Content], room: usize) -> io::Result<Self> {
        let mut pieces = Vec::new();
        let mut lengths = Vec::new();
        let mut sample = Sample { mask: 3 };
        for (parent, memory) in (0u16..).zip(parents) {
            let pages = pages_of(memory.length()?);
            lengths.push(pages);
            let mut walk = Walk::new(memory, 0..pages);
            while let Some((first, bytes)) = walk.next()? {
                for (page, bytes) in (first..).zip(bytes.chunks_exact(PAGE)) {
                    pieces.extend(
                        sample
                            .hashes(bytes)
                            .map(|hash| Piece { hash, parent, page }),
                    );
                }
                while pieces.len() > room {
                    sample.mask = sample.mask << 1 | 1;
                    pieces.retain(|piece| sample.has(piece.hash));
                }
            }
        }
        pieces.sort_unstable();
        pieces.dedup();
        Ok(WindowFinder {
            pieces: without_fillers(&pieces),
            sample,
            parents: lengths,
        })
    }

    /// Windows that are worth a try for a frame of these pages: the one with the most votes, and the one that lies
    /// where the pages lie.
    pub(super) fn candidates(&self, pages: &[u32], raw: &[u8]) -> Vec<Window> {
        let mut windows = Vec::new();
        windows.extend(self.elected(raw));
        let middle = pages[pages.len() / 2];
        let same_place = self.window(0, middle.saturating_sub(WINDOW_PAGES as u32 / 2));
        windows.extend(same_place.filter(|window| !windows.contains(window)));
        windows
    }

    fn elected(&self, raw: &[u8]) -> Option<Window> {
        let mut votes: Vec<(u16, u32)> = Vec::new();
        for hash in self.sample.hashes(raw) {
            let first = self.pieces.partition_point(|piece| piece.hash < hash);
            let equal = self.pieces[first..]
                .iter()
                .take_while(|piece| piece.hash == hash);
            votes.extend(equal.map(|piece| (piece.parent, piece.page)));
        }
        votes.sort_unstable();
        let mut start = 0;
        let mut best = 0..0;
        for (index, (parent, page)) in votes.iter().enumerate() {
            while votes[start].0 != *parent || page - votes[start].1 >= WINDOW_PAGES as u32 {
                start += 1;
            }
            if index + 1 - start > best.len() {
                best = start..index + 1;
            }
        }
        let votes = &votes[best];
        let ((parent, first), (_, last)) = (*votes.first()?, *votes.last()?);
        // Pages on both sides of those that were voted for are as likely to be of use.
        let slack = WINDOW_PAGES as u32 - 1 - (last - first);
        self.window(parent, first.saturating_sub(slack / 2))
    }

    /// The window at a page, or the last one of the parent.
    fn window(&self, parent: u16, page: u32) -> Option<Window> {
        let length = *self.parents.get(usize::from(parent))?;
        let pages = length.min(WINDOW_PAGES as u32);
        (pages > 0).then(|| Window {
            parent,
            page: page.min(length - pages),
            pages: pages as u8,
        })
    }
}

fn without_fillers(pieces: &[Piece]) -> Vec<Piece> {
    let groups = pieces.chunk_by(|a, b| a.hash == b.hash);
    let telling = groups.filter(|group| group.len() <= MAX_PLACES);
    telling.flatten().copied().collect()
}

/// Which pieces are kept: the same ones of the parent as of a frame, because their hashes decide.
#[derive(Clone, Copy)]
struct Sample {
    mask: u64,
}

impl Sample {
    fn has(self, hash: u64) -> bool {
        hash >> 32 & self.mask == 0
    }

    /// Hashes of the sampled pieces of some pages.
    fn hashes(self, pages: &[u8]) -> impl Iterator<Item = u64> {
        let pieces = pages.as_chunks::<PIECE>().0.iter();
        pieces
            .filter_map(hash_of)
            .filter(move |hash| self.has(*hash))
    }
}

/// Hash of a piece; `None` if it is one word over and over.
fn hash_of(piece: &[u8; PIECE]) -> Option<u64> {
    let words = piece.as_chunks::<8>().0;
    if words.iter().all(|word| *word == words[0]) {
        return None;
    }
    let hash = words.iter().fold(0, |hash: u64, word| {
        (hash.rotate_left(23) ^ u64::from_le_bytes(*word)).wrapping_mul(0x9E37_79B9_7F4A_7C15)
    });
    Some(hash ^ hash >> 29)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{like, noise, zeroes};

    #[test]
    fn frame_finds_the_pages_that_it_resembles() {
        let parent = (0..500).map(noise).collect::<Vec<_>>().concat();
        let finder = WindowFinder::new(&[&zeroes(), &parent]).unwrap();
        let raw = (300..316)
            .map(|page| like(&noise(page), 5))
            .collect::<Vec<_>>();
        let window = finder.elected(&raw.concat()).unwrap();
        let pages = window.page..window.page + u32::from(window.pages);
        assert_eq!((window.parent, pages.len()), (1, WINDOW_PAGES));
        assert!(pages.start <= 300 && pages.end >= 316, "{pages:?}");
    }

    #[test]
    fn window_lies_inside_of_a_parent() {
        let parent = (0..40).map(noise).collect::<Vec<_>>().concat();
        let finder = WindowFinder::new(&[&parent, &noise(50)]).unwrap();
        for (page, raw) in [(0, noise(0)), (39, noise(39)), (1000, noise(50))] {
            for window in finder.candidates(&[page], &raw) {
                let end = window.page + u32::from(window.pages);
                assert!(end <= [40, 1][usize::from(window.parent)], "{window:?}");
            }
        }
        let none: &[u8] = &[];
        assert!(
            WindowFinder::new(&[&none])
                .unwrap()
                .candidates(&[0], &noise(1))
                .is_empty()
        );
    }

    #[test]
    fn samples_stay_within_their_bound_and_still_find_the_place() {
        let parent = (0..1000).map(noise).collect::<Vec<_>>().concat();
        let finder = WindowFinder::with_room(&[&parent], 2000).unwrap();
        assert!((500..=2000).contains(&finder.pieces.len()));
        let raw = (700..716).map(noise).collect::<Vec<_>>().concat();
        let window = finder.elected(&raw).unwrap();
        assert!(
            window.page.abs_diff(700) < WINDOW_PAGES as u32,
            "{window:?}"
        );
    }
}
