//! Block volumes: devices of the node that become disks of the guest.
//!
//! In the container such a disk is the guest's own device node, bound to the path that was asked for.

use std::fmt::Display;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use kiln_agent_api::proto;

use super::DISK_WAIT_MS;
use crate::error::{Error, Result};
use crate::spec::{BlockDevice, SpecMount};
use crate::uvm::GuestDisk;

/// Where a block device of the node is. The kernel knows its name.
pub(super) fn path(major: impl Display, minor: impl Display) -> Result<PathBuf> {
    let what = || format!("find the block device {major}:{minor}");
    let uevent = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent"))
        .map_err(|e| Error::failed(what(), e))?;
    let name = uevent
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="))
        .ok_or_else(|| Error::failed(what(), "the kernel has no name for it"))?;
    Ok(Path::new("/dev").join(name))
}

/// Opens the device. The specification has its numbers.
pub(super) fn open(device: &BlockDevice) -> Result<File> {
    let (major, minor) = device.number;
    let what = || format!("open the block volume for {}", device.path);
    let path = path(major, minor).map_err(|e| Error::failed(what(), e))?;
    let file = OpenOptions::new()
        .read(true)
        .write(!device.read_only)
        .open(&path)
        .map_err(|e| Error::failed(what(), e))?;
    let found = file.metadata().map_err(|e| Error::failed(what(), e))?;
    let number = (libc::major(found.rdev()), libc::minor(found.rdev()));
    let is_it = (i64::from(number.0), i64::from(number.1)) == device.number;
    if !found.file_type().is_block_device() || !is_it {
        let why = format!("{} is another one than {major}:{minor}", path.display());
        return Err(Error::failed(what(), why));
    }
    Ok(file)
}

/// How the guest binds the disk, and how the container gets it from there.
pub(super) fn mounts(
    device: &BlockDevice,
    disk: &GuestDisk,
    at: String,
) -> (proto::Mount, SpecMount) {
    let in_guest = proto::Mount {
        source: disk.path.clone(),
        target: at.clone(),
        type_: "bind".into(),
        options: if device.read_only {
            vec!["ro".into()]
        } else {
            Vec::new()
        },
        wait_ms: DISK_WAIT_MS,
        make_target: true,
        target_mode: 0o600,
        min_size: disk.size,
        ..Default::default()
    };
    let in_container = SpecMount {
        destination: device.path.clone(),
        kind: "bind".into(),
        source: at,
        options: vec!["bind".into(), "rprivate".into()],
        ..SpecMount::default()
    };
    (in_guest, in_container)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_that_is_not_there_is_named() {
        let device = BlockDevice {
            path: "/dev/xvda".into(),
            number: (4095, 7),
            read_only: false,
        };
        let error = open(&device).unwrap_err().chain();
        assert!(
            error.contains("/dev/xvda") && error.contains("4095:7"),
            "{error}"
        );
    }
}
