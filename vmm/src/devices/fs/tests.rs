//! The device with a real server on a real folder.

use kiln_vmm_fs::{Options, Server, ServerError};

use super::*;
use crate::devices::testing::{BUFFERS_BASE, Bench, Driver};
use crate::virtio::{DeviceError, VirtioDevice};

const MEMORY: usize = 4 << 20;
const REQUEST: u64 = BUFFERS_BASE;
const ANSWER: u64 = BUFFERS_BASE + 0x10_0000;

fn config() -> FsConfig {
    FsConfig {
        tag: "kiln".to_owned(),
        queue_size: 128,
    }
}

/// A device with a server, in operation.
fn bench(dir: &tempfile::TempDir) -> Bench<Fs> {
    let mut device = Fs::new(&config());
    device.attach(server(dir)).unwrap();
    Bench::new(device, MEMORY, 128)
}

/// The driver begins anew, on empty rings.
fn restart(bench: &mut Bench<Fs>) {
    for (driver, index) in bench.drivers.iter_mut().zip(0..) {
        *driver = Driver::new(&bench.memory, index, 128);
        driver.poke(driver.avail_ring(), &[0; 0x1000]);
    }
    let features = bench.device.features();
    bench.activate(features);
}

fn server(dir: &tempfile::TempDir) -> FsServer {
    let root = dir.path().to_str().unwrap().to_owned();
    let options = Options {
        root,
        ..Options::default()
    };
    let made = FsServer::start(move |_: &[_]| Ok::<_, ServerError>((Server::new(&options)?, ())));
    made.unwrap().unwrap().0
}

/// Sends a FUSE request on the request queue; gives error and body of the answer.
fn ask(bench: &mut Bench<Fs>, opcode: u32, node: u64, body: &[u8]) -> (i32, Vec<u8>) {
    let mut raw = Vec::new();
    raw.extend((40 + body.len() as u32).to_le_bytes());
    raw.extend(opcode.to_le_bytes());
    raw.extend(9u64.to_le_bytes());
    raw.extend(node.to_le_bytes());
    raw.extend([0; 16]);
    raw.extend(body);
    let driver = &mut bench.drivers[1];
    driver.poke(REQUEST, &raw);
    driver.add(
        &[(REQUEST, raw.len() as u32)],
        &[(ANSWER, 16), (ANSWER + 16, 8192)],
    );
    bench.kick(1);
    let mut used = None;
    bench.run_until(|bench| {
        used = bench.drivers[1].used();
        used.is_some()
    });
    let answer = bench.drivers[1].peek(ANSWER, used.unwrap().1 as usize);
    assert_eq!(answer[8..16], 9u64.to_le_bytes());
    (
        i32::from_le_bytes(answer[4..8].try_into().unwrap()),
        answer[16..].to_vec(),
    )
}

fn mount(bench: &mut Bench<Fs>) -> i32 {
    let mut body = Vec::new();
    body.extend(7u32.to_le_bytes());
    body.extend(38u32.to_le_bytes());
    body.extend([0; 8]);
    ask(bench, 26, 0, &body).0
}

#[test]
fn a_device_without_a_server_can_not_be_mounted_and_gets_one_later() {
    let mut bench = Bench::new(Fs::new(&config()), MEMORY, 128);
    let mut space = [0xff; 44];
    bench.device.read_config(0, &mut space);
    assert_eq!(
        (&space[..5], &space[36..44]),
        (&b"kiln\0"[..], &[1, 0, 0, 0, 0, 0, 0, 0][..])
    );
    assert_eq!(mount(&mut bench), -libc::ENODEV);
    assert!(!bench.device.is_mounted());
    bench.device.save().unwrap();

    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), b"x").unwrap();
    // Its queues are the device thread's by now.
    assert!(matches!(
        bench.device.attach(server(&dir)),
        Err(DeviceError::Busy(_))
    ));
    bench.device.reset();
    bench.device.attach(server(&dir)).unwrap();
    assert!(matches!(
        bench.device.attach(server(&dir)),
        Err(DeviceError::Busy(_))
    ));
    restart(&mut bench);
    assert_eq!(mount(&mut bench), 0);
    assert_eq!(ask(&mut bench, 1, 1, b"file\0").0, 0);
    assert_eq!(ask(&mut bench, 1, 1, b"none\0").0, -libc::ENOENT);
}

