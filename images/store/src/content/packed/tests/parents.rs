//! Memories that are stored as what differs from another one's.

use kiln_packs::{Coding, FrameReader};
use proptest::prelude::*;

use super::*;
use crate::Parent;

/// A memory as that of another bake of the same kernel: some pages are equal, some moved, most differ by a few bytes, some
/// are its own.
pub(super) fn alike(of: &[u8], seed: u8) -> Vec<u8> {
    let mut bytes = of.to_vec();
    let (page, pages) = (|number: usize| number * PAGE..(number + 1) * PAGE, PAGES);
    for number in 0..pages {
        match (number + usize::from(seed)) % 6 {
            0 => {}
            1 => bytes[page(number)].copy_from_slice(&of[page((number + 7) % pages)]),
            2 => bytes[page(number)].fill(0),
            3 if number % 4 == 0 => bytes[page(number)].fill(seed | 1),
            _ => {
                for pointer in (0..PAGE).step_by(256) {
                    bytes[number * PAGE + pointer] ^= seed.max(1);
                }
            }
        }
    }
    bytes
}

pub(super) fn sibling(store: &Store, seed: u8) -> Digest {
    child(store, seed, Basis::Sibling)
}

/// In a class of its own.
pub(super) fn child(store: &Store, seed: u8, basis: Basis) -> Digest {
    let name = "y".repeat(usize::from(seed) + 1);
    let storage = Storage {
        basis,
        ..Storage::default()
    };
    enter_as(store, &name, &alike(&content(1), seed), storage).unwrap()
}

pub(super) fn parents(store: &Store, id: Digest) -> Vec<Parent> {
    store.entry(id).unwrap().manifest.unwrap().parents
}

/// A parent, and a child of it.
pub(super) fn family(store: &Store) -> (Digest, Digest) {
    let parent = enter(store, 1);
    let child = child(store, 30, Basis::Of(parent));
    assert_eq!(parents(store, child)[0].uvm, parent);
    (parent, child)
}

#[test]
fn sibling_is_stored_as_what_differs() {
    let (_dir, store) = store();
    let parent = enter(&store, 1);
    let child = sibling(&store, 30);
    let named = parents(&store, child);
    let memory = object(&store, parent);
    let length = content(1).len() as u64;
    assert_eq!(
        named,
        [Parent {
            uvm: parent,
            memory,
            length
        }]
    );
    let length = |id| fs::metadata(pack(&store, id)).unwrap().len();
    let alone = enter_bytes(&store, "alone", &alike(&content(1), 31)).unwrap();
    assert!(
        length(child) * 3 < length(alone),
        "{} of {}",
        length(child),
        length(alone)
    );

    let file = File::open(pack(&store, child)).unwrap();
    let pack = Pack::open(&file).unwrap();
    assert_eq!(pack.parents()[0].id, *memory.as_bytes());
    let from_parent = |page: u32| matches!(pack.source_of(page), Some(Source::Parent { .. }));
    assert!((0..PAGES as u32).any(from_parent));
    let has_prefix = |coding| matches!(coding, Coding::ZstdWithPrefix(_));
    assert!(pack.frames().iter().any(|frame| has_prefix(frame.coding)));

    assert_eq!(read(&open(&store, child).unwrap()), alike(&content(1), 30));
    go_cold(&store);
    assert_eq!(read(&open(&store, child).unwrap()), alike(&content(1), 30));
    let both = [parent, child].map(|id| object(&store, id).to_string());
    assert_eq!(flats(&store), both.into());
}

#[test]
fn pages_that_are_needed_first_need_no_parent_unless_it_is_to_be_lean() {
    let (_dir, store) = store();
    let parent = enter(&store, 1);
    let memory = alike(&content(1), 3);
    let first = [3u32, 4, 14, 280];
    assert!(first.iter().any(|page| {
        let page = *page as usize * PAGE..(*page as usize + 1) * PAGE;
        memory[page.clone()] == content(1)[page.clone()] && memory[page].iter().any(|b| *b != 0)
    }));
    let entered = |name: &str, starts_alone, memory: &[u8]| {
        let basis = Basis::Of(parent);
        enter_as(
            &store,
            name,
            memory,
            Storage {
                basis,
                starts_alone,
            },
        )
        .unwrap()
    };
    let alone = File::open(pack(&store, entered("one", true, &memory))).unwrap();
    let opened = Pack::open(&alone).unwrap();
    let mut reader = FrameReader::new().unwrap();
    assert!(opened.working_set_frames() > 0);
    for frame in 0..opened.working_set_frames() {
        reader.read(&opened, &alone, frame, &[]).unwrap();
    }
    let is_own = |page: &u32| {
        matches!(
            opened.source_of(*page),
            Some(Source::Zero | Source::Literal(_))
        )
    };
    assert!(first.iter().all(is_own));

    let lean = File::open(pack(&store, entered("two", false, &alike(&content(1), 9)))).unwrap();
    let opened = Pack::open(&lean).unwrap();
    let from_parent = |page: &u32| matches!(opened.source_of(*page), Some(Source::Parent { .. }));
    assert!(first.iter().any(from_parent));
    assert!(lean.metadata().unwrap().len() < alone.metadata().unwrap().len());
}

