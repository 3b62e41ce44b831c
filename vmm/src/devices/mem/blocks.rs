//! Which blocks of the region are plugged.

use serde::{Deserialize, Serialize};

/// One bit a block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Blocks {
    words: Vec<u64>,
    len: u64,
}

/// A run of blocks: the first, and the one after the last.
pub(super) type Run = std::ops::Range<u64>;

impl Blocks {
    pub(super) fn new(len: u64) -> Self {
        let words = usize::try_from(len.div_ceil(64)).unwrap_or(0);
        Blocks {
            words: vec![0; words],
            len,
        }
    }

    /// Whether decoded state is one that could have been saved from `len` blocks.
    pub(super) fn is_sound(&self, len: u64) -> bool {
        self.len == len
            && self.words.len() as u64 == len.div_ceil(64)
            && (len.is_multiple_of(64)
                || self.words.last().is_none_or(|last| last >> (len % 64) == 0))
    }

    pub(super) fn count(&self) -> u64 {
        self.words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// The block after the last plugged one.
    pub(super) fn end(&self) -> u64 {
        let last = self
            .words
            .iter()
            .zip(0u64..)
            .filter(|(word, _)| **word != 0)
            .last();
        last.map_or(0, |(word, i)| i * 64 + 64 - u64::from(word.leading_zeros()))
    }

    /// How many of a run are plugged.
    pub(super) fn count_in(&self, run: &Run) -> u64 {
        run.clone().filter(|block| self.get(*block)).count() as u64
    }

    pub(super) fn set(&mut self, run: &Run, plugged: bool) {
        for block in run.clone().take_while(|block| *block < self.len) {
            // Below `len`, which was a length of a vector.
            if let Some(word) = self.words.get_mut((block / 64) as usize) {
                let bit = 1 << (block % 64);
                if plugged {
                    *word |= bit;
                } else {
                    *word &= !bit;
                }
            }
        }
    }

    fn get(&self, block: u64) -> bool {
        usize::try_from(block / 64)
            .ok()
            .and_then(|word| self.words.get(word))
            .is_some_and(|word| word >> (block % 64) & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_like_a_set(ops in proptest::collection::vec((0u64..200, 0u64..40, any::<bool>()), 1..40)) {
            let mut blocks = Blocks::new(190);
            let mut model = BTreeSet::new();
            for (start, len, plug) in ops {
                let run = start..start + len;
                let expected = run.clone().filter(|b| model.contains(b)).count() as u64;
                prop_assert_eq!(blocks.count_in(&run), expected);
                blocks.set(&run, plug);
                for block in run.filter(|b| *b < 190) {
                    if plug { model.insert(block); } else { model.remove(&block); }
                }
                prop_assert_eq!(blocks.count(), model.len() as u64);
                prop_assert_eq!(blocks.end(), model.last().map_or(0, |b| b + 1));
                prop_assert!(blocks.is_sound(190));
            }
        }
    }

    #[test]
    fn unsound_state_is_noticed() {
        assert!(!Blocks::new(64).is_sound(65));
        assert!(
            !Blocks {
                words: vec![0],
                len: 190
            }
            .is_sound(190)
        );
        assert!(
            !Blocks {
                words: vec![1 << 6],
                len: 6
            }
            .is_sound(6)
        );
        assert!(
            Blocks {
                words: vec![1 << 5],
                len: 6
            }
            .is_sound(6)
        );
    }
}
