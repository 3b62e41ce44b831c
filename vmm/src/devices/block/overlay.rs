//! A disk whose writes live in the VMM's memory and spill to a file: `kiln-overlay` behind the device.
//!
//! What needs no disk is done at once on the device thread. The rest (content of the disk below, content that was
//! spilled, writes while RAM is full) waits on a thread, which is started when first needed.

use std::fs::File;
use std::io;
use std::os::fd::RawFd;

use kiln_overlay::{Attempt, BufferError, Overlay, Source, Target};

use super::backend::{
    BlockBackend, BlockOp, BlockRequest, Completion, Content, IoBuffers, Submitted,
};
use super::worker::Worker;

/// An overlay as a disk.
#[derive(Debug)]
pub struct OverlayBackend {
    // Before the overlay: its thread uses that.
    worker: Option<Worker>,
    overlay: std::sync::Arc<Overlay>,
}

/// A request's buffers in guest memory.
struct Guest<'a>(&'a IoBuffers);

impl Source for Guest<'_> {
    fn len(&self) -> u64 {
        self.0.len()
    }

    fn read(&self, at: u64, out: &mut [u8]) -> Result<(), BufferError> {
        Ok(self.0.read_at(at, out)?)
    }
}

impl Target for Guest<'_> {
    fn len(&self) -> u64 {
        self.0.len()
    }

    fn write(&mut self, at: u64, data: &[u8]) -> Result<(), BufferError> {
        Ok(self.0.write_at(at, data)?)
    }
}

impl OverlayBackend {
    /// Makes a disk of an overlay.
    pub fn new(overlay: Overlay) -> Self {
        Self {
            worker: None,
            overlay: std::sync::Arc::new(overlay),
        }
    }

    /// Does what can be done without waiting.
    fn attempt(&self, request: &BlockRequest) -> Result<Attempt, kiln_overlay::Error> {
        let overlay = &self.overlay;
        match request.op {
            BlockOp::Read => overlay.try_read(request.offset, &mut Guest(&request.buffers)),
            BlockOp::Write => overlay.try_write(request.offset, &Guest(&request.buffers)),
            BlockOp::Flush if !overlay.flush_is_free() => Ok(Attempt::WouldWait),
            BlockOp::Flush => overlay.flush().map(|()| Attempt::Done),
            BlockOp::Discard => overlay
                .discard(request.offset, request.len)
                .map(|()| Attempt::Done),
            BlockOp::WriteZeroes { .. } => overlay
                .write_zeroes(request.offset, request.len)
                .map(|()| Attempt::Done),
        }
    }

    fn later(&mut self, request: BlockRequest) -> Submitted {
        let worker = match &mut self.worker {
            Some(worker) => worker,
            none => {
                let overlay = self.overlay.clone();
                match Worker::new(move |request| execute(&overlay, request)) {
                    Ok(worker) => none.insert(worker),
                    Err(e) => {
                        return Submitted::Done(Completion {
                            tag: request.tag,
                            result: Err(e),
                        });
                    }
                }
            }
        };
        worker.submit(request)
    }
}

/// Does a request, waiting where need be.
fn execute(overlay: &Overlay, request: &BlockRequest) -> io::Result<()> {
    let result = match request.op {
        BlockOp::Read => overlay.read(request.offset, &mut Guest(&request.buffers)),
        BlockOp::Write => overlay.write(request.offset, &Guest(&request.buffers)),
        BlockOp::Flush => overlay.flush(),
        BlockOp::Discard => overlay.discard(request.offset, request.len),
        BlockOp::WriteZeroes { .. } => overlay.write_zeroes(request.offset, request.len),
    };
    result.map_err(Into::into)
}

impl BlockBackend for OverlayBackend {
    fn capacity(&self) -> u64 {
        self.overlay.capacity()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn submit(&mut self, request: BlockRequest) -> Submitted {
        let result = match self.attempt(&request) {
            Ok(Attempt::WouldWait) => return self.later(request),
            Ok(Attempt::Done) => Ok(()),
            Err(e) => Err(e.into()),
        };
        Submitted::Done(Completion {
            tag: request.tag,
            result,
        })
    }

    fn kick(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn completion_fd(&self) -> Option<RawFd> {
        self.worker.as_ref().map(Worker::fd)
    }

    fn completions(&mut self, done: &mut Vec<Completion>) -> io::Result<()> {
        if let Some(worker) = &mut self.worker {
            worker.completions(done);
        }
        Ok(())
    }

    fn drain(&mut self, done: &mut Vec<Completion>) -> io::Result<()> {
        if let Some(worker) = &mut self.worker {
            worker.drain(done);
        }
        Ok(())
    }

    fn save(&self, into: &File) -> io::Result<Content> {
        self.overlay
            .save(into)
            .map(Content::Saved)
            .map_err(Into::into)
    }
}
