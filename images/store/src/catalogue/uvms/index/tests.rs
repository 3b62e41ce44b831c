use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::*;
use crate::testing::description;
use crate::{Description, Kind, Object, Store};

const NOW: Stamp = Stamp {
    inode: 7,
    seconds: -1,
    nanoseconds: 999_999_999,
};

fn host(protocol: u32) -> Host {
    Host {
        cpu: description("x").cpu.features,
        protocol,
    }
}

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_or_create(dir.path().join("store")).unwrap();
    (dir, store)
}

fn bake(store: &Store, name: &str, change: impl FnOnce(&mut Description)) -> Digest {
    let staging = store.begin(0).unwrap();
    for kind in [Kind::State, Kind::Memory] {
        let file = staging.create(kind).unwrap();
        file.write_all_at(name.as_bytes(), 0).unwrap();
    }
    let mut about = description(name);
    change(&mut about);
    staging.commit(about).unwrap()
}

fn said(store: &Store) -> Said {
    let host = host(description("x").protocol);
    store.uvms().ask_index(&host, &Wanted::default()).unwrap()
}

fn file_of(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

/// A μVM as the index sees it, the older the higher its number.
fn uvm(
    number: u32,
    protocol: u32,
    cpus: u32,
    memory_mib: u32,
    scratch: bool,
) -> (Digest, Manifest) {
    let mut about = description("x");
    about.protocol = protocol;
    about.class.memory_mib = 1;
    about.class.max_cpus = cpus;
    about.class.max_memory_mib = memory_mib;
    let object = Object {
        kind: Kind::Scratch,
        digest: about.recipe,
        length: 0,
        data: 0,
    };
    let objects = if scratch { vec![object] } else { vec![] };
    let id = Digest::of_bytes(&number.to_le_bytes());
    let parents = Vec::new();
    let manifest = Manifest {
        about,
        parents,
        objects,
    };
    (id, manifest)
}

fn index_of(uvms: &[(Digest, Manifest)]) -> Vec<u8> {
    encode(NOW, uvms.iter().map(|(id, manifest)| (*id, manifest)))
}

proptest! {
    #[test]
    fn index_names_what_reading_all_would_find(
        uvms in prop::collection::vec(
            (0u32..12, 1u32..9, 1u32..9, any::<bool>(), 1u32..4, 1u32..9, 0u32..3),
            0..120,
        ),
        asked in prop::collection::vec((0u32..41, 0u32..10, prop::option::of(0u64..10), any::<bool>()), 1..20),
    ) {
        let uvms: Vec<_> = (0u32..)
            .zip(uvms)
            .map(|(i, (protocol, cpus, memory, scratch, first_cpus, first, kernel))| {
                let (id, mut manifest) = uvm(i, protocol, cpus, memory, scratch);
                manifest.about.class.cpus = first_cpus;
                manifest.about.class.memory_mib = first;
                manifest.about.kernel.release = kernel.to_string();
                (id, manifest)
            })
            .collect();
        let file = file_of(&index_of(&uvms));
        for (protocol, cpus, memory, scratch) in asked {
            let wanted = Wanted { cpus, memory: memory.map(|mib| mib << 20), scratch };
            let host = host(protocol);
            let here = || uvms.iter().filter(|(_, m)| m.resumes_here(&host).is_ok());
            // Kernels, that of the newest μVM first.
            let mut kernels = Vec::new();
            for (_, m) in here() {
                if !kernels.contains(&&m.about.kernel) {
                    kernels.push(&m.about.kernel);
                }
            }
            let best = kernels.into_iter().find_map(|kernel| {
                let fitting = here().filter(|(_, m)| m.about.kernel == *kernel && wanted.fits(m));
                fitting.min_by_key(|(_, m)| {
                    let class = &m.about.class;
                    let mib = memory.map(|wanted| {
                        let first = u64::from(class.memory_mib);
                        (first > wanted, first.abs_diff(wanted))
                    });
                    (mib, class.cpus > cpus, class.cpus.abs_diff(cpus))
                })
            });
            let picked = best.map(|(id, _)| *id);
            prop_assert_eq!(ask(&file, NOW, &host, &wanted).unwrap(), picked);
        }
    }
}

#[test]
fn index_with_a_flipped_bit_names_nothing_else() {
    let uvms: Vec<_> = (0..6)
        .map(|i| uvm(i, i % 3, 1 + i, 8 - i, i % 2 == 0))
        .collect();
    let good = index_of(&uvms);
    let answers = |bytes: &[u8]| {
        let file = file_of(bytes);
        (0..4).map(move |protocol| ask(&file, NOW, &host(protocol), &Wanted::default()).ok())
    };
    let right: Vec<_> = answers(&good).collect();
    for bit in 0..good.len() * 8 {
        let mut flipped = good.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        for (now, right) in answers(&flipped).zip(&right) {
            // No answer, or "none", has all manifests read.
            assert!(now.flatten().is_none() || now == *right, "bit {bit}");
        }
    }
    for length in 0..good.len() {
        for now in answers(&good[..length]) {
            assert!(
                now.flatten().is_none() || right.contains(&now),
                "cut to {length}"
            );
        }
    }
}

/// What the format is. See docs/store.md before changing it.
#[test]
fn disk_form_is_pinned() {
    let uvms = [
        uvm(0, 1, 2, 512, true),
        uvm(1, 1, 4, 256, false),
        uvm(2, 2, 1, 1, true),
    ];
    let digest = Digest::of_bytes(&index_of(&uvms));
    assert_eq!(digest.to_string(), PINNED);
}
const PINNED: &str = "9bacec1137e89a138854ee0368510acfec5037a79b1d55d63135e5da5daf4d03";

#[test]
fn ten_thousand_kinds_take_as_many_reads_and_hardly_more_bytes_than_one() {
    // They differ in the class, and every tenth in what it resumes on.
    let many: Vec<_> = (0..10_000)
        .map(|i| uvm(i, i / 10, 1 + i % 64, 256 * (1 + i % 7), true))
        .collect();
    let one = index_of(&many[..1]);
    let all = index_of(&many);
    let group = |bytes: &[u8]| {
        let slots = word(bytes, 8);
        let key = key_of(&host(0));
        let table = bytes[HEADER..].as_chunks::<SLOT>().0;
        let from = slot_of(&key, slots) as usize;
        let at = table[from..].iter().position(|slot| slot[..32] == key);
        (at.unwrap(), word(&table[from + at.unwrap()], 40))
    };
    let ((_, records_of_one), (displaced, records)) = (group(&one), group(&all));
    assert_eq!(records_of_one, 1);
    assert!(displaced < PROBE && records <= 10, "{displaced} {records}");
}

#[test]
fn every_change_of_the_store_is_in_the_index_at_once() {
    let (_dir, store) = store();
    assert_eq!(said(&store), Said::Nothing);
    let old = bake(&store, "old", |about| about.class.slots = 1);
    assert_eq!(said(&store), Said::This(old));
    let new = bake(&store, "new", |about| about.baked_at += 1);
    assert_eq!(said(&store), Said::This(new));
    store.pin(old).unwrap();
    assert_eq!(said(&store), Said::This(new));
    store.remove(new).unwrap();
    assert_eq!(said(&store), Said::This(old));
    store.unpin(old).unwrap();
    let all = crate::Policy {
        all: true,
        ..Default::default()
    };
    store.collect(all).unwrap();
    assert_eq!(said(&store), Said::None);
}

#[test]
fn index_is_not_believed_after_a_change_by_hand_and_is_mended_by_who_picks() {
    let (_dir, store) = store();
    let old = bake(&store, "old", |_| {});
    let new = bake(&store, "new", |about| about.baked_at += 1);
    // Not within the tick of the clock that the directory's time has.
    std::thread::sleep(std::time::Duration::from_millis(20));
    fs::remove_file(store.uvms().path(&new)).unwrap();
    assert_eq!(said(&store), Said::Nothing);
    let host = host(description("x").protocol);
    let pick = || store.pick(&host, &Wanted::default()).unwrap();
    assert_eq!(pick(), Ok(old));
    assert_eq!(said(&store), Said::This(old));

    // A writer at work is waited for by nobody, and its index is its own.
    fs::remove_file(store.root().join("index")).unwrap();
    let lock = store
        .content
        .write_lock(crate::content::WRITER_WAIT)
        .unwrap();
    assert_eq!(pick(), Ok(old));
    assert_eq!(said(&store), Said::Nothing);
    drop(lock);
    assert_eq!(pick(), Ok(old));
    assert_eq!(said(&store), Said::This(old));
}

#[test]
fn what_the_index_names_is_looked_at_before_it_is_picked() {
    let (_dir, store) = store();
    let old = bake(&store, "old", |_| {});
    let new = bake(&store, "new", |about| about.baked_at += 1);
    let memory = store.lease(new).unwrap().path(Kind::Memory).unwrap();
    fs::remove_file(memory).unwrap();
    assert_eq!(said(&store), Said::This(new));
    let host = host(description("x").protocol);
    assert_eq!(store.pick(&host, &Wanted::default()).unwrap(), Ok(old));
}
