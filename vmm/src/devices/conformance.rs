//! What every device owes its contract, checked in the same way for all of them.

use std::sync::Arc;

use virtio_queue::QueueT;

use super::block::{Block, BlockConfig, FileBackend};
use super::fs::{Fs, FsConfig};
use super::mem::Mem;
use super::net::{Net, NetConfig};
use super::rng::Rng;
use super::testing::{BUFFERS_BASE, Bench, Driver};
use super::vsock::Vsock;
use crate::memory::HotplugRegion;
use crate::virtio::{DeviceError, DeviceState, VirtioDevice};

const MEMORY: usize = 2 << 20;

#[derive(Debug)]
struct NoRegion;

impl HotplugRegion for NoRegion {
    fn base(&self) -> u64 {
        1 << 32
    }
    fn len(&self) -> u64 {
        1 << 30
    }
    fn block_size(&self) -> u64 {
        2 << 20
    }
    fn set_usable(&self, _bytes: u64) -> std::io::Result<()> {
        Ok(())
    }
    fn discard(&self, _offset: u64, _len: u64) -> std::io::Result<()> {
        Ok(())
    }
}

fn block() -> Block {
    let config = BlockConfig {
        id: "conform".to_owned(),
        queues: 2,
        queue_size: 64,
        read_only: false,
    };
    let mut block = Block::new(&config);
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    block
        .attach(Box::new(FileBackend::new(file, false).unwrap()))
        .unwrap();
    block
}

fn net() -> Net {
    Net::new(&NetConfig {
        mac: [2, 0, 0, 0, 0, 7],
        pairs: 2,
        queue_size: 64,
    })
}

fn mem() -> Mem {
    let mut mem = Mem::new(Arc::new(NoRegion));
    mem.request(256 << 20).unwrap();
    mem
}

fn fs() -> Fs {
    Fs::new(&FsConfig {
        tag: "conform".to_owned(),
        queue_size: 64,
    })
}

fn vsock() -> Vsock {
    Vsock::new(3, None)
}

/// Kicks every queue and delivers what comes of it.
fn kick_all<D: VirtioDevice>(bench: &mut Bench<D>) {
    for queue in 0..bench.drivers.len() {
        bench.kick(u16::try_from(queue).unwrap());
    }
}

fn config<D: VirtioDevice>(device: &D) -> Vec<u8> {
    let mut space = vec![0xff; 256];
    device.read_config(0, &mut space);
    space
}

/// A state restored into a fresh device is the state that was saved, configuration space included.
fn saved_state_is_restored<D: VirtioDevice>(make: fn() -> D) {
    let mut bench = Bench::new(make(), MEMORY, 64);
    kick_all(&mut bench);
    bench.device.pause().unwrap();
    let state = bench.device.save().unwrap();
    let mut fresh = make();
    fresh.restore(&state).unwrap();
    assert_eq!(fresh.save().unwrap(), state);
    assert_eq!(config(&fresh), config(&bench.device));
    assert_eq!(fresh.queue_max_sizes(), bench.device.queue_max_sizes());
    assert_eq!(fresh.features(), bench.device.features());
}

/// State of another kind or version, cut short or with something behind it, is refused.
fn foreign_state_is_refused<D: VirtioDevice>(make: fn() -> D) {
    let mut bench = Bench::new(make(), MEMORY, 64);
    bench.device.pause().unwrap();
    let state = bench.device.save().unwrap();
    let mut longer = state.bytes.clone();
    longer.push(0);
    let mut wrong = vec![
        DeviceState {
            kind: "other".to_owned(),
            ..state.clone()
        },
        DeviceState {
            version: state.version + 1,
            ..state.clone()
        },
        DeviceState {
            bytes: longer,
            ..state.clone()
        },
    ];
    for len in 0..state.bytes.len() {
        wrong.push(DeviceState {
            bytes: state.bytes[..len].to_vec(),
            ..state.clone()
        });
    }
    for state in wrong {
        assert!(
            matches!(make().restore(&state), Err(DeviceError::State(_))),
            "{state:?}"
        );
    }
}

/// Pausing twice is pausing once, and a paused device changes no guest memory.
fn pausing_is_idempotent_and_quiet<D: VirtioDevice>(make: fn() -> D) {
    let mut bench = Bench::new(make(), MEMORY, 64);
    kick_all(&mut bench);
    bench.device.pause().unwrap();
    let (queues, state) = (bench.device.queues(), bench.device.save().unwrap());
    let before = bench.drivers[0].peek(0, MEMORY);
    bench.device.pause().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(5));
    assert_eq!(bench.device.queues(), queues);
    assert_eq!(bench.device.save().unwrap(), state);
    assert!(bench.drivers[0].peek(0, MEMORY) == before);
    bench.device.unpause();
    assert!(!bench.failed());
}

