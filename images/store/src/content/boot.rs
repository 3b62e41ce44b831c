//! Tells one boot of the machine from the next.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use crate::Error;
use crate::error::Context;

/// The kernel's name for this boot. Read once in a process.
pub(crate) fn id() -> Result<&'static str, Error> {
    static ID: OnceLock<String> = OnceLock::new();
    if let Some(id) = ID.get() {
        return Ok(id);
    }
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = fs::read_to_string(path).context("reading", path)?;
    Ok(ID.get_or_init(|| text.trim_end().to_owned()))
}
