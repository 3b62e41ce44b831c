use std::os::unix::fs::FileExt;
use std::sync::Barrier;

use kiln_store::lock::LockError;

use super::*;

struct Node {
    scratch: tempfile::TempDir,
}

impl Node {
    fn new() -> Node {
        Node {
            scratch: tempfile::tempdir().unwrap(),
        }
    }

    fn cache(&self, budget: u64) -> Cache {
        Cache::open(self.scratch.path().join("cache"), budget).unwrap()
    }

    /// A layer with `kib` of content, and its key.
    fn layer(&self, name: &str, kib: usize) -> (ImageKey, Lowers) {
        let dir = self.scratch.path().join(name);
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("content"), vec![7; kib * 1024]).unwrap();
        let lowers = Lowers::plain(dir);
        (ImageKey::from_lowers(&lowers).unwrap(), lowers)
    }

    fn is_empty(&self, sub: &str) -> bool {
        let path = self.scratch.path().join("cache").join(sub);
        fs::read_dir(path).unwrap().next().is_none()
    }
}

#[test]
fn the_second_lease_is_of_the_same_file() {
    let node = Node::new();
    let cache = Cache::new(node.scratch.path().join("cache"), u64::MAX);
    let (key, lowers) = node.layer("a", 100);
    assert!(cache.lookup(&key).unwrap().is_none());
    assert!(!node.scratch.path().join("cache").exists());
    let first = cache.image_for(&key, &lowers).unwrap();
    let second = cache.image_for(&key, &lowers).unwrap();
    assert_eq!((first.made, second.made), (true, false));
    let inode = |lease: &Lease| lease.file.metadata().unwrap().ino();
    assert_eq!(inode(&first), inode(&second));
    assert!(node.is_empty("building"));
}

#[test]
fn twenty_that_ask_at_once_make_one_image() {
    let node = Node::new();
    let cache = node.cache(u64::MAX);
    let (key, lowers) = node.layer("a", 3000);
    let barrier = Barrier::new(20);
    let made = std::thread::scope(|scope| {
        let asking: Vec<_> = (0..20)
            .map(|_| {
                scope.spawn(|| {
                    barrier.wait();
                    cache.image_for(&key, &lowers).unwrap().made
                })
            })
            .collect();
        asking
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .filter(|made| *made)
            .count()
    });
    assert_eq!(made, 1);
}

#[test]
fn the_least_recently_used_image_goes_and_one_in_use_never_does() {
    let node = Node::new();
    let cache = node.cache(1_300_000);
    let (key_a, a) = node.layer("a", 500);
    let (key_b, b) = node.layer("b", 500);
    let (key_c, c) = node.layer("c", 500);
    let held = cache.image_for(&key_a, &a).unwrap();
    drop(cache.image_for(&key_b, &b).unwrap());
    drop(cache.image_for(&key_c, &c).unwrap());
    assert!(cache.lookup(&key_a).unwrap().is_some());
    assert!(cache.lookup(&key_b).unwrap().is_none());
    assert!(cache.lookup(&key_c).unwrap().is_some());
    // A descriptor that was passed on holds the image as well as the lease did.
    let passed = held.file.try_clone().unwrap();
    drop(held);
    assert!(cache.shrink(0).unwrap() > 0);
    assert!(cache.lookup(&key_a).unwrap().is_some());
    drop(passed);
    assert_eq!(cache.shrink(0).unwrap(), 0);
    assert!(node.is_empty("images") && node.is_empty("trash"));
}

#[test]
fn an_image_that_was_written_to_is_made_again() {
    let node = Node::new();
    let cache = node.cache(u64::MAX);
    let (key, lowers) = node.layer("a", 100);
    let lease = cache.image_for(&key, &lowers).unwrap();
    let good = fs::read(&lease.path).unwrap();
    let file = OpenOptions::new().write(true).open(&lease.path).unwrap();
    file.write_all_at(b"x", 50_000).unwrap();
    drop(lease);
    assert!(cache.lookup(&key).unwrap().is_none());
    let again = cache.image_for(&key, &lowers).unwrap();
    assert!(again.made);
    assert!(fs::read(&again.path).unwrap() == good);
    assert_eq!(cache.verify(&key).unwrap(), Some(true));
}