/// Resetting twice is resetting once; the device has no queues then and can be activated again.
fn reset_is_idempotent<D: VirtioDevice>(make: fn() -> D) {
    let mut bench = Bench::new(make(), MEMORY, 64);
    kick_all(&mut bench);
    bench.device.reset();
    let state = bench.device.save().unwrap();
    assert!(bench.device.queues().is_empty());
    bench.device.reset();
    assert_eq!(bench.device.save().unwrap(), state);
    for queue in 0..8 {
        bench.device.queue_event(queue);
    }
    bench.drivers = (0..)
        .zip(0..bench.drivers.len())
        .map(|(i, _)| Driver::new(&bench.memory, i, 64))
        .collect();
    for driver in &mut bench.drivers {
        driver.set_avail_idx(0);
        driver.poke(driver.used_ring(), &[0; 4]);
    }
    let features = bench.device.features();
    bench.activate(features);
    kick_all(&mut bench);
    assert!(!bench.failed());
}

/// Rings that lie (or come to lie) outside guest memory stop the device, whatever it is.
fn rings_outside_memory_stop_the_device<D: VirtioDevice>(make: fn() -> D) {
    let mut bench = Bench::new(make(), MEMORY, 64);
    let features = bench.device.features();
    bench.device.reset();
    let queues = bench
        .drivers
        .iter()
        .map(|driver| {
            let mut active = driver.queue();
            active
                .queue
                .set_avail_ring_address(Some(0xffff_f000), Some(0));
            active
                .queue
                .set_used_ring_address(Some(0xffff_8000), Some(0));
            active
        })
        .collect();
    bench.activate_with(features, queues);
    // Some queues are only looked at when there is something to put into them; one is always.
    kick_all(&mut bench);
    for queue in 0..bench.drivers.len() {
        bench.device.queue_event(u16::try_from(queue).unwrap());
    }
    assert!(bench.failed());
}

/// An available index further ahead than the queue is long stops the device.
fn impossible_indices_stop_the_device<D: VirtioDevice>(make: fn() -> D) {
    let mut bench = Bench::new(make(), MEMORY, 64);
    for driver in &mut bench.drivers {
        driver.set_avail_idx(9999);
    }
    kick_all(&mut bench);
    assert!(bench.failed());
}

/// Reads and writes of configuration space at any place do nothing bad.
fn configuration_space_has_an_end<D: VirtioDevice>(make: fn() -> D) {
    let mut device = make();
    for offset in [
        0,
        1,
        7,
        55,
        59,
        60,
        255,
        4096,
        u64::from(u32::MAX),
        u64::MAX - 1,
        u64::MAX,
    ] {
        let mut data = [0xff; 8];
        device.read_config(offset, &mut data);
        device.write_config(offset, &[0xff; 8]);
        if offset >= 255 {
            assert_eq!(data, [0; 8]);
        }
    }
}

/// Every queue given the same meaningless chain gives it back or keeps it; the device goes on.
fn meaningless_chains_do_no_harm<D: VirtioDevice>(make: fn() -> D) {
    let mut bench = Bench::new(make(), MEMORY, 64);
    for driver in &mut bench.drivers {
        driver.poke(BUFFERS_BASE, &[0xff; 64]);
        driver.add(&[(BUFFERS_BASE, 64)], &[(BUFFERS_BASE + 64, 64)]);
        driver.add(&[(BUFFERS_BASE, 0)], &[]);
        driver.add(&[(u64::MAX - 4, 64)], &[(BUFFERS_BASE, 16)]);
    }
    kick_all(&mut bench);
    bench.device.pause().unwrap();
    assert!(!bench.failed());
}

macro_rules! conformance {
    ($($device:ident),*) => {$(
        mod $device {
            #[test]
            fn saved_state_is_restored() {
                super::saved_state_is_restored(super::$device);
            }
            #[test]
            fn foreign_state_is_refused() {
                super::foreign_state_is_refused(super::$device);
            }
            #[test]
            fn pausing_is_idempotent_and_quiet() {
                super::pausing_is_idempotent_and_quiet(super::$device);
            }
            #[test]
            fn reset_is_idempotent() {
                super::reset_is_idempotent(super::$device);
            }
            #[test]
            fn rings_outside_memory_stop_the_device() {
                super::rings_outside_memory_stop_the_device(super::$device);
            }
            #[test]
            fn impossible_indices_stop_the_device() {
                super::impossible_indices_stop_the_device(super::$device);
            }
            #[test]
            fn configuration_space_has_an_end() {
                super::configuration_space_has_an_end(super::$device);
            }
            #[test]
            fn meaningless_chains_do_no_harm() {
                super::meaningless_chains_do_no_harm(super::$device);
            }
        }
    )*};
}

fn rng() -> Rng {
    Rng::new()
}

conformance!(block, fs, mem, net, rng, vsock);
