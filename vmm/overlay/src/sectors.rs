//! Sizes, and the bitmaps that say which sectors and pages of a chunk are where.

/// log2 of [`SECTOR_SIZE`].
pub(crate) const SECTOR_SHIFT: u32 = 9;
/// What every offset and length is a multiple of. A write is never torn inside a sector.
pub const SECTOR_SIZE: usize = 1 << SECTOR_SHIFT;
/// What memory is given and taken back in.
pub const PAGE_SIZE: usize = 4096;
const CHUNK_SHIFT: u32 = 16;
/// What moves between RAM and disk as one.
pub const CHUNK_SIZE: usize = 1 << CHUNK_SHIFT;

/// Sectors in a chunk.
pub(crate) const SECTORS: usize = CHUNK_SIZE / SECTOR_SIZE;
/// Pages in a chunk.
pub(crate) const PAGES: usize = CHUNK_SIZE / PAGE_SIZE;
const SECTORS_PER_PAGE: usize = PAGE_SIZE / SECTOR_SIZE;
const WORDS: usize = SECTORS / 64;

const _: () = assert!(SECTORS == WORDS * 64 && SECTORS_PER_PAGE == 8);
const _: () = assert!(PAGES <= 16, "`Pages` has 16 bits");

/// A set of sectors of one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Sectors([u64; WORDS]);

impl Sectors {
    pub(crate) const NONE: Sectors = Sectors([0; WORDS]);

    /// The sectors `first .. end`; the part beyond the chunk is left out.
    pub(crate) fn range(first: usize, end: usize) -> Self {
        let mut words = [0; WORDS];
        for (word, base) in words.iter_mut().zip((0..).step_by(64)) {
            let from = first.clamp(base, base + 64) - base;
            let to = end.clamp(base, base + 64) - base;
            if from < to {
                *word = (u64::MAX >> (64 - (to - from))) << from;
            }
        }
        Sectors(words)
    }

    #[cfg(test)]
    pub(crate) fn from_words(words: [u64; WORDS]) -> Self {
        Sectors(words)
    }

    #[cfg(test)]
    pub(crate) fn words(self) -> [u64; WORDS] {
        self.0
    }

    pub(crate) fn is_empty(self) -> bool {
        self == Self::NONE
    }

    #[cfg(test)]
    pub(crate) fn contains(self, other: Self) -> bool {
        other.minus(self).is_empty()
    }

    pub(crate) fn plus(self, other: Self) -> Self {
        self.zip(other, |a, b| a | b)
    }

    pub(crate) fn minus(self, other: Self) -> Self {
        self.zip(other, |a, b| a & !b)
    }

    pub(crate) fn and(self, other: Self) -> Self {
        self.zip(other, |a, b| a & b)
    }

    fn zip(self, other: Self, f: impl Fn(u64, u64) -> u64) -> Self {
        let mut words = self.0;
        for (word, other) in words.iter_mut().zip(other.0) {
            *word = f(*word, other);
        }
        Sectors(words)
    }

    /// Whether sector `from` is in the set, and for how many sectors before `end` that stays so.
    pub(crate) fn run(self, from: usize, end: usize) -> (bool, usize) {
        let mut at = from;
        let mut first = None;
        while at < end {
            let word = self.0.get(at / 64).copied().unwrap_or_default() >> (at % 64);
            let value = *first.get_or_insert(word & 1 == 1);
            let same = if value {
                word.trailing_ones()
            } else {
                word.trailing_zeros()
            } as usize;
            let in_word = 64 - at % 64;
            at += same.min(in_word);
            if same < in_word {
                break;
            }
        }
        (first.unwrap_or_default(), at.min(end) - from)
    }

    /// The runs of sectors in the set, as `(first, end)`.
    pub(crate) fn runs(self) -> impl Iterator<Item = (usize, usize)> {
        let mut at = 0;
        std::iter::from_fn(move || {
            while at < SECTORS {
                let (inside, len) = self.run(at, SECTORS);
                let first = at;
                at += len;
                if inside {
                    return Some((first, at));
                }
            }
            None
        })
    }

    /// The pages with at least one sector in the set.
    pub(crate) fn pages(self) -> Pages {
        let mut pages = 0;
        for (word, shift) in self.0.iter().zip((0..).step_by(8)) {
            let bytes: u16 = word
                .to_le_bytes()
                .iter()
                .enumerate()
                .map(|(i, byte)| u16::from(*byte != 0) << i)
                .sum();
            pages |= bytes << shift;
        }
        Pages(pages)
    }
}

/// A set of pages of one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Pages(u16);

impl Pages {
    pub(crate) const NONE: Pages = Pages(0);

    pub(crate) fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(crate) fn count(self) -> u64 {
        u64::from(self.0.count_ones())
    }

    pub(crate) fn plus(self, other: Self) -> Self {
        Pages(self.0 | other.0)
    }

    pub(crate) fn minus(self, other: Self) -> Self {
        Pages(self.0 & !other.0)
    }

    pub(crate) fn and(self, other: Self) -> Self {
        Pages(self.0 & other.0)
    }

    /// The runs of pages in the set, as `(first, end)`.
    pub(crate) fn runs(self) -> impl Iterator<Item = (usize, usize)> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            if rest == 0 {
                return None;
            }
            let first = rest.trailing_zeros();
            let len = (rest >> first).trailing_ones();
            let run = (0x1_ffff_u32 >> (17 - len)) << first;
            // The run lies inside the 16 bits it was found in.
            rest &= !(run as u16);
            Some((first as usize, (first + len) as usize))
        })
    }

    /// The sectors of the pages in the set.
    pub(crate) fn sectors(self) -> Sectors {
        self.runs().fold(Sectors::NONE, |all, (first, end)| {
            all.plus(Sectors::range(
                first * SECTORS_PER_PAGE,
                end * SECTORS_PER_PAGE,
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(set: Sectors) -> Vec<usize> {
        set.runs().flat_map(|(first, end)| first..end).collect()
    }

    #[test]
    fn ranges_runs_and_pages_agree_with_counting() {
        for first in 0..=SECTORS {
            for end in first..=SECTORS {
                let set = Sectors::range(first, end);
                assert_eq!(members(set), (first..end).collect::<Vec<_>>());
                let pages: Vec<_> = set.pages().runs().flat_map(|(a, b)| a..b).collect();
                let expected: Vec<_> = (0..PAGES)
                    .filter(|page| (first..end).any(|sector| sector / 8 == *page))
                    .collect();
                assert_eq!(pages, expected);
                assert_eq!(set.pages().count(), expected.len() as u64);
                assert!(set.pages().sectors().contains(set));
            }
        }
    }

    #[test]
    fn sets_add_subtract_and_intersect() {
        let (a, b) = (Sectors::range(10, 90), Sectors::range(60, 100));
        assert_eq!(a.plus(b), Sectors::range(10, 100));
        assert_eq!(a.minus(b), Sectors::range(10, 60));
        assert_eq!(a.and(b), Sectors::range(60, 90));
        assert_eq!(a.run(10, 128), (true, 80));
        assert_eq!(a.run(0, 128), (false, 10));
        assert_eq!(a.run(10, 70), (true, 60));
        assert_eq!(a.run(90, 128), (false, 38));
        assert_eq!(Sectors::from_words(a.words()), a);
    }
}
