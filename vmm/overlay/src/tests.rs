//! Random requests against a plain array of bytes. Seeds are printed; `KILN_OVERLAY_SEED` repeats one.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};

use crate::{
    Attempt, Base, Caching, DiskFile, Error, FileBase, FlushPolicy, LEAST_RAM, Overlay, Pool,
    PoolConfig, SpillFile,
};

const SECTOR: usize = 512;
const DISK: usize = 6 << 20;

/// A spill file that fails when told to.
#[derive(Debug)]
struct Faulty {
    file: DiskFile,
    faults: Arc<Faults>,
}

#[derive(Debug, Default)]
struct Faults {
    /// Writes until one fails; below zero none does, at zero all do.
    countdown: AtomicI64,
    errno: AtomicU32,
    /// Every how many writes one is cut short; zero is never.
    short: AtomicU32,
    writes: AtomicU32,
    /// Those that the last sync came after.
    synced: AtomicU32,
}

impl SpillFile for Faulty {
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        let faults = &self.faults;
        let left = faults.countdown.load(Ordering::SeqCst);
        if left == 0 {
            let errno = faults.errno.load(Ordering::SeqCst);
            return Err(io::Error::from_raw_os_error(errno.cast_signed()));
        }
        if left > 0 {
            faults.countdown.store(left - 1, Ordering::SeqCst);
        }
        let short = faults.short.load(Ordering::SeqCst);
        let count = faults.writes.fetch_add(1, Ordering::SeqCst);
        if short > 0 && count.is_multiple_of(short) && buf.len() > 4096 {
            return self.file.write_at(&buf[..4096], offset);
        }
        self.file.write_at(buf, offset)
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.punch(offset, len)
    }
    fn sync(&self) -> io::Result<()> {
        let writes = self.faults.writes.load(Ordering::SeqCst);
        self.faults.synced.store(writes, Ordering::SeqCst);
        self.file.sync()
    }
}

/// Data in every other 100 KiB.
#[derive(Debug)]
struct Striped;

const STRIPE: u64 = 100 << 10;

fn below(offset: u64) -> u8 {
    if (offset / STRIPE).is_multiple_of(2) {
        (offset / 512 % 255) as u8 + 1
    } else {
        0
    }
}

impl Base for Striped {
    fn extent(&self, offset: u64) -> (bool, u64) {
        if offset >= DISK as u64 / 2 {
            return (false, u64::MAX);
        }
        let end = (offset / STRIPE + 1) * STRIPE;
        (
            (offset / STRIPE).is_multiple_of(2),
            end.min(DISK as u64 / 2),
        )
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        for (byte, at) in buf.iter_mut().zip(offset..) {
            *byte = below(at);
        }
        Ok(())
    }
}

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    /// A range of whole sectors: mostly short, sometimes long.
    fn range(&mut self, size: usize) -> (usize, usize) {
        let longest = [8, 64, 300, 2000][self.below(4)];
        let len = (1 + self.below(longest)) * SECTOR;
        let at = self.below((size - len) / SECTOR + 1) * SECTOR;
        (at, len)
    }
}

fn seed(default: u64) -> u64 {
    let seed = std::env::var("KILN_OVERLAY_SEED")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or_else(|| {
            let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
            default ^ (now.as_nanos() as u64 | 1)
        });
    println!("KILN_OVERLAY_SEED={seed}");
    seed
}

fn pool(flush: FlushPolicy) -> (Pool, Arc<Faults>) {
    let dir = tempfile::tempdir().unwrap();
    let dir = File::open(dir.path()).unwrap();
    let file = DiskFile::unlinked_in(std::os::fd::AsRawFd::as_raw_fd(&dir), Caching::Direct);
    let faults = Arc::new(Faults::default());
    faults.countdown.store(-1, Ordering::SeqCst);
    let spill = Faulty {
        file: file.unwrap(),
        faults: faults.clone(),
    };
    let pool = Pool::new(PoolConfig {
        spill: Some(Box::new(spill)),
        flush,
        ..PoolConfig::new(LEAST_RAM)
    });
    (pool, faults)
}

