//! Guest memory, and a request's buffers in it.
//!
//! Trusted: the caller's description of memory. Not trusted: where a request's buffers lie, and what they hold, which
//! the guest may change at any time. So what is decided by is copied out once.

use std::ptr::NonNull;

use thiserror::Error;

use crate::ServerError;

/// The most buffers a request can have: what one system call takes.
const MOST_BUFFERS: usize = 1024;

/// Why a view could not be made, or a request not be put into it.
#[derive(Debug, Error)]
pub enum ViewError {
    /// The regions overlap or end beyond the address space.
    #[error("guest memory can't be viewed: {0}")]
    Regions(&'static str),
    /// The request has more buffers than fit.
    #[error("the request has {0} buffers; at most {MOST_BUFFERS} are possible")]
    TooMany(usize),
}

/// A buffer in host memory. One that is not in the view is found out when the request is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Host address.
    pub addr: usize,
    /// Length in bytes.
    pub len: u32,
}

/// Guest memory under host addresses.
#[derive(Debug)]
pub struct View {
    /// Start and end of each region, in order.
    regions: Vec<(usize, usize)>,
}

impl View {
    /// Views these regions: start and length in host memory.
    ///
    /// # Safety
    ///
    /// Each region must be mapped, readable and writable, for as long as the view lives, and must not be
    /// accessed through references by anybody: the guest writes to it at any time.
    pub unsafe fn new(regions: &[(NonNull<u8>, usize)]) -> Result<Self, ViewError> {
        let mut list = Vec::with_capacity(regions.len());
        for (start, len) in regions {
            let start = start.as_ptr() as usize;
            let end = start
                .checked_add(*len)
                .ok_or(ViewError::Regions("a region ends beyond the address space"))?;
            list.push((start, end));
        }
        list.sort_unstable();
        if list.windows(2).any(|pair| pair[0].1 > pair[1].0) {
            return Err(ViewError::Regions("regions overlap"));
        }
        Ok(View { regions: list })
    }

    fn holds(&self, span: &Span) -> bool {
        let Some(end) = span.addr.checked_add(span.len as usize) else {
            return false;
        };
        let after = self
            .regions
            .partition_point(|(start, _)| *start <= span.addr);
        after > 0 && self.regions.get(after - 1).is_some_and(|r| end <= r.1)
    }
}

/// Buffers that lie in guest memory, as one run of bytes.
#[derive(Clone, Copy)]
pub(crate) struct Buffers<'a> {
    spans: &'a [Span],
    len: usize,
}

impl<'a> Buffers<'a> {
    /// Checks all of a request's buffers.
    pub(crate) fn check(
        view: &'a View,
        readable: &'a [Span],
        writable: &'a [Span],
    ) -> Result<(Self, Self), ServerError> {
        let count = readable.len() + writable.len();
        if count > MOST_BUFFERS {
            return Err(ViewError::TooMany(count).into());
        }
        Ok((Self::new(view, readable)?, Self::new(view, writable)?))
    }

    pub(crate) fn new(view: &'a View, spans: &'a [Span]) -> Result<Self, ServerError> {
        if !spans.iter().all(|span| view.holds(span)) {
            let what = "a buffer is outside guest memory";
            return Err(ServerError::Request(what.to_owned()));
        }
        // At most 1024 lengths of 32 bits each.
        let len = spans.iter().map(|span| span.len as usize).sum();
        Ok(Buffers { spans, len })
    }

    /// Bytes in all buffers together.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The pieces of up to `len` bytes from `at` on, each with its address.
    fn pieces(&self, at: usize, len: usize) -> impl Iterator<Item = (*mut u8, usize)> {
        let (mut skip, mut left) = (at, len);
        self.spans.iter().filter_map(move |span| {
            let size = span.len as usize;
            let begin = skip.min(size);
            skip -= begin;
            let take = (size - begin).min(left);
            left -= take;
            let address = std::ptr::with_exposed_provenance_mut::<u8>(span.addr + begin);
            (take > 0).then_some((address, take))
        })
    }

    /// Fills `to` from the bytes at `at`. `false` if there are fewer.
    #[must_use]
    pub(crate) fn read(&self, at: usize, to: &mut [u8]) -> bool {
        if at.checked_add(to.len()).is_none_or(|end| end > self.len) {
            return false;
        }
        let mut rest = to;
        for (from, len) in self.pieces(at, rest.len()) {
            let (now, later) = rest.split_at_mut(len);
            rest = later;
            // SAFETY: the span lies in a region of the view, which is mapped and has no references into it; `now`
            // has that length and is host memory.
            unsafe { std::ptr::copy_nonoverlapping(from, now.as_mut_ptr(), len) };
        }
        true
    }

    /// Writes `bytes` at `at`. `false` if there is no room for them.
    #[must_use]
    pub(crate) fn write(&self, at: usize, bytes: &[u8]) -> bool {
        if at.checked_add(bytes.len()).is_none_or(|end| end > self.len) {
            return false;
        }
        let mut rest = bytes;
        for (to, len) in self.pieces(at, rest.len()) {
            let (now, later) = rest.split_at(len);
            rest = later;
            // SAFETY: as above.
            unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), to, len) };
        }
        true
    }

    /// Puts what the kernel needs to read or write up to `len` bytes from `at` on into `out`.
    pub(crate) fn iovecs(&self, at: usize, len: usize, out: &mut Vec<libc::iovec>) {
        out.clear();
        out.extend(self.pieces(at, len).map(|(address, len)| libc::iovec {
            iov_base: address.cast(),
            iov_len: len,
        }));
    }

    pub(crate) fn to_vec(self) -> Vec<Span> {
        self.spans.to_vec()
    }
}