#[test]
fn parent_is_the_newest_that_has_none_and_stays() {
    let (_dir, store) = store();
    let mut number = 0;
    let mut enter = |class: u32, baked_at, release: &str, basis| {
        number += 1;
        let staging = store.begin(0).unwrap();
        let write = |kind, bytes: &[u8]| {
            let file = staging.create(kind).unwrap();
            file.write_all_at(bytes, 0).unwrap();
        };
        write(Kind::Memory, &alike(&content(1), number));
        write(Kind::State, b"state");
        let mut about = description(&number.to_string());
        (about.class.slots, about.baked_at) = (class, baked_at);
        about.kernel.release = release.into();
        let storage = Storage {
            basis,
            ..Storage::default()
        };
        let id = staging.commit_as(about, storage)?;
        let of = parents(&store, id).first().map(|parent| parent.uvm);
        Ok::<_, Error>((id, of))
    };
    let (one, of) = enter(1, 1000, "6.12", Basis::Sibling).unwrap();
    assert_eq!(of, None, "it is the first");
    let (two, of) = enter(2, 1001, "6.12", Basis::Sibling).unwrap();
    assert_eq!(of, Some(one));
    let (other, of) = enter(3, 1002, "6.1", Basis::Sibling).unwrap();
    assert_eq!(of, None, "of another kernel");
    let (four, of) = enter(4, 1003, "6.12", Basis::None).unwrap();
    assert_eq!(of, None, "as was asked");
    let (_, of) = enter(5, 1004, "6.12", Basis::Sibling).unwrap();
    assert_eq!(
        of,
        Some(four),
        "newer than the first, and no child like the second"
    );
    let (_, of) = enter(4, 1005, "6.12", Basis::Sibling).unwrap();
    assert_eq!(
        of,
        Some(one),
        "the newest is the one whose place this one takes"
    );
    store.pin(four).unwrap();
    let (_, of) = enter(4, 1006, "6.12", Basis::Sibling).unwrap();
    assert_eq!(of, Some(four), "it stays, for it is pinned");
    let (_, of) = enter(6, 1007, "6.12", Basis::Of(other)).unwrap();
    assert_eq!(of, Some(other), "the one that was named");

    let error = enter(7, 1008, "6.12", Basis::Of(two)).unwrap_err();
    assert!(matches!(error, Error::NotAParent { id, .. } if id == two));
    assert!(error.to_string().contains(&one.short()), "{error}");
    assert!(store.check_parent(two).is_err() && store.check_parent(four).is_ok());
    let missing = enter(7, 1009, "6.12", Basis::Of(Digest::of_bytes(b"none")));
    assert!(matches!(missing, Err(Error::NotFound(_))));
}

#[test]
fn sibling_that_cannot_be_read_is_no_parent_and_stops_no_bake() {
    let (_dir, store) = store();
    let (good, damaged) = (enter(&store, 1), enter(&store, 2));
    go_cold(&store);
    let path = pack(&store, damaged);
    let middle = fs::metadata(&path).unwrap().len() / 2;
    writable(&path).write_all_at(&[0xff; 64], middle).unwrap();
    let child = sibling(&store, 5);
    assert_eq!(parents(&store, child)[0].uvm, good);
    writable(&pack(&store, good))
        .write_all_at(&[0xff; 64], 300)
        .unwrap();
    go_cold(&store);
    let alone = sibling(&store, 6);
    assert_eq!(parents(&store, alone), []);
    assert_eq!(read(&open(&store, alone).unwrap()), alike(&content(1), 6));
}

#[test]
fn parent_whose_rebuilt_file_has_changed_is_rebuilt_before_it_is_referred_to() {
    let (_dir, store) = store();
    let parent = enter(&store, 1);
    // A page of the child's own, which the parent does not have.
    let page = 5 * PAGE..6 * PAGE;
    let own = &alike(&content(1), 5)[page.clone()];
    assert!(!content(1).chunks(PAGE).any(|page| page == own));
    writable(&flat(&store, parent))
        .write_all_at(own, page.start as u64)
        .unwrap();
    let child = sibling(&store, 5);
    assert_eq!(parents(&store, child)[0].uvm, parent);
    go_cold(&store);
    assert_eq!(read(&open(&store, child).unwrap()), alike(&content(1), 5));
}

