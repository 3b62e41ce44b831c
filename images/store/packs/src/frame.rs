//! Decoding frames: stored bytes are verified before they are decompressed, pages before they are given out.

use std::io;

use zstd::zstd_safe::{DCtx, get_error_name};

use crate::content::offset_of;
use crate::error::Error;
use crate::pack::Pack;
use crate::table::{Coding, FrameEntry, Window};
use crate::{Content, FRAME_PAGES, PAGE, WINDOW_PAGES, short_digest};

/// Decodes frames of packs, one at a time. Threads that decode at the same time need one each.
///
/// All its memory, about 400 KiB, is allocated when it is made.
pub struct FrameReader {
    decompressor: DCtx<'static>,
    stored: Vec<u8>,
    window: Vec<u8>,
    raw: Vec<u8>,
}

impl std::fmt::Debug for FrameReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameReader").finish_non_exhaustive()
    }
}

impl FrameReader {
    /// Makes one.
    pub fn new() -> Result<FrameReader, Error> {
        let decompressor = DCtx::try_create().ok_or(Error::Io {
            action: "making a decompressor",
            source: io::ErrorKind::OutOfMemory.into(),
        })?;
        Ok(FrameReader {
            decompressor,
            stored: vec![0; FRAME_PAGES * PAGE],
            window: vec![0; WINDOW_PAGES * PAGE],
            raw: vec![0; FRAME_PAGES * PAGE],
        })
    }

    /// The literal pages of a frame. `file` is the pack's, `parents` are its parents' flat memories, in order; those
    /// that no frame refers to may be left out at the end.
    pub fn read(
        &mut self,
        pack: &Pack,
        file: &dyn Content,
        frame: u32,
        parents: &[&dyn Content],
    ) -> Result<&[u8], Error> {
        let entry = pack.frame(frame)?;
        let stored = &mut self.stored[..entry.stored as usize];
        file.read_into(stored, pack.frames_offset() + entry.offset)
            .map_err(|source| Error::ReadFrame { frame, source })?;
        if short_digest(stored) != entry.stored_digest {
            return Err(Error::Stored { frame });
        }
        match entry.coding {
            Coding::Raw => self.raw[..stored.len()].copy_from_slice(stored),
            Coding::Zstd => self.decompress(frame, entry, 0)?,
            Coding::ZstdWithPrefix(window) => {
                let length = self.read_window(window, parents)?;
                self.decompress(frame, entry, length)?;
            }
        }
        let raw = &self.raw[..entry.raw_length()];
        if short_digest(raw) == entry.raw_digest {
            return Ok(raw);
        }
        Err(match entry.coding {
            Coding::ZstdWithPrefix(Window { parent, .. }) => Error::RawOfParent { frame, parent },
            _ => Error::Raw { frame },
        })
    }

    /// Reads the pages that a frame is compressed against. Gives their length.
    fn read_window(&mut self, window: Window, parents: &[&dyn Content]) -> Result<usize, Error> {
        let Window {
            parent,
            page,
            pages,
        } = window;
        let content = parents
            .get(usize::from(parent))
            .ok_or(Error::ParentMissing { parent })?;
        let length = usize::from(pages) * PAGE;
        content
            .read_into(&mut self.window[..length], offset_of(page))
            .map_err(|source| Error::ReadParent {
                parent,
                page,
                source,
            })?;
        Ok(length)
    }

    fn decompress(&mut self, frame: u32, entry: &FrameEntry, window: usize) -> Result<(), Error> {
        let raw = &mut self.raw[..entry.raw_length()];
        let stored = &self.stored[..entry.stored as usize];
        let done = if window == 0 {
            self.decompressor.decompress(raw, stored)
        } else {
            let window = &self.window[..window];
            self.decompressor.decompress_using_dict(raw, stored, window)
        };
        let reason = match done {
            Ok(length) if length == entry.raw_length() => return Ok(()),
            Ok(_) => "fewer pages than there should be",
            Err(code) => get_error_name(code),
        };
        match entry.coding {
            // Its bytes are those that were written, so it is the window that differs.
            Coding::ZstdWithPrefix(Window { parent, .. }) => {
                Err(Error::RawOfParent { frame, parent })
            }
            _ => Err(Error::Decompress { frame, reason }),
        }
    }
}
