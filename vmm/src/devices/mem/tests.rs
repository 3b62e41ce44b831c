//! The device against a driver and a region that remembers what was done to it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::*;
use crate::devices::testing::{BUFFERS_BASE, Bench};
use crate::memory::HotplugRegion;
use crate::virtio::{DeviceError, VirtioDevice};

const BASE: u64 = 0x1_0000_0000;
const BLOCK: u64 = 2 << 20;
const MIB: u64 = 1 << 20;
const REGION: u64 = 1024 * MIB;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

#[derive(Debug, Default)]
struct Region {
    usable: Mutex<Vec<u64>>,
    discarded: Mutex<Vec<(u64, u64)>>,
    fails: AtomicBool,
}

impl Region {
    fn check(&self) -> io::Result<()> {
        if self.fails.load(Ordering::SeqCst) {
            Err(io::ErrorKind::Other.into())
        } else {
            Ok(())
        }
    }
}

impl HotplugRegion for Region {
    fn base(&self) -> u64 {
        BASE
    }
    fn len(&self) -> u64 {
        REGION
    }
    fn block_size(&self) -> u64 {
        BLOCK
    }
    fn set_usable(&self, bytes: u64) -> io::Result<()> {
        self.check()?;
        self.usable.lock().unwrap().push(bytes);
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check()?;
        self.discarded.lock().unwrap().push((offset, len));
        Ok(())
    }
}

fn device() -> (Bench<Mem>, Arc<Region>) {
    let region = Arc::new(Region::default());
    (Bench::new(Mem::new(region.clone()), 2 << 20, 64), region)
}

/// Sends one request. Gives type and state of the response.
fn ask(bench: &mut Bench<Mem>, kind: u16, addr: u64, blocks: u16) -> (u16, u16) {
    let mut raw = [0; 24];
    raw[..2].copy_from_slice(&kind.to_le_bytes());
    raw[8..16].copy_from_slice(&addr.to_le_bytes());
    raw[16..18].copy_from_slice(&blocks.to_le_bytes());
    let driver = &mut bench.drivers[0];
    driver.poke(BUFFERS_BASE, &raw);
    driver.poke(BUFFERS_BASE + 64, &[0xff; 10]);
    driver.add(&[(BUFFERS_BASE, 24)], &[(BUFFERS_BASE + 64, 10)]);
    bench.kick(0);
    assert_eq!(bench.drivers[0].used().unwrap().1, 10);
    let raw = bench.drivers[0].peek(BUFFERS_BASE + 64, 10);
    (
        u16::from_le_bytes([raw[0], raw[1]]),
        u16::from_le_bytes([raw[8], raw[9]]),
    )
}

fn config(bench: &Bench<Mem>, at: u64) -> u64 {
    let mut raw = [0; 8];
    bench.device.read_config(at, &mut raw);
    u64::from_le_bytes(raw)
}

