//! A baker that is killed at a random moment, again and again, and one that runs out of disk,
//! against a store that must stay whole.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::env;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use kiln_store::testing::description;
use kiln_store::{Digest, Error, Host, ImageKey, Kind, Policy, SegmentDigest, Store, Turn, Wanted};
use kiln_vmm_saved::cpu::{Fingerprint, WORDS};

const CHILD: &str = "KILN_STORE_TEST_ROOT";

fn bake(store: &Store, seed: u64) -> Result<Digest, Error> {
    let staging = store.begin(0)?;
    let memory = staging.create(Kind::Memory)?;
    memory.set_len(4 << 20).unwrap();
    for i in 0..16 {
        memory
            .write_all_at(&[(seed % 251) as u8 + 1; 5000], i * 200_000)
            .unwrap();
    }
    staging
        .create(Kind::State)?
        .write_all_at(&seed.to_le_bytes(), 0)
        .unwrap();
    let mut about = description(&seed.to_string());
    about.baked_at = seed;
    about.cpu.features = Fingerprint([0; WORDS]);
    staging.commit(about)
}

/// Makes an image, or finds it.
fn image(store: &Store, seed: u64) -> Result<(), Error> {
    let key = ImageKey::from_identity([seed.to_le_bytes()]);
    let images = store.images();
    if images.lookup(&key)?.is_some() {
        return Ok(());
    }
    if let Turn::Make(making) = images.turn(&key)? {
        let content = vec![seed as u8 + 1; 300_000];
        let hash = *blake3::hash(&content).as_bytes();
        let len = content.len() as u64;
        let file = making.reserve(len)?;
        file.write_all_at(&content, 0).unwrap();
        making.finish(hash, vec![SegmentDigest { len, hash }])?;
    }
    Ok(())
}

/// Not a test of its own: what the tests below run in a process that they kill.
#[test]
fn child() {
    let Some(root) = env::var_os(CHILD) else {
        return;
    };
    let store = Store::open_or_create(Path::new(&root)).unwrap();
    for round in 0u64.. {
        let seed = u64::from(std::process::id()) * 1000 + round;
        bake(&store, seed).unwrap();
        image(&store, round % 7).unwrap();
        if round % 3 == 2 {
            store
                .collect(Policy {
                    target: Some(20 << 20),
                    ..Policy::default()
                })
                .unwrap();
        }
    }
}

/// Does not outlive the test, however that ends.
struct Child(std::process::Child);

impl Child {
    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn spawn_child(root: &Path) -> Child {
    let child = Command::new(env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .env(CHILD, root)
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    Child(child)
}

#[test]
fn store_is_whole_after_kill_9_at_60_moments() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("store");
    let (mut baked, mut made) = (0, 0);
    for round in 0..60u64 {
        let mut child = spawn_child(&root);
        // Spread over a bake's length; a generator of our own keeps the moments reproducible.
        let moment = (round * 7919 + 13) % 61;
        sleep(Duration::from_millis(5 + moment));
        child.kill();
        let store = Store::open_or_create(&root).unwrap();
        let report = store.verify(&[]).unwrap();
        assert!(
            report.damage.is_empty(),
            "round {round}: {:?}",
            report.damage
        );
        let host = Host {
            cpu: Fingerprint([0; WORDS]),
            protocol: 1,
        };
        let picked = store.pick(&host, &Wanted::default()).unwrap();
        let newest = store.find(|_| true).unwrap();
        assert_eq!(picked.ok(), newest, "round {round}");
        baked += u64::from(report.uvms);
        made += u64::from(report.images);
    }
    assert!(
        baked > 10 && made > 10,
        "the child was killed before it did anything"
    );
    let store = Store::open(&root).unwrap();
    let last = bake(&store, u64::MAX).unwrap();
    store
        .collect(Policy {
            all: true,
            ..Policy::default()
        })
        .unwrap();
    assert!(matches!(store.lease(last), Err(Error::NotFound(_))));
    for empty in ["tmp", "making", "images"] {
        assert_eq!(std::fs::read_dir(root.join(empty)).unwrap().count(), 0);
    }
    assert_eq!(store.verify(&[]).unwrap().orphans, 0);
}

#[test]
fn two_bakers_and_a_collector_at_once_do_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("store");
    let mut children = [spawn_child(&root), spawn_child(&root)];
    let store = Store::open_or_create(&root).unwrap();
    for _ in 0..20 {
        sleep(Duration::from_millis(20));
        let report = store.verify(&[]).unwrap();
        assert!(report.damage.is_empty(), "{:?}", report.damage);
        store.collect(Policy::default()).unwrap();
    }
    for child in &mut children {
        assert!(child.0.try_wait().unwrap().is_none(), "a baker gave up");
        child.kill();
    }
}

/// A lease ends with its holder, however that ended.
#[test]
fn lease_of_a_killed_process_holds_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_or_create(dir.path().join("store")).unwrap();
    let id = bake(&store, 1).unwrap();
    let lease = store.lease(id).unwrap();
    // The holder: a process that inherits the lease's descriptor and nothing else of ours.
    use std::os::fd::AsFd;
    let inherited = lease.as_fd().try_clone_to_owned().unwrap();
    let mut holder = Command::new("sleep")
        .arg("60")
        .stdin(Stdio::from(inherited))
        .spawn()
        .unwrap();
    drop(lease);
    assert!(matches!(store.remove(id), Err(Error::InUse { .. })));
    holder.kill().unwrap();
    holder.wait().unwrap();
    // A process that another test is just starting has all our descriptors until it runs its program.
    for _ in 0..100 {
        match store.remove(id) {
            Err(Error::InUse { .. }) => sleep(Duration::from_millis(20)),
            other => return other.unwrap(),
        }
    }
    panic!("the lease outlives its holder");
}
