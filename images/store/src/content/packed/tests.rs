mod family;
mod faults;
mod parents;
mod room;

use std::collections::BTreeSet;
use std::fs::Permissions;
use std::fs::{self, FileTimes};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use super::flat::{FlatFile, flat_files};
use super::*;
use crate::content::disk::tests::FaultyDisk;
use crate::testing::description;
use crate::{Basis, Damage, Kind, Policy, Storage, Store, WorkingSet};

const PAGES: usize = 300;

/// Zeroes, pages that compress and pages that don't; `seed` makes it one of its own.
fn content(seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; PAGES * PAGE];
    let mut state = u64::from(seed) + 1;
    for (number, page) in bytes.chunks_exact_mut(PAGE).enumerate() {
        match number % 7 {
            0..3 => page.fill(seed.wrapping_add(number as u8) | 1),
            3 | 4 => page.fill_with(|| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
                (state >> 56) as u8
            }),
            _ => {}
        }
    }
    bytes
}

/// Stored as if it were the only one.
const ALONE: Storage = Storage {
    basis: Basis::None,
    starts_alone: true,
};

fn enter_bytes(store: &Store, name: &str, memory: &[u8]) -> Result<Digest, Error> {
    enter_as(store, name, memory, ALONE)
}

fn enter_as(store: &Store, name: &str, memory: &[u8], storage: Storage) -> Result<Digest, Error> {
    let staging = store.begin(0)?;
    let write = |kind, bytes: &[u8]| -> Result<(), Error> {
        staging.create(kind)?.write_all_at(bytes, 0).unwrap();
        Ok(())
    };
    write(Kind::Memory, memory)?;
    write(Kind::State, b"state")?;
    let set: WorkingSet = [3, 4, 14, 280]
        .map(|page| (page, page == 14))
        .into_iter()
        .collect();
    write(Kind::WorkingSet, &set.encode())?;
    let mut about = description(name);
    about.class.slots = name.len() as u32;
    staging.commit_as(about, storage)
}

fn enter(store: &Store, seed: u8) -> Digest {
    // A class of its own: none supersedes another.
    enter_bytes(store, &"x".repeat(usize::from(seed) + 1), &content(seed)).unwrap()
}

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_or_create(dir.path().join("store")).unwrap();
    (dir, store)
}

fn with_disk(store: &Store, disk: &Arc<FaultyDisk>) -> Store {
    Store {
        content: Content::at(store.root().to_owned(), disk.clone()),
    }
}

fn open(store: &Store, id: Digest) -> Result<File, Error> {
    store.lease(id)?.open(Kind::Memory)
}