#[test]
fn a_mounted_device_refuses_to_be_saved() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = bench(&dir);
    assert_eq!(mount(&mut bench), 0);
    bench.device.pause().unwrap();
    assert!(matches!(bench.device.save(), Err(DeviceError::Busy(_))));
    bench.device.reset();
    bench.device.save().unwrap();
}

#[test]
fn requests_without_sense_are_answered_and_harm_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = bench(&dir);
    assert_eq!(mount(&mut bench), 0);
    assert_eq!(ask(&mut bench, 9999, 1, b"").0, -libc::ENOSYS);
    // A body shorter than its request needs.
    assert_eq!(ask(&mut bench, 15, 1, b"abc").0, -libc::EIO);
    let driver = &mut bench.drivers[1];
    driver.add(&[(REQUEST, 39)], &[(ANSWER, 16)]);
    driver.add(&[], &[(ANSWER, 16)]);
    bench.kick(1);
    bench.device.pause().unwrap();
    for _ in 0..2 {
        assert_eq!(bench.drivers[1].used().unwrap().1, 0);
    }
    bench.device.unpause();
    // A request that wants an answer and has no room for it.
    bench.drivers[1].add(&[(REQUEST, 40)], &[]);
    bench.kick(1);
    bench.device.pause().unwrap();
    assert_eq!(bench.drivers[1].used().unwrap().1, 0);
    assert!(!bench.failed());
}

#[test]
fn a_server_that_can_not_be_made_says_why() {
    let options = Options {
        root: "/no/such".to_owned(),
        ..Options::default()
    };
    let made = FsServer::start(move |_: &[_]| Ok((Server::new(&options)?, ()))).unwrap();
    assert!(matches!(made, Err(ServerError::Root { .. })));
}

/// Begins to wait for a lock on the whole file, which the host has.
fn wait_for_lock(bench: &mut Bench<Fs>, path: &std::path::Path) -> std::fs::File {
    std::fs::write(path, b"x").unwrap();
    let host = std::fs::File::open(path).unwrap();
    host.lock().unwrap();
    let (_, entry) = ask(bench, 1, 1, b"f\0");
    let node = u64::from_le_bytes(entry[..8].try_into().unwrap());
    let (_, open) = ask(bench, 14, node, &2u64.to_le_bytes());
    let mut raw = Vec::new();
    for number in [88u32, 33] {
        raw.extend(number.to_le_bytes());
    }
    for number in [9, node, 0, 0] {
        raw.extend(number.to_le_bytes());
    }
    raw.extend(&open[..8]);
    for number in [1, 0, i64::MAX.unsigned_abs()] {
        raw.extend(number.to_le_bytes());
    }
    // To write; of the whole file.
    for number in [1u32, 0, 1, 0] {
        raw.extend(number.to_le_bytes());
    }
    let driver = &mut bench.drivers[1];
    driver.poke(REQUEST, &raw);
    driver.add(&[(REQUEST, raw.len() as u32)], &[(ANSWER, 16)]);
    bench.kick(1);
    host
}

#[test]
fn a_request_that_waits_for_a_lock_holds_up_no_other_and_no_pause() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = bench(&dir);
    assert_eq!(mount(&mut bench), 0);
    let host = wait_for_lock(&mut bench, &dir.path().join("f"));
    assert_eq!(ask_beside(&mut bench), -libc::ENOENT);
    bench.device.pause().unwrap();
    drop(host);
    // Long enough for several tries.
    std::thread::sleep(std::time::Duration::from_millis(150));
    assert_eq!(bench.drivers[1].used(), None);
    bench.device.unpause();
    let mut used = None;
    bench.run_until(|bench| {
        used = bench.drivers[1].used();
        used.is_some()
    });
    assert_eq!(used.unwrap().1, 16);
    assert_eq!(bench.drivers[1].peek(ANSWER + 4, 4), [0; 4]);
}

