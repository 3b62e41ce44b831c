//! Room for baked μVMs, for spilled writes, and for pods' memory.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::{Check, System};
use crate::output::size;

const DISK_LEAST: u64 = 256 << 20;
const DISK_GOOD: u64 = 2 << 30;
const MEMORY_LEAST: u64 = 256 << 20;
const MEMORY_GOOD: u64 = 1 << 30;

/// The store, and next to it the files that overlays spill to.
pub(super) fn disk(system: &System) -> Check {
    let store = system.at(&system.store);
    let Some(dir) = store.ancestors().find(|dir| dir.is_dir()) else {
        return Check::fail(
            "disk",
            format!("{} has no parent", store.display()),
            "mount a disk",
        );
    };
    match available(dir) {
        Ok(bytes) => disk_with(&system.store, bytes),
        Err(error) => Check::warn(
            "disk",
            format!("the room on {} is unknown: {error}", dir.display()),
            "see `df`",
        ),
    }
}

fn disk_with(store: &Path, bytes: u64) -> Check {
    let found = format!("{} available for {}", size(bytes), store.display());
    let remedy = format!("make room there, or mount a disk on {}", store.display());
    match bytes {
        DISK_GOOD.. => Check::ok("disk", found),
        DISK_LEAST.. => Check::warn("disk", found, remedy),
        _ => Check::fail("disk", found, remedy),
    }
}

fn available(dir: &Path) -> io::Result<u64> {
    let path = CString::new(dir.as_os_str().as_bytes())?;
    // SAFETY: an all-zero statvfs is a valid value; the kernel fills it in.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: a terminated path and a structure, both valid for the call.
    if unsafe { libc::statvfs(path.as_ptr(), &raw mut stat) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Each pod's memory, and what its overlay holds, comes from here.
pub(super) fn memory(system: &System) -> Check {
    let text = system.read("/proc/meminfo").unwrap_or_default();
    let available = text.lines().find_map(|line| {
        let kib = line
            .strip_prefix("MemAvailable:")?
            .trim()
            .strip_suffix(" kB")?;
        kib.parse::<u64>().ok()?.checked_mul(1024)
    });
    let Some(bytes) = available else {
        return Check::warn("memory", "/proc/meminfo does not tell", "mount /proc");
    };
    let found = format!("{} available", size(bytes));
    let remedy = "stop what is not needed, or use a larger machine";
    match bytes {
        MEMORY_GOOD.. => Check::ok("memory", found),
        MEMORY_LEAST.. => Check::warn("memory", found, remedy),
        _ => Check::fail("memory", found, remedy),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::super::tests::Fixture;
    use super::*;

    #[test]
    fn room_on_disk_is_judged_by_two_thresholds() {
        let status = |bytes| disk_with(Path::new("/x"), bytes).status;
        assert_eq!(status(DISK_GOOD), Status::Ok);
        assert_eq!(status(DISK_GOOD - 1), Status::Warn);
        assert_eq!(status(DISK_LEAST - 1), Status::Fail);
    }

    #[test]
    fn room_is_looked_for_where_the_store_will_be() {
        let fixture = Fixture::new();
        assert!(!disk(&fixture.system).found.contains("unknown"));
    }

    #[test]
    fn memory_is_what_the_kernel_calls_available() {
        let fixture = Fixture::new();
        assert_eq!(memory(&fixture.system).status, Status::Warn);
        let with = |available: u64| {
            let text = format!("MemTotal: 99999999 kB\nMemAvailable:   {available} kB\n");
            fixture.file("proc/meminfo", &text);
            memory(&fixture.system)
        };
        assert_eq!(with(2 << 20).status, Status::Ok);
        assert_eq!(with(500 << 10).status, Status::Warn);
        assert_eq!(with(100 << 10).status, Status::Fail);
    }
}
