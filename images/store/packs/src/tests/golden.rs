//! The formats, byte for byte. When one of these tests fails, `docs/formats/pack.md` says what to do.

use crate::testing::{bytes_of, file_of, noise, packed, zeroes};
use crate::{Content, Copies, Image, ImageIndex, Options, Pack, Parent, Writer, rebuild_flat};

/// The pack of [`memory`], in hexadecimal.
const PACK: &str = "
    6b696c6e70636b0a  magic: kilnpck
    01000000 00000000  version, flags
    0080000000000000  memory: 32 KiB
    02000000 01000000  literals, frames of the working set
    0100 0100 01000000  parents, images, frames
    c800000000000000 3c00000000000000  page map: offset, length
    0401000000000000 2c00000000000000  frame table
    3001000000000000 1a00000000000000  frames
    dbdc60e374b6a1458736f3a694dfb55dd57c15d90d26ac2f7e53a3a6e53a236f  checksum

    1111111111111111111111111111111111111111111111111111111111111111  parent 0
    0030000000000000  its length
    2222222222222222222222222222222222222222222222222222222222222222  image 0
    0020000000000000  its length

    01000000 0000 00000000  page 0: zero
    01000000 0200 01000000  page 1: parent 0, page 1
    02000000 0100 00000000  pages 2 and 3: literals 0 and 1
    01000000 0300 01000000  page 4: image 0, block 1
    01000000 0100 00000000  page 5: literal 0
    02000000 0200 01000000  pages 6 and 7: parent 0, pages 1 and 2

    1a000000 02 03 0000 00000000  26 bytes, zstd with the prefix of parent 0, 3 pages from page 0
    5354af95d7fde2f439bac7a9d22a12bc  its pages' digest
    9e2485458f490ac0c8f0a2a9f88963bd  digest of the stored bytes

    28b52ffd60001f85000010ccde03009807be84015053e0bf0fae  zstd's
";

/// The index of [`image`].
const INDEX: &str = "
    6b696c6e6964780a  magic: kilnidx
    01000000 02000000  version, entries
    0020000000000000 0000000000000000  length of the image, reserved
    2222222222222222222222222222222222222222222222222222222222222222  the image
    3c7d7edb9b9979e0759656bb310589ac96ac72de60c44d4a7037a1be55fd15aa  checksum

    8f1a18ac565dd8b8 00000000  block 0
    db0b7be11e002edb 01000000  block 1
";

/// The bytes that a text has: of each line, what comes before two blanks.
fn from_hex(text: &str) -> Vec<u8> {
    let lines = text.trim().lines().map(str::trim);
    let digits = lines.filter_map(|line| line.split("  ").next());
    let digits = digits.collect::<String>().replace(' ', "");
    let digits = digits.as_bytes().chunks(2);
    let byte = |pair| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.map(byte).collect()
}

fn parent() -> Vec<Vec<u8>> {
    (0..3).map(noise).collect()
}

fn image() -> Vec<Vec<u8>> {
    vec![noise(10), noise(11)]
}

fn memory() -> Vec<Vec<u8>> {
    let fill = vec![0xCC; 4096];
    let mut near = noise(2);
    near[100] ^= 1;
    vec![
        zeroes(),
        noise(1),
        fill.clone(),
        near,
        noise(11),
        fill,
        noise(1),
        noise(2),
    ]
}

#[test]
fn pack_is_read_from_its_golden_bytes() {
    let bytes = from_hex(PACK);
    let pack = Pack::open(&bytes).unwrap();
    let out = tempfile::tempfile().unwrap();
    let (parent, image) = (file_of(&parent()), file_of(&image()));
    rebuild_flat(&pack, &bytes, &[&parent], &[&image], &out).unwrap();
    assert!(bytes_of(&out) == memory().concat());
}

/// If only this one fails, a new version of zstd compresses otherwise: the format is what it was.
#[test]
fn pack_is_written_as_its_golden_bytes() {
    let (memory, parent, image) = (file_of(&memory()), file_of(&parent()), file_of(&image()));
    let index = from_hex(INDEX);
    let (id, copies) = ([0x11; 32], Copies::None);
    let parent = Parent {
        id,
        memory: &parent,
    };
    let image = Image {
        content: &image as &dyn Content,
        index: ImageIndex::parse(&index).unwrap(),
    };
    let writer = Writer::new(&memory).parent(parent).image(image);
    let writer = writer.working_set(&[2, 3]).options(Options {
        copies,
        ..Options::default()
    });
    assert_eq!(packed(&writer).0, from_hex(PACK));
}

#[test]
fn index_is_written_as_its_golden_bytes() {
    let index = ImageIndex::build(&file_of(&image()), [0x22; 32]).unwrap();
    assert_eq!(index, from_hex(INDEX));
}
