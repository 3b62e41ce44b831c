use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::sync::Barrier;
use std::sync::atomic::Ordering;

use super::*;
use crate::content::WRITER_WAIT;
use crate::content::disk::tests::FaultyDisk;
use crate::content::lock::{self, LockError};
use crate::{Store, Usage};

struct Node {
    scratch: tempfile::TempDir,
}

impl Node {
    fn new() -> Node {
        Node {
            scratch: tempfile::tempdir().unwrap(),
        }
    }

    fn root(&self) -> PathBuf {
        self.scratch.path().join("store")
    }

    fn store(&self) -> Store {
        Store::open_or_create(self.root()).unwrap()
    }

    fn is_empty(&self, sub: &str) -> bool {
        let path = self.root().join(sub);
        fs::read_dir(path).unwrap().next().is_none()
    }
}

fn key(name: &str) -> ImageKey {
    ImageKey::from_identity([name])
}

/// The image of this name, so many KiB long, made if it isn't there.
fn image(images: &Images, name: &str, kib: usize) -> Result<Image, Error> {
    if let Some(image) = images.lookup(&key(name))? {
        return Ok(image);
    }
    match images.turn(&key(name))? {
        Turn::There(image) => Ok(image),
        Turn::Make(making) => finish(making, &vec![name.as_bytes()[0]; kib << 10]),
    }
}

fn finish(making: Making, content: &[u8]) -> Result<Image, Error> {
    let length = content.len() as u64;
    let file = making.reserve(length)?;
    file.write_all_at(content, 0).unwrap();
    let (first, rest) = content.split_at(content.len() / 3);
    let segments = [first, rest].map(|part| SegmentDigest {
        len: part.len() as u64,
        hash: *blake3::hash(part).as_bytes(),
    });
    making.finish(*blake3::hash(content).as_bytes(), segments.to_vec())
}

fn shrink(store: &Store) -> Vec<Digest> {
    let policy = Policy {
        target: Some(0),
        ..Policy::default()
    };
    let report = store.collect(policy).unwrap();
    report.removed.iter().map(|r| r.what.id).collect()
}

fn is_there(store: &Store, name: &str) -> bool {
    store.images().lookup(&key(name)).unwrap().is_some()
}

#[test]
fn the_second_lease_is_of_the_same_file() {
    let node = Node::new();
    let images = Images::at(node.root());
    assert!(images.lookup(&key("a")).unwrap().is_none());
    assert!(!node.root().exists());
    let first = image(&images, "a", 100).unwrap();
    let second = image(&images, "a", 100).unwrap();
    assert_eq!((first.made, second.made), (true, false));
    let inode = |image: &Image| image.file.metadata().unwrap().ino();
    assert_eq!(inode(&first), inode(&second));
    assert!(node.is_empty("tmp") && node.is_empty("making"));
}

#[test]
fn twenty_that_ask_at_once_make_one_image() {
    let node = Node::new();
    let images = node.store().images();
    let barrier = Barrier::new(20);
    let ask = || {
        barrier.wait();
        image(&images, "a", 3000).unwrap().made
    };
    let made = std::thread::scope(|scope| {
        let asking: Vec<_> = (0..20).map(|_| scope.spawn(ask)).collect();
        let asked = asking.into_iter().map(|thread| thread.join().unwrap());
        asked.filter(|made| *made).count()
    });
    assert_eq!(made, 1);
    assert!(node.is_empty("making"));
}

/// Makes the use of an image lie so far back.
fn age(images: &Images, name: &str, seconds: u64) {
    let time = std::time::SystemTime::now() - Duration::from_secs(seconds);
    let dir = File::open(images.dir(&key(name))).unwrap();
    dir.set_times(fs::FileTimes::new().set_modified(time))
        .unwrap();
}

#[test]
fn the_least_recently_used_image_goes_and_one_in_use_never_does() {
    let node = Node::new();
    let store = node.store();
    let images = store.images();
    let Usage { used, .. } = store.usage().unwrap();
    store.set_budget(Some(used + (1300 << 10))).unwrap();
    let held = image(&images, "a", 500).unwrap();
    age(&images, "a", 100);
    drop(image(&images, "b", 500).unwrap());
    age(&images, "b", 50);
    drop(image(&images, "c", 500).unwrap());
    assert!(is_there(&store, "a") && !is_there(&store, "b") && is_there(&store, "c"));
    // A descriptor that was passed on holds the image as well as the lease did.
    let passed = held.file.try_clone().unwrap();
    drop(held);
    assert_eq!(shrink(&store), [key("c").digest()]);
    assert!(is_there(&store, "a"));
    let in_use = store.remove(key("a").digest()).unwrap_err();
    assert!(
        matches!(in_use, Error::InUse { kind: NOUN, .. }),
        "{in_use}"
    );
    drop(passed);
    assert_eq!(shrink(&store), [key("a").digest()]);
    assert!(node.is_empty("images") && node.is_empty("tmp"));
}

