use std::fs;
use std::os::unix::fs::FileExt;

use super::*;
use crate::testing::description;
use crate::{Description, Kind, Policy, Why};

const PROTOCOL: u32 = 4;

fn host() -> Host {
    Host {
        cpu: description("x").cpu.features,
        protocol: PROTOCOL,
    }
}

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_or_create(dir.path().join("store")).unwrap();
    (dir, store)
}

/// Enters a μVM that resumes on [`host`], but for what `change` does to it.
fn bake(store: &Store, name: &str, change: impl FnOnce(&mut Description)) -> Digest {
    let staging = store.begin(0).unwrap();
    for kind in [Kind::State, Kind::Memory] {
        let file = staging.create(kind).unwrap();
        file.write_all_at(name.as_bytes(), 0).unwrap();
    }
    let mut about = description(name);
    about.protocol = PROTOCOL;
    change(&mut about);
    staging.commit(about).unwrap()
}

/// A manifest as another version of kiln left it.
fn foreign(store: &Store, version: u8) -> Digest {
    let id = bake(store, "foreign", |about| about.baked_at += 1000);
    let mut bytes = fs::read(store.uvms().path(&id)).unwrap();
    store.remove(id).unwrap();
    bytes[8] = version;
    let id = Digest::of_bytes(&bytes);
    fs::write(store.uvms().path(&id), bytes).unwrap();
    id
}

fn pick(store: &Store) -> Result<Digest, Miss> {
    let wanted = Wanted {
        cpus: 16,
        ..Wanted::default()
    };
    store.pick(&host(), &wanted).unwrap()
}

#[test]
fn size_fits_a_class_that_can_grow_to_it() {
    let fits = |cpus, memory| {
        let wanted = Wanted {
            cpus,
            memory,
            scratch: false,
        };
        let most = Extent {
            cpus: 4,
            memory_mib: 1024,
        };
        wanted.are_met_by(&Traits {
            first: most,
            most,
            scratch: false,
            edition: 0,
        })
    };
    assert!(fits(4, Some(1024 << 20)) && fits(1, None));
    assert!(!fits(5, None) && !fits(1, Some((1024 << 20) + 1)));
}

#[test]
fn newer_ones_that_do_not_fit_never_hide_an_older_one_that_does() {
    let (_dir, store) = store();
    let good = bake(&store, "good", |_| {});
    bake(&store, "foreign CPU", |about| {
        about.baked_at += 10;
        about.cpu.features.0[9] ^= 1 << 16;
    });
    bake(&store, "old protocol", |about| {
        about.baked_at += 20;
        about.protocol = 3;
    });
    bake(&store, "too small", |about| {
        about.baked_at += 30;
        about.class.max_cpus = 1;
    });
    foreign(&store, 1);
    foreign(&store, 9);
    assert_eq!(pick(&store), Ok(good));
}

#[test]
fn one_that_begins_nearest_is_picked_of_the_newest_kernel() {
    let (_dir, store) = store();
    let sized = |name: &str, age: u64, mib: u32, kernel: &str| {
        bake(&store, name, |about| {
            about.baked_at -= age;
            about.class.memory_mib = mib;
            about.kernel.release = kernel.to_owned();
        })
    };
    let default = sized("default", 1, 320, "new");
    let large = sized("large", 0, 2048, "new");
    sized("just right", 9, 1024, "old");
    let pick = |mib: u64| {
        let wanted = Wanted {
            memory: Some(mib << 20),
            ..Wanted::default()
        };
        store.pick(&host(), &wanted).unwrap().unwrap()
    };
    assert_eq!(pick(320), default);
    assert_eq!(pick(128), default, "the smallest, if none is small enough");
    assert_eq!(pick(1024), default, "which can grow, and no older kernel");
    assert_eq!(pick(2048), large);
    assert_eq!(pick(4096), large);
    let again = sized("default again", 0, 320, "new");
    assert_eq!(pick(320), again);
}

#[test]
fn who_misses_by_its_cpu_is_named_with_the_register() {
    let (_dir, store) = store();
    let id = bake(&store, "foreign CPU", |about| {
        about.cpu.features.0[9] ^= 1 << 16;
    });
    let miss = pick(&store).unwrap_err().to_string();
    assert!(miss.contains(&id.short()), "{miss}");
    assert!(miss.contains("another CPU (cpuid leaf 0x7.0 ebx"), "{miss}");
}

#[test]
fn who_misses_by_its_protocol_is_named_with_both() {
    let (_dir, store) = store();
    bake(&store, "old protocol", |about| about.protocol = 3);
    foreign(&store, 1);
    let miss = pick(&store).unwrap_err().to_string();
    assert!(
        miss.contains("its agent speaks protocol 3, this kiln speaks 4"),
        "{miss}"
    );
}

#[test]
fn size_and_older_kilns_are_told_apart() {
    let (_dir, store) = store();
    bake(&store, "too small", |about| about.class.max_cpus = 1);
    assert_eq!(pick(&store), Err(Miss::Size));
    foreign(&store, 9);
    assert_eq!(pick(&store), Err(Miss::Size));
    let older = foreign(&store, 1);
    assert_eq!(pick(&store), Err(Miss::Older(older)));
}

#[test]
fn uvm_with_a_missing_object_is_not_picked() {
    let (_dir, store) = store();
    let id = bake(&store, "good", |_| {});
    let memory = store.lease(id).unwrap().path(Kind::Memory).unwrap();
    fs::remove_file(memory).unwrap();
    assert_eq!(pick(&store), Err(Miss::Size));
}

#[test]
fn older_kilns_uvms_are_no_damage_and_go_with_the_next_collection() {
    let (_dir, store) = store();
    let good = bake(&store, "good", |_| {});
    let older = foreign(&store, 1);
    let listed = store.entry(older).unwrap().manifest.unwrap_err();
    assert!(listed.to_string().contains("by an older kiln"), "{listed}");
    assert!(store.verify(&[]).unwrap().damage.is_empty());
    let report = store.collect(Policy::default()).unwrap();
    let removed: Vec<_> = report.removed.iter().map(|r| (r.what.id, r.why)).collect();
    assert_eq!(removed, [(older, Why::Older)]);
    assert_eq!(report.damaged, []);
    assert_eq!(pick(&store), Ok(good));
}

#[test]
fn pinned_uvm_of_an_older_kiln_stays() {
    let (_dir, store) = store();
    let older = foreign(&store, 1);
    store.pin(older).unwrap();
    let report = store.collect(Policy::default()).unwrap();
    assert_eq!(report.damaged[0].id, older);
    assert_eq!((report.removed, report.damaged.len()), (vec![], 1));
}
