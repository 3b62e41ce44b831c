//! The device against a driver, honest and hostile, over both file engines and a backend that is slow,
//! small and failing.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::RawFd;

use proptest::prelude::*;

use super::*;
use crate::devices::testing::{BUFFERS_BASE, Bench, Desc, INDIRECT, NEXT, WRITE};
use crate::virtio::{DeviceError, VirtioDevice};

mod overlay;

const MEMORY: usize = 4 << 20;
const HEADER: u64 = BUFFERS_BASE;
const STATUS: u64 = BUFFERS_BASE + 0x800;
const DATA: u64 = BUFFERS_BASE + 0x1000;
const DISK: u64 = 1 << 20;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const UNTOUCHED: u8 = 0xee;

fn config() -> BlockConfig {
    BlockConfig {
        id: "disk0".to_owned(),
        queues: 2,
        queue_size: 128,
        read_only: false,
    }
}

fn file(len: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    file
}

fn disk(uring: bool) -> (Bench<Block>, File) {
    let file = file(DISK);
    let mut backend = FileBackend::new(file.try_clone().unwrap(), false).unwrap();
    backend.start(&Rings::new(usize::from(uring))).unwrap();
    let mut device = Block::new(&config());
    device.attach(Box::new(backend)).unwrap();
    (Bench::new(device, MEMORY, 128), file)
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut raw = [0; 16];
    raw[..4].copy_from_slice(&kind.to_le_bytes());
    raw[8..].copy_from_slice(&sector.to_le_bytes());
    raw
}

/// Sends one request and waits for its status and used length.
fn request(
    bench: &mut Bench<Block>,
    kind: u32,
    sector: u64,
    sent: &[(u64, u32)],
    wanted: &[(u64, u32)],
) -> (u8, u32) {
    bench.drivers[0].poke(HEADER, &header(kind, sector));
    bench.drivers[0].poke(STATUS, &[UNTOUCHED]);
    let mut readable = vec![(HEADER, 16)];
    readable.extend_from_slice(sent);
    let mut writable = wanted.to_vec();
    writable.push((STATUS, 1));
    let head = bench.drivers[0].add(&readable, &writable);
    let told = bench.sink.queue_count(0);
    bench.kick(0);
    let mut used = None;
    bench.run_until(|bench| {
        used = bench.drivers[0].used();
        used.is_some()
    });
    let (id, len) = used.unwrap();
    assert_eq!(id, head);
    assert!(
        bench.sink.queue_count(0) > told,
        "an answer without an interrupt"
    );
    (bench.drivers[0].peek(STATUS, 1)[0], len)
}

fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut raw = [0; 16];
    raw[..8].copy_from_slice(&sector.to_le_bytes());
    raw[8..12].copy_from_slice(&sectors.to_le_bytes());
    raw[12..].copy_from_slice(&flags.to_le_bytes());
    raw
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 251) as u8).collect()
}

#[test]
fn disks_that_find_no_ring_work_on_threads_and_rings_come_back() {
    let rings = Rings::new(1);
    if rings.count() == 0 {
        eprintln!("skipped: no io_uring on this host");
        return;
    }
    let disk = |rings: &Rings| {
        let mut backend = FileBackend::new(file(DISK), false).unwrap();
        backend.start(rings).unwrap();
        let ring = backend.has_ring();
        let mut device = Block::new(&config());
        device.attach(Box::new(backend)).unwrap();
        (Bench::new(device, MEMORY, 128), ring)
    };
    let works = |bench: &mut Bench<Block>| {
        let data = pattern(4096);
        bench.drivers[0].poke(DATA, &data);
        assert_eq!(request(bench, OUT, 8, &[(DATA, 4096)], &[]).0, OK);
        bench.drivers[0].poke(DATA, &[0; 4096]);
        assert_eq!(request(bench, IN, 8, &[], &[(DATA, 4096)]).0, OK);
        assert_eq!(bench.drivers[0].peek(DATA, 4096), data);
    };
    let (mut first, ring) = disk(&rings);
    assert!(ring);
    let (mut second, ring) = disk(&rings);
    assert!(!ring);
    works(&mut first);
    works(&mut second);
    drop(first.device.detach().unwrap());
    assert_eq!(rings.count(), 1);
    let (mut third, ring) = disk(&rings);
    assert!(ring);
    works(&mut third);
    works(&mut second);
}