#[test]
fn many_that_open_a_cold_child_at_once_rebuild_it_and_its_parent_once() {
    let (_dir, store) = store();
    let (parent, child) = family(&store);
    go_cold(&store);
    let disk = FaultyDisk::new(0, false);
    let store = with_disk(&store, &disk);
    let start = std::sync::Barrier::new(16);
    let opened = |id: Digest| {
        start.wait();
        open(&store, id).unwrap().metadata().unwrap().ino()
    };
    let inodes: BTreeSet<u64> = std::thread::scope(|scope| {
        let ids = (0..16).map(|number| if number % 3 == 0 { parent } else { child });
        let threads: Vec<_> = ids.map(|id| scope.spawn(move || opened(id))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!((inodes.len(), rebuilds(&disk)), (2, 2));
}

#[test]
fn who_gives_up_waiting_for_a_parent_says_so_within_the_limit() {
    let (_dir, store) = store();
    let (parent, child) = family(&store);
    go_cold(&store);
    let leader = File::open(pack(&store, parent)).unwrap();
    lock::exclusive(&leader, REBUILD_WAIT).unwrap();
    let lease = store.lease(child).unwrap();
    let memory = lease.manifest().object(Kind::Memory).unwrap().memory();
    let allowed: Vec<_> = lease
        .manifest()
        .parents
        .iter()
        .map(Parent::memory)
        .collect();
    let soon = Instant::now() + Duration::from_millis(50);
    let error = store
        .content
        .open_packed_until(memory, &allowed, soon)
        .unwrap_err();
    assert!(soon.elapsed() < Duration::from_secs(5));
    let of = object(&store, parent);
    assert!(
        matches!(error, Error::Rebuilding { object, .. } if object == of),
        "{error:?}"
    );
    // The child's pack is free again.
    drop(leader);
    assert_eq!(
        read(&lease.open(Kind::Memory).unwrap()),
        alike(&content(1), 30)
    );
}

#[test]
fn parent_stays_flat_while_its_child_is_rebuilt_and_then_makes_way_as_any() {
    let (_dir, store) = store();
    let other = enter(&store, 2);
    let (parent, child) = family(&store);
    let bytes = |id: Digest| fs::metadata(flat(&store, id)).unwrap().blocks() * 512;
    let (of_parent, of_child) = (bytes(parent), bytes(child));
    go_cold(&store);
    open(&store, other).unwrap();
    // Room for the two, and what the file system needs to find their parts.
    store
        .set_flat_budget(Some(of_parent + of_child + 65536))
        .unwrap();
    open(&store, child).unwrap();
    let both: BTreeSet<_> = [parent, child]
        .map(|id| object(&store, id).to_string())
        .into();
    assert_eq!(flats(&store), both, "the other one made way");
    // Room for neither: the child is rebuilt all the same, and the parent is not removed for it.
    go_cold(&store);
    store.set_flat_budget(Some(1)).unwrap();
    assert_eq!(read(&open(&store, child).unwrap()), alike(&content(1), 30));
    assert_eq!(flats(&store), both);
    open(&store, other).unwrap();
    assert_eq!(flats(&store), [object(&store, other).to_string()].into());
}

#[test]
fn memory_that_the_store_has_already_gets_a_pack_without_parents() {
    let (_dir, store) = store();
    let (parent, child) = family(&store);
    let again = enter_as(&store, "again", &alike(&content(1), 30), Storage::default()).unwrap();
    assert_eq!(parents(&store, again), []);
    assert_eq!(object(&store, again), object(&store, child));
    // As good for the one that names a parent.
    go_cold(&store);
    assert_eq!(read(&open(&store, child).unwrap()), alike(&content(1), 30));
    assert_eq!(flats(&store), [object(&store, child).to_string()].into());
    assert!(store.verify(&[]).unwrap().damage.is_empty());
    // Nor when a kiln that is newer has it.
    let newer = child_of_newer_kiln(&store, parent);
    let again = enter_as(&store, "newer", &newer, Storage::default()).unwrap();
    assert_eq!(parents(&store, again), []);
    // A parent's own memory, whose pack is lost, has no parents either when it comes again.
    fs::remove_file(pack(&store, parent)).unwrap();
    enter(&store, 3);
    let mended = enter_as(&store, "mended", &content(1), Storage::default()).unwrap();
    assert_eq!(parents(&store, mended), []);
    go_cold(&store);
    assert_eq!(read(&open(&store, parent).unwrap()), content(1));
}

/// The memory of a child whose manifest this kiln does not read.
fn child_of_newer_kiln(store: &Store, parent: Digest) -> Vec<u8> {
    let newer = child(store, 17, Basis::Of(parent));
    let path = store.root().join("uvms").join(newer.to_string());
    let mut bytes = fs::read(&path).unwrap();
    bytes[8] += 1;
    fs::remove_file(&path).unwrap();
    let name = Digest::of_bytes(&bytes).to_string();
    fs::write(path.with_file_name(name), &bytes).unwrap();
    alike(&content(1), 17)
}

#[test]
fn memory_that_another_enters_meanwhile_is_packed_again_without_parents() {
    let (_dir, store) = store();
    let (one, two) = (enter(&store, 1), enter(&store, 2));
    let memory = alike(&content(1), 9);
    let of = |basis| Storage {
        basis,
        starts_alone: true,
    };
    // When the first is packed and not entered yet, another enters the same memory with another parent.
    let (quick, bytes) = (store.clone(), memory.clone());
    let mut entered = false;
    let disk = FaultyDisk::watched(move |name, path| {
        if name == "seal" && path.ends_with("memory.pack") && !std::mem::replace(&mut entered, true)
        {
            enter_as(&quick, "quick", &bytes, of(Basis::Of(two))).unwrap();
        }
    });
    let slow = enter_as(
        &with_disk(&store, &disk),
        "slow",
        &memory,
        of(Basis::Of(one)),
    )
    .unwrap();
    assert_eq!(parents(&store, slow), []);
    assert_eq!(store.list().unwrap().len(), 4);
    go_cold(&store);
    for entry in store.list().unwrap() {
        open(&store, entry.id).unwrap();
    }
    assert!(store.verify(&[]).unwrap().damage.is_empty());
}

#[test]
fn pack_that_does_not_give_back_its_memory_is_not_entered() {
    let (_dir, store) = store();
    enter(&store, 1);
    let before = store.content.objects().unwrap();
    let mut lengths = Vec::new();
    for at in [10u64, 130, 900, 4000] {
        let disk = FaultyDisk::watched(move |name, path| {
            if name == "seal" && path.ends_with("memory.pack") {
                let file = File::options().read(true).write(true).open(path).unwrap();
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[!byte[0]], at).unwrap();
            }
        });
        let entered = enter_as(
            &with_disk(&store, &disk),
            "x",
            &alike(&content(1), 9),
            Storage::default(),
        );
        let error = entered.unwrap_err();
        assert!(matches!(error, Error::BadPack { .. }), "{error:?}");
        lengths.push(store.content.objects().unwrap());
    }
    assert!(lengths.iter().all(|objects| *objects == before));
    assert_eq!(fs::read_dir(store.root().join("tmp")).unwrap().count(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    /// Whatever the memories are, each comes back from its pack, its parent's and nothing else.
    #[test]
    fn families_come_back_to_the_byte(
        changes in prop::collection::vec((0..PAGES, 0..PAGE, any::<u8>(), 0..4u8), 1..200),
        length in 1..=PAGES + 20,
        first in prop::collection::btree_set(0..PAGES as u32, 0..40),
        starts_alone: bool,
    ) {
        let (_dir, store) = store();
        let base = content(1);
        let parent = enter(&store, 1);
        let mut memory = base.clone();
        for (page, at, byte, kind) in changes {
            let bytes = &mut memory[page * PAGE..(page + 1) * PAGE];
            match kind {
                0 => bytes.fill(0),
                1 => bytes[at] = byte,
                2 => bytes.fill(byte),
                _ => bytes.copy_from_slice(&base[(page + at) % PAGES * PAGE..][..PAGE]),
            }
        }
        memory.resize(length * PAGE, 7);
        let staging = store.begin(0).unwrap();
        staging.create(Kind::Memory).unwrap().write_all_at(&memory, 0).unwrap();
        staging.create(Kind::State).unwrap().write_all_at(b"state", 0).unwrap();
        let set: WorkingSet = first.iter().filter(|p| (**p as usize) < length).map(|p| (*p, false)).collect();
        staging.create(Kind::WorkingSet).unwrap().write_all_at(&set.encode(), 0).unwrap();
        let mut about = description("child");
        about.class.slots = 99;
        let child = staging.commit_as(about, Storage { basis: Basis::Sibling, starts_alone }).unwrap();
        // Unless it is the parent's memory itself.
        prop_assert_eq!(parents(&store, child).len(), usize::from(memory != base));
        go_cold(&store);
        prop_assert!(read(&open(&store, child).unwrap()) == memory);
        prop_assert!(read(&open(&store, parent).unwrap()) == base);
        prop_assert!(store.verify(&[]).unwrap().damage.is_empty());
    }
}
