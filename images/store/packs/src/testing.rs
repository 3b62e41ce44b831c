//! Memories for tests.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::content::{is_zero, offset_of};
use crate::{Content, PAGE, Pack, Summary, Writer};

/// A page that looks like nothing else, the same for the same number.
pub(crate) fn noise(number: u64) -> Vec<u8> {
    let mut page = vec![0; PAGE];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&number.to_le_bytes());
    hasher.finalize_xof().fill(&mut page);
    page
}

/// A page with a text over and over.
pub(crate) fn text(number: u64) -> Vec<u8> {
    let line = format!("{number:x}, and so on; ");
    line.bytes().cycle().take(PAGE).collect()
}

pub(crate) fn zeroes() -> Vec<u8> {
    vec![0; PAGE]
}

/// A page like another one, but for a few bytes.
pub(crate) fn like(page: &[u8], change: u8) -> Vec<u8> {
    let mut page = page.to_vec();
    for at in (0..PAGE).step_by(256) {
        page[at] ^= change | 1;
    }
    page
}

/// A file of pages, in which zeroes are holes.
pub(crate) fn file_of(pages: &[Vec<u8>]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len((pages.len() * PAGE) as u64).unwrap();
    for (number, page) in (0u32..).zip(pages) {
        if !is_zero(page) {
            file.write_all_at(page, offset_of(number)).unwrap();
        }
    }
    file
}

/// All bytes of a content.
pub(crate) fn bytes_of(content: &dyn Content) -> Vec<u8> {
    let mut bytes = vec![0; content.length().unwrap() as usize];
    content.read_into(&mut bytes, 0).unwrap();
    bytes
}

/// The bytes of a pack.
pub(crate) fn packed(writer: &Writer<'_>) -> (Vec<u8>, Summary) {
    let file = tempfile::tempfile().unwrap();
    let summary = writer.write(&file).unwrap();
    let bytes = bytes_of(&file);
    assert_eq!(bytes.len() as u64, summary.length);
    let pack = Pack::open(&bytes).unwrap();
    assert_eq!(pack.frames().len(), summary.frames as usize);
    (bytes, summary)
}