fn start_content(size: usize) -> Vec<u8> {
    (0..size as u64)
        .map(|at| if at < DISK as u64 / 2 { below(at) } else { 0 })
        .collect()
}

fn check(overlay: &Overlay, model: &[u8], at: usize, len: usize) {
    let mut found = vec![0xee; len];
    overlay.read(at as u64, &mut found[..]).unwrap();
    let differs = found
        .iter()
        .zip(&model[at..at + len])
        .position(|(a, b)| a != b);
    assert_eq!(differs, None, "in {at:#x}+{len:#x}");
}

/// After a failed write, each sector is as before or as written; the model takes what it is.
fn adopt(overlay: &Overlay, model: &mut [u8], at: usize, data: &[u8]) {
    let mut found = vec![0; data.len()];
    overlay.read(at as u64, &mut found[..]).unwrap();
    for (i, sector) in found.chunks(SECTOR).enumerate() {
        let range = at + i * SECTOR..at + (i + 1) * SECTOR;
        let new = &data[i * SECTOR..(i + 1) * SECTOR];
        assert!(
            sector == &model[range.clone()] || sector == new,
            "torn sector"
        );
        model[range].copy_from_slice(sector);
    }
}

fn run_model(rng: &mut Rng, flush: FlushPolicy, steps: usize) {
    let (mut pool, mut faults) = self::pool(flush);
    let mut overlay = Overlay::new(&pool, DISK as u64, Some(Box::new(Striped))).unwrap();
    let mut model = start_content(DISK);
    let mut failed_writes = 0;
    for _ in 0..steps {
        let (at, len) = rng.range(DISK);
        match rng.below(100) {
            0..45 => {
                let mut data = vec![0; len];
                for sector in data.chunks_mut(SECTOR) {
                    let value = rng.next().to_le_bytes();
                    sector
                        .iter_mut()
                        .zip(value.iter().cycle())
                        .for_each(|(a, b)| *a = *b);
                }
                match overlay.write(at as u64, &data[..]) {
                    Ok(()) => model[at..at + len].copy_from_slice(&data),
                    Err(Error::NoSpace | Error::SpillWrite(_)) => {
                        failed_writes += 1;
                        adopt(&overlay, &mut model, at, &data);
                    }
                    Err(e) => panic!("{e}"),
                }
            }
            45..75 => check(&overlay, &model, at, len),
            75..82 => {
                let mut found = vec![0; len];
                if overlay.try_read(at as u64, &mut found[..]).unwrap() == Attempt::Done {
                    assert!(found == model[at..at + len]);
                }
            }
            82..90 => {
                if rng.below(2) == 0 {
                    overlay.discard(at as u64, len as u64).unwrap();
                } else {
                    overlay.write_zeroes(at as u64, len as u64).unwrap();
                }
                model[at..at + len].fill(0);
            }
            90..93 => drop(overlay.flush()),
            93..96 => {
                let ram = LEAST_RAM + rng.below(4 << 20) as u64;
                pool.set_limits(ram, if rng.below(4) == 0 { 2 << 20 } else { u64::MAX });
            }
            // Saved and resumed: by another process, with RAM and a spill file of its own.
            96 => {
                let file = tempfile::tempfile().unwrap();
                overlay.save(&file).unwrap();
                let base = FileBase::new(file).unwrap();
                (pool, faults) = self::pool(flush);
                overlay = Overlay::new(&pool, DISK as u64, Some(Box::new(base))).unwrap();
            }
            _ => {
                let errno = [libc::ENOSPC, libc::EIO][rng.below(2)];
                faults.errno.store(errno.cast_unsigned(), Ordering::SeqCst);
                faults.short.store(rng.below(4) as u32, Ordering::SeqCst);
                let countdown = [-1, -1, 0, rng.below(20) as i64][rng.below(4)];
                faults.countdown.store(countdown, Ordering::SeqCst);
            }
        }
    }
    faults.countdown.store(-1, Ordering::SeqCst);
    check(&overlay, &model, 0, DISK);
    println!("{failed_writes} writes failed, {:?}", pool.stats());
    overlay.discard(0, DISK as u64).unwrap();
    check(&overlay, &vec![0; DISK], 0, DISK);
    assert_eq!(pool.stats().ram_bytes, 0);
}