fn moves_data_both_ways(uring: bool) {
    let (mut bench, mut file) = disk(uring);
    let data = pattern(12288);
    bench.drivers[0].poke(DATA, &data);
    // Split so that no buffer ends on a sector's border.
    let parts = [(DATA, 100), (DATA + 100, 4000), (DATA + 4100, 8188)];
    assert_eq!(request(&mut bench, OUT, 3, &parts, &[]), (OK, 1));
    assert_eq!(request(&mut bench, FLUSH, 0, &[], &[]), (OK, 1));
    let mut stored = vec![0; data.len()];
    file.seek(SeekFrom::Start(3 * 512)).unwrap();
    file.read_exact(&mut stored).unwrap();
    assert_eq!(stored, data);

    bench.drivers[0].poke(DATA, &vec![0; data.len()]);
    let parts = [(DATA, 1), (DATA + 1, 12286), (DATA + 12287, 1)];
    assert_eq!(request(&mut bench, IN, 3, &[], &parts), (OK, 12289));
    assert_eq!(bench.drivers[0].peek(DATA, data.len()), data);
    assert!(bench.sink.queue_count(0) > 0);
}

#[test]
fn a_file_uses_uring_wherever_the_kernel_has_it() {
    let has_uring = io_uring::IoUring::new(2).is_ok();
    let (mut bench, _) = disk(true);
    assert_eq!(request(&mut bench, IN, 0, &[], &[(DATA, 512)]).0, OK);
    let backend = bench.device.detach().unwrap();
    assert_eq!(format!("{backend:?}").contains("engine: Uring"), has_uring);
}

#[test]
fn moves_data_both_ways_by_uring() {
    moves_data_both_ways(true);
}

#[test]
fn moves_data_both_ways_by_thread() {
    moves_data_both_ways(false);
}

fn discards_and_zeroes(uring: bool) {
    let (mut bench, mut file) = disk(uring);
    let data = vec![0xaa; 64 << 10];
    file.write_all(&data).unwrap();

    let ranges = [range(0, 8, 0), range(16, 8, 0)].concat();
    bench.drivers[0].poke(DATA, &ranges);
    assert_eq!(request(&mut bench, DISCARD, 0, &[(DATA, 32)], &[]), (OK, 1));
    for flags in [0, 1] {
        bench.drivers[0].poke(DATA, &range(32 + u64::from(flags) * 16, 8, flags));
        assert_eq!(
            request(&mut bench, WRITE_ZEROES, 0, &[(DATA, 16)], &[]),
            (OK, 1)
        );
    }
    let mut stored = vec![0; data.len()];
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_exact(&mut stored).unwrap();
    let expected = |sector: usize| {
        let gone = [0..8, 16..24, 32..40, 48..56]
            .iter()
            .any(|r| r.contains(&sector));
        if gone { 0 } else { 0xaa }
    };
    for (sector, bytes) in stored.chunks(512).enumerate() {
        assert!(
            bytes.iter().all(|b| *b == expected(sector)),
            "sector {sector}"
        );
    }
    assert_eq!(file.metadata().unwrap().len(), DISK);
}

#[test]
fn discards_and_zeroes_by_uring() {
    discards_and_zeroes(true);
}

#[test]
fn discards_and_zeroes_by_thread() {
    discards_and_zeroes(false);
}

#[test]
fn answers_the_disks_name() {
    let (mut bench, _) = disk(true);
    bench.drivers[0].poke(DATA, &[UNTOUCHED; 32]);
    assert_eq!(request(&mut bench, GET_ID, 0, &[], &[(DATA, 20)]), (OK, 21));
    assert_eq!(
        &bench.drivers[0].peek(DATA, 21),
        b"disk0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\xee"
    );
}

