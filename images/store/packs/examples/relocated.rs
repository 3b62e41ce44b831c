//! Makes a memory file that is like a booted guest's: a kernel that has relocated itself, and a program's pages, all at
//! places that a seed decides. Two of one kernel are as alike as two bakes are, where no guest can be booted.
//!
//! `cargo run --release -p kiln-packs --example relocated -- KERNEL PROGRAM SEED MIB OUT`. KERNEL is a bzImage with a zstd
//! payload, as Debian's are. OUT.ws is a working set: a fifth of the pages with data, in runs of four.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;

use anyhow::{Context, ensure};
use kiln_packs::PAGE;

/// Virtual address of physical address 0 in the kernel's own mapping.
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// What a kernel is aligned to, and moved by.
const STEP: u64 = 2 << 20;
/// Pages of the program that follow each other, as the guest's page cache has them.
const RUN: usize = 16;

/// Numbers that look random, the same each time.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % limit
    }
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kernel, program, seed, mib, out] = arguments.as_slice() else {
        anyhow::bail!("KERNEL PROGRAM SEED MIB OUT");
    };
    let mut numbers = Numbers(seed.parse()?);
    let payload = payload(&fs::read(kernel).with_context(|| format!("reading {kernel}"))?)?;
    let length = mib.parse::<usize>()? << 20;
    let mut memory = vec![0; length];

    let moved = (1 + numbers.below(400)) * STEP;
    let kernel = relocated(&payload, moved)?;
    ensure!(
        kernel.len() + (64 << 20) < length,
        "the memory is too small"
    );
    let room = (length - kernel.len()) as u64 / STEP;
    let place = (8 + numbers.below(room - 8)) as usize * STEP as usize;
    memory[place..place + kernel.len()].copy_from_slice(&kernel);

    let mut used: BTreeSet<usize> = (place / PAGE..(place + kernel.len()).div_ceil(PAGE)).collect();
    let program = fs::read(program).with_context(|| format!("reading {program}"))?;
    for pages in program.chunks(RUN * PAGE) {
        let first = loop {
            let first = numbers.below((length / PAGE - RUN) as u64) as usize;
            if used.range(first..first + RUN).next().is_none() {
                break first;
            }
        };
        used.extend(first..first + RUN);
        memory[first * PAGE..][..pages.len()].copy_from_slice(pages);
    }

    let has_data = |page: &usize| memory[page * PAGE..][..PAGE].iter().any(|byte| *byte != 0);
    let data: Vec<usize> = used.into_iter().filter(has_data).collect();
    let first = data.chunks(4).filter(|_| numbers.below(5) == 0).flatten();
    let first: Vec<String> = first.map(usize::to_string).collect();
    println!(
        "{} pages with data, {} of them first",
        data.len(),
        first.len()
    );
    fs::write(out, &memory)?;
    Ok(fs::write(format!("{out}.ws"), first.join(" "))?)
}

/// What a bzImage decompresses: an ELF file, and after it the kernel's relocations (Documentation/arch/x86/boot.rst).
fn payload(image: &[u8]) -> anyhow::Result<Vec<u8>> {
    let setup = (usize::from(*image.get(0x1f1).context("no kernel")?) + 1) * 512;
    let (offset, length) = (word(image, 0x248)? as usize, word(image, 0x24c)? as usize);
    let stored = image.get(setup + offset..setup + offset + length);
    let mut payload = Vec::new();
    // Behind the frame is its length.
    let mut decoder =
        zstd::Decoder::new(stored.context("the kernel is cut short")?)?.single_frame();
    decoder.read_to_end(&mut payload)?;
    Ok(payload)
}

/// The kernel as it lies in memory when it has moved by so many bytes.
fn relocated(payload: &[u8], moved: u64) -> anyhow::Result<Vec<u8>> {
    let headers = long(payload, 32)? as usize;
    let mut segments = Vec::new();
    for number in 0..usize::from(payload[56]) {
        let header = headers + number * 56;
        if word(payload, header)? == 1 {
            let field = |at| long(payload, header + at).map(|value| value as usize);
            // Offset in the file, physical address, length in the file and in memory.
            segments.push((field(8)?, field(24)?, field(32)?, field(40)?));
        }
    }
    let start = segments
        .iter()
        .map(|segment| segment.1)
        .min()
        .context("no segment")?;
    let end = segments
        .iter()
        .map(|segment| segment.1 + segment.3)
        .max()
        .unwrap_or(start);
    let mut kernel = vec![0; end - start];
    for (offset, address, length, _) in segments {
        kernel[address - start..][..length].copy_from_slice(&payload[offset..][..length]);
    }
    // Three lists of addresses, from the end of the payload backwards, each ended by a 0: words to add to, words to
    // subtract from, long words to add to (arch/x86/boot/compressed/misc.c, handle_relocations).
    let mut at = payload.len();
    for list in 0..3 {
        loop {
            at -= 4;
            let address = word(payload, at)?;
            if address == 0 {
                break;
            }
            // As the kernel does, with its sign.
            let address = i64::from(address.cast_signed()).cast_unsigned();
            let place = address.wrapping_sub(KERNEL_MAP) as usize - start;
            if list == 2 {
                let value = long(&kernel, place)?.wrapping_add(moved);
                kernel[place..place + 8].copy_from_slice(&value.to_le_bytes());
            } else {
                let moved = if list == 0 {
                    moved
                } else {
                    moved.wrapping_neg()
                };
                let value = word(&kernel, place)?.wrapping_add(moved as u32);
                kernel[place..place + 4].copy_from_slice(&value.to_le_bytes());
            }
        }
    }
    Ok(kernel)
}

fn word(bytes: &[u8], at: usize) -> anyhow::Result<u32> {
    let four = bytes.get(at..at + 4).context("the kernel is cut short")?;
    Ok(u32::from_le_bytes(four.try_into()?))
}

fn long(bytes: &[u8], at: usize) -> anyhow::Result<u64> {
    Ok(u64::from(word(bytes, at)?) | u64::from(word(bytes, at + 4)?) << 32)
}
