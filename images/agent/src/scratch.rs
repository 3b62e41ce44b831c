//! The file system that containers' writable layers lie on.
//!
//! It is mounted before the bake, so no pod waits for it; after a resume the disk below is an overlay in the VMM's
//! memory, which has the same content.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use kiln_agent_api::{GUEST_LAYERS, GUEST_SCRATCH, GUEST_STATE_DIR, slots};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::statvfs;

/// Deleted files give their room back at once. Nothing is initialized behind the guest's back, which would fill the
/// overlay's RAM with zeroes. A sync asks for no flush: what the overlay has taken lasts as long as it, flushed or not.
/// Blocks are not marked as unwritten until their content is there, which takes a worker and a second change of the
/// inode for each write: only a crash would show, and nobody mounts this after one. Nothing reads the bitmaps of all groups
/// ahead: these are made in memory, 14 MiB for a disk that is empty, in every copy of this μVM.
const OPTIONS: &str = "discard,noinit_itable,nobarrier,dioread_lock,no_prefetch_block_bitmaps";
/// Has syncs ask for a flush.
const FLUSHING: &str = "barrier";

fn disk() -> Option<String> {
    let disk = slots::disk_name(slots::SCRATCH)?;
    Some(disk.trim_start_matches("/dev/").to_owned())
}

/// Mounts it, if the machine has it.
pub(crate) fn mount_it() -> io::Result<()> {
    let Some(disk) = disk() else { return Ok(()) };
    let serial = Path::new("/sys/block").join(&disk).join("serial");
    match fs::read_to_string(serial) {
        Ok(serial) if serial.trim_end() == slots::disk_id(slots::SCRATCH) => {}
        _ => return Ok(()),
    }
    fs::create_dir_all(GUEST_SCRATCH)?;
    mount(
        Some(format!("/dev/{disk}").as_str()),
        GUEST_SCRATCH,
        Some("ext4"),
        MsFlags::MS_NOATIME,
        Some(OPTIONS),
    )?;
    Ok(())
}

/// From now on a sync is answered when the host's disk has it.
pub(crate) fn flush() -> io::Result<()> {
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_NOATIME;
    mount(
        None::<&str>,
        GUEST_SCRATCH,
        None::<&str>,
        flags,
        Some(FLUSHING),
    )?;
    Ok(())
}

/// Makes and removes what a container has there. What the file system had to read for it then stays in memory, and so in
/// every copy of this μVM: none of them reads it at the start of its first container.
pub(crate) fn rehearse() -> io::Result<()> {
    const NAME: &str = "rehearsal";
    if !is_mounted()? {
        return Ok(());
    }
    let own = Path::new(GUEST_LAYERS).join(NAME);
    let root = Path::new(GUEST_STATE_DIR).join(NAME);
    let [upper, work] = ["upper", "work"].map(|name| own.join(name));
    for folder in [&upper, &work, &root] {
        fs::create_dir_all(folder)?;
    }
    let options = format!(
        "lowerdir=/,upperdir={},workdir={}",
        upper.display(),
        work.display()
    );
    let overlay = Some("overlay");
    mount(
        overlay,
        &root,
        overlay,
        MsFlags::empty(),
        Some(options.as_str()),
    )?;
    let written = fs::write(root.join("file"), [1; 4096]);
    umount2(&root, MntFlags::empty())?;
    written?;
    fs::remove_dir(&root)?;
    fs::remove_dir_all(&own)?;
    nix::unistd::syncfs(fs::File::open(GUEST_SCRATCH)?)?;
    BAKED_BYTES.store(used()?, Ordering::Relaxed);
    Ok(())
}

/// What the file system took for itself when the machine was baked.
static BAKED_BYTES: AtomicU64 = AtomicU64::new(0);

fn used() -> io::Result<u64> {
    let figures = statvfs(GUEST_SCRATCH)?;
    let blocks = figures.blocks().saturating_sub(figures.blocks_free());
    Ok(blocks * figures.fragment_size())
}

/// Bytes that containers have on it, what the guest has not written to the disk yet included.
pub(crate) fn written() -> io::Result<u64> {
    if !is_mounted()? {
        return Ok(0);
    }
    Ok(used()?.saturating_sub(BAKED_BYTES.load(Ordering::Relaxed)))
}

/// Whether there is such a file system: a machine without the disk has none.
fn is_mounted() -> io::Result<bool> {
    let above = Path::new(GUEST_SCRATCH).parent().unwrap_or(Path::new("/"));
    match fs::metadata(GUEST_SCRATCH) {
        Ok(folder) => Ok(folder.dev() != fs::metadata(above)?.dev()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Leaves this many bytes to be written, so that a container that writes more is told at once that the disk is full:
/// the file system is larger than what the host gives, and would only learn when it writes its cache back.
pub(crate) fn limit(bytes: u64) -> io::Result<()> {
    let Some(disk) = disk() else { return Ok(()) };
    let knob: PathBuf = ["/sys/fs/ext4", &disk, "reserved_clusters"]
        .iter()
        .collect();
    let figures = statvfs(GUEST_SCRATCH)?;
    let reserved = reserve(figures.blocks_free(), figures.fragment_size(), bytes);
    fs::write(knob, reserved.to_string())
}

/// Free blocks that are kept from everybody.
fn reserve(free: u64, block: u64, bytes: u64) -> u64 {
    free.saturating_sub(bytes.div_ceil(block.max(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_but_the_limit_is_reserved() {
        assert_eq!(reserve(1000, 4096, 40_960), 990);
        assert_eq!(reserve(1000, 4096, 40_961), 989);
        assert_eq!(reserve(10, 4096, 1 << 30), 0);
    }
}
