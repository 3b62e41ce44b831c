use std::os::unix::fs::FileExt;

use kiln_agent_api::PROTOCOL_VERSION;
use kiln_store::testing::description;
use kiln_store::{Collected, Entry, Holding, Kind, Storage, Usage, Why};
use kiln_uvm::cpu::{Fingerprint, WORDS};

use super::collect::collected_text;
use super::list::{Listed, ListedImage, list_row, list_text, listed};
use super::*;
use crate::output::size;

pub(crate) fn bake(store: &Store, name: &str) -> Digest {
    let staging = store.begin(0).unwrap();
    let memory = staging.create(Kind::Memory).unwrap();
    memory.write_all_at(name.as_bytes(), 1 << 20).unwrap();
    staging
        .create(Kind::State)
        .unwrap()
        .write_all_at(b"state", 0)
        .unwrap();
    let mut about = description(name);
    about.class.max_cpus = 8;
    about.class.max_memory_mib = 4096;
    about.class.slots = 4;
    about.baked_at = 1_763_726_399;
    about.protocol = PROTOCOL_VERSION;
    about.cpu.features = Fingerprint([7; WORDS]);
    staging.commit(about).unwrap()
}

fn quiet() -> Output {
    Output::new(true)
}

#[test]
fn row_of_the_list_tells_class_kernel_and_pin() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_or_create(dir.path().join("s")).unwrap();
    let id = bake(&store, "one");
    store.pin(id).unwrap();
    let holding = Holding {
        alone: 5 << 20,
        shared: 2 << 20,
    };
    let row = list_row(&store.entry(id).unwrap(), Some(holding));
    assert_eq!(row[0], id.short());
    assert_eq!(row[1], "2025-11-21 11:59");
    assert_eq!(
        row[2..6],
        ["1-8", "256-4096 MiB", "4", "6.12.95+deb12-cloud-amd64"]
    );
    assert_eq!(row[7..], ["5.0 MiB", "2.0 MiB", "pinned"]);
}

#[test]
fn json_of_a_uvm_is_flat_and_names_its_damage() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_or_create(dir.path().join("s")).unwrap();
    let id = bake(&store, "one");
    let entry = store.entry(id).unwrap();
    let json = serde_json::to_value(Listed::new(&entry, None)).unwrap();
    assert_eq!(json["id"], id.to_string());
    assert_eq!(json["class"]["memory_mib"], 256);
    assert_eq!(json["objects"][0]["kind"], "state");
    assert!(json.get("damage").is_none());
    let wrong = "ab".repeat(32);
    std::fs::write(store.root().join("uvms").join(&wrong), "junk").unwrap();
    let entry = store.entry(wrong.parse().unwrap()).unwrap();
    let json = serde_json::to_value(Listed::new(&entry, None)).unwrap();
    assert!(json["damage"].as_str().unwrap().contains("kiln rm"));
}

#[test]
fn misspelt_name_removes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_or_create(dir.path()).unwrap();
    let id = bake(&store, "one");
    let names = [id.to_string(), "ffff0000".to_owned()];
    assert!(remove(dir.path(), &names, &quiet()).is_err());
    assert_eq!(store.list().unwrap().len(), 1);
    remove(dir.path(), &names[..1], &quiet()).unwrap();
    assert!(store.list().unwrap().is_empty());
}

#[test]
fn damage_makes_verify_fail() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_or_create(dir.path()).unwrap();
    let id = bake(&store, "one");
    let code = |names: &[String]| verify(dir.path(), names, &quiet()).unwrap();
    assert_eq!(code(&[]), ExitCode::SUCCESS);
    let memory = store.lease(id).unwrap().path(Kind::Memory).unwrap();
    std::fs::remove_file(memory).unwrap();
    assert_eq!(code(&[id.short()]), ExitCode::from(1));
}

#[test]
fn text_of_a_collection_says_what_and_why() {
    let id = Digest::of_bytes(b"x");
    let what = Named { kind: "μVM", id };
    let report = Collected {
        removed: vec![kiln_store::Removed {
            what,
            why: Why::Superseded,
        }],
        in_use: vec![Named { kind: "image", id }],
        parents: vec![what],
        freed: 3 << 20,
        used: 1 << 20,
        ..Collected::default()
    };
    let mut usage = Usage {
        used: 1 << 20,
        flat: 0,
        budget: Some(1 << 30),
    };
    let text = collected_text(&report, false, &usage);
    assert!(text.contains(&format!("removed μVM {} (a newer one", id.short())));
    assert!(text.contains(&format!("kept image {} (in use)", id.short())));
    assert!(text.contains(&format!("kept μVM {} (others are stored", id.short())));
    assert!(text.ends_with("freed 3.0 MiB; the store takes 1.0 MiB of 1.0 GiB\n"));
    (usage.budget, usage.flat) = (None, 2 << 20);
    let text = collected_text(&report, true, &usage);
    assert!(text.contains("would free"));
    assert!(text.ends_with("takes 1.0 MiB, and 2.0 MiB of memory rebuilt from packs\n"));
}

