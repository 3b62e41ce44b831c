//! Page-aligned buffers for I/O past the page cache.

use std::cell::RefCell;

use crate::sectors::PAGE_SIZE;

/// What one I/O moves at most: 16 chunks.
pub(crate) const BOUNCE_LEN: usize = 1 << 20;

/// A page-aligned buffer.
#[derive(Debug)]
pub(crate) struct Bounce {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Bounce {
    pub(crate) fn new(len: usize) -> Self {
        let memory = vec![0; len + PAGE_SIZE];
        let start = memory.as_ptr().align_offset(PAGE_SIZE).min(PAGE_SIZE);
        Bounce { memory, start, len }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

thread_local! {
    static BOUNCE: RefCell<Option<Bounce>> = const { RefCell::new(None) };
}

/// Runs `f` with the thread's own buffer of [`BOUNCE_LEN`] bytes, made at the first use.
pub(crate) fn with_bounce<R>(f: impl FnOnce(&mut [u8]) -> R) -> R {
    let mut bounce = BOUNCE
        .with(RefCell::take)
        .unwrap_or_else(|| Bounce::new(BOUNCE_LEN));
    let result = f(bounce.bytes_mut());
    BOUNCE.with(|place| place.replace(Some(bounce)));
    result
}