#[test]
fn requests_outside_the_disk_or_misshapen_are_io_errors() {
    let (mut bench, _) = disk(true);
    let last = DISK / 512;
    assert_eq!(
        request(&mut bench, IN, last - 1, &[], &[(DATA, 512)]),
        (OK, 513)
    );
    for (kind, sector, len) in [
        (IN, last, 512),
        (IN, last - 1, 1024),
        (OUT, last, 512),
        (IN, u64::MAX, 512),
        (IN, u64::MAX / 512, 512),
        (OUT, 0, 511),
        (IN, 0, 513),
    ] {
        let buffer = [(DATA, len)];
        let (sent, wanted): (&[_], &[_]) = if kind == IN {
            (&[], &buffer)
        } else {
            (&buffer, &[])
        };
        assert_eq!(request(&mut bench, kind, sector, sent, wanted), (IOERR, 1));
    }
    assert_eq!(request(&mut bench, IN, 0, &[], &[]), (IOERR, 1));
    for (kind, raw, status) in [
        (DISCARD, range(last, 1, 0), IOERR),
        (DISCARD, range(u64::MAX, 1, 0), IOERR),
        (DISCARD, range(0, 1, 1), UNSUPP),
        (DISCARD, range(0, u32::MAX, 0), IOERR),
        (WRITE_ZEROES, range(0, 1, 2), UNSUPP),
        (WRITE_ZEROES, range(0, 0x1_0001, 0), IOERR),
    ] {
        bench.drivers[0].poke(DATA, &raw);
        assert_eq!(request(&mut bench, kind, 0, &[(DATA, 16)], &[]).0, status);
    }
    assert_eq!(request(&mut bench, DISCARD, 0, &[(DATA, 17)], &[]).0, IOERR);
    assert_eq!(request(&mut bench, DISCARD, 0, &[], &[]).0, IOERR);
    assert_eq!(
        request(&mut bench, WRITE_ZEROES, 0, &[(DATA, 32)], &[]).0,
        IOERR
    );
    assert_eq!(request(&mut bench, 77, 0, &[], &[]), (UNSUPP, 1));
    assert!(!bench.failed());
}

#[test]
fn chains_that_cannot_be_answered_are_given_back() {
    let (mut bench, _) = disk(true);
    bench.drivers[0].poke(HEADER, &header(IN, 0));
    // No status byte; a header cut short; a buffer outside memory; readable after writable; a loop; an
    // index past the table; an indirect table in an indirect table.
    bench.drivers[0].add(&[(HEADER, 16)], &[]);
    bench.drivers[0].add(&[(HEADER, 15)], &[]);
    bench.drivers[0].add(&[(HEADER, 16)], &[(MEMORY as u64 - 8, 512), (STATUS, 1)]);
    let chain = |driver: &mut crate::devices::testing::Driver, head: u16, list: &[Desc]| {
        for (desc, index) in list.iter().zip(head..) {
            driver.set_desc(index, *desc);
        }
        driver.make_available(head);
    };
    let desc = |addr, len, flags, next| Desc {
        addr,
        len,
        flags,
        next,
    };
    let driver = &mut bench.drivers[0];
    chain(
        driver,
        20,
        &[desc(STATUS, 1, WRITE | NEXT, 21), desc(HEADER, 16, 0, 0)],
    );
    chain(driver, 30, &[desc(HEADER, 16, NEXT, 30)]);
    chain(driver, 40, &[desc(HEADER, 16, NEXT, 128)]);
    driver.poke(DATA, &desc(DATA, 16, INDIRECT, 0).bytes());
    chain(driver, 50, &[desc(DATA, 16, INDIRECT, 0)]);
    chain(driver, 60, &[desc(DATA, 17, INDIRECT, 0)]);
    chain(driver, 70, &[desc(0x5000_0000, 16, INDIRECT, 0)]);
    bench.kick(0);
    for _ in 0..9 {
        assert_eq!(bench.drivers[0].used().unwrap().1, 0);
    }
    assert_eq!(bench.drivers[0].used(), None);
    assert!(!bench.failed());
    assert_eq!(request(&mut bench, IN, 0, &[], &[(DATA, 512)]).0, OK);
}

#[test]
fn an_indirect_chain_works_like_a_direct_one() {
    let (mut bench, _) = disk(true);
    let driver = &mut bench.drivers[0];
    driver.poke(HEADER, &header(IN, 0));
    let table = BUFFERS_BASE + 0x10_0000;
    let list = [
        Desc {
            addr: HEADER,
            len: 16,
            flags: NEXT,
            next: 1,
        },
        Desc {
            addr: DATA,
            len: 512,
            flags: NEXT | WRITE,
            next: 2,
        },
        Desc {
            addr: STATUS,
            len: 1,
            flags: WRITE,
            next: 0,
        },
    ];
    driver.poke(table, &list.map(Desc::bytes).concat());
    driver.poke(STATUS, &[UNTOUCHED]);
    driver.set_desc(
        5,
        Desc {
            addr: table,
            len: 48,
            flags: INDIRECT,
            next: 0,
        },
    );
    driver.make_available(5);
    bench.kick(0);
    let mut used = None;
    bench.run_until(|bench| {
        used = bench.drivers[0].used();
        used.is_some()
    });
    assert_eq!(used, Some((5, 513)));
    assert_eq!(bench.drivers[0].peek(STATUS, 1), [OK]);
}

