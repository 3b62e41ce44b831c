//! An image's index of any bytes, with the right checksum.
#![no_main]

use kiln_packs::ImageIndex;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut bytes = data.to_vec();
    if bytes.len() >= 96 {
        let mut checksum = blake3::Hasher::new();
        checksum.update(&bytes[..64]).update(&bytes[96..]);
        bytes[64..96].copy_from_slice(checksum.finalize().as_bytes());
    }
    let Ok(index) = ImageIndex::parse(&bytes) else {
        return;
    };
    if let Some(block) = index.find(&[0xCC; 4096]) {
        assert!(u64::from(block) < index.image().length / 4096);
    }
});
