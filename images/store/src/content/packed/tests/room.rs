//! Room: the flat files' budget, other boots, collection.

use super::*;

#[test]
fn flat_files_of_other_boots_go_at_first_use() {
    let (_dir, store) = store();
    let id = enter(&store, 1);
    let other = store.content.flat_root().join("of-another-boot");
    // What is no file of the store's is nobody's concern.
    fs::create_dir(store.content.boot_dir().unwrap().join("stray")).unwrap();
    let leave = || {
        fs::create_dir_all(&other).unwrap();
        fs::write(other.join(object(&store, id).to_string()), "zeros").unwrap();
    };
    leave();
    drop(store.begin(0).unwrap());
    assert!(!other.exists(), "a writer");
    leave();
    open(&store, id).unwrap();
    assert!(other.exists(), "a hot start does not look");
    fs::remove_file(flat(&store, id)).unwrap();
    open(&store, id).unwrap();
    assert!(!other.exists(), "a rebuild");
    leave();
    let dry_run = Policy {
        dry_run: true,
        ..Policy::default()
    };
    store.collect(dry_run).unwrap();
    assert!(other.exists());
    store.collect(Policy::default()).unwrap();
    assert!(!other.exists(), "a collection");
}

#[test]
fn least_recently_used_flat_file_makes_way_and_stays_with_who_has_it() {
    let (_dir, store) = store();
    let ids = [1, 2, 3].map(|seed| enter(&store, seed));
    let bytes = |id: Digest| fs::metadata(flat(&store, id)).unwrap().blocks() * 512;
    let all: u64 = ids.map(bytes).iter().sum();
    assert_eq!(store.usage().unwrap().flat, all);
    // Room for two, and what the file system needs to find their parts.
    store
        .set_flat_budget(Some(all - bytes(ids[0]) + 65536))
        .unwrap();
    let used_long_ago = |id: Digest, seconds| {
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let file = File::open(flat(&store, id)).unwrap();
        file.set_times(FileTimes::new().set_modified(time)).unwrap();
    };
    used_long_ago(ids[1], 1000);
    used_long_ago(ids[2], 2000);
    fs::remove_file(flat(&store, ids[0])).unwrap();
    open(&store, ids[0]).unwrap();
    let there = ids.map(|id| flat(&store, id).exists());
    assert_eq!(there, [true, false, true]);
    // Opening is use: now 2 is older than 1.
    go_cold(&store);
    let kept = open(&store, ids[1]).unwrap();
    open(&store, ids[2]).unwrap();
    used_long_ago(ids[1], 1000);
    used_long_ago(ids[2], 2000);
    open(&store, ids[1]).unwrap();
    open(&store, ids[0]).unwrap();
    assert!(flat(&store, ids[1]).exists() && !flat(&store, ids[2]).exists());
    // One that is larger than the budget is rebuilt all the same, for a pod waits for it.
    store.set_flat_budget(Some(1)).unwrap();
    open(&store, ids[2]).unwrap();
    assert_eq!(flats(&store), [object(&store, ids[2]).to_string()].into());
    assert_eq!(read(&kept), content(2));
    let new = enter(&store, 4);
    assert_eq!(flats(&store), [object(&store, new).to_string()].into());
}

#[test]
fn collection_and_removal_take_pack_and_flat_file() {
    let (_dir, store) = store();
    let (one, two) = (enter(&store, 1), enter(&store, 2));
    let paths = [pack(&store, one), flat(&store, one)];
    let stays = [pack(&store, two), flat(&store, two)];
    let orphan = store.content.pack_path(&Digest::of_bytes(b"orphan"));
    fs::create_dir_all(orphan.parent().unwrap()).unwrap();
    fs::write(&orphan, "x").unwrap();
    assert_eq!(store.verify(&[]).unwrap().orphans, 1);
    store.remove(one).unwrap();
    assert!(paths.iter().all(|path| !path.exists()));
    assert!(!orphan.exists());
    assert!(stays.iter().all(|path| path.exists()));
    let bytes = fs::metadata(&stays[0]).unwrap().blocks() * 512;
    let manifest = store.entry(two).unwrap().manifest.unwrap();
    let memory = manifest.object(Kind::Memory).unwrap();
    assert_eq!(store.stored_bytes(memory).unwrap(), bytes);
    let all = Policy {
        all: true,
        ..Policy::default()
    };
    assert!(store.collect(all).unwrap().freed >= bytes);
    assert!(stays.iter().all(|path| !path.exists()));
    assert_eq!(store.usage().unwrap().flat, 0);
}

#[test]
fn usage_and_budget_count_packs_and_no_flat_files() {
    let (_dir, store) = store();
    let id = enter(&store, 1);
    let usage = store.usage().unwrap();
    let bytes = |path| fs::metadata(path).unwrap().blocks() * 512;
    assert_eq!(usage.flat, bytes(flat(&store, id)));
    go_cold(&store);
    let cold = store.usage().unwrap();
    assert_eq!((cold.used, cold.flat), (usage.used, 0));
    fs::remove_file(pack(&store, id)).unwrap();
    // A budget that the staged memory, which is larger than its pack, would exceed.
    let without = store.usage().unwrap().used;
    store.set_budget(Some(usage.used + 16384)).unwrap();
    assert!(usage.used - without < usage.flat);
    enter(&store, 1);
    store.set_budget(Some(without)).unwrap();
    let refused = enter_bytes(&store, "four", &content(7));
    assert!(matches!(refused, Err(Error::OverBudget { .. })));
    assert_eq!(flats(&store).len(), 1, "what was refused left no flat file");
}