#[test]
fn an_impossible_ring_stops_the_device() {
    let (mut bench, _) = disk(true);
    bench.drivers[0].set_avail_idx(1000);
    bench.kick(0);
    assert!(bench.failed());

    let (mut bench, _) = disk(true);
    bench.drivers[0].make_available(500);
    bench.kick(0);
    assert!(bench.failed());
}

#[test]
fn every_request_of_a_full_queue_is_answered_once() {
    for uring in [true, false] {
        let (mut bench, _) = disk(uring);
        for queue in [0, 1] {
            for i in 0..42u64 {
                let base = BUFFERS_BASE + 0x10_0000 * (queue as u64 + 1) + i * 0x1000;
                bench.drivers[queue].poke(base, &header(if i % 2 == 0 { IN } else { OUT }, i));
                bench.drivers[queue].poke(base + 16, &[UNTOUCHED]);
                let data = [(base + 512, 512)];
                if i % 2 == 0 {
                    bench.drivers[queue].add(&[(base, 16)], &[data[0], (base + 16, 1)]);
                } else {
                    bench.drivers[queue].add(&[(base, 16), data[0]], &[(base + 16, 1)]);
                }
            }
        }
        bench.kick(0);
        bench.kick(1);
        for queue in [0, 1] {
            let mut heads = Vec::new();
            bench.run_until(|bench| {
                heads.extend(bench.drivers[queue].used().map(|(head, _)| head));
                heads.len() == 42
            });
            heads.sort_unstable();
            heads.dedup();
            assert_eq!(heads.len(), 42);
            for i in 0..42u64 {
                let base = BUFFERS_BASE + 0x10_0000 * (queue as u64 + 1) + i * 0x1000;
                assert_eq!(bench.drivers[queue].peek(base + 16, 1), [OK]);
            }
        }
    }
}

#[test]
fn a_slot_becomes_a_disk_and_a_slot_again() {
    let mut bench = Bench::new(Block::new(&config()), MEMORY, 128);
    let sectors = |bench: &Bench<Block>| {
        let mut raw = [0; 8];
        bench.device.read_config(0, &mut raw);
        u64::from_le_bytes(raw)
    };
    assert_eq!(sectors(&bench), 0);
    assert_eq!(request(&mut bench, IN, 0, &[], &[(DATA, 512)]).0, IOERR);
    assert_eq!(request(&mut bench, FLUSH, 0, &[], &[]).0, OK);

    for round in 0..2 {
        let backend = FileBackend::new(file(8192 + 100), false).unwrap();
        bench.device.attach(Box::new(backend)).unwrap();
        assert_eq!(bench.sink.config_count(), 2 * round + 1);
        assert_eq!(sectors(&bench), 16);
        assert_eq!(request(&mut bench, IN, 15, &[], &[(DATA, 512)]).0, OK);
        let again = FileBackend::new(file(512), false).unwrap();
        assert!(matches!(
            bench.device.attach(Box::new(again)),
            Err(DeviceError::Busy(_))
        ));
        bench.device.detach().unwrap();
        assert_eq!(bench.sink.config_count(), 2 * round + 2);
        assert_eq!(sectors(&bench), 0);
        assert_eq!(request(&mut bench, IN, 15, &[], &[(DATA, 512)]).0, IOERR);
    }
    assert!(matches!(bench.device.detach(), Err(DeviceError::Usage(_))));
}

#[test]
fn a_slot_filled_between_bake_and_resume_is_announced() {
    let mut baked = Bench::new(Block::new(&config()), MEMORY, 128);
    baked.device.pause().unwrap();
    let state = baked.device.save().unwrap();
    for filled in [false, true] {
        let mut device = Block::new(&config());
        device.restore(&state).unwrap();
        if filled {
            device
                .attach(Box::new(FileBackend::new(file(512), true).unwrap()))
                .unwrap();
        }
        let bench = Bench::new(device, MEMORY, 128);
        assert_eq!(bench.sink.config_count(), u32::from(filled));
    }
}

