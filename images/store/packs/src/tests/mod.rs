//! What holds for whole packs: they give back what was packed, and nothing else.

mod golden;
mod guest;
mod writing;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use proptest::prelude::*;

use crate::content::{is_zero, offset_of};
use crate::testing::{bytes_of, file_of, noise, packed, text};
use crate::*;
use guest::{Files, guest, rich};

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
    fn first_page_that_differs_is_found(guest in guest(), changes in prop::collection::vec(any::<u32>(), 1..4)) {
        let files = Files::of(&guest);
        let (bytes, _) = packed(&files.writer(&guest));
        let pack = Pack::open(&bytes).unwrap();
        let mut memory = guest.memory.concat();
        let difference = |memory: &Vec<u8>| {
            first_difference(&pack, &bytes, &files.parents(), &[&files.image], memory).unwrap()
        };
        prop_assert_eq!(difference(&memory), None);
        if !memory.is_empty() {
            let changed = changes.iter().map(|at| *at as usize % memory.len());
            let changed: std::collections::BTreeSet<usize> = changed.collect();
            changed.iter().for_each(|at| memory[*at] ^= 0x10);
            let first = changed.first().map(|at| (at / PAGE) as u32);
            prop_assert_eq!(difference(&memory), first);
            changed.iter().for_each(|at| memory[*at] ^= 0x10);
        }
        memory.extend(noise(1));
        prop_assert_eq!(difference(&memory), Some(pack.pages()));
    }

    #[test]
    fn frames_of_the_working_set_come_first_and_need_no_other_file(guest in guest()) {
        let files = Files::of(&guest);
        let (bytes, _) = packed(&files.writer(&guest));
        let pack = Pack::open(&bytes).unwrap();
        let first = pack.working_set_frames();
        if guest.options.copies == Copies::All {
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

    let short: &dyn Content = &file_of(&guest.parents[0][..5]);
    let error = rebuild_flat(&pack, &bytes, &[short], &[image], &out).unwrap_err();
    let text =
        "parent 0 has 20480 bytes instead of 81920: it is not the one that the pack was made with";
    assert_eq!(error.to_string(), text);
    let error = rebuild_flat(&pack, &bytes, &files.parents(), &[short], &out).unwrap_err();
    let of_image = matches!(error, Error::OtherOrigin { what: "image", .. });
    assert!(of_image, "{error}");
    let error = FrameReader::new()
        .unwrap()
        .read(&pack, &bytes, 2, &[short])
        .unwrap_err();
    let at_window = matches!(error, Error::ReadParent { parent: 0, .. });
    assert!(at_window, "{error}");

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

/// A VMM's threads share a pack, and each has a reader.
#[test]
fn readers_can_be_given_to_threads() {
    fn shared<T: Send + Sync>() {}
    fn given<T: Send>() {}
    shared::<Pack>();
    shared::<Placements>();
    given::<FrameReader>();
}
