//! A job that syncs all the time.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};

use crate::text::say;

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
