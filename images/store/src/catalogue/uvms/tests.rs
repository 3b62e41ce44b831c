mod faults;
mod saved;

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::*;
use crate::content::disk::tests::FaultyDisk;
use crate::testing::description;
use crate::{CHUNK, Removed};

/// A bake: `name` decides the recipe and the content.
fn bake(store: &Store, name: &str) -> Result<Digest, Error> {
    let storage = Storage {
        basis: Basis::None,
        starts_alone: true,
    };
    bake_as(store, name, storage)
}

fn bake_as(store: &Store, name: &str, storage: Storage) -> Result<Digest, Error> {
    let staging = store.begin(0)?;
    let memory = staging.create(Kind::Memory)?;
    memory.set_len(4 * CHUNK).unwrap();
    memory.write_all_at(name.as_bytes(), 3 * CHUNK).unwrap();
    memory.write_all_at(&[0; 8192], CHUNK).unwrap();
    staging
        .create(Kind::State)?
        .write_all_at(&[7; 100], 0)
        .unwrap();
    let mut about = description(name);
    about.class.slots = name.len() as u32;
    staging.commit_as(about, storage)
}

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_or_create(dir.path().join("store")).unwrap();
    (dir, store)
}

fn faulty_store(dir: &Path, disk: &Arc<FaultyDisk>) -> Store {
    Store {
        content: Content::at(dir.join("store"), disk.clone()),
    }
}

fn uvm(id: Digest) -> Named {
    Named { kind: NOUN, id }
}

fn ids(store: &Store) -> BTreeSet<Digest> {
    store.list().unwrap().iter().map(|entry| entry.id).collect()
}

/// Whatever the index is, it says what the manifests say.
fn assert_picks_as_if_all_were_read(store: &Store) {
    let host = Host {
        cpu: description("x").cpu.features,
        protocol: description("x").protocol,
    };
    let wanted = Wanted::default();
    let newest = store.find(|m| m.resumes_here(&host).is_ok()).unwrap();
    // Once with what is there, and once with what that has mended.
    for _ in 0..2 {
        assert_eq!(store.pick(&host, &wanted).unwrap().ok(), newest);
    }
}

fn assert_clean(store: &Store) {
    let report = store.verify(&[]).unwrap();
    assert!(report.damage.is_empty(), "{:?}", report.damage);
}

#[test]
fn baked_uvm_is_found_leased_and_mapped_as_it_was_written() {
    let (_dir, store) = store();
    let id = bake(&store, "one").unwrap();
    let recipe = Digest::of_bytes(b"one");
    assert_eq!(store.find(|m| m.about.recipe == recipe).unwrap(), Some(id));
    assert_eq!(store.find(|m| m.about.recipe == id).unwrap(), None);
    assert_eq!(store.resolve("latest").unwrap(), id);
    assert_eq!(store.resolve(&id.short()).unwrap(), id);
    let lease = store.lease(id).unwrap();
    let memory = lease.open(Kind::Memory).unwrap();
    let mut name = [0; 3];
    memory.read_exact_at(&mut name, 3 * CHUNK).unwrap();
    assert_eq!(&name, b"one");
    assert_eq!(
        lease.manifest().object(Kind::Memory).unwrap().length,
        4 * CHUNK
    );
    assert!(matches!(
        lease.open(Kind::WorkingSet),
        Err(Error::Incomplete(Kind::WorkingSet))
    ));
}

#[test]
fn zeros_that_were_written_take_no_room() {
    let (_dir, store) = store();
    let staging = store.begin(0).unwrap();
    let memory = staging.create(Kind::Memory).unwrap();
    memory.write_all_at(&vec![0; 8 << 20], 0).unwrap();
    staging
        .create(Kind::State)
        .unwrap()
        .write_all_at(b"state", 0)
        .unwrap();
    let id = staging.commit(description("zeros")).unwrap();
    let file = store.lease(id).unwrap().open(Kind::Memory).unwrap();
    let meta = file.metadata().unwrap();
    assert_eq!(meta.len(), 8 << 20);
    assert_eq!(meta.blocks(), 0, "no block is left");
}

#[test]
fn bake_without_memory_is_refused_and_leaves_nothing() {
    let (_dir, store) = store();
    let staging = store.begin(0).unwrap();
    staging
        .create(Kind::State)
        .unwrap()
        .write_all_at(b"state", 0)
        .unwrap();
    let error = staging.commit(description("x")).unwrap_err();
    assert!(matches!(error, Error::Incomplete(Kind::Memory)));
    assert_eq!(fs::read_dir(store.root().join("tmp")).unwrap().count(), 0);
    assert!(ids(&store).is_empty());
}

