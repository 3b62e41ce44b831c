//! Block volumes: devices of the node that become disks of the guest.
//!
//! In the container such a disk is the guest's own device node, bound to the path that was asked for.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use kiln_agent_api::proto;

use super::DISK_WAIT_MS;
use crate::error::{Error, Result};
use crate::spec::{BlockDevice, SpecMount};
use crate::uvm::GuestDisk;

/// Opens the device. The specification has its numbers, the kernel knows its name.
pub(super) fn open(device: &BlockDevice) -> Result<File> {
    let (major, minor) = device.number;
    let what = || {
        format!(
            "open the block volume for {}, device {major}:{minor}",
            device.path
        )
    };
    let uevent = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent"))
        .map_err(|e| Error::failed(what(), e))?;
    let name = uevent
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="))
        .ok_or_else(|| Error::failed(what(), "the kernel has no name for it"))?;
    let file = OpenOptions::new()
        .read(true)
        .write(!device.read_only)
        .open(Path::new("/dev").join(name))
        .map_err(|e| Error::failed(what(), e))?;
    let found = file.metadata().map_err(|e| Error::failed(what(), e))?;
    let number = (libc::major(found.rdev()), libc::minor(found.rdev()));
    let is_it = (i64::from(number.0), i64::from(number.1)) == device.number;
    if !found.file_type().is_block_device() || !is_it {
        return Err(Error::failed(what(), format!("/dev/{name} is another one")));
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
