//! What containers wrote, as containerd finds it.

use std::os::unix::fs::MetadataExt;

use super::*;

/// As the overlayfs snapshotter gives it; the second is its upper directory.
fn snapshot(dir: &Path, name: &str) -> (Vec<Mount>, PathBuf) {
    let at = |part| dir.join(format!("{name}-{part}"));
    for part in ["lower", "upper", "work"] {
        std::fs::create_dir(at(part)).unwrap();
    }
    let option = |key, part| format!("{key}={}", at(part).display());
    let mount = Mount {
        type_: "overlay".into(),
        source: "overlay".into(),
        options: vec![
            option("workdir", "work"),
            option("upperdir", "upper"),
            option("lowerdir", "lower"),
        ],
        ..Default::default()
    };
    (vec![mount], at("upper"))
}

/// As containerd measures a snapshot.
fn usage(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).unwrap();
    entries
        .map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512)
        .sum()
}

async fn until(what: impl Fn() -> bool) {
    let waiting = async {
        while !what() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(10 * SECOND, waiting).await.unwrap();
}

#[tokio::test]
async fn each_container_of_a_pod_accounts_for_its_own_writes_until_it_is_deleted() {
    const MIB: u64 = 1 << 20;
    let bed = Bed::new("s").await;
    bed.create("s", Some("sandbox")).await.unwrap();
    let mut uppers = Vec::new();
    for id in ["a", "b"] {
        let (mounts, upper) = snapshot(bed.dir.path(), id);
        let stdio = StdioPaths::default();
        let made = bed.create_on(id, Some("container"), stdio, mounts).await;
        made.unwrap();
        bed.pod.start(id, "").await.unwrap();
        uppers.push(upper);
    }
    *bed.uvm.written.lock().unwrap() = Written {
        held: 61 * MIB,
        limit: 100 * MIB,
        total: 61 * MIB,
        own: vec![60 * MIB, 4096],
    };
    // Asked for again at once, it is not done again.
    bed.pod.stats("a").await.unwrap();
    bed.pod.stats("b").await.unwrap();
    // In whichever order they were asked for.
    let sums = || uppers.iter().map(|upper| usage(upper)).sum::<u64>();
    until(|| sums() >= 60 * MIB + 4096).await;
    let [a, b] = [0, 1].map(|n| usage(&uppers[n]));
    assert!(a.min(b) < 64 << 10 && a.max(b) >= 60 * MIB, "{a} {b}");
    let asked = |call: &String| call.starts_with("written");
    assert_eq!(bed.uvm.calls().iter().filter(|c| asked(c)).count(), 1);
    for id in ["a", "b"] {
        bed.uvm.end(id, "", 0);
        bed.pod.wait(id, "").await.unwrap();
        bed.pod.delete(id, "").await.unwrap();
    }
    assert_eq!(sums(), 0);
}
