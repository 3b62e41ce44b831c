//! What a writer makes of what it is given.

use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use crate::content::offset_of;
use crate::testing::{bytes_of, file_of, like, noise, packed, text, zeroes};
use crate::*;

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
    let beyond = [0..2, 2..2];
    let behind = [1..2, 2..2];
    for unchanged in [beyond, behind, [0..1, 0..1]] {
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

    fn read_into(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
        assert!(offset >= self.1.end || offset + buffer.len() as u64 <= self.1.start);
        Content::read_into(&self.0, buffer, offset)
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
    assert_eq!((ranges.len(), &ranges[0]), (1, &(35..36)));
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

#[test]
fn copies_are_made_of_what_is_wanted() {
    let (parent, block) = (noise(1), noise(2));
    let memory = file_of(&[parent.clone(), block.clone(), text(3)]);
    let (parent, image) = (file_of(&[parent]), file_of(&[block]));
    let index = ImageIndex::build(&image, [2; 32]).unwrap();
    let index = ImageIndex::parse(&index).unwrap();
    let sources = |copies| {
        let options = Options {
            copies,
            ..Options::default()
        };
        let (id, memory, content) = ([1; 32], &memory, &image);
        let writer = Writer::new(memory).working_set(&[2, 1, 0]).options(options);
        let writer = writer.parent(Parent {
            id,
            memory: &parent,
        });
        let (bytes, _) = packed(&writer.image(Image { content, index }));
        let pack = Pack::open(&bytes).unwrap();
        [0, 1, 2].map(|page| pack.source_of(page).unwrap())
    };
    let (of_parent, of_image) = (
        Source::Parent { parent: 0, page: 0 },
        Source::Image { image: 0, block: 0 },
    );
    let literal = Source::Literal;
    assert_eq!(sources(Copies::None), [of_parent, of_image, literal(0)]);
    assert_eq!(
        sources(Copies::OfImages),
        [of_parent, literal(1), literal(0)]
    );
    assert_eq!(sources(Copies::All), [literal(2), literal(1), literal(0)]);
}