/// Looks up a name that there is none of, by buffers of its own.
fn ask_beside(bench: &mut Bench<Fs>) -> i32 {
    const ELSEWHERE: u64 = 0x8000;
    let mut raw = Vec::new();
    for number in [45u32, 1, 11, 0, 1, 0, 0, 0, 0, 0] {
        raw.extend(number.to_le_bytes());
    }
    raw.extend(b"none\0");
    let driver = &mut bench.drivers[1];
    driver.poke(REQUEST + ELSEWHERE, &raw);
    driver.add(
        &[(REQUEST + ELSEWHERE, raw.len() as u32)],
        &[(ANSWER + ELSEWHERE, 16)],
    );
    bench.kick(1);
    bench.run_until(|bench| bench.drivers[1].used().is_some());
    let answer = bench.drivers[1].peek(ANSWER + ELSEWHERE, 16);
    i32::from_le_bytes(answer[4..8].try_into().unwrap())
}

#[test]
fn a_reset_ends_what_waits_and_answers_it_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = bench(&dir);
    assert_eq!(mount(&mut bench), 0);
    let host = wait_for_lock(&mut bench, &dir.path().join("f"));
    bench.drivers[1].poke(ANSWER, &[0xee; 16]);
    bench.device.reset();
    drop(host);
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert_eq!(bench.drivers[1].peek(ANSWER, 16), [0xee; 16]);
    bench.device.save().unwrap();
}

#[test]
fn a_device_with_a_request_that_waits_refuses_to_be_saved() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = bench(&dir);
    // Not mounted, as no guest that means well would do.
    let _host = wait_for_lock(&mut bench, &dir.path().join("f"));
    bench.device.pause().unwrap();
    assert!(matches!(bench.device.save(), Err(DeviceError::Busy(_))));
}

#[test]
fn what_was_asked_before_a_pause_is_answered_and_what_comes_after_waits() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = bench(&dir);
    assert_eq!(mount(&mut bench), 0);
    let look_up = |bench: &mut Bench<Fs>, place: u64| {
        let mut raw = Vec::new();
        for number in [45u32, 1, 11, 0, 1, 0, 0, 0, 0, 0] {
            raw.extend(number.to_le_bytes());
        }
        raw.extend(b"none\0");
        let (from, to) = (REQUEST + place * 0x100, ANSWER + place * 0x100);
        let driver = &mut bench.drivers[1];
        driver.poke(from, &raw);
        driver.add(&[(from, raw.len() as u32)], &[(to, 16)]);
    };
    // A queue full, of which not one was kicked for.
    for place in 0..60 {
        look_up(&mut bench, place);
    }
    let interrupts = bench.sink.queue_count(1);
    bench.device.pause().unwrap();
    for _ in 0..60 {
        assert_eq!(bench.drivers[1].used().unwrap().1, 16);
    }
    assert!(bench.sink.queue_count(1) > interrupts);
    look_up(&mut bench, 0);
    bench.kick(1);
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(bench.drivers[1].used(), None);
    bench.device.unpause();
    bench.run_until(|bench| bench.drivers[1].used().is_some());
}

#[test]
fn a_broken_ring_stops_the_device_until_its_driver_begins_anew() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = bench(&dir);
    assert_eq!(mount(&mut bench), 0);
    // More than there is room for.
    let driver = &mut bench.drivers[1];
    let index = u16::from_le_bytes(driver.peek(driver.avail_ring() + 2, 2).try_into().unwrap());
    driver.set_avail_idx(index.wrapping_add(1000));
    bench.kick(1);
    bench.run_until(|bench| bench.failed());
    bench.device.pause().unwrap();
    bench.device.unpause();
    bench.device.reset();
    assert!(!bench.device.is_mounted());
    restart(&mut bench);
    assert_eq!(mount(&mut bench), 0);
    assert!(!bench.failed());
}