#[test]
fn a_read_only_disk_refuses_to_change() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    std::fs::write(&path, vec![0x55; 4096]).unwrap();
    assert!(matches!(
        FileBackend::new(File::open(&path).unwrap(), false),
        Err(FileError::Access(_))
    ));
    let mut device = Block::new(&config());
    let backend = FileBackend::new(File::open(&path).unwrap(), true).unwrap();
    device.attach(Box::new(backend)).unwrap();
    let mut bench = Bench::new(device, MEMORY, 128);
    assert_eq!(request(&mut bench, OUT, 0, &[(DATA, 512)], &[]).0, IOERR);
    bench.drivers[0].poke(DATA, &range(0, 1, 0));
    assert_eq!(request(&mut bench, DISCARD, 0, &[(DATA, 16)], &[]).0, IOERR);
    assert_eq!(request(&mut bench, IN, 0, &[], &[(DATA, 512)]).0, OK);
    assert_eq!(bench.drivers[0].peek(DATA, 512), vec![0x55; 512]);

    let fixed = BlockConfig {
        read_only: true,
        ..config()
    };
    let mut device = Block::new(&fixed);
    assert_ne!(device.features() & (1 << 5), 0);
    let writable = FileBackend::new(file(512), false).unwrap();
    assert!(matches!(
        device.attach(Box::new(writable)),
        Err(DeviceError::Usage(_))
    ));
}

#[test]
fn a_file_cut_short_is_an_io_error_not_a_hang() {
    for uring in [true, false] {
        let (mut bench, file) = disk(uring);
        file.set_len(1024).unwrap();
        assert_eq!(request(&mut bench, IN, 1, &[], &[(DATA, 4096)]).0, IOERR);
        assert_eq!(request(&mut bench, IN, 0, &[], &[(DATA, 1024)]).0, OK);
    }
}

#[test]
fn only_files_and_block_devices_are_disks() {
    let null = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .unwrap();
    assert!(matches!(
        FileBackend::new(null, false),
        Err(FileError::Kind)
    ));
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(
        FileBackend::new(File::open(dir.path()).unwrap(), true),
        Err(FileError::Kind)
    ));
}

/// Holds back what it is given, takes two requests at a time, and fails every `fail_every`-th.
#[derive(Debug)]
struct Slow {
    data: Vec<u8>,
    held: Vec<BlockRequest>,
    seen: u64,
    fail_every: u64,
}

impl Slow {
    fn finish(&mut self, done: &mut Vec<Completion>) {
        // Last in, first out: an order no guest may rely on.
        while let Some(request) = self.held.pop() {
            self.seen += 1;
            let at = request.offset as usize..(request.offset + request.len) as usize;
            let result = if self.seen.is_multiple_of(self.fail_every) {
                Err(io::Error::other("made to fail"))
            } else if request.op == BlockOp::Read {
                request
                    .buffers
                    .write_at(0, &self.data[at])
                    .map_err(io::Error::other)
            } else if request.op == BlockOp::Write {
                request
                    .buffers
                    .read_at(0, &mut self.data[at])
                    .map_err(io::Error::other)
            } else {
                Err(io::ErrorKind::Unsupported.into())
            };
            done.push(Completion {
                tag: request.tag,
                result,
            });
        }
    }
}