fn read(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn object(store: &Store, id: Digest) -> Digest {
    let lease = store.lease(id).unwrap();
    lease.manifest().object(Kind::Memory).unwrap().digest
}

fn pack(store: &Store, id: Digest) -> PathBuf {
    store.content.pack_path(&object(store, id))
}

fn flat(store: &Store, id: Digest) -> PathBuf {
    store.content.flat_path(&object(store, id)).unwrap()
}

/// As after a start of the machine.
fn go_cold(store: &Store) {
    store
        .content
        .remove_tree(&store.content.flat_root())
        .unwrap();
}

/// Names of this boot's flat files.
fn flats(store: &Store) -> BTreeSet<String> {
    let files = flat_files(&store.content.boot_dir().unwrap()).unwrap();
    let name = |file: &FlatFile| file.path.file_name().unwrap().to_str().unwrap().to_owned();
    files.iter().map(name).collect()
}

fn writable(path: &Path) -> File {
    fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
    File::options().read(true).write(true).open(path).unwrap()
}

fn rebuilds(disk: &FaultyDisk) -> usize {
    let log = disk.log.lock().unwrap();
    log.iter().filter(|(name, _)| *name == "fill").count()
}

#[test]
fn memory_is_stored_packed_and_can_be_mapped_at_once() {
    let (_dir, store) = store();
    let disk = FaultyDisk::new(0, false);
    let store = with_disk(&store, &disk);
    let id = enter(&store, 1);
    assert_eq!(rebuilds(&disk), 1, "the pack was written");
    assert_eq!(read(&open(&store, id).unwrap()), content(1));
    assert_eq!(rebuilds(&disk), 1, "nothing was rebuilt");
    let path = store.lease(id).unwrap().path(Kind::Memory).unwrap();
    assert_eq!(path, flat(&store, id));
    assert!(!store.content.object_path(&object(&store, id)).exists());
    let file = File::open(pack(&store, id)).unwrap();
    let pack = Pack::open(&file).unwrap();
    // Pages 3, 4 and 14 have data, 280 is of those that compress.
    assert_eq!(pack.working_set_frames(), 1);
    let Some(Source::Literal(first)) = pack.source_of(3) else {
        panic!("page 3 is its own");
    };
    assert_eq!(first, 0);
}

#[test]
fn memory_of_another_boot_is_rebuilt_to_the_byte() {
    let (_dir, store) = store();
    let id = enter(&store, 1);
    let hot = open(&store, id).unwrap().metadata().unwrap();
    go_cold(&store);
    let file = open(&store, id).unwrap();
    assert_eq!(read(&file), content(1));
    let cold = file.metadata().unwrap();
    assert!(cold.blocks() * 512 < hot.len() * 9 / 10, "zeroes take room");
    assert_eq!(cold.mode() & 0o777, 0o400);
    let again = open(&store, id).unwrap().metadata().unwrap();
    assert_eq!((cold.ino(), cold.len()), (again.ino(), hot.len()));
    assert_eq!(flats(&store), [object(&store, id).to_string()].into());
    // The file is a cache of one length; another one is none.
    writable(&flat(&store, id)).set_len(4096).unwrap();
    assert_eq!(read(&open(&store, id).unwrap()), content(1));
}

#[test]
fn memory_that_is_there_as_it_is_is_used_as_it_is() {
    let (_dir, store) = store();
    let odd = enter_bytes(&store, "odd", &content(1)[..PAGE + 1]).unwrap();
    assert!(store.content.object_path(&object(&store, odd)).exists());
    assert!(!pack(&store, odd).exists());
    assert_eq!(read(&open(&store, odd).unwrap()), content(1)[..PAGE + 1]);

    let id = enter(&store, 4);
    let plain = store.content.object_path(&object(&store, id));
    fs::create_dir_all(plain.parent().unwrap()).unwrap();
    fs::rename(flat(&store, id), &plain).unwrap();
    fs::remove_file(pack(&store, id)).unwrap();
    assert_eq!(store.find(|m| m.about.class.slots == 5).unwrap(), Some(id));
    let lease = store.lease(id).unwrap();
    assert_eq!(lease.path(Kind::Memory).unwrap(), plain);
    assert_eq!(read(&lease.open(Kind::Memory).unwrap()), content(4));
    assert!(store.verify(&[]).unwrap().damage.is_empty());
    assert!(flats(&store).is_empty());
}

#[test]
fn many_that_open_a_cold_memory_at_once_rebuild_it_once() {
    let (_dir, store) = store();
    let id = enter(&store, 1);
    go_cold(&store);
    let disk = FaultyDisk::new(0, false);
    let store = with_disk(&store, &disk);
    let start = std::sync::Barrier::new(16);
    let opened = || {
        start.wait();
        open(&store, id).unwrap().metadata().unwrap().ino()
    };
    let inodes: BTreeSet<u64> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..16).map(|_| scope.spawn(opened)).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!((inodes.len(), rebuilds(&disk)), (1, 1));
}

#[test]
fn follower_of_a_killed_leader_rebuilds_and_removes_what_that_left() {
    let (_dir, store) = store();
    let (id, other) = (enter(&store, 1), enter(&store, 2));
    go_cold(&store);
    let dir = store.content.boot_dir().unwrap();
    fs::create_dir_all(&dir).unwrap();
    let unfinished = |id: Digest| dir.join(format!("{}{UNFINISHED}1-0", object(&store, id)));
    // A leader, and another one that goes on living.
    let leader = File::open(pack(&store, id)).unwrap();
    lock::exclusive(&leader, REBUILD_WAIT).unwrap();
    let (half, living) = (unfinished(id), unfinished(other));
    fs::write(&half, &content(1)[..100 * PAGE]).unwrap();
    fs::write(&living, "").unwrap();
    let its_own = File::open(&living).unwrap();
    lock::exclusive(&its_own, REBUILD_WAIT).unwrap();
    std::thread::scope(|scope| {
        let follower = scope.spawn(|| open(&store, id));
        drop(leader);
        let file = follower.join().unwrap().unwrap();
        assert_eq!(read(&file), content(1));
    });
    assert!(!half.exists() && living.exists());
    drop(its_own);
    // A writer removes it as well.
    drop(store.begin(0).unwrap());
    assert!(!living.exists());
}

