//! The device over an overlay.

use std::io::Write;

use kiln_overlay::{
    Caching, DiskFile, FileBase, FlushPolicy, LEAST_RAM, Overlay, Pool, PoolConfig,
};

use super::*;
use crate::devices::block::OverlayBackend;

const STEP: usize = 64 << 10;

fn overlay(config: PoolConfig, size: u64, base: Option<File>) -> Bench<Block> {
    let base =
        base.map(|file| Box::new(FileBase::new(file).unwrap()) as Box<dyn kiln_overlay::Base>);
    let overlay = Overlay::new(&Pool::new(config), size, base).unwrap();
    let mut device = Block::new(&config_of_one_queue());
    device
        .attach(Box::new(OverlayBackend::new(overlay)))
        .unwrap();
    Bench::new(device, MEMORY, 128)
}

fn config_of_one_queue() -> BlockConfig {
    BlockConfig {
        queues: 1,
        ..config()
    }
}

fn write(bench: &mut Bench<Block>, at: usize, data: &[u8]) -> u8 {
    bench.drivers[0].poke(DATA, data);
    let buffers = [(DATA, data.len() as u32)];
    request(bench, OUT, (at / 512) as u64, &buffers, &[]).0
}

fn read(bench: &mut Bench<Block>, at: usize, len: usize) -> Vec<u8> {
    bench.drivers[0].poke(DATA, &vec![0x55; len]);
    let buffers = [(DATA, len as u32)];
    assert_eq!(request(bench, IN, (at / 512) as u64, &[], &buffers).0, OK);
    bench.drivers[0].peek(DATA, len)
}

#[test]
fn writes_stay_above_a_base_that_is_read_where_nothing_was_written() {
    let content = pattern(STEP);
    let mut base = file(0);
    base.write_all(&content).unwrap();
    let mut bench = overlay(
        PoolConfig::new(4 << 20),
        1 << 20,
        Some(base.try_clone().unwrap()),
    );
    assert_eq!(read(&mut bench, 0, 8192), content[..8192]);
    assert_eq!(write(&mut bench, 4096, &[7; 512]), OK);
    let mut expected = content[..8192].to_vec();
    expected[4096..4608].fill(7);
    assert_eq!(read(&mut bench, 0, 8192), expected);
    // Past the base's end there are zeroes, and room.
    assert_eq!(read(&mut bench, 2 * STEP, 512), [0; 512]);
    assert_eq!(write(&mut bench, 2 * STEP, &[8; 512]), OK);
    assert_eq!(read(&mut bench, 2 * STEP, 512), [8; 512]);
    bench.drivers[0].poke(DATA, &range(0, 16, 0));
    assert_eq!(request(&mut bench, DISCARD, 0, &[(DATA, 16)], &[]).0, OK);
    assert_eq!(read(&mut bench, 0, 8192), [0; 8192]);
    assert_eq!(request(&mut bench, FLUSH, 0, &[], &[]).0, OK);
    let mut untouched = vec![0; STEP];
    base.seek(SeekFrom::Start(0)).unwrap();
    base.read_exact(&mut untouched).unwrap();
    assert_eq!(untouched, content);
}

#[test]
fn a_write_without_room_fails_alone_and_there_is_room_again_after_a_discard() {
    let mut bench = overlay(PoolConfig::new(LEAST_RAM), 4 << 20, None);
    let fits = LEAST_RAM as usize / STEP;
    for i in 0..fits {
        assert_eq!(write(&mut bench, i * STEP, &vec![i as u8 + 1; STEP]), OK);
    }
    assert_eq!(write(&mut bench, fits * STEP, &vec![9; STEP]), IOERR);
    for i in 0..fits {
        assert_eq!(read(&mut bench, i * STEP, 512), [i as u8 + 1; 512]);
    }
    bench.drivers[0].poke(DATA, &range(0, (STEP / 512) as u32, 0));
    assert_eq!(request(&mut bench, DISCARD, 0, &[(DATA, 16)], &[]).0, OK);
    assert_eq!(write(&mut bench, fits * STEP, &vec![9; STEP]), OK);
    assert!(!bench.failed());
}

#[test]
fn what_does_not_fit_into_ram_spills_and_reads_the_same() {
    let mut config = PoolConfig::new(LEAST_RAM);
    let spill = tempfile::tempfile().unwrap();
    config.spill = Some(Box::new(DiskFile::new(spill, Caching::Window)));
    let mut bench = overlay(config, 16 << 20, None);
    let chunks = 8 * LEAST_RAM as usize / STEP;
    let content = |i: usize| vec![(i % 251) as u8 + 1; STEP];
    for i in 0..chunks {
        assert_eq!(write(&mut bench, i * STEP, &content(i)), OK);
    }
    for i in 0..chunks {
        assert_eq!(read(&mut bench, i * STEP, STEP), content(i));
    }
}

#[test]
fn a_flush_that_is_a_disks_is_answered_when_the_file_has_what_was_written() {
    for (flush, reaches) in [(FlushPolicy::Disk, true), (FlushPolicy::Memory, false)] {
        let mut config = PoolConfig::new(4 << 20);
        let spill = tempfile::NamedTempFile::new().unwrap();
        let file = spill.reopen().unwrap();
        config.spill = Some(Box::new(DiskFile::new(file, Caching::Window)));
        config.flush = flush;
        let mut bench = overlay(config, 1 << 20, None);
        let content = pattern(STEP);
        assert_eq!(write(&mut bench, STEP, &content), OK);
        let spilled = || std::fs::read(spill.path()).unwrap();
        assert_eq!(spilled(), []);
        assert_eq!(request(&mut bench, FLUSH, 0, &[], &[]).0, OK);
        assert_eq!(spilled().starts_with(&content), reaches);
        assert_eq!(read(&mut bench, STEP, STEP), content);
    }
}
