//! Random guests: memories that are made of their parents' and images' pages as real ones are.

use std::fs::File;
use std::ops::Range;

use proptest::prelude::*;

use crate::testing::{file_of, like, noise, text, zeroes};
use crate::{Content, Copies, Image, ImageIndex, Options, Parent, Writer};

/// What a page of a random memory is. Numbers are taken modulo what there is.
#[derive(Debug, Clone)]
enum Kind {
    Zero,
    /// As the parent's with the same number.
    Same,
    Moved(u8),
    OfSecondParent(u8),
    Block(u8),
    Twice(u8),
    /// Like a page of the parent.
    Near(u8, u8),
    Text(u8),
    Noise(u8),
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        3 => Just(Kind::Zero),
        6 => Just(Kind::Same),
        2 => any::<u8>().prop_map(Kind::Moved),
        1 => any::<u8>().prop_map(Kind::OfSecondParent),
        2 => any::<u8>().prop_map(Kind::Block),
        2 => any::<u8>().prop_map(Kind::Twice),
        3 => any::<(u8, u8)>().prop_map(|(page, change)| Kind::Near(page, change)),
        2 => any::<u8>().prop_map(Kind::Text),
        1 => any::<u8>().prop_map(Kind::Noise),
    ]
}

/// Runs of one kind, as memories have them.
fn kinds(longest: usize) -> impl Strategy<Value = Vec<Kind>> {
    let run = (kind(), 1usize..12).prop_map(|(kind, length)| vec![kind; length]);
    prop::collection::vec(run, 0..longest).prop_map(|runs| runs.concat())
}

#[derive(Debug, Clone)]
pub(super) struct Guest {
    pub(super) parents: Vec<Vec<Vec<u8>>>,
    pub(super) image: Vec<Vec<u8>>,
    pub(super) memory: Vec<Vec<u8>>,
    pub(super) working_set: Vec<u32>,
    pub(super) unchanged: Vec<Range<u32>>,
    pub(super) options: Options,
}

fn page_of(kind: &Kind, number: usize, before: &[Vec<u8>], guest: &Guest) -> Vec<u8> {
    let pick = |pages: &[Vec<u8>], at: usize| match pages.len() {
        0 => zeroes(),
        length => pages[at % length].clone(),
    };
    let own = |seed: u8| u64::from(seed) << 32 | number as u64;
    let parent = guest.parents.first().map_or(&[][..], Vec::as_slice);
    match *kind {
        Kind::Zero => zeroes(),
        Kind::Same => parent.get(number).cloned().unwrap_or_else(zeroes),
        // With the number, so that runs move as runs.
        Kind::Moved(by) => pick(parent, number + usize::from(by)),
        Kind::OfSecondParent(at) => {
            let second = guest.parents.get(1).map_or(&[][..], Vec::as_slice);
            pick(second, number + usize::from(at))
        }
        Kind::Block(at) => pick(&guest.image, number + usize::from(at)),
        Kind::Twice(at) => pick(before, usize::from(at)),
        Kind::Near(at, change) => like(&pick(parent, number + usize::from(at)), change),
        Kind::Text(seed) => text(own(seed)),
        Kind::Noise(seed) => noise(own(seed)),
    }
}

fn pages_of(kinds: &[Kind], guest: &Guest) -> Vec<Vec<u8>> {
    let mut pages: Vec<Vec<u8>> = Vec::new();
    for (number, kind) in kinds.iter().enumerate() {
        pages.push(page_of(kind, number, &pages, guest));
    }
    pages
}

pub(super) fn guest() -> impl Strategy<Value = Guest> {
    let memories = (prop::collection::vec(kinds(8), 0..3), kinds(5), kinds(14));
    let choices = (
        prop::collection::vec(any::<u16>(), 0..40),
        any::<u64>(),
        any::<bool>(),
        prop::sample::select(vec![Copies::None, Copies::OfImages, Copies::All]),
    );
    (memories, choices).prop_map(
        |((parents, image, memory), (touched, unchanged, prefix, copies))| {
            let mut guest = Guest {
                parents: Vec::new(),
                image: Vec::new(),
                memory: Vec::new(),
                working_set: Vec::new(),
                unchanged: Vec::new(),
                options: Options {
                    level: 1,
                    prefix,
                    copies,
                },
            };
            for parent in parents {
                let pages = pages_of(&parent, &guest);
                guest.parents.push(pages);
            }
            guest.image = pages_of(&image, &guest);
            guest.memory = pages_of(&memory, &guest);
            let length = guest.memory.len();
            if length > 0 {
                let within = |at: u16| (usize::from(at) % length) as u32;
                guest.working_set = touched.into_iter().map(within).collect();
            }
            if let Some(parent) = guest.parents.first() {
                let equal = |(number, page): (usize, &Vec<u8>)| {
                    let known = unchanged >> (number % 64) & 1 == 1;
                    (known && parent.get(number) == Some(page)).then_some(number as u32)
                };
                let equal = guest.memory.iter().enumerate().filter_map(equal);
                guest.unchanged = equal.map(|page| page..page + 1).collect();
            }
            guest
        },
    )
}

/// The files that a guest consists of.
pub(super) struct Files {
    pub(super) parents: Vec<File>,
    pub(super) image: File,
    pub(super) index: Vec<u8>,
    pub(super) memory: File,
}

impl Files {
    pub(super) fn of(guest: &Guest) -> Files {
        let image = file_of(&guest.image);
        Files {
            parents: guest.parents.iter().map(|pages| file_of(pages)).collect(),
            index: ImageIndex::build(&image, [9; 32]).unwrap(),
            memory: file_of(&guest.memory),
            image,
        }
    }

    pub(super) fn parents(&self) -> Vec<&dyn Content> {
        self.parents.iter().map(|file| file as _).collect()
    }

    pub(super) fn writer<'a>(&'a self, guest: &'a Guest) -> Writer<'a> {
        let mut writer = Writer::new(&self.memory)
            .image(Image {
                content: &self.image,
                index: ImageIndex::parse(&self.index).unwrap(),
            })
            .working_set(&guest.working_set)
            .unchanged(&guest.unchanged)
            .options(guest.options.clone());
        for (number, memory) in (0u8..).zip(&self.parents) {
            writer = writer.parent(Parent {
                id: [number; 32],
                memory,
            });
        }
        writer
    }
}

/// A guest that has a frame of each coding and a run of each source.
pub(super) fn rich() -> Guest {
    let parent: Vec<_> = (0..20).map(noise).collect();
    let image: Vec<_> = (100..104).map(noise).collect();
    let mut memory = vec![zeroes(), parent[1].clone(), text(1), parent[7].clone()];
    memory.extend((2..17).map(text));
    memory.extend((200..216).map(noise));
    memory.extend(image.iter().cloned());
    memory.extend(parent.iter().take(16).map(|page| like(page, 1)));
    Guest {
        parents: vec![parent],
        image,
        memory,
        working_set: vec![2],
        unchanged: Vec::new(),
        options: Options::default(),
    }
}
