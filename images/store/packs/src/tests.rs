//! What holds for whole packs: they give back what was packed, and nothing else.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};

use proptest::prelude::*;

use crate::content::{is_zero, offset_of};
use crate::testing::{bytes_of, file_of, like, noise, packed, text, zeroes};
use crate::*;

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
struct Guest {
    parents: Vec<Vec<Vec<u8>>>,
    image: Vec<Vec<u8>>,
    memory: Vec<Vec<u8>>,
    working_set: Vec<u32>,
    unchanged: Vec<Range<u32>>,
    options: Options,
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

fn guest() -> impl Strategy<Value = Guest> {
    let memories = (prop::collection::vec(kinds(8), 0..3), kinds(5), kinds(14));
    let choices = (
        prop::collection::vec(any::<u16>(), 0..40),
        any::<u64>(),
        any::<(bool, bool)>(),
    );
    (memories, choices).prop_map(
        |((parents, image, memory), (touched, unchanged, (prefix, copy_working_set)))| {
            let mut guest = Guest {
                parents: Vec::new(),
                image: Vec::new(),
                memory: Vec::new(),
                working_set: Vec::new(),
                unchanged: Vec::new(),
                options: Options {
                    level: 1,
                    prefix,
                    copy_working_set,
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
struct Files {
    parents: Vec<File>,
    image: File,
    index: Vec<u8>,
    memory: File,
}

impl Files {
    fn of(guest: &Guest) -> Files {
        let image = file_of(&guest.image);
        Files {
            parents: guest.parents.iter().map(|pages| file_of(pages)).collect(),
            index: ImageIndex::build(&image, [9; 32]).unwrap(),
            memory: file_of(&guest.memory),
            image,
        }
    }

    fn parents(&self) -> Vec<&dyn Content> {
        self.parents.iter().map(|file| file as _).collect()
    }

    fn writer<'a>(&'a self, guest: &'a Guest) -> Writer<'a> {
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

/// Reads every page as a server of page faults does.
fn page_by_page(pack: &Pack, bytes: &[u8], files: &Files) -> Vec<u8> {
    let mut reader = FrameReader::new().unwrap();
    let mut memory = Vec::new();
    for page in 0..pack.pages() {
        let mut content = vec![0; PAGE];
        match pack.source_of(page).unwrap() {
            Source::Zero => {}
            Source::Literal(literal) => {
                let (frame, offset) = Pack::place_of(literal);
                let raw = reader.read(pack, &bytes, frame, &files.parents()).unwrap();
                content.copy_from_slice(&raw[offset..][..PAGE]);
            }
            Source::Parent { parent, page } => files.parents[usize::from(parent)]
                .read_exact_at(&mut content, offset_of(page))
                .unwrap(),
            Source::Image { block, .. } => files
                .image
                .read_exact_at(&mut content, offset_of(block))
                .unwrap(),
        }
        memory.extend(content);
    }
    assert_eq!(pack.source_of(pack.pages()), None);
    memory
}

fn flat(pack: &Pack, bytes: &[u8], files: &Files) -> Result<File, Error> {
    let out = file_of(&[noise(1)]);
    rebuild_flat(pack, &bytes, &files.parents(), &[&files.image], &out)?;
    Ok(out)
}

fn data_pages(pages: &[Vec<u8>]) -> u64 {
    pages.iter().filter(|page| !is_zero(page)).count() as u64
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn what_was_packed_comes_back(guest in guest()) {
        let files = Files::of(&guest);
        let (bytes, summary) = packed(&files.writer(&guest));
        let pack = Pack::open(&bytes).unwrap();
        let expected = guest.memory.concat();
        prop_assert!(page_by_page(&pack, &bytes, &files) == expected);

        let rebuilt = flat(&pack, &bytes, &files).unwrap();
        prop_assert!(bytes_of(&rebuilt) == expected);
        prop_assert_eq!(summary.data_pages, data_pages(&guest.memory));
        // What is zero takes no room; the rest is what a file system needs for itself.
        let room = rebuilt.metadata().unwrap().blocks() * 512;
        prop_assert!(room <= offset_of(data_pages(&guest.memory) as u32 + 16), "{}", room);

        if let Some(parent) = guest.parents.first() {
            let patch = file_of(&[noise(2)]);
            let ranges =
                rebuild_patch(&pack, &bytes, &files.parents(), &[&files.image], &patch).unwrap();
            let mut overlaid = parent.concat();
            overlaid.resize(expected.len(), 0);
            for range in &ranges {
                let bytes = offset_of(range.start) as usize..offset_of(range.end) as usize;
                patch.read_exact_at(&mut overlaid[bytes], offset_of(range.start)).unwrap();
            }
            prop_assert!(overlaid == expected);
            // Nothing beyond the parent is left to what lies behind its end.
            let beyond = parent.len() as u32..guest.memory.len() as u32;
            prop_assert!(beyond.is_empty() || ranges.last().unwrap().end == beyond.end);
            prop_assert!(ranges.windows(2).all(|two| two[1].start > two[0].end + 16));
        }
    }

    #[test]
    fn frames_of_the_working_set_come_first_and_need_no_other_file(guest in guest()) {
        let files = Files::of(&guest);
        let (bytes, _) = packed(&files.writer(&guest));
        let pack = Pack::open(&bytes).unwrap();
        let first = pack.working_set_frames();
        if guest.options.copy_working_set {
            let mut literals: Vec<u32> = Vec::new();
            for page in &guest.working_set {
                match pack.source_of(*page).unwrap() {
                    Source::Literal(literal) => literals.push(literal),
                    source => prop_assert_eq!(source, Source::Zero),
                }
            }
            let mut seen = 0;
            for literal in literals {
                prop_assert!(literal <= seen);
                seen = seen.max(literal + 1);
            }
            prop_assert_eq!(first, seen.div_ceil(FRAME_PAGES as u32));
            let mut reader = FrameReader::new().unwrap();
            for frame in 0..first {
                reader.read(&pack, &bytes, frame, &[]).unwrap();
            }
        }
    }

    #[test]
    fn placements_are_the_page_map_the_other_way_round(guest in guest()) {
        let files = Files::of(&guest);
        let (bytes, _) = packed(&files.writer(&guest));
        let pack = Pack::open(&bytes).unwrap();
        let placements = pack.placements();
        let mut literal_pages = 0;
        for frame in 0..pack.frames().len() as u32 {
            for place in placements.of_frame(frame) {
                for index in 0..place.pages {
                    let Some(Source::Literal(literal)) = pack.source_of(place.page + index) else {
                        panic!("page {} is no literal", place.page + index);
                    };
                    let offset = place.offset + index as usize * PAGE;
                    prop_assert_eq!(Pack::place_of(literal), (frame, offset));
                    literal_pages += 1;
                }
            }
        }
        let literal = |page: &u32| matches!(pack.source_of(*page), Some(Source::Literal(_)));
        prop_assert_eq!(literal_pages, (0..pack.pages()).filter(literal).count());
    }

    #[test]
    fn damage_is_found_before_wrong_bytes_are_given(
        guest in guest(),
        at in any::<prop::sample::Index>(),
        bit in 0u8..8,
        cut in any::<prop::sample::Index>(),
    ) {
        let files = Files::of(&guest);
        let (mut bytes, _) = packed(&files.writer(&guest));
        let shorter = bytes[..cut.index(bytes.len())].to_vec();
        prop_assert!(Pack::open(&shorter).is_err());
        let longer = [&bytes[..], &[0]].concat();
        prop_assert!(Pack::open(&longer).is_err());
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        let found = Pack::open(&bytes).and_then(|pack| flat(&pack, &bytes, &files));
        prop_assert!(found.is_err(), "bit {} of byte {} of {}", bit, at, bytes.len());
    }

    #[test]
    fn other_parents_and_images_are_no_danger(guest in guest(), other in guest()) {
        let files = Files::of(&guest);
        let (bytes, _) = packed(&files.writer(&guest));
        let pack = Pack::open(&bytes).unwrap();
        let mut others = Files::of(&other);
        others.parents.push(file_of(&[]));
        others.parents.push(file_of(&[]));
        let mut reader = FrameReader::new().unwrap();
        for (frame, entry) in (0..).zip(pack.frames()) {
            let right = reader.read(&pack, &bytes, frame, &files.parents()).unwrap().to_vec();
            // Chance may make the other parent equal where the frame looks.
            match reader.read(&pack, &bytes, frame, &others.parents()) {
                Ok(raw) => prop_assert!(raw == right),
                Err(_) => prop_assert!(matches!(entry.coding, Coding::ZstdWithPrefix(_))),
            }
        }
        let _ = flat(&pack, &bytes, &others);
    }

    #[test]
    fn arbitrary_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        prop_assert!(Pack::open(&bytes).is_err());
        prop_assert!(ImageIndex::parse(&bytes).is_err());
    }
}

/// A guest that has a frame of each coding and a run of each source.
fn rich() -> Guest {
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

#[test]
fn each_kind_of_frame_and_source_is_used() {
    let guest = rich();
    let files = Files::of(&guest);
    let (_, summary) = packed(&files.writer(&guest));
    let expected = Summary {
        length: summary.length,
        runs: 7,
        data_pages: 54,
        parent_pages: 2,
        image_pages: 4,
        literals: 48,
        frames: 3,
        working_set_frames: 1,
        working_set_length: summary.working_set_length,
        prefix_frames: 1,
        raw_frames: 1,
    };
    assert_eq!(summary, expected);
}

/// Every bit of it, not only some as above.
#[test]
fn any_flipped_bit_is_found() {
    let guest = rich();
    let files = Files::of(&guest);
    let (mut bytes, _) = packed(&files.writer(&guest));
    let pack = Pack::open(&bytes).unwrap();
    let frames = bytes.len()
        - pack
            .frames()
            .iter()
            .map(|e| e.stored as usize)
            .sum::<usize>();
    let parents = files.parents();
    let mut reader = FrameReader::new().unwrap();
    for at in 0..bytes.len() {
        let frame = pack
            .frames()
            .partition_point(|entry| frames as u64 + entry.offset <= at as u64);
        // Frames that are stored raw are long, and all alike.
        let step = if at > frames && at % 64 != 0 { 8 } else { 1 };
        for bit in (0..8).step_by(step) {
            bytes[at] ^= 1 << bit;
            if at < frames {
                assert!(Pack::open(&bytes).is_err(), "bit {bit} of byte {at}");
            } else {
                let error = reader
                    .read(&pack, &bytes, frame as u32 - 1, &parents)
                    .unwrap_err();
                assert!(matches!(error, Error::Stored { .. }), "{error}");
            }
            bytes[at] ^= 1 << bit;
        }
    }
}

#[test]
fn parent_that_is_shorter_or_other_is_named() {
    let guest = rich();
    let files = Files::of(&guest);
    let (bytes, _) = packed(&files.writer(&guest));
    let pack = Pack::open(&bytes).unwrap();
    let image: &dyn Content = &files.image;
    let out = tempfile::tempfile().unwrap();

    let short = file_of(&guest.parents[0][..5]);
    let error = rebuild_flat(&pack, &bytes, &[&short], &[image], &out).unwrap_err();
    assert!(
        matches!(error, Error::ReadParent { parent: 0, .. }),
        "{error}"
    );

    let mut other = guest.parents[0].clone();
    other[3] = noise(77);
    let error = rebuild_flat(&pack, &bytes, &[&file_of(&other)], &[image], &out).unwrap_err();
    assert!(
        matches!(
            error,
            Error::RawOfParent {
                frame: 2,
                parent: 0
            }
        ),
        "{error}"
    );

    let error = rebuild_flat(&pack, &bytes, &[], &[image], &out).unwrap_err();
    assert!(
        matches!(error, Error::ParentMissing { parent: 0 }),
        "{error}"
    );
    let error = rebuild_flat(&pack, &bytes, &files.parents(), &[], &out).unwrap_err();
    assert!(matches!(error, Error::ImageMissing { image: 0 }), "{error}");
    let short = file_of(&guest.image[..1]);
    let error = rebuild_flat(&pack, &bytes, &files.parents(), &[&short], &out).unwrap_err();
    assert!(
        matches!(error, Error::ReadImage { image: 0, .. }),
        "{error}"
    );

    assert_eq!(
        pack.parents(),
        [Origin {
            id: [0; 32],
            length: 20 * 4096
        }]
    );
    assert_eq!(
        pack.images(),
        [Origin {
            id: [9; 32],
            length: 4 * 4096
        }]
    );
}

#[test]
fn patch_needs_a_parent_and_a_frame_has_to_exist() {
    let memory = file_of(&[text(1)]);
    let (bytes, _) = packed(&Writer::new(&memory));
    let pack = Pack::open(&bytes).unwrap();
    let out = tempfile::tempfile().unwrap();
    let error = rebuild_patch(&pack, &bytes, &[], &[], &out).unwrap_err();
    assert!(matches!(error, Error::NoParent), "{error}");
    let error = FrameReader::new()
        .unwrap()
        .read(&pack, &bytes, 1, &[])
        .unwrap_err();
    assert!(
        matches!(
            error,
            Error::NoSuchFrame {
                frame: 1,
                frames: 1
            }
        ),
        "{error}"
    );
}

#[test]
fn what_cannot_be_packed_is_refused_by_name() {
    let out = tempfile::tempfile().unwrap();
    let memory = file_of(&[text(1), text(2)]);
    let odd = vec![1; PAGE + 1];
    let error = Writer::new(&odd).write(&out).unwrap_err();
    assert!(
        matches!(error, WriteError::MemoryLength { length: 4097 }),
        "{error}"
    );
    let error = Writer::new(&memory)
        .working_set(&[2])
        .write(&out)
        .unwrap_err();
    assert!(
        matches!(error, WriteError::WorkingSet { page: 2, pages: 2 }),
        "{error}"
    );

    let short = file_of(&[text(1)]);
    let (id, memory) = ([0; 32], &memory);
    let parent = Parent { id, memory: &short };
    for unchanged in [vec![0..2], vec![1..2], vec![0..1, 0..1]] {
        let writer = Writer::new(memory).parent(parent).unchanged(&unchanged);
        let error = writer.write(&out).unwrap_err();
        assert!(matches!(error, WriteError::Unchanged { .. }), "{error}");
    }

    let index = ImageIndex::build(&short, id).unwrap();
    let index = ImageIndex::parse(&index).unwrap();
    let content = memory;
    let error = Writer::new(memory)
        .image(Image { content, index })
        .write(&out)
        .unwrap_err();
    assert!(
        matches!(error, WriteError::ForeignIndex { image: 0 }),
        "{error}"
    );

    let mut writer = Writer::new(memory);
    for _ in 0..17 {
        writer = writer.parent(parent);
    }
    let error = writer.write(&out).unwrap_err();
    assert!(
        matches!(
            error,
            WriteError::TooManyOrigins {
                parents: 17,
                images: 0
            }
        ),
        "{error}"
    );
}

/// A running μVM's memory, of which only some pages may be looked at.
struct Guarded(Vec<u8>, Range<u64>);

impl Content for Guarded {
    fn length(&self) -> std::io::Result<u64> {
        self.0.length()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
        assert!(offset >= self.1.end || offset + buffer.len() as u64 <= self.1.start);
        Content::read_at(&self.0, buffer, offset)
    }
}

#[test]
fn unchanged_pages_are_not_looked_at() {
    let parent: Vec<_> = (0..40).map(text).collect();
    let mut memory = parent.clone();
    memory[35] = text(99);
    let parent = file_of(&parent);
    let guarded = Guarded(memory.concat(), offset_of(3)..offset_of(30));
    let writer = Writer::new(&guarded)
        .unchanged(&[3..10, 10..30])
        .parent(Parent {
            id: [0; 32],
            memory: &parent,
        });
    let (bytes, summary) = packed(&writer);
    assert_eq!(
        (summary.runs, summary.parent_pages, summary.literals),
        (3, 39, 1)
    );
    let pack = Pack::open(&bytes).unwrap();
    let out = tempfile::tempfile().unwrap();
    rebuild_flat(&pack, &bytes, &[&parent], &[], &out).unwrap();
    assert!(bytes_of(&out) == memory.concat());
    let ranges = rebuild_patch(&pack, &bytes, &[&parent], &[], &out).unwrap();
    assert_eq!(ranges, [35..36]);
}

#[test]
fn zeroes_over_a_parents_data_are_a_hole_of_the_patch() {
    let parent: Vec<_> = (0..100).map(text).collect();
    let mut memory = parent.clone();
    memory[10..12].fill(zeroes());
    memory[40] = text(500);
    // As near as gaps are filled in, and one page further.
    memory[57] = text(501);
    memory[75] = text(502);
    let parent = file_of(&parent);
    let memory = file_of(&memory);
    let (bytes, _) = packed(&Writer::new(&memory).parent(Parent {
        id: [0; 32],
        memory: &parent,
    }));
    let pack = Pack::open(&bytes).unwrap();
    let out = tempfile::tempfile().unwrap();
    let ranges = rebuild_patch(&pack, &bytes, &[&parent], &[], &out).unwrap();
    assert_eq!(ranges, [10..12, 40..58, 75..76]);
    assert_eq!(out.metadata().unwrap().blocks() * 512, offset_of(19));
}

/// zstd would take such a window for a trained dictionary.
#[test]
fn window_that_looks_like_a_dictionary_is_not_used() {
    let magic = 0xEC30_A437_u32.to_le_bytes();
    let parent: Vec<_> = (0..40)
        .map(|page| [&magic[..], &noise(page)[4..]].concat())
        .collect();
    let memory: Vec<_> = parent.iter().map(|page| like(page, 1)).collect();
    let (parent, memory) = (file_of(&parent), file_of(&memory));
    let (bytes, summary) = packed(&Writer::new(&memory).parent(Parent {
        id: [0; 32],
        memory: &parent,
    }));
    assert_eq!((summary.frames, summary.prefix_frames), (3, 0));
    let pack = Pack::open(&bytes).unwrap();
    let out = tempfile::tempfile().unwrap();
    rebuild_flat(&pack, &bytes, &[&parent], &[], &out).unwrap();
    assert!(bytes_of(&out) == bytes_of(&memory));
}