#[test]
fn store_of_another_format_is_refused_by_name() {
    let (_dir, store) = store();
    fs::write(store.root().join("format"), "kiln-store 4\n").unwrap();
    let error = Store::open(store.root()).unwrap_err().to_string();
    assert!(
        error.contains("kiln-store 4") && error.contains("kiln-store 3"),
        "{error}"
    );
    assert!(Store::open_or_create(store.root()).is_err());
    let missing = Store::open("/nonexistent/store").unwrap_err();
    assert!(matches!(missing, Error::NoStore(_)));
}

#[test]
fn bake_begins_while_others_end_theirs() {
    let (_dir, store) = store();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..400 {
                    let staging = store.begin(0).unwrap();
                    staging.create(Kind::State).unwrap();
                    drop(staging);
                }
            });
        }
    });
    assert_clean(&store);
}

#[test]
fn killed_bake_that_had_folders_is_swept_by_the_next_one() {
    let (_dir, store) = store();
    let killed = |name: &str| {
        let deep = store.root().join("tmp").join(name).join("tree/deeper");
        std::fs::create_dir_all(&deep).unwrap();
        std::fs::write(deep.join("file"), "x").unwrap();
        std::os::unix::fs::symlink(store.root().join("objects"), deep.join("link")).unwrap();
    };
    killed("1-0");
    bake(&store, "one").unwrap();
    killed("2-0");
    assert_eq!(store.collect(Policy::default()).unwrap().interrupted, 1);
    let left = std::fs::read_dir(store.root().join("tmp")).unwrap();
    assert_eq!(left.count(), 0);
    assert_eq!(store.verify(&[]).unwrap().objects, 2);
    // What a bake leaves in its own folder goes with it.
    let staging = store.begin(0).unwrap();
    std::fs::create_dir(staging.dir().join("tree")).unwrap();
    drop(staging);
    let left = std::fs::read_dir(store.root().join("tmp")).unwrap();
    assert_eq!(left.count(), 0);
}

#[test]
fn leased_uvm_is_neither_removed_nor_collected() {
    let (_dir, store) = store();
    let id = bake(&store, "one").unwrap();
    let lease = store.lease(id).unwrap();
    assert!(matches!(store.remove(id), Err(Error::InUse { .. })));
    let report = store
        .collect(Policy {
            all: true,
            ..Policy::default()
        })
        .unwrap();
    assert_eq!((report.in_use, report.removed), (vec![uvm(id)], vec![]));
    assert_clean(&store);
    drop(lease);
    store.remove(id).unwrap();
    assert!(matches!(store.lease(id), Err(Error::NotFound(_))));
    assert!(store.content.objects().unwrap().is_empty());
}

#[test]
fn pinned_uvm_stays_until_it_is_unpinned() {
    let (_dir, store) = store();
    let id = bake(&store, "one").unwrap();
    store.pin(id).unwrap();
    store.pin(id).unwrap();
    assert!(store.entry(id).unwrap().pinned);
    assert!(matches!(store.remove(id), Err(Error::Pinned(_))));
    let all = Policy {
        all: true,
        ..Policy::default()
    };
    assert_eq!(store.collect(all).unwrap().removed, []);
    store.unpin(id).unwrap();
    assert_eq!(
        store.collect(all).unwrap().removed,
        [Removed {
            what: uvm(id),
            why: Why::All
        }]
    );
    assert!(matches!(store.pin(id), Err(Error::NotFound(_))));
}

#[test]
fn newer_uvm_of_the_same_class_supersedes_the_older() {
    let (_dir, store) = store();
    let old = bake(&store, "aaa").unwrap();
    let other_class = bake(&store, "aaaa").unwrap();
    let staging = store.begin(0).unwrap();
    staging
        .create(Kind::Memory)
        .unwrap()
        .write_all_at(b"new", 0)
        .unwrap();
    staging
        .create(Kind::State)
        .unwrap()
        .write_all_at(b"new", 0)
        .unwrap();
    let mut about = description("bbb");
    about.class.slots = 3;
    about.baked_at += 1;
    let new = staging.commit(about).unwrap();

    let dry = store
        .collect(Policy {
            dry_run: true,
            ..Policy::default()
        })
        .unwrap();
    assert_eq!(
        dry.removed,
        [Removed {
            what: uvm(old),
            why: Why::Superseded
        }]
    );
    assert_eq!(ids(&store).len(), 3, "a dry run changes nothing");
    let keep = Policy {
        keep_superseded: true,
        ..Policy::default()
    };
    assert_eq!(store.collect(keep).unwrap().removed, []);
    let report = store.collect(Policy::default()).unwrap();
    assert_eq!(report.removed, dry.removed);
    assert!(report.freed > 0);
    assert_eq!(ids(&store), BTreeSet::from([other_class, new]));
    assert_clean(&store);
}

