//! Using memory and CPU in a way that can be predicted.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::text::say;

const MIB: usize = 1 << 20;
const PAGE: usize = 4096;

/// Touches `mib` MiB in steps of `step` MiB, prints the sum after each step, and holds them until
/// the process is killed. Every page gets bytes of its own, so nothing can merge or compress them.
pub(crate) fn fill(mib: usize, step: usize) -> Result<()> {
    if step == 0 {
        bail!("a step of 0 MiB never gets there");
    }
    let mut held: Vec<Vec<u8>> = Vec::new();
    let mut random = Random::new(0x6b69_6c6e);
    let mut filled = 0;
    while filled < mib {
        let size = step.min(mib - filled);
        let mut block = vec![0u8; size * MIB];
        for page in block.chunks_mut(PAGE) {
            page[..8].copy_from_slice(&random.next().to_le_bytes());
        }
        held.push(block);
        filled += size;
        say(&format!("filled {filled}"))?;
    }
    crate::process::wait_for_end()?;
    // The compiler may not give the memory back before the wait is over.
    std::hint::black_box(&held);
    Ok(())
}

/// Computes for `seconds` of wall time on each of `threads` threads, then prints the CPU time used.
pub(crate) fn burn(seconds: f64, threads: usize) -> Result<()> {
    say("burning")?;
    let until = Instant::now() + Duration::from_secs_f64(seconds);
    let workers: Vec<_> = (0..threads.max(1))
        .map(|index| {
            std::thread::spawn(move || {
                let mut random = Random::new(index as u64 + 1);
                let mut rounds = 0u64;
                while Instant::now() < until {
                    for _ in 0..10_000 {
                        std::hint::black_box(random.next());
                    }
                    rounds += 1;
                }
                rounds
            })
        })
        .collect();
    let mut rounds = 0;
    for worker in workers {
        rounds += worker.join().unwrap_or(0);
    }
    say(&format!(
        "burned cpu_ms={} rounds={rounds}",
        cpu_time().as_millis()
    ))
}

/// CPU time this process has used so far.
fn cpu_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a live timespec, which is all the call writes to.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    if result != 0 {
        return Duration::ZERO;
    }
    Duration::new(
        time.tv_sec.unsigned_abs(),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

/// splitmix64: the same bytes for the same seed, everywhere.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Random(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_is_the_published_one() {
        // First values of splitmix64 for seed 1234567, from its reference implementation.
        let mut random = Random::new(1_234_567);
        assert_eq!(random.next(), 6_457_827_717_110_365_317);
        assert_eq!(random.next(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn a_step_of_nothing_is_refused() {
        assert!(fill(1, 0).is_err());
    }
}
