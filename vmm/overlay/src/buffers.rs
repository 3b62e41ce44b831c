//! The other end of a transfer: scattered memory that data comes from or goes to.

use std::io::{IoSlice, IoSliceMut};

/// Why a caller's buffer could not be used; what went wrong is the caller's to say.
pub type BufferError = Box<dyn std::error::Error + Send + Sync>;

/// Where the data of a write comes from.
///
/// It may change while it is read, if it is a guest's: each byte is read once.
pub trait Source {
    /// How many bytes there are.
    fn len(&self) -> u64;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `out` from the bytes at `at`.
    fn read(&self, at: u64, out: &mut [u8]) -> Result<(), BufferError>;
}

/// Where the data of a read goes.
pub trait Target {
    /// How many bytes there is room for.
    fn len(&self) -> u64;

    /// Whether there is room for none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Puts `data` at `at`.
    fn write(&mut self, at: u64, data: &[u8]) -> Result<(), BufferError>;
}

/// Calls `f` with the place in a piece, the place in the run, and the length of each part of
/// `at .. at + len` of a run of pieces.
fn visit(
    lens: impl Iterator<Item = usize>,
    at: u64,
    len: usize,
    mut f: impl FnMut(usize, usize, usize, usize),
) -> Result<(), BufferError> {
    let mut skip = usize::try_from(at)?;
    let mut done = 0;
    for (piece, piece_len) in lens.enumerate() {
        if done == len {
            break;
        }
        if skip >= piece_len {
            skip -= piece_len;
            continue;
        }
        let now = (piece_len - skip).min(len - done);
        f(piece, skip, done, now);
        done += now;
        skip = 0;
    }
    if done < len {
        return Err(format!("the buffers end {} bytes too early", len - done).into());
    }
    Ok(())
}

impl Source for [IoSlice<'_>] {
    fn len(&self) -> u64 {
        self.iter().map(|piece| piece.len() as u64).sum()
    }

    fn read(&self, at: u64, out: &mut [u8]) -> Result<(), BufferError> {
        let len = out.len();
        visit(
            self.iter().map(|piece| piece.len()),
            at,
            len,
            |piece, from, to, now| {
                out[to..to + now].copy_from_slice(&self[piece][from..from + now]);
            },
        )
    }
}

impl Source for [u8] {
    fn len(&self) -> u64 {
        self.len() as u64
    }

    fn read(&self, at: u64, out: &mut [u8]) -> Result<(), BufferError> {
        [IoSlice::new(self)].read(at, out)
    }
}

impl Target for [IoSliceMut<'_>] {
    fn len(&self) -> u64 {
        self.iter().map(|piece| piece.len() as u64).sum()
    }

    fn write(&mut self, at: u64, data: &[u8]) -> Result<(), BufferError> {
        let lens: Vec<_> = self.iter().map(|piece| piece.len()).collect();
        visit(
            lens.into_iter(),
            at,
            data.len(),
            |piece, into, from, now| {
                self[piece][into..into + now].copy_from_slice(&data[from..from + now]);
            },
        )
    }
}

impl Target for [u8] {
    fn len(&self) -> u64 {
        self.len() as u64
    }

    fn write(&mut self, at: u64, data: &[u8]) -> Result<(), BufferError> {
        [IoSliceMut::new(self)].write(at, data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scattered_pieces_read_and_write_as_one_run() {
        let (a, b, c) = ([1, 2, 3], [], [4, 5]);
        let pieces = [IoSlice::new(&a), IoSlice::new(&b), IoSlice::new(&c)];
        let mut out = [0; 3];
        pieces.read(1, &mut out).unwrap();
        assert_eq!((out, Source::len(&pieces[..])), ([2, 3, 4], 5));
        assert!(pieces.read(3, &mut out).is_err());

        let (mut a, mut b) = ([0; 3], [0; 2]);
        [IoSliceMut::new(&mut a), IoSliceMut::new(&mut b)]
            .write(2, &[7, 8])
            .unwrap();
        assert_eq!((a, b), ([0, 0, 7], [8, 0]));
        assert!([IoSliceMut::new(&mut a)].write(2, &[7, 8]).is_err());
    }
}
