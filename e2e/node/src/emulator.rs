//! QEMU as the node's CPUs. Two faults of its emulated SVM end guests at random (docs/node.md); they are mended in a
//! copy of the program in memory, at places found by its own symbols, and so is what takes a good part of its time. An
//! unknown build runs as it is.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Where distributions keep what QEMU otherwise finds beside its program.
const DATA: &str = "/usr/share/qemu";
/// The first major version whose emulation carried the node through code that changes under it.
const SOUND: u32 = 10;

pub(crate) struct Emulator {
    program: PathBuf,
    /// The mended copy.
    copy: Option<File>,
}

impl Emulator {
    /// The program that `KILN_QEMU` names, or the one on the path, as it is.
    pub(crate) fn installed() -> Self {
        let program = std::env::var_os("KILN_QEMU").unwrap_or_else(|| "qemu-system-x86_64".into());
        Self {
            program: program.into(),
            copy: None,
        }
    }

    /// The same for emulated CPUs: mended, and what there is to say about it.
    pub(crate) fn for_emulation() -> (Self, Vec<String>) {
        let mut emulator = Self::installed();
        let mut said = Vec::new();
        said.extend(emulator.warn_of_age());
        match emulator.mend() {
            Ok(unknown) => said.extend(unknown.into_iter().map(|what| {
                format!(
                    "this QEMU may {what}: it is not a build that could be mended (docs/node.md)"
                )
            })),
            Err(error) => said.push(format!("QEMU runs as it is, with its faults: {error:#}")),
        }
        (emulator, said)
    }

    pub(crate) fn command(&self) -> Command {
        match &self.copy {
            None => Command::new(&self.program),
            Some(copy) => {
                let mut command = Command::new(format!("/proc/self/fd/{}", copy.as_raw_fd()));
                command.args(["-L", DATA]);
                command
            }
        }
    }

    fn warn_of_age(&self) -> Option<String> {
        let output = Command::new(&self.program).arg("--version").output().ok()?;
        let major = major_version(&String::from_utf8_lossy(&output.stdout))?;
        (major < SOUND).then(|| {
            format!(
                "QEMU {major} emulates changing code wrongly, which ends in panics of the node; \
                 use {SOUND} or later (make setup; KILN_QEMU=PATH)"
            )
        })
    }

    /// What could not be mended.
    fn mend(&mut self) -> Result<Vec<&'static str>> {
        let path = find(&self.program).context("it is not on the path")?;
        let mut program =
            std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        let unknown = mend(&mut program);
        // Nothing to say if it is not there: it costs time alone.
        let _ = forget_jumps_at_once(&mut program);
        let fd = memfd_create(c"qemu", MFdFlags::MFD_CLOEXEC).context("making a file in memory")?;
        let mut copy = File::from(fd);
        copy.write_all(&program)
            .context("filling a file in memory")?;
        self.copy = Some(reopened(&copy)?);
        Ok(unknown)
    }
}

/// A program open for writing can't be run.
fn reopened(file: &File) -> Result<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    File::open(path).context("opening a file in memory again")
}

fn find(program: &Path) -> Option<PathBuf> {
    if program.components().count() > 1 {
        return Some(program.to_owned());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join(program))
        .find(|path| path.is_file())
}

fn major_version(text: &str) -> Option<u32> {
    let version = text.strip_prefix("QEMU emulator version ")?;
    version.split('.').next()?.parse().ok()
}

/// Mends what is known; names what is not found.
fn mend(program: &mut [u8]) -> Vec<&'static str> {
    let mends: [(&str, Mend); 2] = [
        ("deliver an interrupt to a guest twice", keep_no_vector),
        ("lose flags of the first CPU", touch_no_first_cpu),
    ];
    let failed = |(what, mend): (&'static str, Mend)| mend(program).is_none().then_some(what);
    mends.into_iter().filter_map(failed).collect()
}

type Mend = fn(&mut [u8]) -> Option<()>;

/// As it enters a guest with an interrupt, QEMU delivers this at once, and keeps its vector as an exception yet to come.
/// Without the store that keeps it there is none.
fn keep_no_vector(program: &mut [u8]) -> Option<()> {
    /// How far before the delivery.
    const NEAR: usize = 96;
    const NOP: [u8; 6] = [0x66, 0x0f, 0x1f, 0x44, 0, 0];
    let enter = symbol(program, "helper_vmrun")?;
    let deliver = symbol(program, "do_interrupt_x86_hardirq")?;
    let code = program.get(enter.start..enter.start + enter.length)?;
    let is_delivery = |at: &usize| {
        let relative = code.get(at + 1..at + 5).and_then(signed);
        let next = (enter.start + at + 5) as i64;
        code[*at] == 0xe8 && relative.map(|by| next + by) == Some(deliver.start as i64)
    };
    let call = only((0..code.len()).filter(is_delivery))?;
    // `mov [register - offset], register` of 32 bits: what is before the emulated CPU's registers is the generic CPU's.
    let is_store = |at: &usize| {
        let (mode, base) = (code[at + 1] >> 6, code[at + 1] & 7);
        let offset = code.get(at + 2..at + 6).and_then(signed);
        code[*at] == 0x89
            && mode == 2
            && base != 4
            && offset.is_some_and(|by| (-0x8000..0).contains(&by))
    };
    let store = only((call.checked_sub(NEAR)?..call).filter(is_store))?;
    let at = enter.start + store;
    program.get_mut(at..at + NOP.len())?.copy_from_slice(&NOP);
    Some(())
}