#[test]
fn budget_bends_for_an_image_but_not_for_a_bake_which_images_make_way_for() {
    let node = Node::new();
    let store = node.store();
    let images = store.images();
    let Usage { used, .. } = store.usage().unwrap();
    store.set_budget(Some(used + (700 << 10))).unwrap();
    let held = image(&images, "a", 500).unwrap();
    drop(image(&images, "b", 500).unwrap());
    assert!(is_there(&store, "a") && is_there(&store, "b"));
    let refused = store.begin(400 << 10).unwrap_err();
    assert!(matches!(refused, Error::OverBudget { .. }), "{refused}");
    assert!(is_there(&store, "a") && !is_there(&store, "b"));
    drop(held);
    store.begin(400 << 10).unwrap();
    assert!(!is_there(&store, "a"));
}

#[test]
fn store_without_a_budget_of_its_own_has_the_default_one() {
    let node = Node::new();
    let store = node.store();
    let budget = || store.usage().unwrap().budget;
    assert_eq!(budget(), Some(crate::DEFAULT_BUDGET));
    store.set_budget(None).unwrap();
    assert_eq!(budget(), None);
}

#[test]
fn an_image_that_was_written_to_is_made_again() {
    let node = Node::new();
    let store = node.store();
    let images = store.images();
    let lease = image(&images, "a", 100).unwrap();
    let good = fs::read(&lease.path).unwrap();
    let file = OpenOptions::new().write(true).open(&lease.path).unwrap();
    file.write_all_at(b"x", 50_000).unwrap();
    drop(lease);
    assert!(images.lookup(&key("a")).unwrap().is_none());
    let damage = store.verify(&[]).unwrap().damage;
    assert!(matches!(damage[..], [Damage::Content { .. }]), "{damage:?}");
    let again = image(&images, "a", 100).unwrap();
    assert!(again.made);
    assert!(fs::read(&again.path).unwrap() == good);
    let report = store.verify(&[key("a").digest()]).unwrap();
    assert_eq!((report.images, report.damage.len()), (1, 0));
}

#[test]
fn an_image_of_an_earlier_boot_is_read_again_unless_it_was_synced() {
    let node = Node::new();
    let images = node.store().images();
    let lease = image(&images, "a", 100).unwrap();
    let dir = lease.path.parent().unwrap().to_owned();
    let reboot = || {
        let mut record = images.record(&key("a")).unwrap();
        record.boot = [1; 16];
        images.write_record(&dir, &record).unwrap();
    };
    reboot();
    assert!(images.lookup(&key("a")).unwrap().is_none());
    assert!(!image(&images, "a", 100).unwrap().made);
    assert!(images.lookup(&key("a")).unwrap().is_some());
    images.sync(&key("a")).unwrap();
    reboot();
    assert!(images.lookup(&key("a")).unwrap().is_some());
}

#[test]
fn one_that_another_kiln_made_is_made_again_or_collected() {
    let node = Node::new();
    let store = node.store();
    for (name, collected) in [("a", false), ("b", true)] {
        let lease = image(&store.images(), name, 100).unwrap();
        fs::write(lease.path.with_file_name(RECORD), "KILNIMG9 and more").unwrap();
        drop(lease);
        assert!(!is_there(&store, name));
        if collected {
            let removed = store.collect(Policy::default()).unwrap().removed;
            assert_eq!(removed[0].why, Why::Unusable);
            assert_eq!(removed[0].what.id, key(name).digest());
        } else {
            assert!(image(&store.images(), name, 100).unwrap().made);
        }
    }
    assert!(is_there(&store, "a"));
}

