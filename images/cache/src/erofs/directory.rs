//! A directory's content: blocks of entries, each followed by its names, sorted over the whole directory so
//! that the kernel can search it by halves.

use super::format::{BLOCK, BLOCK_LEN, DIRENT_LEN, FileType, put_dirent};
use super::tree::Dirent;

/// How many of the first entries share a block.
fn fitting(entries: &[Dirent]) -> (usize, usize) {
    let mut used = 0;
    for (count, entry) in entries.iter().enumerate() {
        let more = DIRENT_LEN + entry.name.len();
        if used + more > BLOCK_LEN {
            return (count, used);
        }
        used += more;
    }
    (entries.len(), used)
}

/// The directory's length in bytes.
pub(crate) fn len(mut entries: &[Dirent]) -> u64 {
    let mut len = 0;
    loop {
        let (count, used) = fitting(entries);
        entries = &entries[count..];
        if entries.is_empty() {
            return len + used as u64;
        }
        len += BLOCK;
    }
}

/// Writes the directory: whole blocks to `blocks`, what is left to `tail`. Both are zeroed.
pub(crate) fn encode(
    mut entries: &[Dirent],
    blocks: &mut [u8],
    tail: &mut [u8],
    number_and_type: impl Fn(&Dirent) -> (u64, FileType),
) {
    for out in blocks.chunks_mut(BLOCK_LEN).chain([tail]) {
        let (count, _) = fitting(entries);
        let (now, rest) = entries.split_at(count);
        let mut name_at = count * DIRENT_LEN;
        for (index, entry) in now.iter().enumerate() {
            let (nid, file_type) = number_and_type(entry);
            // Below the block's length.
            let offset = (name_at & 0xffff) as u16;
            put_dirent(out, index * DIRENT_LEN, nid, offset, file_type);
            out[name_at..name_at + entry.name.len()].copy_from_slice(&entry.name);
            name_at += entry.name.len();
        }
        entries = rest;
    }
}
