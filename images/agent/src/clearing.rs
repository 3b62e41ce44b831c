//! Fills free memory with zeros: what was in use once would be part of every snapshot otherwise.
//!
//! A process takes the memory (the kernel hands out cleared pages), and gives it back by its end. Near the end somebody else
//! may find none, whatever is left alone. So it is a process of its own, the one that the kernel kills then: all that it took
//! is cleared.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use crate::resources::{free_memory, total_memory};
use crate::sys::Pages;

/// The argument of the process that takes.
pub(crate) const ARGUMENT: &str = "--take-free-memory";
/// What it says when it has all.
const TAKEN: &[u8] = b"taken";

/// What the kernel keeps free for itself in all, and of its low memory, with what it keeps meanwhile, when nothing else goes
/// on. Memory that counts as free and may not be taken would be waited for in vain.
const RESERVES: [(&str, &str); 2] = [
    ("/proc/sys/vm/lowmem_reserve_ratio", "0 0 0"),
    ("/proc/sys/vm/min_free_kbytes", "512"),
];
/// What is left alone: whoever needs memory meanwhile must find some.
const LEFT_ALONE: usize = 3 << 20;
/// The most and the least that is taken before looking again at how much is left.
const STRIDE: (usize, usize) = (128 << 10, 8 << 20);

/// Clears it. Blocks the thread.
pub(crate) fn clear_free_memory() -> io::Result<()> {
    let mut before = Vec::new();
    for (file, _) in RESERVES {
        before.push((file, fs::read_to_string(file)?));
    }
    for (file, meanwhile) in RESERVES {
        fs::write(file, meanwhile)?;
    }
    let taker = start();
    for (file, value) in before {
        fs::write(file, value.trim())?;
    }
    // Given back when the kernel keeps as much as ever.
    taker?.end()
}

/// A process that has all free memory.
struct Taker(std::process::Child);

/// Returns when it has it, or was killed for it.
fn start() -> io::Result<Taker> {
    // The reaper collects every child, this one too.
    let mut child = Command::new("/proc/self/exe")
        .arg0("kiln-agent-taker")
        .arg(ARGUMENT)
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut told = Vec::new();
    if let Some(output) = child.stdout.as_mut() {
        output.take(TAKEN.len() as u64).read_to_end(&mut told)?;
    }
    if told != TAKEN {
        tracing::warn!("free memory was not cleared to its end: who took it was killed");
    }
    Ok(Taker(child))
}

impl Taker {
    /// Returns when the memory is free again.
    fn end(mut self) -> io::Result<()> {
        drop(self.0.stdin.take());
        // A process that ends gives its memory back before it closes its files.
        if let Some(mut output) = self.0.stdout.take() {
            output.read_to_end(&mut Vec::new())?;
        }
        Ok(())
    }
}

/// The process that takes: until its input ends.
pub(crate) fn serve() -> io::Result<()> {
    fs::write("/proc/self/oom_score_adj", "1000")?;
    let _taken = take()?;
    let mut output = io::stdout();
    output.write_all(TAKEN)?;
    output.flush()?;
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// All that is free, in large pieces and in small ones.
fn take() -> io::Result<[Pages; 2]> {
    let total = usize::try_from(total_memory()?).unwrap_or(usize::MAX);
    // All room beforehand: with nothing left the kernel could note no further piece.
    let large = Pages::room_for(total)?;
    let small = Pages::room_for(LEFT_ALONE)?;
    small.one_by_one()?;
    let mut taken = 0;
    while taken < total {
        let free = usize::try_from(free_memory()?).unwrap_or(usize::MAX);
        let more = (free.saturating_sub(LEFT_ALONE) / 2).min(total - taken);
        if more < STRIDE.0 {
            break;
        }
        let more = more.min(STRIDE.1) & !0xfff;
        large.take(taken..taken + more)?;
        taken += more;
    }
    // What was left alone lies about in small pieces, which the kernel hands out before it breaks a large one up. So
    // with a large one given back there is enough for everyone, and what is taken now is what was left.
    if taken > STRIDE.1 {
        large.give_back(0..STRIDE.1)?;
        small.take(0..LEFT_ALONE)?;
    }
    Ok([large, small])
}
