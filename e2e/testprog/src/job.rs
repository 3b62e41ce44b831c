//! Jobs that write: one that is born, works and dies; one that syncs all the time; one that grows.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::load::Random;
use crate::text::say;

const MIB: usize = 1 << 20;
/// A source file of the tree.
const FILE: usize = 32 << 10;
/// Files in a directory.
const WIDTH: usize = 32;

/// Unpacks a tree of `mib` MiB, builds something of each directory and syncs that, and deletes all of it.
pub(crate) fn short(root: &str, mib: usize) -> Result<()> {
    let root = Path::new(root);
    let mut random = Random::new(1);
    let content: Vec<u8> = (0..FILE / 8)
        .flat_map(|_| random.next().to_le_bytes())
        .collect();
    let directories: Vec<PathBuf> = (0..(mib * MIB).div_ceil(FILE * WIDTH))
        .map(|number| root.join(format!("part-{number}")))
        .collect();
    for directory in &directories {
        fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
        for number in 0..WIDTH {
            let path = directory.join(format!("source-{number}"));
            fs::write(&path, &content).with_context(|| path.display().to_string())?;
        }
    }
    for directory in &directories {
        build(directory)?;
    }
    for directory in &directories {
        fs::remove_dir_all(directory).with_context(|| directory.display().to_string())?;
    }
    say("done")
}

/// Reads every source of a directory and writes an eighth of it as the result.
fn build(directory: &Path) -> Result<()> {
    let path = directory.join("result");
    let mut result = File::create(&path).with_context(|| path.display().to_string())?;
    let mut content = Vec::with_capacity(FILE);
    for number in 0..WIDTH {
        content.clear();
        File::open(directory.join(format!("source-{number}")))?.read_to_end(&mut content)?;
        if content.len() != FILE {
            bail!("source-{number} is {} bytes long", content.len());
        }
        result.write_all(&content[..FILE / 8])?;
    }
    result.sync_all().context("syncing a result")
}

/// Appends 4 KiB and syncs, `count` times.
pub(crate) fn syncs(root: &str, count: u32) -> Result<()> {
    let path = Path::new(root).join("journal");
    let mut file = File::create(&path).with_context(|| path.display().to_string())?;
    for number in 0..count {
        file.write_all(&[number as u8; 4096])?;
        file.sync_all().context("syncing")?;
    }
    fs::remove_file(&path)?;
    say("done")
}

/// Writes `mib` MiB in synced steps of `step` MiB, and prints after each how many MiB there are and how many
/// milliseconds it took.
pub(crate) fn grow(root: &str, mib: usize, step: usize) -> Result<()> {
    let path = Path::new(root).join("growing");
    let mut file = File::create(&path).with_context(|| path.display().to_string())?;
    let mut random = Random::new(2);
    let content: Vec<u8> = (0..MIB / 8)
        .flat_map(|_| random.next().to_le_bytes())
        .collect();
    for number in 1..=mib / step.max(1) {
        let begin = Instant::now();
        for _ in 0..step {
            file.write_all(&content)?;
        }
        file.sync_data().context("syncing")?;
        say(&format!(
            "{} {:.3}",
            number * step,
            begin.elapsed().as_secs_f64() * 1000.0
        ))?;
    }
    fs::remove_file(&path)?;
    say("done")
}