#[test]
fn what_a_crash_left_is_removed_and_what_is_being_made_is_not() {
    let node = Node::new();
    let store = node.store();
    let images = store.images();
    let dead = node.root().join("tmp/dead/finished");
    fs::create_dir_all(&dead).unwrap();
    fs::write(dead.join(IMAGE), b"half").unwrap();
    fs::write(node.root().join("making").join("dead"), b"").unwrap();
    let Turn::Make(making) = images.turn(&key("a")).unwrap() else {
        panic!("it is not there");
    };
    drop(making.reserve(1 << 20).unwrap());
    drop(image(&images, "b", 1).unwrap());
    store.collect(Policy::default()).unwrap();
    assert!(!node.root().join("tmp/dead").exists());
    assert!(!node.root().join("making/dead").exists());
    assert!(making.dir().join("finished").join(IMAGE).exists());
    drop(making);
    assert!(node.is_empty("tmp") && node.is_empty("making"));
}

#[test]
fn nobody_waits_for_ever_for_an_image_or_for_who_makes_it() {
    let node = Node::new();
    let waits = Waits {
        making: Duration::from_millis(20),
        rest: Duration::from_millis(20),
    };
    let store = node.store();
    let images = Images {
        waits,
        ..store.images()
    };
    let held_by_me = |error: Error| match error {
        Error::Lock(LockError::Held { holder, .. }) => {
            assert_eq!(holder.unwrap().pid, std::process::id());
        }
        other => panic!("{other:?}"),
    };
    let making = images.turn(&key("a")).unwrap();
    held_by_me(images.turn(&key("a")).unwrap_err());
    drop(making);

    let writing = store.content.write_lock(WRITER_WAIT).unwrap();
    held_by_me(image(&images, "a", 1).unwrap_err());
    drop(writing);

    let path = image(&images, "a", 1).unwrap().path;
    let hostile = File::open(path).unwrap();
    assert!(lock::try_exclusive(&hostile).unwrap());
    held_by_me(images.lookup(&key("a")).unwrap_err());
    drop(hostile);
    assert!(!image(&images, "a", 1).unwrap().made);
}

#[test]
fn full_disk_takes_unused_images_and_then_fails_by_name() {
    let node = Node::new();
    let store = node.store();
    let on = |disk| Images::of(Content::at(node.root(), disk));
    let calm = FaultyDisk::new(0, false);
    drop(image(&on(calm.clone()), "a", 10).unwrap());
    let log = calm.log.lock().unwrap().clone();
    let steps = log.iter().filter(|(name, _)| *name != "rename to");
    let at = steps.clone().position(|(name, _)| *name == "reserve");
    let full_once = || FaultyDisk::new(at.unwrap() as u32 + 1, false);

    let held = image(&on(full_once()), "b", 10).unwrap();
    assert!(held.made && !is_there(&store, "a"));
    // Nothing is left to go.
    let error = image(&on(full_once()), "c", 10).unwrap_err();
    assert!(
        matches!(error, Error::NoSpace { needed: 10240, .. }),
        "{error:?}"
    );
    assert!(is_there(&store, "b"));
}

#[test]
fn fault_at_any_step_of_making_an_image_leaves_none_or_a_good_one() {
    for fatal in [false, true] {
        for fail_at in 1.. {
            let node = Node::new();
            let clean = node.store();
            let disk = FaultyDisk::new(fail_at, fatal);
            let images = Images::of(Content::at(node.root(), disk.clone()));
            let made = image(&images, "a", 10);
            let struck = disk.struck.load(Ordering::Relaxed);
            assert_eq!(made.is_ok(), is_there(&clean, "a"), "fault {fail_at}");
            drop(made);
            // Whatever was left behind, the next one goes on and nothing stays.
            image(&clean.images(), "a", 10).unwrap();
            assert!(clean.verify(&[]).unwrap().damage.is_empty());
            clean.collect(Policy::default()).unwrap();
            assert!(node.is_empty("tmp") && node.is_empty("making"));
            if !struck {
                assert!(fail_at > 5, "only {fail_at} faults were injected");
                break;
            }
        }
    }
}

#[test]
fn a_record_with_a_flipped_bit_is_no_record() {
    let meta = tempfile::tempfile().unwrap().metadata().unwrap();
    let record = Record {
        boot: [3; 16],
        synced: true,
        stamp: Stamp::of(&meta),
        digest: [4; 32],
        segments: vec![
            SegmentDigest {
                len: 4096,
                hash: [5; 32]
            };
            3
        ],
    };
    let bytes = record.encode();
    assert_eq!(Record::decode(&bytes), Some(record));
    for at in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1;
        assert_eq!(Record::decode(&flipped), None, "byte {at}");
    }
}
