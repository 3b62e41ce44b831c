//! What memories, parents, images and packs are to this crate: bytes at offsets.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::PAGE;

/// Bytes that can be read at any offset: a file, a slice, or a paused VM's memory.
///
/// It must not change while it is packed or read. Frames have digests, so a pack whose parent changes is found out
/// where it matters for decompression, but a plain copy of a parent's page is not checked.
pub trait Content {
    /// Length in bytes, holes included.
    fn length(&self) -> io::Result<u64>;

    /// Fills `buffer` with the bytes at `offset`; [`io::ErrorKind::UnexpectedEof`] if there are fewer.
    fn read_into(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// First offset at or after `offset` that may hold something else than zero, or `None` if all that follows is zero.
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        Ok((offset < self.length()?).then_some(offset))
    }
}

impl Content for File {
    fn length(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_into(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(buffer, offset)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        match rustix::fs::seek(self, SeekFrom::Data(offset)) {
            Ok(at) => Ok(Some(at)),
            Err(Errno::NXIO) => Ok(None),
            // A file system that knows no holes: all is data.
            Err(Errno::INVAL) => Ok((offset < self.length()?).then_some(offset)),
            Err(error) => Err(error.into()),
        }
    }
}

impl Content for [u8] {
    fn length(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_into(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..)?.get(..buffer.len()))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }
}

impl Content for Vec<u8> {
    fn length(&self) -> io::Result<u64> {
        self.as_slice().length()
    }

    fn read_into(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        Content::read_into(self.as_slice(), buffer, offset)
    }
}

impl<T: Content + ?Sized> Content for &T {
    fn length(&self) -> io::Result<u64> {
        (**self).length()
    }

    fn read_into(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_into(buffer, offset)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        (**self).next_data(offset)
    }
}

/// Offset of a page.
pub(crate) fn offset_of(page: u32) -> u64 {
    u64::from(page) * PAGE as u64
}

/// Whole pages of so many bytes. What is beyond the last number that a map can hold does not count.
pub(crate) fn pages_of(length: u64) -> u32 {
    u32::try_from(length / PAGE as u64).unwrap_or(u32::MAX)
}

pub(crate) fn is_zero(page: &[u8]) -> bool {
    let (words, rest) = page.as_chunks::<16>();
    words.iter().all(|word| u128::from_le_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

/// Pages read at a time when a content is walked through.
pub(crate) const WALK_PAGES: usize = 64;

/// Walks through the pages of a part of a content, a buffer at a time, past its holes.
pub(crate) struct Walk<'a> {
    content: &'a dyn Content,
    next: u32,
    end: u32,
    buffer: Vec<u8>,
}

impl<'a> Walk<'a> {
    pub(crate) fn new(content: &'a dyn Content, pages: std::ops::Range<u32>) -> Self {
        Walk {
            content,
            next: pages.start,
            end: pages.end,
            buffer: vec![0; WALK_PAGES * PAGE],
        }
    }

    /// The next pages that may not be zero: the number of the first, and their bytes.
    pub(crate) fn next(&mut self) -> io::Result<Option<(u32, &[u8])>> {
        if self.next >= self.end {
            return Ok(None);
        }
        let Some(data) = self.content.next_data(offset_of(self.next))? else {
            self.next = self.end;
            return Ok(None);
        };
        let first = pages_of(data).max(self.next);
        if first >= self.end {
            self.next = self.end;
            return Ok(None);
        }
        let pages = (self.end - first).min(WALK_PAGES as u32);
        let bytes = &mut self.buffer[..pages as usize * PAGE];
        self.content.read_into(bytes, offset_of(first))?;
        self.next = first + pages;
        Ok(Some((first, bytes)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn walk_passes_holes_and_reads_all_data() {
        let file = tempfile::tempfile().unwrap();
        let pages = 1000u32;
        file.set_len(offset_of(pages)).unwrap();
        for page in [0u32, 70, 71, 500, 999] {
            file.write_all_at(&[7; PAGE], offset_of(page)).unwrap();
        }
        let mut walk = Walk::new(&file, 1..pages);
        let (mut read, mut found) = (0, Vec::new());
        while let Some((first, bytes)) = walk.next().unwrap() {
            for (page, bytes) in (first..).zip(bytes.chunks(PAGE)) {
                read += 1;
                if !is_zero(bytes) {
                    found.push(page);
                }
            }
        }
        assert_eq!(found, [70, 71, 500, 999]);
        assert!(read < 300, "{read}");
    }

    #[test]
    fn slice_ends_where_it_ends() {
        let bytes = vec![1u8; 10];
        let mut buffer = [0; 4];
        assert!(Content::read_into(&bytes, &mut buffer, 6).is_ok());
        for offset in [7, 11, u64::MAX] {
            let error = Content::read_into(&bytes, &mut buffer, offset).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
    }
}
