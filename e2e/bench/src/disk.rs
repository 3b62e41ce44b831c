//! A disk as clouds rent it. The node's own is the host's page cache: as fast as a disk can be.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use kiln_e2e::node;

/// What writes to the disk lies here: containers' own layers, and kiln's overlays beyond their RAM.
const DATA: &str = "/var/lib";
/// One write after another is then answered within a millisecond, as a volume in a network does it.
const WRITES_A_SECOND: u32 = 1000;
const MIB_A_SECOND: u32 = 125;

/// Pods share such a disk as long as this lives.
#[derive(Debug)]
pub(crate) struct Rented {
    file: PathBuf,
    device: String,
}

impl Rented {
    pub(crate) fn by_pods() -> Result<Self> {
        let rented = Rented {
            file: node::tests_cgroup()?.join("io.max"),
            device: disk_of(Path::new(DATA))?,
        };
        let bytes = u64::from(MIB_A_SECOND) << 20;
        rented
            .set(&format!("wiops={WRITES_A_SECOND} wbps={bytes}"))
            .with_context(|| format!("limiting writes by {}", rented.file.display()))?;
        Ok(rented)
    }

    fn set(&self, limits: &str) -> std::io::Result<()> {
        fs::write(&self.file, format!("{} {limits}", self.device))
    }
}

impl Drop for Rented {
    fn drop(&mut self) {
        // Fails if the cgroup went first, and the limits with it.
        let _ = self.set("wiops=max wbps=max");
    }
}

/// Number of the disk (limits are not for partitions) that a folder is on.
fn disk_of(folder: &Path) -> Result<String> {
    let device = fs::metadata(folder)
        .with_context(|| folder.display().to_string())?
        .dev();
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    let own = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    let own = own.canonicalize().with_context(|| {
        format!(
            "{} is not on a disk of its own file system",
            folder.display()
        )
    })?;
    let disk = match (own.join("partition").exists(), own.parent()) {
        (true, Some(disk)) => disk,
        _ => &own,
    };
    let number = fs::read_to_string(disk.join("dev")).context("a disk without a number")?;
    match number.trim() {
        "" => bail!("{} has no number", disk.display()),
        number => Ok(number.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_no_disk_is_refused_by_name() {
        let error = disk_of(Path::new("/proc")).unwrap_err();
        assert!(format!("{error:#}").contains("/proc"), "{error:#}");
    }
}