/// Any CPU that loads an FPU state rewrites the first CPU's flags, unlocked, for the sake of a signal that no 64-bit system
/// uses.
fn touch_no_first_cpu(program: &mut [u8]) -> Option<()> {
    const RETURN: u8 = 0xc3;
    let clear = symbol(program, "cpu_clear_ignne")?;
    *program.get_mut(clear.start)? = RETURN;
    Some(())
}

/// Each change of address space, and a guest that is entered or left makes several, has a CPU forget where 4096 jumps
/// lead. One string instruction takes a third of the time of a loop over every other word.
fn forget_jumps_at_once(program: &mut [u8]) -> Option<()> {
    /// `lea rax, [rdx + 16]; add rdx, 16 + 4096 * 16`: first and last entry, from their table's address in `rdx`.
    const BOUNDS: [u8; 11] = [
        0x48, 0x8d, 0x42, 0x10, 0x48, 0x81, 0xc2, 0x10, 0x00, 0x01, 0x00,
    ];
    /// `mov qword [rax], 0; add rax, 16; cmp rax, rdx; jne`: the first of an entry's two words.
    const LOOP: [u8; 16] = [
        0x48, 0xc7, 0x00, 0, 0, 0, 0, 0x48, 0x83, 0xc0, 0x10, 0x48, 0x39, 0xd0, 0x75, 0xf0,
    ];
    /// `lea rdi, [rdx + 16]; xor eax, eax; mov ecx, 4096 * 2; rep stosq; xor edx, edx; xor edi, edi; ret`: both words.
    const AT_ONCE: [u8; 19] = [
        0x48, 0x8d, 0x7a, 0x10, 0x31, 0xc0, 0xb9, 0x00, 0x20, 0, 0, 0xf3, 0x48, 0xab, 0x31, 0xd2,
        0x31, 0xff, 0xc3,
    ];
    let flush = symbol(program, "tcg_flush_jmp_cache")?;
    let code = program.get(flush.start..flush.start + flush.length)?;
    let found = |what: &[u8]| only((0..code.len()).filter(|&at| code[at..].starts_with(what)));
    let (bounds, looped) = (found(&BOUNDS)?, found(&LOOP)?);
    if looped < bounds + AT_ONCE.len() {
        return None;
    }
    let at = flush.start + bounds;
    program
        .get_mut(at..at + AT_ONCE.len())?
        .copy_from_slice(&AT_ONCE);
    Some(())
}

/// The one there is.
fn only(mut found: impl Iterator<Item = usize>) -> Option<usize> {
    let first = found.next()?;
    found.next().is_none().then_some(first)
}

fn signed(bytes: &[u8]) -> Option<i64> {
    Some(i32::from_le_bytes(bytes.try_into().ok()?).into())
}

fn unsigned<const LENGTH: usize>(bytes: &[u8], at: usize) -> Option<usize> {
    let mut wide = [0; 8];
    wide[..LENGTH].copy_from_slice(bytes.get(at..at.checked_add(LENGTH)?)?);
    usize::try_from(u64::from_le_bytes(wide)).ok()
}

/// Where a function is in the file. Code lies in QEMU's file where it lies in memory.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    start: usize,
    length: usize,
}

