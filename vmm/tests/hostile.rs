//! A VMM that was taken over, in its jail but without a machine (`src/hostile`).

use std::collections::BTreeMap;
use std::process::Command;

#[test]
fn no_thread_gets_out_of_the_jail_or_harms_what_others_share() {
    // SAFETY: no arguments.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("skipped: only root can enter the jail");
        return;
    }
    let (root, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    std::fs::write(folder.path().join("inside"), b"").unwrap();
    let shared = tempfile::NamedTempFile::new().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_kiln-vmm-hostile"))
        .arg("rehearse")
        .args([root.path(), folder.path(), shared.path()])
        .env_clear()
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    let mut attempts: BTreeMap<&str, usize> = BTreeMap::new();
    for line in said.lines().filter_map(|line| line.strip_prefix("attack ")) {
        let mut words = line.split_whitespace();
        *attempts.entry(words.next().unwrap()).or_default() += 1;
        assert!(line.contains(": refused ("), "{line}");
    }
    assert_eq!(attempts.len(), 4, "{said}");
    assert!(attempts.values().all(|n| *n >= 50), "{attempts:?}");
    assert!(said.lines().last().unwrap().starts_with("attacks done: "));
    // What must not have happened to the folder.
    let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(names.len(), 1);
}
