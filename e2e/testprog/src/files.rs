//! Writing files with known content and hashing them.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::load::Random;
use crate::text::say;

/// Writes `bytes` pseudo-random bytes made from `seed`, syncs them, and prints their SHA-256.
pub(crate) fn write(path: &str, bytes: u64, seed: u64) -> Result<()> {
    let file = File::create(path).with_context(|| format!("cannot create {path}"))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let mut hash = Sha256::new();
    for piece in Content::new(bytes, seed) {
        out.write_all(&piece)
            .with_context(|| format!("cannot write to {path}"))?;
        hash.update(&piece);
    }
    let file = out
        .into_inner()
        .with_context(|| format!("cannot write to {path}"))?;
    file.sync_all()
        .with_context(|| format!("cannot sync {path}"))?;
    say(&hex(&hash.finalize()))
}

/// Writes what [`write`] writes, and hashes nothing, which costs more than the writing.
pub(crate) fn put(path: &str, bytes: u64, seed: u64) -> Result<()> {
    let mut file = File::create(path).with_context(|| format!("cannot create {path}"))?;
    for piece in Content::new(bytes, seed) {
        file.write_all(&piece)
            .with_context(|| format!("cannot write to {path}"))?;
    }
    file.sync_all()
        .with_context(|| format!("cannot sync {path}"))
}

/// Reads a file whole, again and again, as programs read what configures them.
pub(crate) fn opens(path: &str, count: u64) -> Result<()> {
    for _ in 0..count {
        std::fs::read(path).with_context(|| format!("cannot read {path}"))?;
    }
    Ok(())
}

/// Reads or writes blocks of a file that is there, at random.
pub(crate) fn blocks(path: &str, what: &str, count: u64) -> Result<()> {
    const BLOCK: u64 = 4096;
    let file = File::options()
        .read(true)
        .write(true)
        .open(path)
        .with_context(|| format!("cannot open {path}"))?;
    let blocks = file.metadata()?.len() / BLOCK;
    ensure!(blocks > 0, "{path} has less than a block");
    let mut random = Random::new(1);
    let mut block = vec![7; usize::try_from(BLOCK)?];
    let refused = || format!("cannot {what} {path}");
    for _ in 0..count {
        let at = random.next() % blocks * BLOCK;
        match what {
            "read" => file.read_exact_at(&mut block, at).with_context(refused)?,
            "write" => file.write_all_at(&block, at).with_context(refused)?,
            "sync" => {
                file.write_all_at(&block, at).with_context(refused)?;
                file.sync_all().with_context(refused)?;
            }
            _ => bail!("blocks are read, written or synced, not {what:?}"),
        }
    }
    Ok(())
}

/// Prints the names of what is moved into a directory, as whoever reloads a configuration waits for it.
pub(crate) fn watch(dir: &str) -> Result<()> {
    /// Of an event, before its name.
    const HEADER: usize = size_of::<libc::inotify_event>();
    let path = CString::new(dir)?;
    // SAFETY: takes flags only.
    let inotify = unsafe { libc::inotify_init1(libc::IN_CLOEXEC) };
    ensure!(
        inotify >= 0,
        "cannot watch: {}",
        std::io::Error::last_os_error()
    );
    // SAFETY: the descriptor was just made, and nobody else has it.
    let mut events = unsafe { File::from_raw_fd(inotify) };
    // SAFETY: the path is a string that lives until the call returns.
    let watch = unsafe { libc::inotify_add_watch(inotify, path.as_ptr(), libc::IN_MOVED_TO) };
    ensure!(
        watch >= 0,
        "cannot watch {dir}: {}",
        std::io::Error::last_os_error()
    );
    say("watching")?;
    let mut buffer = [0; 4096];
    loop {
        let got = events.read(&mut buffer)?;
        let mut rest = &buffer[..got];
        while rest.len() >= HEADER {
            // The name's length is the last field.
            let (header, more) = rest.split_at(HEADER);
            let length = u32::from_ne_bytes(header[HEADER - 4..].try_into()?);
            let (name, next) = more.split_at(usize::try_from(length)?);
            let name = CStr::from_bytes_until_nul(name)?;
            say(&name.to_string_lossy())?;
            rest = next;
        }
    }
}

/// Fails unless the file is as [`put`] wrote it, and says where it is not.
pub(crate) fn check(path: &str, bytes: u64, seed: u64) -> Result<()> {
    let mut file = File::open(path).with_context(|| format!("cannot open {path}"))?;
    let mut at = 0;
    for piece in Content::new(bytes, seed) {
        let mut found = vec![0; piece.len()];
        file.read_exact(&mut found)
            .with_context(|| format!("cannot read {path} at {at}"))?;
        if found != piece {
            let first = found.iter().zip(&piece).position(|(a, b)| a != b);
            bail!("{path} differs at {}", at + first.unwrap_or(0) as u64);
        }
        at += piece.len() as u64;
    }
    if file
        .read(&mut [0])
        .with_context(|| format!("cannot read {path}"))?
        > 0
    {
        bail!("{path} is longer than {bytes} bytes");
    }
    say("right")
}

/// Prints the SHA-256 of each file.
pub(crate) fn hash(paths: &[String]) -> Result<()> {
    if paths.is_empty() {
        bail!("no path given");
    }
    for path in paths {
        let mut file = File::open(path).with_context(|| format!("cannot open {path}"))?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            let got = file
                .read(&mut buffer)
                .with_context(|| format!("cannot read {path}"))?;
            if got == 0 {
                break;
            }
            hash.update(&buffer[..got]);
        }
        say(&hex(&hash.finalize()))?;
    }
    Ok(())
}

/// Pseudo-random content of a given length, in pieces of up to 64 KiB.
pub(crate) struct Content {
    left: u64,
    random: Random,
}

impl Content {
    const PIECE: usize = 64 << 10;

    pub(crate) fn new(bytes: u64, seed: u64) -> Self {
        Content {
            left: bytes,
            random: Random::new(seed),
        }
    }
}

impl Iterator for Content {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        if self.left == 0 {
            return None;
        }
        let size = usize::try_from(self.left).map_or(Self::PIECE, |left| left.min(Self::PIECE));
        let mut piece = Vec::with_capacity(size + 8);
        while piece.len() < size {
            piece.extend_from_slice(&self.random.next().to_le_bytes());
        }
        piece.truncate(size);
        self.left -= size as u64;
        Some(piece)
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_has_the_length_asked_for_and_is_the_same_for_the_same_seed() {
        for bytes in [0, 1, 7, 65_535, 65_536, 65_537, 200_000] {
            let first: Vec<u8> = Content::new(bytes, 9).flatten().collect();
            assert_eq!(first.len() as u64, bytes);
            assert_eq!(first, Content::new(bytes, 9).flatten().collect::<Vec<u8>>());
        }
        let other: Vec<u8> = Content::new(64, 10).flatten().collect();
        assert_ne!(other, Content::new(64, 9).flatten().collect::<Vec<u8>>());
    }
}
