//! Parents and children in removal, collection, the budget, lists and verification.

use super::parents::{alike, child, family, parents, sibling};
use super::*;
use crate::{Holding, Named, Why};

fn uvm(id: Digest) -> Named {
    Named { kind: "μVM", id }
}

fn all() -> Policy {
    Policy {
        all: true,
        ..Policy::default()
    }
}

fn removed(report: &crate::Collected) -> Vec<(Digest, Why)> {
    report.removed.iter().map(|r| (r.what.id, r.why)).collect()
}

fn used_at(store: &Store, id: Digest, seconds: u64) {
    let path = store.root().join("uvms").join(id.to_string());
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    let file = File::open(path).unwrap();
    file.set_times(FileTimes::new().set_modified(time)).unwrap();
}

fn on_disk(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn parent_is_not_removed_before_its_children_and_the_refusal_names_one() {
    let (_dir, store) = store();
    let (parent, one) = family(&store);
    let two = child(&store, 31, Basis::Of(parent));
    let error = store.remove(parent).unwrap_err();
    let text = error.to_string();
    let Error::HasChildren { id, child, count } = error else {
        panic!("{error:?}");
    };
    assert_eq!((id, count), (parent, 2));
    assert!([one, two].contains(&child) && text.contains(&child.short()));
    let children: BTreeSet<Digest> = store.children(parent).unwrap().into_iter().collect();
    assert_eq!(children, [one, two].into());
    store.remove(one).unwrap();
    assert!(store.remove(parent).is_err());
    store.remove(two).unwrap();
    store.remove(parent).unwrap();
    assert!(store.content.objects().unwrap().is_empty());
}

#[test]
fn lease_on_a_child_is_a_lease_on_its_parent() {
    let (_dir, store) = store();
    let (parent, child) = family(&store);
    let lease = store.lease(child).unwrap();
    let is_free = |id: Digest| {
        let path = store.root().join("uvms").join(id.to_string());
        lock::try_exclusive(&File::open(path).unwrap()).unwrap()
    };
    assert!(!is_free(child) && !is_free(parent));
    let report = store.collect(all()).unwrap();
    assert_eq!(report.in_use, [uvm(child)]);
    assert_eq!(
        (report.parents, report.removed),
        (vec![uvm(parent)], vec![])
    );
    drop(lease);
    assert!(is_free(child) && is_free(parent));
}

#[test]
fn child_and_parent_are_leased_and_removed_at_once_without_a_deadlock() {
    let (_dir, store) = store();
    let (parent, child) = family(&store);
    let deadline = Instant::now() + Duration::from_secs(20);
    std::thread::scope(|scope| {
        for id in [child, parent, child] {
            let store = &store;
            scope.spawn(move || {
                for _ in 0..150 {
                    let lease = store.lease(id).unwrap();
                    drop(lease);
                }
            });
        }
        let dry = Policy {
            dry_run: true,
            ..all()
        };
        for _ in 0..40 {
            store.collect(dry).unwrap();
            assert!(store.remove(parent).is_err());
        }
    });
    assert!(Instant::now() < deadline);
    assert_eq!(store.collect(all()).unwrap().removed.len(), 2);
}

#[test]
fn superseded_parent_stays_with_its_children_and_goes_with_the_last_one() {
    let (_dir, store) = store();
    let (parent, kid) = family(&store);
    // Of the parent's class, and newer.
    let enter_newer = |name: &str, seed| {
        let staging = store.begin(0).unwrap();
        let write = |kind, bytes: &[u8]| {
            let file = staging.create(kind).unwrap();
            file.write_all_at(bytes, 0).unwrap();
        };
        write(Kind::Memory, &content(seed));
        write(Kind::State, b"state");
        let mut about = description(name);
        about.class = store.entry(parent).unwrap().manifest.unwrap().about.class;
        about.baked_at += u64::from(seed);
        staging.commit_as(about, ALONE).unwrap()
    };
    let newer = enter_newer("newer", 3);
    let dry = Policy {
        dry_run: true,
        ..Policy::default()
    };
    for policy in [dry, Policy::default()] {
        let report = store.collect(policy).unwrap();
        assert_eq!(
            (removed(&report), &report.parents),
            (vec![], &vec![uvm(parent)])
        );
    }
    go_cold(&store);
    assert_eq!(read(&open(&store, kid).unwrap()), alike(&content(1), 30));
    store.remove(kid).unwrap();
    let report = store.collect(Policy::default()).unwrap();
    assert_eq!(removed(&report), [(parent, Why::Superseded)]);
    assert_eq!(report.parents, []);
    assert_eq!(store.list().unwrap()[0].id, newer);
}

#[test]
fn all_go_children_first_and_a_pinned_child_keeps_its_parent() {
    let (_dir, store) = store();
    let (parent, pinned) = family(&store);
    let other = child(&store, 31, Basis::Of(parent));
    store.pin(pinned).unwrap();
    let report = store.collect(all()).unwrap();
    assert_eq!(removed(&report), [(other, Why::All)]);
    assert_eq!(report.parents, [uvm(parent)]);
    store.unpin(pinned).unwrap();
    // The parent is the one that was used longest ago.
    used_at(&store, parent, 1000);
    let dry = store
        .collect(Policy {
            dry_run: true,
            ..all()
        })
        .unwrap();
    let report = store.collect(all()).unwrap();
    assert_eq!(removed(&report), [(pinned, Why::All), (parent, Why::All)]);
    assert_eq!((dry.removed, dry.used), (report.removed, report.used));
}

#[test]
fn room_is_made_by_children_before_their_parent_and_by_no_more_than_it_takes() {
    let (_dir, store) = store();
    let other = enter(&store, 2);
    let (parent, one) = family(&store);
    let two = child(&store, 31, Basis::Of(parent));
    for (id, seconds) in [(parent, 1000), (one, 2000), (other, 3000), (two, 4000)] {
        used_at(&store, id, seconds);
    }
    let manifest = on_disk(&store.root().join("uvms").join(one.to_string()));
    let own = store.holdings(&store.list().unwrap()).unwrap()[&one].alone + manifest;
    let used = store.usage().unwrap().used;
    let target = |bytes| Policy {
        target: Some(bytes),
        keep_superseded: true,
        ..Policy::default()
    };
    let dry = |policy| Policy {
        dry_run: true,
        ..policy
    };
    // The oldest is the parent, which has to wait for both; the first child is enough.
    let policy = target(used - own);
    let foretold = store.collect(dry(policy)).unwrap();
    assert_eq!(removed(&foretold), [(one, Why::Room)]);
    assert_eq!(foretold.used, used - own);
    assert_eq!(foretold.parents, []);
    let report = store.collect(policy).unwrap();
    assert_eq!(report.removed, foretold.removed);
    assert_eq!(report.used, used - own);
    assert_eq!(report.used, store.usage().unwrap().used);
    // The last child is enough: its parent stays, although it is the oldest.
    let order = |report: &crate::Collected| -> Vec<Digest> {
        report.removed.iter().map(|r| r.what.id).collect()
    };
    let holdings = store.holdings(&store.list().unwrap()).unwrap();
    let both = holdings[&other].alone + holdings[&two].alone + 2 * manifest;
    let foretold = store.collect(dry(target(report.used - both))).unwrap();
    assert_eq!(order(&foretold), [other, two]);
    assert_eq!(foretold.parents, []);
    // Everything: the parent right after its last child.
    let report = store.collect(target(0)).unwrap();
    assert_eq!(order(&report), [other, two, parent]);
    assert!(store.content.objects().unwrap().is_empty());
}

#[test]
fn list_tells_what_each_holds_alone_and_what_it_shares() {
    let (_dir, store) = store();
    let (parent, child) = family(&store);
    let other = enter(&store, 2);
    let holdings = store.holdings(&store.list().unwrap()).unwrap();
    let packs = [parent, child, other].map(|id| on_disk(&pack(&store, id)));
    let state = {
        let path = store.lease(other).unwrap().path(Kind::State).unwrap();
        on_disk(&path) * 2 // and the working set, which is as small
    };
    let holding = |alone, shared| Holding { alone, shared };
    assert_eq!(holdings[&parent], holding(0, packs[0] + state));
    assert_eq!(holdings[&child], holding(packs[1], packs[0] + state));
    assert_eq!(holdings[&other], holding(packs[2], state));
    // What it holds alone is what its removal gives back, but for its manifest.
    let manifest = on_disk(&store.root().join("uvms").join(child.to_string()));
    let before = store.usage().unwrap().used;
    store.remove(child).unwrap();
    assert_eq!(before - store.usage().unwrap().used, packs[1] + manifest);
}

#[test]
fn budget_counts_children_by_their_packs() {
    let (_dir, store) = store();
    let parent = enter(&store, 1);
    let used = store.usage().unwrap().used;
    let alone = on_disk(&pack(&store, parent));
    store.set_budget(Some(used + alone / 2 + 16384)).unwrap();
    let error = enter_bytes(&store, "alone", &alike(&content(1), 4)).unwrap_err();
    assert!(matches!(error, Error::OverBudget { .. }), "{error:?}");
    let kid = sibling(&store, 4);
    assert_eq!(parents(&store, kid)[0].uvm, parent);
}

#[test]
fn parent_that_is_gone_is_told_by_name() {
    let (_dir, store) = store();
    let (parent, child) = family(&store);
    let manifest = store.root().join("uvms").join(parent.to_string());
    fs::rename(&manifest, store.root().join("away")).unwrap();
    let error = store.lease(child).unwrap_err();
    assert!(matches!(error, Error::NoParent { id, parent: of } if (id, of) == (child, parent)));
    assert!(error.to_string().contains(&parent.short()), "{error}");
    assert_eq!(store.find(|_| true).unwrap(), None, "it is not picked");
    let damage = store.verify(&[]).unwrap().damage;
    let named = |damage: &Damage| matches!(damage, Damage::Parent { of, parent: gone } if (of.id, *gone) == (child, parent));
    assert!(damage.len() == 1 && named(&damage[0]), "{damage:?}");
    fs::rename(store.root().join("away"), &manifest).unwrap();

    // Its manifest is there, and its memory is not.
    fs::remove_file(pack(&store, parent)).unwrap();
    go_cold(&store);
    let (memory, lost) = (object(&store, child), object(&store, parent));
    let error = open(&store, child).unwrap_err();
    let names =
        matches!(error, Error::Parent { object, parent, .. } if (object, parent) == (memory, lost));
    assert!(names, "{error:?}");
    assert_eq!(store.find(|_| true).unwrap(), None);
    let damage = store.verify(&[]).unwrap().damage;
    let missing: BTreeSet<_> = damage
        .iter()
        .map(|damage| match damage {
            Damage::Missing { of, part, object } if *object == lost => (of.id, *part),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(
        missing,
        [(child, "parent's memory"), (parent, "memory")].into()
    );
    // As it lies in the store unpacked, it is as good.
    let plain = store.content.object_path(&lost);
    fs::create_dir_all(plain.parent().unwrap()).unwrap();
    fs::write(&plain, content(1)).unwrap();
    assert_eq!(read(&open(&store, child).unwrap()), alike(&content(1), 30));
    assert!(store.verify(&[]).unwrap().damage.is_empty());
}

#[test]
fn any_damage_of_a_parent_or_a_child_is_found_by_name() {
    let (_dir, store) = store();
    let (parent, child) = family(&store);
    let mut state = 4711u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
        (state >> 33) as usize % below
    };
    for round in 0..60 {
        let id = [parent, child][round % 2];
        let path = pack(&store, id);
        let good = fs::read(&path).unwrap();
        let mut bytes = good.clone();
        match round % 3 {
            0 => bytes.truncate(random(good.len())),
            _ => bytes[random(good.len())] ^= 1 << random(8),
        }
        let file = writable(&path);
        file.set_len(0).unwrap();
        file.write_all_at(&bytes, 0).unwrap();
        go_cold(&store);
        let (error, of) = (open(&store, child).unwrap_err(), object(&store, parent));
        match &error {
            Error::Pack { object: named, .. } if id == child => {
                assert_eq!(*named, object(&store, child));
            }
            Error::Parent { parent: named, .. } if id == parent => assert_eq!(*named, of),
            other => panic!("round {round}: {other:?}"),
        }
        assert!(error.to_string().contains("kiln verify"), "{error}");
        let good_parent = (id == child).then(|| of.to_string());
        assert!(
            flats(&store)
                .iter()
                .all(|name| Some(name) == good_parent.as_ref())
        );
        let damage = store.verify(&[child]).unwrap().damage;
        let [
            Damage::Pack {
                of,
                part,
                object: named,
                ..
            },
        ] = &damage[..]
        else {
            panic!("round {round}: {damage:?}");
        };
        let wanted = match id == child {
            true => (child, "memory", object(&store, child)),
            false => (child, "parent's memory", object(&store, parent)),
        };
        assert_eq!((of.id, *part, *named), wanted);
        file.set_len(0).unwrap();
        file.write_all_at(&good, 0).unwrap();
    }
    assert!(store.verify(&[]).unwrap().damage.is_empty());
    go_cold(&store);
    assert_eq!(read(&open(&store, child).unwrap()), alike(&content(1), 30));
}

#[test]
fn changed_file_of_a_parent_gives_no_wrong_page_and_is_rebuilt_by_the_next_one() {
    let (_dir, store) = store();
    let (parent, child) = family(&store);
    for at in [0, 5, 70, 150] {
        go_cold(&store);
        open(&store, parent).unwrap();
        // All pages of some frames' windows, and pages that are referred to.
        let changed = writable(&flat(&store, parent));
        changed
            .write_all_at(&[0x77; 40 * PAGE], at * PAGE as u64)
            .unwrap();
        let error = open(&store, child).unwrap_err();
        let names = matches!(error, Error::ChangedParent { object: named, parent: of }
            if named == object(&store, child) && of == object(&store, parent));
        assert!(names, "{error:?}");
        assert!(flats(&store).is_empty(), "the changed file is gone");
        assert_eq!(read(&open(&store, child).unwrap()), alike(&content(1), 30));
    }
    // `verify` is not misled by it either.
    let changed = writable(&flat(&store, parent));
    changed.write_all_at(&[0x77; PAGE], 0).unwrap();
    let damage = store.verify(&[]).unwrap().damage;
    assert!(matches!(damage[..], [Damage::Flat { .. }]), "{damage:?}");
    assert!(store.verify(&[]).unwrap().damage.is_empty());
}

#[test]
fn pack_with_another_parent_than_its_manifest_names_is_refused() {
    let (_dir, store) = store();
    let (parent, kid) = family(&store);
    let other = enter(&store, 2);
    let of_other = child(&store, 31, Basis::Of(other));
    // A good pack, of a child of another parent.
    fs::rename(pack(&store, of_other), pack(&store, kid)).unwrap();
    go_cold(&store);
    let error = open(&store, kid).unwrap_err();
    let (memory, foreign) = (object(&store, kid), object(&store, other));
    let names = matches!(error, Error::OtherParent { object, parent } if (object, parent) == (memory, foreign));
    assert!(names, "{error:?}");
    assert!(error.to_string().contains(&foreign.short()));
    let damage = store.verify(&[kid]).unwrap().damage;
    let [
        damage @ Damage::Unreadable {
            of, part: "memory", ..
        },
    ] = &damage[..]
    else {
        panic!("{damage:?}");
    };
    let cause = std::error::Error::source(damage).unwrap().to_string();
    assert!(of.id == kid && cause.contains(&foreign.short()), "{cause}");
    assert_eq!(parents(&store, kid)[0].uvm, parent);
}
