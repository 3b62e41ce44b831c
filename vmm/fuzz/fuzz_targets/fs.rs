#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    // A folder for each run, so that a finding does not depend on the runs before it.
    if let Ok(dir) = tempfile::tempdir() {
        kiln_vmm::devices::fuzzing::fs(dir.path(), data);
    }
});