#[test]
fn an_image_of_an_earlier_boot_is_read_again_unless_it_was_synced() {
    let node = Node::new();
    let cache = node.cache(u64::MAX);
    let (key, lowers) = node.layer("a", 100);
    let lease = cache.image_for(&key, &lowers).unwrap();
    let dir = lease.path.parent().unwrap().to_owned();
    let reboot = || {
        let mut record = Record::decode(&fs::read(dir.join(RECORD)).unwrap()).unwrap();
        record.boot = [1; 16];
        write_record(&dir, &record).unwrap();
    };
    reboot();
    assert!(cache.lookup(&key).unwrap().is_none());
    assert!(!cache.image_for(&key, &lowers).unwrap().made);
    assert!(cache.lookup(&key).unwrap().is_some());
    cache.sync(&key).unwrap();
    reboot();
    assert!(cache.lookup(&key).unwrap().is_some());
}

#[test]
fn what_a_crash_left_is_removed_and_what_is_being_made_is_not() {
    let node = Node::new();
    let cache = node.cache(u64::MAX);
    let (key, _) = node.layer("a", 1);
    for left in ["building/dead", "trash/dead"] {
        fs::create_dir_all(cache.dir.join(left)).unwrap();
        fs::write(cache.dir.join(left).join(IMAGE), b"half").unwrap();
    }
    let alive = cache.dir.join("building").join(key.as_str());
    fs::create_dir(&alive).unwrap();
    let _making = cache.lock_key(&key).unwrap();
    node.cache(u64::MAX);
    assert!(alive.exists());
    assert!(!cache.dir.join("building/dead").exists());
    assert!(node.is_empty("trash"));
}

#[test]
fn a_failed_conversion_leaves_nothing() {
    let node = Node::new();
    let cache = node.cache(u64::MAX);
    let (key, lowers) = node.layer("a", 1);
    fs::remove_dir_all(lowers.dirs().next().unwrap()).unwrap();
    let error = cache.image_for(&key, &lowers).unwrap_err();
    assert!(matches!(
        error,
        CacheError::Image(ImageError::OpenLayer { .. })
    ));
    assert!(node.is_empty("building") && node.is_empty("images"));
}

#[test]
fn nobody_waits_for_ever_for_an_image_or_for_who_makes_it() {
    let node = Node::new();
    let waits = Waits {
        making: Duration::from_millis(20),
        rest: Duration::from_millis(20),
    };
    let cache = Cache {
        waits,
        ..node.cache(u64::MAX)
    };
    let held_by_me = |error: CacheError| match error {
        CacheError::Lock(LockError::Held { holder, .. }) => {
            assert_eq!(holder.unwrap().pid, std::process::id());
        }
        other => panic!("{other:?}"),
    };
    let (key, lowers) = node.layer("a", 1);
    let making = cache.lock_key(&key).unwrap();
    held_by_me(cache.image_for(&key, &lowers).unwrap_err());
    drop(making);

    let path = cache.image_for(&key, &lowers).unwrap().path;
    let hostile = File::open(path).unwrap();
    assert!(lock::try_exclusive(&hostile).unwrap());
    held_by_me(cache.lookup(&key).unwrap_err());
    drop(hostile);
    assert!(!cache.image_for(&key, &lowers).unwrap().made);
}

#[test]
fn a_record_with_a_flipped_bit_is_no_record() {
    let record = Record {
        boot: [3; 16],
        synced: true,
        stamp: Stamp::of(&tempfile::tempfile().unwrap()).unwrap(),
        digest: [4; 32],
        segments: vec![
            crate::erofs::SegmentDigest {
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
