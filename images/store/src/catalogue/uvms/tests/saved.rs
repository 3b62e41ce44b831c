//! μVMs that were saved with a container in them.

use super::*;

fn save(store: &Store, name: &str, bake: Digest, baked_at: u64) -> Result<Digest, Error> {
    let staging = store.begin(0)?;
    for kind in [Kind::State, Kind::Memory, Kind::Scratch] {
        let file = staging.create(kind)?;
        file.write_all_at(format!("{name} {bake}").as_bytes(), 0)
            .unwrap();
    }
    let mut about = description(name);
    about.baked_at = baked_at;
    about.saved = Some(Saved {
        name: name.to_owned(),
        bake,
        disks: vec![SavedDisk {
            slot: 8,
            image: bake.to_string(),
            content: Digest::of_bytes(b"image"),
        }],
        container: "{}".to_owned(),
    });
    staging.commit(about)
}

/// Later than all that is baked here.
const LATER: u64 = 2_000_000_000;

#[test]
fn saved_one_is_found_by_its_name_and_never_picked() {
    let (_dir, store) = store();
    let bake = bake(&store, "one").unwrap();
    let saved = save(&store, "web", bake, LATER).unwrap();
    assert_eq!(store.resolve("web").unwrap(), saved);
    assert_eq!(store.resolve(&saved.short()).unwrap(), saved);
    let host = Host {
        cpu: description("x").cpu.features,
        protocol: description("x").protocol,
    };
    // By the index, and by reading all.
    for _ in 0..2 {
        let picked = store.pick(&host, &Wanted::default()).unwrap();
        assert_eq!(picked.unwrap(), bake);
        std::fs::remove_file(store.content.root.join("index")).unwrap();
    }
    store.remove(bake).unwrap();
    assert_eq!(
        store.pick(&host, &Wanted::default()).unwrap(),
        Err(Miss::Size)
    );
}

#[test]
fn name_is_taken_once_and_free_again_when_its_owner_is_gone() {
    let (_dir, store) = store();
    let bake = bake(&store, "one").unwrap();
    let first = save(&store, "web", bake, LATER).unwrap();
    let again = save(&store, "web", bake, LATER + 1).unwrap_err();
    assert!(
        matches!(&again, Error::NameTaken { name, id } if name == "web" && *id == first),
        "{again}"
    );
    assert!(again.to_string().contains("kiln rm web"), "{again}");
    assert!(store.check_name("web").is_err() && store.check_name("db").is_ok());
    store.remove(first).unwrap();
    save(&store, "web", bake, LATER + 1).unwrap();
    assert_clean(&store);
}

#[test]
fn collection_keeps_it_even_for_want_of_room_unless_all_goes() {
    let (_dir, store) = store();
    let bake = bake(&store, "one").unwrap();
    let older = save(&store, "older", bake, LATER).unwrap();
    let newer = save(&store, "newer", bake, LATER + 1).unwrap();
    let none = Policy {
        target: Some(0),
        ..Policy::default()
    };
    store.collect(none).unwrap();
    assert_eq!(ids(&store), BTreeSet::from([older, newer]));
    let all = Policy {
        all: true,
        ..Policy::default()
    };
    store.collect(all).unwrap();
    assert_eq!(ids(&store), BTreeSet::new());
}

#[test]
fn it_supersedes_no_bake_and_is_no_parent() {
    let (_dir, store) = store();
    let bake = bake(&store, "one").unwrap();
    let saved = save(&store, "web", bake, LATER).unwrap();
    store.collect(Policy::default()).unwrap();
    assert_eq!(ids(&store), BTreeSet::from([bake, saved]));
    let refused = store.check_parent(saved).unwrap_err();
    assert!(
        refused.to_string().contains("saved with a container"),
        "{refused}"
    );
}