#[test]
fn images_are_listed_inspected_verified_and_removed_beside_uvms() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_or_create(dir.path().join("s")).unwrap();
    let layer = dir.path().join("layer");
    std::fs::create_dir(&layer).unwrap();
    std::fs::write(layer.join("file"), "content").unwrap();
    let lowers = kiln_cache::Lowers::plain(layer);
    let key = lowers.key().unwrap();
    let image = kiln_cache::image_for(&store.images(), &key, &lowers).unwrap();
    let (uvm, id) = (bake(&store, "one"), key.digest());

    let text = list_text(&listed(&store).unwrap(), &store.images().entries().unwrap());
    assert!(
        text.contains(&uvm.short()) && text.contains(&id.short()),
        "{text}"
    );
    let json = serde_json::to_value(ListedImage::from(&store.images().entry(&key).unwrap()));
    let json = json.unwrap();
    assert_eq!(
        (&json["kind"], &json["id"]),
        (&"image".into(), &id.to_string().into())
    );

    let names = [id.short()];
    let root = store.root();
    assert_eq!(
        inspect(root, &names[0], &quiet()).unwrap(),
        ExitCode::SUCCESS
    );
    assert_eq!(verify(root, &names, &quiet()).unwrap(), ExitCode::SUCCESS);
    assert!(remove(root, &names, &quiet()).is_err(), "it is in use");
    drop(image);
    remove(root, &names, &quiet()).unwrap();
    assert!(store.images().entries().unwrap().is_empty());
    assert_eq!(store.list().unwrap().len(), 1);
}

/// Two μVMs of different sizes, the second of which is stored as what differs from the first.
fn family(store: &Store) -> (Digest, Digest) {
    let ids = [1u8, 2].map(|number| {
        let staging = store.begin(0).unwrap();
        let common = (0..300u32).flat_map(|page| {
            let words =
                (0..1024u32).map(move |word| (page * 7919 + word).wrapping_mul(0x9E37_79B9));
            words.flat_map(u32::to_le_bytes)
        });
        let memory: Vec<u8> = common.chain([number; 4096]).collect();
        for (kind, bytes) in [(Kind::Memory, memory.as_slice()), (Kind::State, b"state")] {
            let file = staging.create(kind).unwrap();
            file.write_all_at(bytes, 0).unwrap();
        }
        let mut about = description(&number.to_string());
        about.class.slots = u32::from(number);
        staging.commit_as(about, Storage::default()).unwrap()
    });
    (ids[0], ids[1])
}

#[test]
fn child_is_listed_with_its_parent_and_with_what_it_shares() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_or_create(dir.path().join("s")).unwrap();
    let (parent, child) = family(&store);
    let uvms = listed(&store).unwrap();
    let find = |id: Digest| uvms.iter().find(|(entry, _)| entry.id == id).unwrap();
    let row = |(entry, holding): &(Entry, Option<Holding>)| list_row(entry, *holding);
    let of_child = row(find(child));
    assert_eq!(of_child[9], format!("child of {}", parent.short()));
    assert_eq!(row(find(parent))[9], "");
    let holding = find(child).1.unwrap();
    assert!(0 < holding.alone && holding.alone < holding.shared);
    assert_eq!(of_child[7..9], [size(holding.alone), size(holding.shared)]);
    let json = serde_json::to_value(Listed::new(&find(child).0, Some(holding))).unwrap();
    assert_eq!(json["parents"][0]["uvm"], parent.to_string());
    assert_eq!(json["stored"]["alone"], holding.alone);
    assert_eq!(json["stored"]["shared"], holding.shared);
    for id in [parent, child] {
        inspect(store.root(), &id.to_string(), &quiet()).unwrap();
    }
}

#[test]
fn parent_is_removed_with_its_children_whatever_the_order_they_are_named_in() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_or_create(dir.path().join("s")).unwrap();
    let (parent, child) = family(&store);
    let refused = remove(store.root(), &[parent.to_string()], &quiet()).unwrap_err();
    assert_eq!(refused.code(), ExitCode::from(4));
    assert_eq!(store.list().unwrap().len(), 2);
    let names = [parent, child].map(|id| id.to_string());
    remove(store.root(), &names, &quiet()).unwrap();
    assert!(store.list().unwrap().is_empty());
}