impl BlockBackend for Slow {
    fn capacity(&self) -> u64 {
        self.data.len() as u64
    }
    fn read_only(&self) -> bool {
        false
    }
    fn submit(&mut self, request: BlockRequest) -> Submitted {
        if self.held.len() == 2 {
            return Submitted::Busy(request);
        }
        self.held.push(request);
        Submitted::Pending
    }
    fn kick(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn completion_fd(&self) -> Option<RawFd> {
        None
    }
    fn completions(&mut self, _done: &mut Vec<Completion>) -> io::Result<()> {
        Ok(())
    }
    fn drain(&mut self, done: &mut Vec<Completion>) -> io::Result<()> {
        self.finish(done);
        Ok(())
    }
    fn save(&self, _: &File) -> io::Result<Content> {
        Ok(Content::Elsewhere)
    }
}

#[test]
fn pausing_finishes_all_requests_even_those_the_backend_had_no_room_for() {
    let mut device = Block::new(&config());
    let slow = Slow {
        data: vec![7; 1 << 16],
        held: Vec::new(),
        seen: 0,
        fail_every: 5,
    };
    device.attach(Box::new(slow)).unwrap();
    let mut bench = Bench::new(device, MEMORY, 128);
    for i in 0..10u64 {
        let base = DATA + i * 0x1000;
        bench.drivers[1].poke(base, &header(IN, i));
        bench.drivers[1].add(&[(base, 16)], &[(base + 512, 512), (base + 16, 1)]);
    }
    bench.kick(1);
    assert_eq!(bench.drivers[1].used(), None);
    bench.device.pause().unwrap();
    bench.device.pause().unwrap();
    let mut statuses = Vec::new();
    while bench.drivers[1].used().is_some() {}
    for i in 0..10u64 {
        statuses.push(bench.drivers[1].peek(DATA + i * 0x1000 + 16, 1)[0]);
    }
    assert_eq!(statuses.iter().filter(|s| **s == OK).count(), 8);
    assert_eq!(statuses.iter().filter(|s| **s == IOERR).count(), 2);
    let queues = bench.device.queues();
    assert_eq!((queues[1].next_avail, queues[1].next_used), (10, 10));
}

#[test]
fn an_operation_the_backend_lacks_is_reported_as_such() {
    let mut device = Block::new(&config());
    let slow = Slow {
        data: vec![7; 1 << 16],
        held: Vec::new(),
        seen: 0,
        fail_every: 100,
    };
    device.attach(Box::new(slow)).unwrap();
    let mut bench = Bench::new(device, MEMORY, 128);
    bench.drivers[0].poke(HEADER, &header(DISCARD, 0));
    bench.drivers[0].poke(DATA, &range(0, 8, 0));
    bench.drivers[0].add(&[(HEADER, 16), (DATA, 16)], &[(STATUS, 1)]);
    bench.kick(0);
    bench.device.pause().unwrap();
    assert_eq!(bench.drivers[0].peek(STATUS, 1), [UNSUPP]);
}

#[test]
fn reset_leaves_nothing_in_flight_and_the_disk_usable() {
    let (mut bench, _) = disk(true);
    for i in 0..20u64 {
        bench.drivers[0].poke(DATA + i * 0x1000, &header(IN, i));
        bench.drivers[0].add(
            &[(DATA + i * 0x1000, 16)],
            &[(DATA + i * 0x1000 + 512, 512), (DATA + i * 0x1000 + 16, 1)],
        );
    }
    bench.device.queue_event(0);
    bench.device.reset();
    bench.device.reset();
    let before = bench.drivers[0].peek(0, MEMORY);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(bench.drivers[0].peek(0, MEMORY), before);

    let features = bench.device.features();
    bench.drivers = vec![
        crate::devices::testing::Driver::new(&bench.memory, 0, 128),
        crate::devices::testing::Driver::new(&bench.memory, 1, 128),
    ];
    for driver in &mut bench.drivers {
        driver.set_avail_idx(0);
        driver.poke(driver.used_ring(), &[0; 4]);
    }
    bench.activate(features);
    assert_eq!(request(&mut bench, IN, 0, &[], &[(DATA, 512)]).0, OK);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// What is written in any shape is what is read back in any other.
    #[test]
    fn any_split_of_a_transfer_is_the_same_transfer(
        cuts in proptest::collection::vec(1u32..3000, 1..20),
        sector in 0u64..100,
    ) {
        let (mut bench, _) = disk(true);
        let total = cuts.iter().sum::<u32>().div_ceil(512) * 512;
        let mut parts = Vec::new();
        let mut at = 0;
        for cut in &cuts {
            parts.push((DATA + u64::from(at), *cut));
            at += cut;
        }
        if at < total {
            parts.push((DATA + u64::from(at), total - at));
        }
        let data = pattern(total as usize);
        bench.drivers[0].poke(DATA, &data);
        prop_assert_eq!(request(&mut bench, OUT, sector, &parts, &[]).0, OK);
        bench.drivers[0].poke(DATA, &vec![0; data.len()]);
        prop_assert_eq!(request(&mut bench, IN, sector, &[], &[(DATA, total)]).0, OK);
        prop_assert_eq!(bench.drivers[0].peek(DATA, data.len()), data);
    }
}