#[test]
fn shared_object_survives_the_removal_of_one_of_its_uvms() {
    let (_dir, store) = store();
    let one = bake(&store, "one").unwrap();
    let two = bake(&store, "four").unwrap();
    // The state objects are equal.
    assert_eq!(store.content.objects().unwrap().len(), 3);
    store.remove(one).unwrap();
    assert_eq!(store.content.objects().unwrap().len(), 2);
    assert_clean(&store);
    store.lease(two).unwrap().open(Kind::State).unwrap();
}

#[test]
fn budget_is_a_hard_limit_and_collection_makes_room_for_the_least_recently_used() {
    let (_dir, store) = store();
    let first = bake(&store, "a").unwrap();
    let second = bake(&store, "bb").unwrap();
    let used = store.usage().unwrap().used;
    store.set_budget(Some(used)).unwrap();
    assert!(matches!(bake(&store, "ccc"), Err(Error::OverBudget { .. })));
    assert!(matches!(
        store.begin(1 << 30),
        Err(Error::OverBudget { .. })
    ));
    assert_eq!(ids(&store), BTreeSet::from([first, second]));

    let long_ago = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1000);
    let file = File::options()
        .read(true)
        .open(store.uvms().path(&second))
        .unwrap();
    file.set_times(fs::FileTimes::new().set_modified(long_ago))
        .unwrap();
    store.set_budget(None).unwrap();
    let used = store.usage().unwrap().used;
    let target = Policy {
        target: Some(used - 1),
        ..Policy::default()
    };
    let report = store.collect(target).unwrap();
    assert_eq!(
        report.removed,
        [Removed {
            what: uvm(second),
            why: Why::Room
        }]
    );
    bake(&store, "ccc").unwrap();
}

#[test]
fn verify_names_every_kind_of_damage() {
    let (_dir, store) = store();
    let id = bake(&store, "one").unwrap();
    let lease = store.lease(id).unwrap();
    let state = lease.path(Kind::State).unwrap();
    drop(lease);
    let damage = |store: &Store| {
        let mut damage = store.verify(&[id]).unwrap().damage;
        assert_eq!(damage.len(), 1, "{damage:?}");
        damage.remove(0)
    };
    // Writing to a sealed file takes root, or owner's rights given back.
    use std::os::unix::fs::PermissionsExt;
    for path in [&state, &store.uvms().path(&id)] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    }
    let file = File::options().write(true).open(&state).unwrap();
    file.write_all_at(b"X", 50).unwrap();
    assert!(matches!(
        damage(&store),
        Damage::Content { part: "state", .. }
    ));
    file.write_all_at(&[7], 50).unwrap();
    assert_clean(&store);
    file.set_len(99).unwrap();
    assert!(matches!(
        damage(&store),
        Damage::Length { part: "state", .. }
    ));
    file.set_len(100).unwrap();
    file.write_all_at(&[7], 99).unwrap();
    fs::rename(&state, state.with_extension("away")).unwrap();
    assert!(matches!(
        damage(&store),
        Damage::Missing { part: "state", .. }
    ));
    fs::rename(state.with_extension("away"), &state).unwrap();
    let manifest = File::options()
        .write(true)
        .open(store.uvms().path(&id))
        .unwrap();
    manifest.write_all_at(b"x", 30).unwrap();
    assert!(matches!(damage(&store), Damage::Entry { .. }));
    assert!(store.lease(id).is_err());
    // It can still be removed, by name, and its objects with it.
    store.remove(id).unwrap();
    assert!(store.content.objects().unwrap().is_empty());
}

#[test]
fn nothing_is_swept_while_a_manifest_cannot_be_read() {
    let (_dir, store) = store();
    bake(&store, "one").unwrap();
    let newer = Digest::of_bytes(b"from a newer kiln");
    fs::write(store.uvms().path(&newer), "not readable here").unwrap();
    let orphan = Digest::of_bytes(b"its object");
    fs::create_dir_all(store.content.object_path(&orphan).parent().unwrap()).unwrap();
    fs::write(store.content.object_path(&orphan), "data").unwrap();
    let report = store.collect(Policy::default()).unwrap();
    assert_eq!((report.damaged, report.objects), (vec![uvm(newer)], 0));
    assert!(store.content.object_path(&orphan).exists());
    store.remove(newer).unwrap();
    assert!(!store.content.object_path(&orphan).exists());
}

#[test]
fn ambiguous_and_short_names_are_refused() {
    let (_dir, store) = store();
    for digit in ["aaaa1", "aaaa2"] {
        let name = format!("{digit:0<64}");
        fs::write(store.root().join("uvms").join(name), "").unwrap();
    }
    assert!(matches!(
        store.resolve("aaaa"),
        Err(Error::Ambiguous { .. })
    ));
    assert!(store.resolve("aaaa1").is_ok());
    assert!(matches!(store.resolve("aaa"), Err(Error::NotFound(_))));
    assert!(matches!(store.resolve("latest"), Err(Error::NotFound(_))));
}