#[test]
fn random_requests_and_faults_agree_with_a_plain_array() {
    let mut rng = Rng(seed(0x9e37_79b9));
    for _ in 0..2 {
        run_model(&mut rng, FlushPolicy::Memory, 1500);
    }
    run_model(&mut rng, FlushPolicy::Disk, 500);
}

#[test]
fn threads_in_their_own_parts_of_the_disk_do_not_disturb_each_other() {
    const PART: usize = 3 << 20;
    let seed = seed(0x1234_5678);
    let (pool, _) = pool(FlushPolicy::Memory);
    // Parts meet inside a chunk.
    let size = 4 * PART + 4 * SECTOR;
    let overlay = Overlay::new(&pool, size.next_multiple_of(SECTOR) as u64, None).unwrap();
    std::thread::scope(|scope| {
        for part in 0..4 {
            let overlay = &overlay;
            scope.spawn(move || {
                let mut rng = Rng(seed.wrapping_add(part as u64) | 1);
                let start = part * (PART + SECTOR);
                let mut model = vec![0; PART];
                for _ in 0..2000 {
                    let (at, len) = rng.range(PART);
                    let offset = (start + at) as u64;
                    match rng.below(10) {
                        0..5 => {
                            let data = vec![rng.next() as u8; len];
                            overlay.write(offset, &data[..]).unwrap();
                            model[at..at + len].copy_from_slice(&data);
                        }
                        5..9 => {
                            let mut found = vec![0; len];
                            overlay.read(offset, &mut found[..]).unwrap();
                            assert!(found == model[at..at + len]);
                        }
                        _ => {
                            overlay.discard(offset, len as u64).unwrap();
                            model[at..at + len].fill(0);
                        }
                    }
                }
            });
        }
    });
    println!("{:?}", pool.stats());
}

#[test]
fn overlapping_writes_never_tear_a_sector() {
    let seed = seed(0x5555);
    let (pool, _) = pool(FlushPolicy::Memory);
    let overlay = Overlay::new(&pool, 3 << 20, None).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let overlay = &overlay;
            scope.spawn(move || {
                let mut rng = Rng(seed.wrapping_add(thread) | 1);
                for _ in 0..2000 {
                    let (at, len) = rng.range(3 << 20);
                    let mut data = vec![rng.next() as u8; len];
                    if rng.below(2) == 0 {
                        overlay.write(at as u64, &data[..]).unwrap();
                    } else {
                        overlay.read(at as u64, &mut data[..]).unwrap();
                        let torn = |s: &[u8]| s.iter().any(|byte| *byte != s[0]);
                        assert!(!data.chunks(SECTOR).any(torn));
                    }
                }
            });
        }
    });
}

#[test]
fn full_spill_disk_fails_the_write_and_nothing_before_it() {
    let (pool, faults) = pool(FlushPolicy::Memory);
    let overlay = Overlay::new(&pool, 64 << 20, None).unwrap();
    faults
        .errno
        .store(libc::ENOSPC.cast_unsigned(), Ordering::SeqCst);
    faults.countdown.store(5, Ordering::SeqCst);
    let chunk = |i: u64| vec![(i % 250) as u8 + 1; 64 << 10];
    let mut done = 0;
    let error = loop {
        match overlay.write(done << 16, &chunk(done)[..]) {
            Ok(()) => done += 1,
            Err(e) => break e,
        }
    };
    assert_eq!(error.errno(), libc::ENOSPC);
    assert!(done >= 16);
    for i in 0..done {
        let mut found = vec![0; 64 << 10];
        overlay.read(i << 16, &mut found[..]).unwrap();
        assert!(found == chunk(i), "chunk {i}");
    }
    // Space again: the same write goes through.
    faults.countdown.store(-1, Ordering::SeqCst);
    overlay.write(done << 16, &chunk(done)[..]).unwrap();
    drop(overlay);
    // A worker may be holding on to the disk for the move it is in.
    let since = std::time::Instant::now();
    while pool.stats().ram_bytes > 0 {
        assert!(since.elapsed().as_secs() < 20, "{:?}", pool.stats());
        std::thread::yield_now();
    }
}