#[test]
fn memory_grows_and_shrinks_as_requested() {
    let (mut bench, region) = device();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let ear = heard.clone();
    bench
        .device
        .observe(move |status| ear.lock().unwrap().push(status.plugged));
    assert_eq!(
        (config(&bench, 0), config(&bench, 16), config(&bench, 24)),
        (BLOCK, BASE, REGION)
    );
    assert_eq!((config(&bench, 32), config(&bench, 48)), (0, 0));

    bench.device.request(200 * MIB).unwrap();
    assert_eq!(bench.sink.config_count(), 1);
    // 200 MiB in whole blocks of 128, and one to spare.
    assert_eq!(
        (config(&bench, 32), config(&bench, 48)),
        (384 * MIB, 200 * MIB)
    );
    assert_eq!(ask(&mut bench, PLUG, BASE, 64), (ACK, 0));
    assert_eq!(ask(&mut bench, PLUG, BASE + 128 * MIB, 36), (ACK, 0));
    assert_eq!(config(&bench, 40), 200 * MIB);
    assert_eq!(ask(&mut bench, PLUG, BASE + 200 * MIB, 1), (NACK, 0));

    // It has followed: nothing to remind it of.
    bench.device.remind();
    assert_eq!(bench.sink.config_count(), 1);
    bench.device.request(100 * MIB).unwrap();
    assert_eq!(bench.sink.config_count(), 2);
    bench.device.remind();
    assert_eq!(bench.sink.config_count(), 3);
    assert_eq!(ask(&mut bench, UNPLUG, BASE + 128 * MIB, 36), (ACK, 0));
    assert_eq!(ask(&mut bench, UNPLUG, BASE + 100 * MIB, 14), (ACK, 0));
    assert_eq!(
        *region.discarded.lock().unwrap(),
        [(128 * MIB, 72 * MIB), (100 * MIB, 28 * MIB)]
    );
    assert_eq!(bench.device.status().plugged, 100 * MIB);
    assert_eq!(
        *heard.lock().unwrap(),
        [128 * MIB, 200 * MIB, 128 * MIB, 100 * MIB]
    );

    bench.device.request(0).unwrap();
    assert_eq!(config(&bench, 32), 128 * MIB);
    assert_eq!(ask(&mut bench, UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!(
        region.discarded.lock().unwrap().last(),
        Some(&(0, 100 * MIB))
    );
    assert_eq!(bench.device.status().plugged, 0);
    bench.device.request(0).unwrap();
    assert_eq!(
        *region.usable.lock().unwrap(),
        [384 * MIB, 256 * MIB, 128 * MIB, 0]
    );
}

#[test]
fn the_state_of_blocks_is_told_as_it_is() {
    let (mut bench, _) = device();
    bench.device.request(64 * MIB).unwrap();
    assert_eq!(ask(&mut bench, PLUG, BASE + 8 * MIB, 4), (ACK, 0));
    assert_eq!(ask(&mut bench, STATE, BASE + 8 * MIB, 4), (ACK, 0));
    assert_eq!(ask(&mut bench, STATE, BASE, 4), (ACK, 1));
    assert_eq!(ask(&mut bench, STATE, BASE, 5), (ACK, 2));
}

#[test]
fn impossible_requests_are_errors_and_change_nothing() {
    let (mut bench, region) = device();
    assert_eq!(ask(&mut bench, PLUG, BASE, 1), (ERROR, 0));
    bench.device.request(128 * MIB).unwrap();
    assert_eq!(ask(&mut bench, PLUG, BASE + 4 * MIB, 1), (ACK, 0));
    for (kind, addr, blocks) in [
        (PLUG, BASE, 0),
        (PLUG, BASE + 1, 1),
        (PLUG, BASE - BLOCK, 1),
        (PLUG, 0, 1),
        (PLUG, u64::MAX, u16::MAX),
        (PLUG, BASE + 256 * MIB, 1),
        (PLUG, BASE + 254 * MIB, 2),
        (PLUG, BASE + 2 * MIB, 2),
        (UNPLUG, BASE, 1),
        (UNPLUG, BASE + 2 * MIB, 2),
        (STATE, BASE + REGION, 1),
        (4, BASE, 1),
        (u16::MAX, BASE, 1),
    ] {
        assert_eq!(
            ask(&mut bench, kind, addr, blocks),
            (ERROR, 0),
            "{kind} {addr:#x} {blocks}"
        );
    }
    assert_eq!(bench.device.status().plugged, BLOCK);
    assert!(region.discarded.lock().unwrap().is_empty());
    assert!(!bench.failed());
}

#[test]
fn a_request_that_cannot_be_answered_changes_nothing() {
    let (mut bench, _) = device();
    bench.device.request(128 * MIB).unwrap();
    let driver = &mut bench.drivers[0];
    let mut raw = [0; 24];
    raw[8..16].copy_from_slice(&BASE.to_le_bytes());
    raw[16] = 1;
    driver.poke(BUFFERS_BASE, &raw);
    driver.add(&[(BUFFERS_BASE, 24)], &[(BUFFERS_BASE + 64, 9)]);
    driver.add(&[(BUFFERS_BASE, 23)], &[(BUFFERS_BASE + 64, 10)]);
    driver.add(&[(BUFFERS_BASE, 24)], &[]);
    bench.kick(0);
    for _ in 0..3 {
        assert_eq!(bench.drivers[0].used().unwrap().1, 0);
    }
    assert_eq!(bench.device.status().plugged, 0);
}

#[test]
fn memory_that_cannot_be_given_back_stays_plugged() {
    let (mut bench, region) = device();
    bench.device.request(128 * MIB).unwrap();
    assert_eq!(ask(&mut bench, PLUG, BASE, 3), (ACK, 0));
    region.fails.store(true, Ordering::SeqCst);
    assert_eq!(ask(&mut bench, UNPLUG, BASE, 3), (BUSY, 0));
    assert_eq!(ask(&mut bench, UNPLUG_ALL, 0, 0), (BUSY, 0));
    assert_eq!(bench.device.status().plugged, 3 * BLOCK);
    assert!(matches!(
        bench.device.request(512 * MIB),
        Err(DeviceError::Io { .. })
    ));
    assert_eq!(bench.device.status().requested, 128 * MIB);
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    let (mut bench, _) = device();
    for bytes in [REGION + BLOCK, 1, BLOCK + 4096, u64::MAX] {
        assert!(matches!(
            bench.device.request(bytes),
            Err(DeviceError::Usage(_))
        ));
    }
    assert_eq!(bench.sink.config_count(), 0);
    bench.device.request(REGION).unwrap();
    assert_eq!(config(&bench, 32), REGION);
}

#[test]
fn a_size_wanted_before_the_driver_is_there_is_announced_to_it() {
    let region = Arc::new(Region::default());
    let mut device = Mem::new(region.clone());
    device.request(256 * MIB).unwrap();
    let bench = Bench::new(device, 2 << 20, 64);
    assert_eq!(bench.sink.config_count(), 1);

    let state = bench.device.save().unwrap();
    for (wanted, announced) in [(256 * MIB, 0), (512 * MIB, 1)] {
        let mut device = Mem::new(region.clone());
        device.restore(&state).unwrap();
        device.request(wanted).unwrap();
        assert_eq!(
            Bench::new(device, 2 << 20, 64).sink.config_count(),
            announced
        );
    }
}

#[test]
fn state_of_another_region_or_with_wrong_sizes_is_refused() {
    #[derive(Debug)]
    struct Other;
    impl HotplugRegion for Other {
        fn base(&self) -> u64 {
            BASE
        }
        fn len(&self) -> u64 {
            REGION / 2
        }
        fn block_size(&self) -> u64 {
            BLOCK
        }
        fn set_usable(&self, _bytes: u64) -> io::Result<()> {
            Ok(())
        }
        fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
            Ok(())
        }
    }
    let (bench, _) = device();
    let state = bench.device.save().unwrap();
    assert!(matches!(
        Mem::new(Arc::new(Other)).restore(&state),
        Err(DeviceError::State(_))
    ));
}

proptest! {
    /// The device's idea of what is plugged is the sum of what it acknowledged, and memory it gave back is
    /// exactly what was unplugged.
    #[test]
    fn acknowledged_requests_are_all_that_counts(
        requests in proptest::collection::vec((0u16..5, 0u64..300, 0u16..40), 1..60),
        wanted in 0u64..256,
    ) {
        let (mut bench, region) = device();
        bench.device.request(wanted * BLOCK).unwrap();
        let mut model = std::collections::BTreeSet::new();
        for (kind, block, count) in requests {
            let run = block..block + u64::from(count);
            region.discarded.lock().unwrap().clear();
            let (answer, _) = ask(&mut bench, kind, BASE + block * BLOCK, count);
            if answer == ACK {
                match kind {
                    PLUG => for b in run { prop_assert!(model.insert(b)); },
                    UNPLUG => {
                        let expected = vec![(block * BLOCK, u64::from(count) * BLOCK)];
                        prop_assert_eq!(&*region.discarded.lock().unwrap(), &expected);
                        for b in run { prop_assert!(model.remove(&b)); }
                    }
                    UNPLUG_ALL => model.clear(),
                    _ => {}
                }
            }
            prop_assert_eq!(bench.device.status().plugged, model.len() as u64 * BLOCK);
            prop_assert!(bench.device.status().plugged <= wanted * BLOCK);
        }
    }
}
