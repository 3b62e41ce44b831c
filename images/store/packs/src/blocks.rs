//! Finding pages by their content: a table of hashes and page numbers, in which a hit is a hint to be compared.

use std::io;

use crate::PAGE;
use crate::content::{Content, Walk, is_zero, pages_of};

/// First eight bytes of a page's BLAKE3 digest. Whoever finds two pages with one hash has won nothing: pages are
/// compared before one is taken for the other.
pub(crate) fn hash_of(page: &[u8]) -> u64 {
    let mut first = [0; 8];
    first.copy_from_slice(&blake3::hash(page).as_bytes()[..8]);
    u64::from_le_bytes(first)
}

/// Hashes and numbers of all whole pages but those of zeroes, by hash. Of pages with one hash, the first.
pub(crate) fn scan(content: &dyn Content) -> io::Result<Vec<(u64, u32)>> {
    let mut table = Vec::new();
    let mut walk = Walk::new(content, 0..pages_of(content.length()?));
    while let Some((first, bytes)) = walk.next()? {
        let pages = (first..).zip(bytes.chunks_exact(PAGE));
        let data = pages.filter(|(_, page)| !is_zero(page));
        table.extend(data.map(|(number, page)| (hash_of(page), number)));
    }
    table.sort_unstable();
    table.dedup_by_key(|(hash, _)| *hash);
    Ok(table)
}
