//! The guest's disks: those that it was baked with, which have names, and those that were plugged, which have slots.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use kiln_agent_api::{proto, slots};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::unistd::syncfs;

use crate::storage::{Result, StorageError, file_error};
use crate::uevent;

/// The path of the disk that a mount is of, once it is there; none if it is of something else.
pub(crate) fn find(wanted: &proto::Mount) -> Result<Option<String>> {
    let plugged = slots::plugged_disk(&wanted.source);
    if plugged.is_none() && !wanted.source.starts_with("/dev/") {
        return Ok(None);
    }
    if plugged.is_none() && wanted.wait_ms == 0 && wanted.min_size == 0 {
        return Ok(Some(wanted.source.clone()));
    }
    let limit = Duration::from_millis(wanted.wait_ms.into());
    let mut found = None;
    let there = || -> Result<bool> {
        let path = match plugged {
            None => Some(wanted.source.clone()),
            Some(slot) => in_slot(&device_of(slot)),
        };
        // A slot without a disk has no size; opening a device that isn't there fails.
        let Some((path, mut device)) = path.and_then(|p| File::open(&p).ok().map(|f| (p, f)))
        else {
            return Ok(false);
        };
        let size = device.seek(SeekFrom::End(0)).unwrap_or(0);
        found = Some(path);
        Ok(size > 0 && size >= wanted.min_size)
    };
    if uevent::wait_until(limit, there)? {
        return Ok(found);
    }
    Err(StorageError::NoDevice {
        device: wanted.source.clone(),
        size: wanted.min_size,
        limit,
    })
}

/// The device in a slot of the one bus there is.
fn device_of(slot: u8) -> PathBuf {
    format!("/sys/bus/pci/devices/0000:00:{slot:02x}.0").into()
}

/// The disk that a PCI device is: its driver gives it whatever name is free.
fn in_slot(device: &Path) -> Option<String> {
    let virtio = fs::read_dir(device).ok()?.flatten();
    let disk = virtio
        .filter_map(|entry| fs::read_dir(entry.path().join("block")).ok())
        .find_map(|mut disks| disks.next()?.ok())?;
    Some(format!("/dev/{}", disk.file_name().to_str()?))
}

/// Has the kernel read a disk's beginning at once, where an EROFS image has its superblock and then its inodes: mounting it
/// and finding a program asks for them a page at a time. What was read stays only as long as the disk is open.
pub(crate) fn read_ahead(device: &str) -> Option<File> {
    const LENGTH: i64 = 64 << 10;
    // Whatever fails here is reported by the mount.
    let file = File::open(device).ok()?;
    posix_fadvise(&file, 0, LENGTH, PosixFadviseAdvice::POSIX_FADV_WILLNEED).ok()?;
    Some(file)
}

/// Has the kernel refuse writes to a disk, or take them. A slot keeps this for whatever disk comes next.
pub(crate) fn set_read_only(device: &str, read_only: bool) -> Result<()> {
    nix::ioctl_write_ptr_bad!(blkroset, nix::request_code_none!(0x12, 93), libc::c_int);
    let set = || -> io::Result<()> {
        let file = File::open(device)?;
        if !file.metadata()?.file_type().is_block_device() {
            return Ok(());
        }
        let value = libc::c_int::from(read_only);
        // SAFETY: BLKROSET reads one int, which lives until the call returns.
        unsafe { blkroset(file.as_raw_fd(), &raw const value) }?;
        Ok(())
    };
    set().map_err(|source| StorageError::File {
        action: "set whether to write to",
        path: device.to_owned(),
        source,
    })
}

/// Gives the top of a file system that was just made to whom it is meant for. mke2fs leaves an empty directory in each, which
/// tells until it is removed, last of all, that nobody has.
pub(crate) fn adopt(top: &Path, owned: &proto::Owned) -> Result<()> {
    /// The first inode that is not the file system's own.
    const FIRST: u64 = 11;
    let left = top.join("lost+found");
    let give = || -> io::Result<()> {
        let is_mke2fs = match fs::symlink_metadata(&left) {
            Ok(found) => found.is_dir() && found.ino() == FIRST,
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(error),
        };
        if !is_mke2fs || fs::read_dir(&left)?.next().is_some() {
            return Ok(());
        }
        chown(top, Some(owned.uid), Some(owned.gid))?;
        fs::set_permissions(top, fs::Permissions::from_mode(owned.mode))?;
        fs::remove_dir(&left)
    };
    give().map_err(|source| file_error("give away", top, source))
}

/// Has what containers wrote to disks reach the host: the guest may end next, and what is on these disks outlives it. A slow
/// disk of the host's is not waited for.
pub(crate) fn write_back(mounted: &[PathBuf]) {
    const LIMIT: Duration = Duration::from_secs(2);
    if mounted.is_empty() {
        return;
    }
    let (mounted, (done, wait)) = (mounted.to_vec(), mpsc::channel());
    std::thread::spawn(move || {
        for top in mounted {
            let written = File::open(&top).and_then(|top| Ok(syncfs(top)?));
            if let Err(error) = written {
                tracing::error!(top = %top.display(), %error, "a volume is not written back");
            }
        }
        // Nobody may wait any more.
        let _ = done.send(());
    });
    let _ = wait.recv_timeout(LIMIT);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_does_not_come_is_named() {
        let mut wanted = proto::Mount::new();
        wanted.wait_ms = 1;
        wanted.min_size = 5;
        for source in ["/dev/kiln-none", &slots::plugged_disk_path(31)] {
            wanted.source = source.to_owned();
            let error = find(&wanted).expect_err("none");
            assert!(error.to_string().contains(source), "{error}");
        }
    }

    #[test]
    fn what_is_no_disk_is_not_waited_for() {
        let mut wanted = proto::Mount::new();
        wanted.min_size = 5;
        for source in ["kiln", "", "/run/kiln/x"] {
            wanted.source = source.to_owned();
            assert_eq!(find(&wanted).expect("nothing to wait for"), None);
        }
    }

    #[test]
    fn a_plugged_disk_is_found_by_its_slot() {
        let device = tempfile::tempdir().expect("a folder");
        assert_eq!(in_slot(device.path()), None);
        fs::create_dir(device.path().join("power")).expect("make");
        fs::create_dir_all(device.path().join("virtio9/block/vdq")).expect("make");
        assert_eq!(in_slot(device.path()).as_deref(), Some("/dev/vdq"));
    }
}
