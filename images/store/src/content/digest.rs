//! Content digests, and how a file's digest is computed without reading its holes.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Bytes a chunk holds; the last one of a file may be shorter.
pub const CHUNK: u64 = 64 * 1024;

/// Separates this store's object digests from every other use of BLAKE3. Changing it, or the way
/// [`of_file`] builds on it, changes every object's name: see `docs/store.md`.
const CONTEXT: &str = "kiln 2026-11-21 store object: length, digests of 64 KiB chunks";

/// A 256-bit content digest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// BLAKE3 of these bytes.
    pub fn of_bytes(bytes: &[u8]) -> Digest {
        Digest(*blake3::hash(bytes).as_bytes())
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first 12 hexadecimal digits: enough to tell μVMs of one store apart by eye.
    pub fn short(&self) -> String {
        let mut text = self.to_string();
        text.truncate(12);
        text
    }
}

impl From<[u8; 32]> for Digest {
    fn from(bytes: [u8; 32]) -> Digest {
        Digest(bytes)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A text that is not 64 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a digest: 64 hexadecimal digits, in lower case")]
pub struct NotADigest(String);

impl FromStr for Digest {
    type Err = NotADigest;
    fn from_str(text: &str) -> Result<Digest, NotADigest> {
        let wrong = || NotADigest(text.to_owned());
        let digits = text.as_bytes();
        if digits.len() != 64 || digits.iter().any(u8::is_ascii_uppercase) {
            return Err(wrong());
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |c: u8| char::from(c).to_digit(16).ok_or_else(wrong);
            *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
        }
        Ok(Digest(bytes))
    }
}

// Text for people and programs that read JSON, bytes in the store's own files.
impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            self.0.serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Digest, D::Error> {
        if deserializer.is_human_readable() {
            let text = String::deserialize(deserializer)?;
            text.parse().map_err(serde::de::Error::custom)
        } else {
            <[u8; 32]>::deserialize(deserializer).map(Digest)
        }
    }
}

/// A file's digest, and what was learned on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scan {
    /// The file's digest.
    pub digest: Digest,
    /// Its length, holes included.
    pub length: u64,
    /// Bytes in chunks that are not all zeros.
    pub data: u64,
}

/// A run of zero pages that the file system keeps as data.
pub(crate) struct ZeroRun {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// Computes the digest of a file's content.
///
/// It is BLAKE3 (in key-derivation mode, with a context of our own) over the length and the
/// BLAKE3 digests of the file's chunks, [`CHUNK`] bytes each. The digest of a chunk of zeros is
/// known, so holes cost nothing. Where they are has no influence, nor has whether the file is stored
/// as it is or packed.
pub fn of_file(file: &File) -> io::Result<Scan> {
    scan(file, &mut |_| Ok(()))
}

/// [`of_file`], telling `found` every run of zero pages that takes room on disk.
pub(crate) fn scan(
    file: &File,
    found: &mut dyn FnMut(ZeroRun) -> io::Result<()>,
) -> io::Result<Scan> {
    let length = file.metadata()?.len();
    let zeros = vec![0u8; CHUNK as usize];
    let zero_chunk = blake3::hash(&zeros);
    let mut list = DigestList::new(length);
    let mut buffer = vec![0u8; CHUNK as usize];
    let mut data = 0;
    let mut next_data = 0;
    let mut offset = 0;
    while offset < length {
        let size = CHUNK.min(length - offset);
        if next_data <= offset {
            next_data = seek_data(file, offset, length)?;
        }
        if next_data >= offset + size {
            let digest = if size == CHUNK {
                zero_chunk
            } else {
                blake3::hash(&zeros[..size as usize])
            };
            list.add(digest);
        } else {
            let chunk = &mut buffer[..size as usize];
            file.read_exact_at(chunk, offset)?;
            report_zero_pages(chunk, offset, found)?;
            if !is_zero(chunk) {
                data += size;
            }
            list.add(blake3::hash(chunk));
        }
        offset += size;
    }
    Ok(Scan {
        digest: list.digest(),
        length,
        data,
    })
}

/// The chunks' digests on their way into the file's. They go in many at a time: one by one takes several times as long,
/// which an almost empty file of many GiB would show.
struct DigestList {
    hasher: blake3::Hasher,
    waiting: Vec<u8>,
}

impl DigestList {
    const AT_ONCE: usize = 256 * 1024;

    fn new(length: u64) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
        hasher.update(&length.to_le_bytes());
        let waiting = Vec::new();
        DigestList { hasher, waiting }
    }

    fn add(&mut self, digest: blake3::Hash) {
        self.waiting.extend_from_slice(digest.as_bytes());
        if self.waiting.len() >= Self::AT_ONCE {
            self.hasher.update(&self.waiting);
            self.waiting.clear();
        }
    }

