use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;

/// A directory that looks like a machine.
pub(super) struct Fixture {
    dir: tempfile::TempDir,
    pub(super) system: System,
}

impl Fixture {
    pub(super) fn new() -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let system = System {
            root: dir.path().to_owned(),
            path: vec!["/usr/bin".into()],
            store: "/var/lib/kiln/store".into(),
        };
        Fixture { dir, system }
    }

    pub(super) fn file(&self, path: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        // A new file each time: one that runs cannot be written to.
        let _ = fs::remove_file(&path);
        fs::write(&path, text).unwrap();
        path
    }

    pub(super) fn program(&self, path: &str, text: &str) {
        let path = self.file(path, text);
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
}

fn rendered(checks: &[Check]) -> String {
    render(checks, &Output::new(false))
}

#[test]
fn verdict_follows_the_worst_check() {
    let good = Check::ok("a", "fine");
    let note = Check::warn("b", "slow", "tune it");
    let bad = Check::fail("c", "absent", "install it");
    assert!(rendered(std::slice::from_ref(&good)).contains("Pods can run here.\n"));
    assert!(rendered(&[good.clone(), note.clone()]).contains("with 1 thing to note"));
    let text = rendered(&[good, note, bad]);
    assert!(text.contains("Pods cannot run here: mend the 1 marked FAIL"));
    assert!(text.contains("→ install it"));
}

#[test]
fn every_check_has_its_own_name_and_every_problem_a_remedy() {
    let fixture = Fixture::new();
    let checks = checks(&fixture.system);
    let names: std::collections::BTreeSet<_> = checks.iter().map(|check| check.name).collect();
    assert_eq!(names.len(), checks.len());
    for check in &checks {
        assert_eq!(
            check.remedy.is_none(),
            check.status == Status::Ok,
            "{check:?}"
        );
        assert!(!check.found.is_empty());
    }
    assert!(
        checks.iter().any(|check| check.status == Status::Fail),
        "an empty machine"
    );
}

#[test]
fn json_has_the_fields_that_programs_rely_on() {
    let checks = [Check::warn("b", "slow", "tune it")];
    let json = serde_json::to_value(Report {
        pods_can_run: true,
        checks: &checks,
    })
    .unwrap();
    assert_eq!(json["pods_can_run"], true);
    assert_eq!(json["checks"][0]["name"], "b");
    assert_eq!(json["checks"][0]["status"], "warn");
    assert_eq!(json["checks"][0]["remedy"], "tune it");
}