/// A function that an ELF program exports.
fn symbol(elf: &[u8], name: &str) -> Option<Place> {
    const DYNAMIC_SYMBOLS: usize = 11;
    const SECTION: usize = 64;
    const SYMBOL: usize = 24;
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let table = unsigned::<8>(elf, 0x28)?;
    let count = unsigned::<2>(elf, 0x3c)?;
    let header = |index: usize| elf.get(table + index * SECTION..)?.get(..SECTION);
    let content = |header: &[u8]| {
        let (at, length) = (unsigned::<8>(header, 0x18)?, unsigned::<8>(header, 0x20)?);
        elf.get(at..at.checked_add(length)?)
    };
    let symbols = (0..count)
        .filter_map(header)
        .find(|header| unsigned::<4>(header, 4) == Some(DYNAMIC_SYMBOLS))?;
    let names = content(header(unsigned::<4>(symbols, 0x28)?)?)?;
    let is_named = |symbol: &&[u8]| {
        let rest = unsigned::<4>(symbol, 0).and_then(|at| names.get(at..));
        rest.is_some_and(|rest| {
            rest.starts_with(name.as_bytes()) && rest.get(name.len()) == Some(&0)
        })
    };
    let symbol = content(symbols)?.chunks_exact(SYMBOL).find(is_named)?;
    let place = Place {
        start: unsigned::<8>(symbol, 8)?,
        length: unsigned::<8>(symbol, 16)?,
    };
    (place.start > 0).then_some(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENTER: usize = 0x400;
    const DELIVER: usize = 0x600;
    const CLEAR: usize = 0x700;
    const STORE: usize = ENTER + 0x80;

    /// A program with the three functions; the first stores the vector and then calls the second.
    fn program() -> Vec<u8> {
        let mut elf = vec![0; 0x800];
        let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"\x7fELF\x02\x01");
        put(0x28, &0x40_u64.to_le_bytes());
        put(0x3c, &2_u16.to_le_bytes());
        // Sections: symbols, whose names are in the second.
        put(0x44, &11_u32.to_le_bytes());
        put(0x58, &0x100_u64.to_le_bytes());
        put(0x60, &(3 * 24_u64).to_le_bytes());
        put(0x68, &1_u32.to_le_bytes());
        put(0x98, &0x200_u64.to_le_bytes());
        put(0xa0, &0x100_u64.to_le_bytes());
        put(
            0x201,
            b"helper_vmrun\0do_interrupt_x86_hardirq\0cpu_clear_ignne\0",
        );
        for (index, (name, start)) in [(1_u32, ENTER), (14, DELIVER), (39, CLEAR)]
            .into_iter()
            .enumerate()
        {
            let at = 0x100 + index * 24;
            put(at, &name.to_le_bytes());
            put(at + 8, &(start as u64).to_le_bytes());
            put(at + 16, &0x100_u64.to_le_bytes());
        }
        put(STORE, &[0x89, 0xb3, 0x10, 0xd7, 0xff, 0xff]);
        let call = STORE + 0x20;
        put(call, &[0xe8]);
        put(call + 1, &((DELIVER - call - 5) as u32).to_le_bytes());
        elf
    }

    #[test]
    fn known_faults_are_mended() {
        let (mut mended, before) = (program(), program());
        assert_eq!(mend(&mut mended), Vec::<&str>::new());
        assert_eq!(mended[CLEAR], 0xc3);
        let changed: Vec<_> = (0..before.len())
            .filter(|&at| mended[at] != before[at])
            .collect();
        let expected: Vec<_> = (STORE..STORE + 6).chain([CLEAR]).collect();
        assert_eq!(changed, expected);
    }

    #[test]
    fn jumps_are_forgotten_by_one_instruction() {
        const FORGET: usize = DELIVER;
        // As QEMU 10 has it, from the table's address on.
        let loops = [
            0x48, 0x8d, 0x42, 0x10, 0x48, 0x81, 0xc2, 0x10, 0, 1, 0, 0x66, 0x0f, 0x1f, 0x84, 0, 0,
            0, 0, 0, 0x48, 0xc7, 0, 0, 0, 0, 0, 0x48, 0x83, 0xc0, 0x10, 0x48, 0x39, 0xd0, 0x75,
            0xf0, 0xc3,
        ];
        let mut other = program();
        other[0x20e..0x222].copy_from_slice(b"tcg_flush_jmp_cache\0");
        let mut known = other.clone();
        known[FORGET..FORGET + loops.len()].copy_from_slice(&loops);
        let before = other.clone();
        assert_eq!(forget_jumps_at_once(&mut other), None);
        assert!(other == before);
        let before = known.clone();
        forget_jumps_at_once(&mut known).unwrap();
        assert_eq!(known[FORGET + 11..FORGET + 14], [0xf3, 0x48, 0xab]);
        assert_eq!(known[FORGET + 18], 0xc3);
        assert_eq!(known[..FORGET], before[..FORGET]);
        assert_eq!(known[FORGET + 19..], before[FORGET + 19..]);
    }

    #[test]
    fn what_is_not_as_known_stays_as_it_is() {
        let mut two_stores = program();
        two_stores[STORE + 8..STORE + 14].copy_from_slice(&[0x89, 0xb3, 0x20, 0xd7, 0xff, 0xff]);
        two_stores[0x201 + 38] = b'x';
        let before = two_stores.clone();
        assert_eq!(mend(&mut two_stores).len(), 2);
        assert!(two_stores == before);
        for length in 0..program().len() {
            mend(&mut program()[..length]);
        }
        assert_eq!(mend(&mut b"#!/bin/sh\n".to_vec()).len(), 2);
    }

    #[test]
    fn version_is_read() {
        assert_eq!(
            major_version("QEMU emulator version 10.0.2 (Debian)"),
            Some(10)
        );
        assert_eq!(major_version("something else"), None);
    }
}
