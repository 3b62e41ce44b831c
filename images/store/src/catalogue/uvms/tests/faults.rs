//! A full disk, a death and a power cut, at every step.

use super::*;

/// Every change to the disk fails once, and each time the store must be as before, or as after. Once with μVMs that have
/// nothing to do with each other, and once with children of one whose memory is not flat.
fn with_every_fault(fatal: bool, operation: impl Fn(&Store, Storage) -> Result<(), Error>) {
    for basis in [Basis::None, Basis::Sibling] {
        let storage = Storage {
            basis,
            ..Storage::default()
        };
        with_every_fault_as(storage, fatal, |store| operation(store, storage));
    }
}

fn with_every_fault_as(
    storage: Storage,
    fatal: bool,
    operation: impl Fn(&Store) -> Result<(), Error>,
) {
    let mut faults = 0;
    for fail_at in 1.. {
        let (dir, clean) = store();
        let first = bake(&clean, "zzz").unwrap();
        let removed = bake_as(&clean, "yyyy", storage).unwrap();
        let pinned = bake_as(&clean, "xxxxx", storage).unwrap();
        let has_parent = storage.basis == Basis::Sibling;
        assert_eq!(
            clean.children(first).unwrap().len(),
            if has_parent { 2 } else { 0 }
        );
        clean.pin(pinned).unwrap();
        let flat = clean.content.flat_root();
        clean.content.remove_tree(&flat).unwrap();
        let before = ids(&clean);

        let disk = FaultyDisk::new(fail_at, fatal);
        let faulty = faulty_store(dir.path(), &disk);
        let result = operation(&faulty);
        let struck = disk.struck.load(Ordering::Relaxed);

        assert_clean(&clean);
        assert_all_can_be_opened(&clean);
        assert_picks_as_if_all_were_read(&clean);
        let after = ids(&clean);
        let change: Vec<Digest> = before.symmetric_difference(&after).copied().collect();
        assert!(change.len() <= 1, "fault {fail_at}: {change:?}");
        assert!(after.contains(&pinned));
        if !struck {
            result.unwrap();
            break;
        }
        faults += 1;
        // Whatever was left behind, the next writer goes on and nothing stays.
        let fresh = bake(&clean, "next one").unwrap();
        assert_picks_as_if_all_were_read(&clean);
        clean.collect(Policy::default()).unwrap();
        assert_picks_as_if_all_were_read(&clean);
        assert_clean(&clean);
        assert_eq!(clean.verify(&[]).unwrap().orphans, 0, "fault {fail_at}");
        assert_eq!(
            fs::read_dir(clean.root().join("tmp")).unwrap().count(),
            0,
            "fault {fail_at}"
        );
        assert!(ids(&clean).contains(&fresh));
        match clean.remove(removed) {
            Ok(()) | Err(Error::NotFound(_)) => {}
            Err(error) => panic!("fault {fail_at}: {error}"),
        }
    }
    assert!(faults >= 3, "only {faults} faults were injected");
}

#[test]
fn full_disk_at_any_step_of_a_bake_leaves_the_store_whole() {
    with_every_fault(false, |store, storage| {
        bake_as(store, "the new one", storage).map(drop)
    });
}

#[test]
fn death_at_any_step_of_a_bake_leaves_the_store_whole() {
    with_every_fault(true, |store, storage| {
        bake_as(store, "the new one", storage).map(drop)
    });
}

#[test]
fn full_disk_at_any_step_of_a_removal_leaves_the_store_whole() {
    with_every_fault(false, |store, _| {
        store.remove(store.find(|m| m.about.class.slots == 4)?.unwrap())
    });
}

#[test]
fn death_at_any_step_of_a_removal_leaves_the_store_whole() {
    with_every_fault(true, |store, _| {
        store.remove(store.find(|m| m.about.class.slots == 4)?.unwrap())
    });
}

/// Everything is to go, at every step of which the program dies.
#[test]
fn death_at_any_step_of_a_collection_leaves_no_child_without_its_parent() {
    for fail_at in 1.. {
        let (dir, clean) = store();
        let parent = bake(&clean, "zzz").unwrap();
        for name in ["yyyy", "xxxxx", "wwwwww"] {
            bake_as(&clean, name, Storage::default()).unwrap();
        }
        assert_eq!(clean.children(parent).unwrap().len(), 3);
        clean
            .content
            .remove_tree(&clean.content.flat_root())
            .unwrap();
        let disk = FaultyDisk::new(fail_at, true);
        let policy = Policy {
            all: true,
            ..Policy::default()
        };
        let result = faulty_store(dir.path(), &disk).collect(policy);
        assert_clean(&clean);
        assert_all_can_be_opened(&clean);
        if !disk.struck.load(Ordering::Relaxed) {
            assert_eq!(result.unwrap().removed.len(), 4);
            assert!(fail_at > 10);
            break;
        }
        clean.collect(policy).unwrap();
        assert!(ids(&clean).is_empty() && clean.content.objects().unwrap().is_empty());
    }
}

fn assert_all_can_be_opened(store: &Store) {
    for id in ids(store) {
        store.lease(id).unwrap().open(Kind::Memory).unwrap();
    }
}

#[test]
fn death_at_any_step_of_making_a_store_does_not_stop_the_next_one() {
    for fail_at in 1.. {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("store");
        let disk = FaultyDisk::new(fail_at, true);
        let result = Store::create_with(root.clone(), disk.clone());
        let store = Store::open_or_create(&root).unwrap();
        bake(&store, "one").unwrap();
        if !disk.struck.load(Ordering::Relaxed) {
            result.unwrap();
            assert!(fail_at > 5);
            break;
        }
    }
}

/// What a power cut would show: a name that is on the disk before its content.
#[test]
fn everything_renamed_into_place_was_synced_before_and_its_directory_after() {
    let (dir, _clean) = store();
    let disk = FaultyDisk::new(0, false);
    let store = faulty_store(dir.path(), &disk);
    bake(&store, "one").unwrap();
    let child = bake_as(&store, "child", Storage::default()).unwrap();
    assert_eq!(store.lease(child).unwrap().manifest().parents.len(), 1);
    let log = disk.log.lock().unwrap();
    let mut renames = 0;
    // What is half an index is none.
    let is_index = |path: &Path| path.ends_with("index") || path.ends_with("index.new");
    // Nor does a flat file outlive a power cut.
    let flat = store.root().join("flat");
    let is_flat = |path: &Path| path.ends_with("memory") || path.starts_with(&flat);
    let renamed = |path: &Path| !is_index(path) && !is_flat(path);
    let steps = log.iter().enumerate();
    for (i, (name, path)) in steps.filter(|(_, (_, path))| renamed(path)) {
        if *name == "rename from" {
            assert!(log[..i].contains(&("sync_file", path.clone())), "{path:?}");
            renames += 1;
        }
        if *name == "rename to" {
            let dir = path.parent().unwrap().to_owned();
            let next_rename = log[i..].iter().position(|(name, _)| *name == "rename from");
            let until = next_rename.map_or(log.len(), |n| i + n);
            assert!(log[i..until].contains(&("sync_dir", dir)), "{path:?}");
        }
    }
    assert_eq!(renames, 6, "state, pack and manifest, twice");
}
