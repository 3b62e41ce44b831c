//! A full disk, and a death, at every step.

use super::parents::{alike, family};
use super::*;

/// Every change to the disk fails once while a cold memory is opened: one without a parent, and then a child, whose parent
/// is cold as well.
fn with_every_fault(fatal: bool) {
    with_every_fault_of(fatal, 5, &content(1), |store| vec![enter(store, 1)]);
    with_every_fault_of(fatal, 10, &alike(&content(1), 30), |store| {
        let (parent, child) = family(store);
        vec![child, parent]
    });
}

/// `enter` gives the memory that is opened, and what is rebuilt for it.
fn with_every_fault_of(
    fatal: bool,
    least: u32,
    memory: &[u8],
    enter: impl Fn(&Store) -> Vec<Digest>,
) {
    let mut full = 0;
    for fail_at in 1.. {
        let (_dir, store) = store();
        let ids = enter(&store);
        let objects: Vec<Digest> = ids.iter().map(|id| object(&store, *id)).collect();
        go_cold(&store);
        let disk = FaultyDisk::new(fail_at, fatal);
        let opened = open(&with_disk(&store, &disk), ids[0]);
        if !disk.struck.load(Ordering::Relaxed) {
            opened.unwrap();
            break;
        }
        match opened {
            Ok(file) => assert_eq!(read(&file), memory),
            Err(Error::NoRoomToRebuild { object, .. }) => {
                assert!(objects.contains(&object));
                full += 1;
            }
            Err(error) => panic!("fault {fail_at}: {error:?}"),
        }
        let left = flats(&store);
        let whole = objects.iter().map(Digest::to_string).collect();
        assert!(fatal || left.is_subset(&whole), "{left:?}");
        assert_eq!(read(&open(&store, ids[0]).unwrap()), memory);
        assert_eq!(flats(&store), whole, "fault {fail_at}");
        assert!(store.verify(&[]).unwrap().damage.is_empty());
    }
    assert!(full >= least, "only {full} faults were injected");
}

#[test]
fn full_disk_at_any_step_of_a_rebuild_is_an_error_that_says_so_and_leaves_nothing() {
    with_every_fault(false);
}

#[test]
fn death_at_any_step_of_a_rebuild_does_not_stop_the_next_one() {
    with_every_fault(true);
}