#[test]
fn ram_stays_within_the_limit_and_discard_gives_the_disk_back() {
    let (pool, _) = pool(FlushPolicy::Memory);
    let overlay = Overlay::new(&pool, 64 << 20, None).unwrap();
    for i in 0..32 {
        overlay.write(i << 20, &vec![7; 1 << 20][..]).unwrap();
        assert!(pool.stats().ram_bytes <= LEAST_RAM);
    }
    assert!(pool.stats().spill_bytes >= 31 << 20);
    overlay.discard(0, 64 << 20).unwrap();
    assert_eq!(pool.stats().ram_bytes, 0);
    let since = std::time::Instant::now();
    while pool.stats().spill_bytes > 0 {
        assert!(since.elapsed().as_secs() < 20, "{:?}", pool.stats());
        std::thread::yield_now();
    }
}

#[test]
fn flush_as_a_disks_is_answered_when_the_file_has_all_and_is_synced() {
    let (pool, faults) = pool(FlushPolicy::Disk);
    let done = || {
        let load = |count: &AtomicU32| count.load(Ordering::SeqCst);
        (load(&faults.writes), load(&faults.synced))
    };
    let overlay = Overlay::new(&pool, 4 << 20, None).unwrap();
    assert!(!overlay.flush_is_free());
    // Far below the threshold, and in two chunks.
    overlay.write(0, &[7; 4096][..]).unwrap();
    overlay.write(1 << 20, &[8; 512][..]).unwrap();
    assert_eq!(done(), (0, 0));
    overlay.flush().unwrap();
    assert_eq!(pool.stats().spilled_bytes, 2 * 4096);
    let (writes, synced) = done();
    assert!(writes > 0 && synced == writes, "{writes}, {synced}");
    // Only what is new goes there again, and it is read from RAM still.
    overlay.write(512, &[9; 512][..]).unwrap();
    overlay.flush().unwrap();
    assert_eq!(pool.stats().spilled_bytes, 3 * 4096);
    assert_eq!(done(), (writes + 1, writes + 1));
    assert_eq!(pool.stats().ram_bytes, 2 * 4096);
    faults
        .errno
        .store(libc::EIO.cast_unsigned(), Ordering::SeqCst);
    faults.countdown.store(0, Ordering::SeqCst);
    overlay.write(0, &[1; 512][..]).unwrap();
    assert_eq!(overlay.flush().unwrap_err().errno(), libc::EIO);
    faults.countdown.store(-1, Ordering::SeqCst);
    overlay.flush().unwrap();
    let mut found = [0; 1536];
    overlay.read(0, &mut found[..]).unwrap();
    assert_eq!([found[0], found[512], found[1024]], [1, 9, 7]);
}

#[test]
fn flush_of_what_lasts_as_long_as_the_pod_does_nothing() {
    let (pool, faults) = pool(FlushPolicy::Memory);
    let overlay = Overlay::new(&pool, 4 << 20, None).unwrap();
    overlay.write(0, &[7; 4096][..]).unwrap();
    assert!(overlay.flush_is_free());
    overlay.flush().unwrap();
    assert_eq!(faults.writes.load(Ordering::SeqCst), 0);
}

#[test]
fn saved_content_takes_no_more_disk_than_it_has_data() {
    use std::os::unix::fs::MetadataExt;
    let (pool, _) = pool(FlushPolicy::Memory);
    // Ends inside a chunk and inside a page.
    let size = (64 << 20) + 3 * SECTOR as u64;
    let overlay = Overlay::new(&pool, size, None).unwrap();
    overlay.write(9 << 20, &[7; 4096][..]).unwrap();
    overlay.write(30 << 20, &[0; 1 << 20][..]).unwrap();
    overlay.write(size - 512, &[8; 512][..]).unwrap();
    let file = tempfile::tempfile().unwrap();
    assert_eq!(overlay.save(&file).unwrap(), 4096 + 3 * 512);
    assert_eq!(file.metadata().unwrap().len(), size);
    assert!(file.metadata().unwrap().blocks() * 512 <= 64 << 10);
    let mut end = [0; 512];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut end, size - 512).unwrap();
    assert_eq!(end, [8; 512]);
}
