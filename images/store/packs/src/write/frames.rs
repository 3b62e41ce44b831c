//! Filling frames with literal pages, and choosing how each is stored.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use zstd::zstd_safe::{self, CCtx, get_error_name};

use super::plan::Plan;
use super::prefix::WindowFinder;
use super::{Copies, MEMORY, PARENT, Writer, failed, writing};
use crate::content::offset_of;
use crate::error::WriteError;
use crate::table::{Coding, FrameEntry, Window};
use crate::{FRAME_PAGES, PAGE, short_digest};

/// Bytes of frames that are written at once.
const BATCH: usize = 1 << 20;

/// A window that begins with these bytes would be taken for a trained dictionary: it is not used.
const DICTIONARY_MAGIC: [u8; 4] = 0xEC30_A437_u32.to_le_bytes();

/// Writes the frames of a plan.
pub(super) struct FrameWriter<'a> {
    writer: &'a Writer<'a>,
    plan: &'a Plan,
    /// Frames that must not refer to a parent.
    plain: u32,
    finder: Option<WindowFinder>,
}

impl<'a> FrameWriter<'a> {
    pub(super) fn new(writer: &'a Writer<'a>, plan: &'a Plan, working_set_frames: u32) -> Self {
        let all = writer.options.copies == Copies::All;
        FrameWriter {
            writer,
            plan,
            plain: if all { working_set_frames } else { 0 },
            finder: None,
        }
    }

    /// Writes all frames from `start` on, and gives their entries.
    pub(super) fn write(mut self, out: &File, start: u64) -> Result<Vec<FrameEntry>, WriteError> {
        let mut coder = Coder::new(self.writer.options.level)?;
        let mut table = Vec::with_capacity(self.plan.literals.len().div_ceil(FRAME_PAGES));
        let mut batch = Vec::with_capacity(BATCH + FRAME_PAGES * PAGE);
        let mut written = start;
        let mut raw = vec![0; FRAME_PAGES * PAGE];
        for (frame, pages) in (0u32..).zip(self.plan.literals.chunks(FRAME_PAGES)) {
            let raw = &mut raw[..pages.len() * PAGE];
            self.read_pages(pages, raw)?;
            let windows = self.windows(frame, pages, raw)?;
            let (coding, stored) = coder.code(frame, raw, &windows)?;
            table.push(FrameEntry {
                offset: written - start + batch.len() as u64,
                stored: stored.len() as u32,
                pages: pages.len() as u32,
                coding,
                raw_digest: short_digest(raw),
                stored_digest: short_digest(stored),
            });
            batch.extend_from_slice(stored);
            if batch.len() >= BATCH {
                out.write_all_at(&batch, written).map_err(writing)?;
                written += batch.len() as u64;
                batch.clear();
            }
        }
        out.write_all_at(&batch, written).map_err(writing)?;
        Ok(table)
    }

    fn read_pages(&self, pages: &[u32], mut raw: &mut [u8]) -> Result<(), WriteError> {
        for group in pages.chunk_by(|a, b| *b == *a + 1) {
            let (bytes, rest) = raw.split_at_mut(group.len() * PAGE);
            self.writer
                .memory
                .read_into(bytes, offset_of(group[0]))
                .map_err(failed(MEMORY))?;
            raw = rest;
        }
        Ok(())
    }

    /// Windows to try for a frame, with their bytes.
    fn windows(
        &mut self,
        frame: u32,
        pages: &[u32],
        raw: &[u8],
    ) -> Result<Vec<(Window, Vec<u8>)>, WriteError> {
        let parents = &self.writer.parents;
        if !self.writer.options.prefix || frame < self.plain || parents.is_empty() {
            return Ok(Vec::new());
        }
        if self.finder.is_none() {
            let memories: Vec<_> = parents.iter().map(|parent| parent.memory).collect();
            self.finder = Some(WindowFinder::new(&memories).map_err(failed(PARENT))?);
        }
        let candidates = self.finder.iter().flat_map(|f| f.candidates(pages, raw));
        let mut windows = Vec::new();
        for window in candidates {
            let mut bytes = vec![0; usize::from(window.pages) * PAGE];
            parents[usize::from(window.parent)]
                .memory
                .read_into(&mut bytes, offset_of(window.page))
                .map_err(failed(PARENT))?;
            if !bytes.starts_with(&DICTIONARY_MAGIC) {
                windows.push((window, bytes));
            }
        }
        Ok(windows)
    }
}

/// Compresses frames in each way that may be the shortest.
struct Coder {
    compressor: CCtx<'static>,
    level: i32,
    best: Vec<u8>,
    attempt: Vec<u8>,
}

impl Coder {
    fn new(level: i32) -> Result<Self, WriteError> {
        let compressor = CCtx::try_create().ok_or(WriteError::Io {
            action: "making a compressor",
            source: io::ErrorKind::OutOfMemory.into(),
        })?;
        let room = zstd_safe::compress_bound(FRAME_PAGES * PAGE);
        Ok(Coder {
            compressor,
            level,
            best: Vec::with_capacity(room),
            attempt: Vec::with_capacity(room),
        })
    }

    /// The shortest form of a frame, and its bytes.
    fn code(
        &mut self,
        frame: u32,
        raw: &[u8],
        windows: &[(Window, Vec<u8>)],
    ) -> Result<(Coding, &[u8]), WriteError> {
        self.best.clear();
        self.best.extend_from_slice(raw);
        let mut coding = Coding::Raw;
        self.compressor
            .compress(&mut self.attempt, raw, self.level)
            .map_err(|code| compress_failed(frame, code))?;
        if self.keep_shorter() {
            coding = Coding::Zstd;
        }
        for (window, bytes) in windows {
            self.compressor
                .compress_using_dict(&mut self.attempt, raw, bytes, self.level)
                .map_err(|code| compress_failed(frame, code))?;
            if self.keep_shorter() {
                coding = Coding::ZstdWithPrefix(*window);
            }
        }
        Ok((coding, &self.best))
    }

    fn keep_shorter(&mut self) -> bool {
        let shorter = self.attempt.len() < self.best.len();
        if shorter {
            std::mem::swap(&mut self.attempt, &mut self.best);
        }
        shorter
    }
}

fn compress_failed(frame: u32, code: usize) -> WriteError {
    let reason = get_error_name(code);
    WriteError::Compress { frame, reason }
}