#[test]
fn who_gives_up_waiting_says_what_the_holder_does() {
    let (_dir, store) = store();
    let id = enter(&store, 1);
    go_cold(&store);
    let leader = File::open(pack(&store, id)).unwrap();
    lock::exclusive(&leader, REBUILD_WAIT).unwrap();
    let object = object(&store, id);
    let length = content(1).len() as u64;
    let soon = Instant::now() + Duration::from_millis(10);
    let waited = store
        .content
        .open_packed_until(Memory { object, length }, &[], soon);
    let error = waited.unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains(&object.short()) && text.contains("rebuilt"),
        "{text}"
    );
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains(&std::process::id().to_string()), "{cause}");
}

#[test]
fn damaged_pack_is_refused_by_name_and_leaves_nothing() {
    let (_dir, store) = store();
    let id = enter(&store, 1);
    let (path, object) = (pack(&store, id), object(&store, id));
    let good = fs::read(&path).unwrap();
    let file = writable(&path);
    let mut state = 12345u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
        (state >> 33) as usize % below
    };
    for round in 0..60 {
        go_cold(&store);
        let mut bytes = good.clone();
        match round % 3 {
            0 => bytes.truncate(random(good.len())),
            1 => bytes.extend(b"more"),
            _ => bytes[random(good.len())] ^= 1 << random(8),
        }
        file.set_len(0).unwrap();
        file.write_all_at(&bytes, 0).unwrap();
        let error = open(&store, id).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Pack { .. }), "{error:?}");
        assert!(text.contains(&object.short()) && text.contains("kiln verify"));
        let verified = store.verify(&[id]).unwrap();
        assert!(
            matches!(verified.damage[..], [Damage::Pack { part: "memory", .. }]),
            "{:?}",
            verified.damage
        );
        assert!(flats(&store).is_empty(), "round {round}");
    }
    // Baking the same again mends it.
    assert_eq!(enter(&store, 1), id);
    go_cold(&store);
    assert_eq!(read(&open(&store, id).unwrap()), content(1));
}

#[test]
fn good_pack_of_another_memory_is_refused() {
    let (_dir, store) = store();
    let (one, two) = (enter(&store, 1), enter(&store, 2));
    fs::rename(pack(&store, two), pack(&store, one)).unwrap();
    go_cold(&store);
    let error = open(&store, one).unwrap_err();
    assert!(matches!(error, Error::OtherContent(_)), "{error:?}");
    assert!(error.to_string().contains(&object(&store, one).short()));
    assert!(flats(&store).is_empty());
    let damage = store.verify(&[]).unwrap().damage;
    let wrong = |damage: &Damage| matches!(damage, Damage::Content { of, .. } if of.id == one);
    let missing = |damage: &Damage| matches!(damage, Damage::Missing { of, .. } if of.id == two);
    assert!(damage.iter().any(wrong) && damage.iter().any(missing) && damage.len() == 2);
    // It is not picked without its pack.
    assert_eq!(store.find(|_| true).unwrap(), Some(one));
}

#[test]
fn verify_finds_damage_in_a_flat_file_and_removes_that() {
    let (_dir, store) = store();
    let id = enter(&store, 1);
    let data = store.verify(&[]).unwrap().data;
    go_cold(&store);
    assert_eq!(store.verify(&[]).unwrap().data, data, "of the pack alone");
    assert!(flats(&store).is_empty());
    open(&store, id).unwrap();
    let path = flat(&store, id);
    writable(&path).write_all_at(b"X", 5 * PAGE as u64).unwrap();
    let damage = store.verify(&[id]).unwrap().damage;
    assert!(
        matches!(damage[..], [Damage::Flat { part: "memory", .. }]),
        "{damage:?}"
    );
    assert!(!path.exists());
    assert!(store.verify(&[]).unwrap().damage.is_empty());
    assert_eq!(read(&open(&store, id).unwrap()), content(1));
}

#[test]
fn working_set_that_is_none_or_of_another_memory_is_refused() {
    let (_dir, store) = store();
    let beyond: WorkingSet = [(PAGES as u32, false)].into_iter().collect();
    for set in [b"junk".to_vec(), beyond.encode()] {
        let staging = store.begin(0).unwrap();
        for (kind, bytes) in [
            (Kind::Memory, content(1)),
            (Kind::State, vec![1]),
            (Kind::WorkingSet, set),
        ] {
            staging
                .create(kind)
                .unwrap()
                .write_all_at(&bytes, 0)
                .unwrap();
        }
        assert!(matches!(
            staging.commit(description("x")),
            Err(Error::Io { .. })
        ));
    }
    assert!(store.content.objects().unwrap().is_empty());
    assert!(flats(&store).is_empty());
}
