//! All of a disk's content as a file, for another overlay to lie over.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::error::Error;
use crate::overlay::{Disk, Overlay};
use crate::sectors::{CHUNK_SIZE, PAGE_SIZE};

impl Overlay {
    /// Writes the disk's content into an empty file, with holes for zeroes, and tells how many bytes of it are
    /// data. Nobody may write to the disk meanwhile.
    pub fn save(&self, into: &File) -> Result<u64, Error> {
        let disk = &self.0;
        if let Some(last) = disk.capacity.checked_sub(1) {
            // The file's length. Cutting files is not among what the VMM's threads may do.
            into.write_all_at(&[0], last).map_err(Error::Save)?;
        }
        let mut content = vec![0; CHUNK_SIZE];
        let mut written = 0;
        for piece in Disk::pieces(0, disk.capacity) {
            if disk.is_empty(piece.chunk, piece.at) {
                continue;
            }
            let content = &mut content[piece.bytes()];
            self.read(piece.at, content)?;
            written += write_data(into, content, piece.at).map_err(Error::Save)?;
        }
        Ok(written)
    }
}

impl Disk {
    /// Whether a chunk, which begins at `start`, was never written and has nothing below it. It may be empty
    /// without this being seen.
    fn is_empty(&self, chunk: u32, start: u64) -> bool {
        self.table.get(chunk).is_none()
            && self.base.as_ref().is_none_or(|base| {
                let (data, until) = base.extent(start);
                !data && until >= start.saturating_add(CHUNK_SIZE as u64)
            })
    }
}

/// Writes the pages that are not all zeroes, neighbours at once.
fn write_data(into: &File, content: &[u8], at: u64) -> io::Result<u64> {
    let mut written = 0;
    let mut offset = 0;
    let has_data = |page: &&[u8]| page.iter().any(|byte| *byte != 0);
    while offset < content.len() {
        let rest = content[offset..].chunks(PAGE_SIZE);
        let data: usize = rest.take_while(has_data).map(<[u8]>::len).sum();
        into.write_all_at(&content[offset..offset + data], at + offset as u64)?;
        written += data as u64;
        // The page after these is empty, or there is none.
        offset += data + PAGE_SIZE;
    }
    Ok(written)
}
