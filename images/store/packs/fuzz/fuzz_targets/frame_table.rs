//! A pack of any bytes, whose digests are right: what an enemy can make. Its frames are decompressed, too.
#![no_main]

use std::ops::Range;

use kiln_packs::{Content, FrameReader, Pack};

const CHECKSUM: Range<usize> = 88..120;
const ENTRY: usize = 44;

fn number(bytes: &[u8], at: usize, length: usize) -> Option<usize> {
    let mut eight = [0; 8];
    eight[..length].copy_from_slice(bytes.get(at..at.checked_add(length)?)?);
    usize::try_from(u64::from_le_bytes(eight)).ok()
}

/// Puts the right digests of stored bytes into the frame table, and the right checksum into the header.
fn seal(bytes: &mut [u8]) -> Option<()> {
    let (table, length) = (number(bytes, 56, 8)?, number(bytes, 64, 8)?);
    let frames = number(bytes, 72, 8)?;
    let mut stored_at = frames;
    for entry in 0..(length / ENTRY).min(bytes.len() / ENTRY) {
        let entry = table.checked_add(entry * ENTRY)?;
        let end = stored_at.checked_add(number(bytes, entry, 4)?)?;
        let digest = blake3::hash(bytes.get(stored_at..end)?);
        bytes
            .get_mut(entry + 28..entry + ENTRY)?
            .copy_from_slice(&digest.as_bytes()[..16]);
        stored_at = end;
    }
    let mut checksum = blake3::Hasher::new();
    checksum.update(bytes.get(..CHECKSUM.start)?);
    checksum.update(bytes.get(CHECKSUM.end..frames)?);
    bytes[CHECKSUM].copy_from_slice(checksum.finalize().as_bytes());
    Some(())
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut bytes = data.to_vec();
    seal(&mut bytes);
    let Ok(pack) = Pack::open(&bytes) else {
        return;
    };
    let parent: Vec<u8> = (0..40 * 4096u32).map(|at| (at / 7) as u8).collect();
    let parents: Vec<&dyn Content> = pack.parents().iter().map(|_| &parent as _).collect();
    let mut reader = FrameReader::new().expect("a decompressor");
    let placements = pack.placements();
    for frame in 0..pack.frames().len() as u32 {
        if let Ok(raw) = reader.read(&pack, &bytes, frame, &parents) {
            let entry = &pack.frames()[frame as usize];
            assert_eq!(raw.len(), entry.raw_length());
            assert_eq!(blake3::hash(raw).as_bytes()[..16], entry.raw_digest);
        }
        for place in placements.of_frame(frame) {
            let end = place.offset + place.pages as usize * kiln_packs::PAGE;
            assert!(end <= pack.frames()[frame as usize].raw_length());
        }
    }
});