    fn digest(mut self) -> Digest {
        self.hasher.update(&self.waiting);
        Digest(*self.hasher.finalize().as_bytes())
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    // By words: every byte of a new memory file passes here.
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_le_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

fn report_zero_pages(
    chunk: &[u8],
    offset: u64,
    found: &mut dyn FnMut(ZeroRun) -> io::Result<()>,
) -> io::Result<()> {
    const PAGE: usize = 4096;
    let mut run: Option<ZeroRun> = None;
    for (i, page) in (0u64..).zip(chunk.chunks(PAGE)) {
        if page.len() == PAGE && is_zero(page) {
            run.get_or_insert(ZeroRun {
                offset: offset + i * PAGE as u64,
                length: 0,
            })
            .length += PAGE as u64;
        } else if let Some(run) = run.take() {
            found(run)?;
        }
    }
    run.map_or(Ok(()), found)
}

/// Where the next data at or after `offset` begins; `length` if there is none.
fn seek_data(file: &File, offset: u64, length: u64) -> io::Result<u64> {
    // SAFETY: a system call on a descriptor that is open; no memory is involved.
    let at = unsafe { libc::lseek(file.as_raw_fd(), offset.cast_signed(), libc::SEEK_DATA) };
    if at >= 0 {
        return Ok(at.cast_unsigned());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ENXIO) => Ok(length),
        // A file system that knows no holes: all is data.
        Some(libc::EINVAL) => Ok(offset),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file_of(bytes: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        file
    }

    #[test]
    fn digest_survives_text_and_refuses_other_text() {
        let digest = Digest::of_bytes(b"kiln");
        assert_eq!(digest.to_string().parse(), Ok(digest));
        for wrong in [
            "",
            "00",
            &"g".repeat(64),
            &digest.to_string().to_uppercase(),
        ] {
            assert!(wrong.parse::<Digest>().is_err(), "{wrong}");
        }
    }

    /// The names of all objects in all stores hang on this value: see docs/store.md before
    /// changing it.
    #[test]
    fn file_digest_is_pinned() {
        let scan = of_file(&file_of(b"kiln")).unwrap();
        assert_eq!(scan.digest.to_string(), PINNED);
        assert_eq!((scan.length, scan.data), (4, 4));
    }
    const PINNED: &str = "ae9c7918036e67641e62720a16a0c62de4d4b43bf92533428d662ae47f2a67c0";

    #[test]
    fn hole_and_written_zeros_have_one_digest() {
        let length = 5 * CHUNK + 123;
        let sparse = tempfile::tempfile().unwrap();
        sparse.set_len(length).unwrap();
        sparse.write_all_at(b"x", 2 * CHUNK + 9).unwrap();
        let mut content = vec![0; length as usize];
        content[(2 * CHUNK + 9) as usize] = b'x';
        let (sparse, full) = (
            of_file(&sparse).unwrap(),
            of_file(&file_of(&content)).unwrap(),
        );
        assert_eq!(sparse, full);
        assert_eq!(sparse.data, CHUNK);
    }

    #[test]
    fn a_long_hole_agrees_with_the_definition() {
        let length = 3 * (DigestList::AT_ONCE as u64 / 32) * CHUNK + 77;
        let file = tempfile::tempfile().unwrap();
        file.set_len(length).unwrap();
        let last = length - length % CHUNK;
        file.write_all_at(b"x", last).unwrap();
        let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
        hasher.update(&length.to_le_bytes());
        for _ in 0..length / CHUNK {
            hasher.update(blake3::hash(&[0; CHUNK as usize]).as_bytes());
        }
        let mut rest = [0; 77];
        rest[0] = b'x';
        hasher.update(blake3::hash(&rest).as_bytes());
        let expected = Digest::from(*hasher.finalize().as_bytes());
        assert_eq!(of_file(&file).unwrap().digest, expected);
    }

    #[test]
    fn length_and_position_change_the_digest() {
        let digest = |bytes: &[u8]| of_file(&file_of(bytes)).unwrap().digest;
        let mut seen = std::collections::BTreeSet::new();
        let chunk = CHUNK as usize;
        for bytes in [
            vec![],
            vec![0; 1],
            vec![0; chunk],
            vec![0; chunk + 1],
            [vec![1; chunk], vec![0; chunk]].concat(),
            [vec![0; chunk], vec![1; chunk]].concat(),
        ] {
            assert!(seen.insert(digest(&bytes)), "{} bytes", bytes.len());
        }
    }

    #[test]
    fn zero_pages_are_reported_in_runs() {
        let mut content = vec![1u8; 16 * 4096];
        content[4096..3 * 4096].fill(0);
        content[15 * 4096..].fill(0);
        let mut runs = Vec::new();
        scan(&file_of(&content), &mut |run| {
            runs.push((run.offset / 4096, run.length / 4096));
            Ok(())
        })
        .unwrap();
        assert_eq!(runs, [(1, 2), (15, 1)]);
    }

    proptest! {
        #[test]
        fn digest_agrees_with_the_definition(
            pieces in prop::collection::vec((0u64..400_000, 1usize..5000, any::<u8>()), 0..6),
            length in 0u64..400_000,
        ) {
            let file = tempfile::tempfile().unwrap();
            let mut model = vec![0u8; length as usize];
            file.set_len(length).unwrap();
            for (at, size, byte) in pieces {
                let at = at.min(length);
                let size = size.min((length - at) as usize);
                file.write_all_at(&vec![byte; size], at).unwrap();
                model[at as usize..at as usize + size].fill(byte);
            }
            let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
            hasher.update(&length.to_le_bytes());
            for chunk in model.chunks(CHUNK as usize) {
                hasher.update(blake3::hash(chunk).as_bytes());
            }
            let expected = Digest::from(*hasher.finalize().as_bytes());
            prop_assert_eq!(of_file(&file).unwrap().digest, expected);
        }
    }
}
