//! A page map of any bytes, of a memory and sources of any length: what is read has one form.
#![no_main]

use kiln_packs::{Limits, PageMap};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((lengths, map)) = data.split_first_chunk::<16>() else {
        return;
    };
    let length = |at: usize| {
        let bytes = lengths[at..at + 4].try_into().expect("four bytes");
        u32::from_le_bytes(bytes)
    };
    let limits = Limits {
        pages: length(0) & (1 << 26) - 1,
        literals: length(4),
        parents: vec![length(8), 7],
        images: vec![length(12)],
    };
    let Ok(read) = PageMap::decode(map, &limits) else {
        return;
    };
    assert_eq!(read.encode(2), map);
    for run in read.runs() {
        assert_eq!(read.source_of(run.page), Some(run.source));
        assert!(read.source_of(run.end() - 1).is_some());
    }
    assert_eq!(read.source_of(limits.pages), None);
});
