//! What a container wrote, where containerd looks for it.
//!
//! Writes go to the μVM's overlay, in RAM or spilled, and containerd measures a directory of its snapshotter that stays empty.
//! So a file lies there whose blocks are as many as the container's writes take: its usage, and with it the kubelet's
//! limits and eviction, count what was written, and the disk has the room kept that writes in RAM may need when they
//! leave it.
//!
//! The directory is containerd's. Nothing of the guest names it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use containerd_shim_protos::api::Mount;
use kiln_cache::OverlayMount;
use nix::fcntl::{FallocateFlags, fallocate};

/// The file's name among what a snapshotter would have of the container.
const NAME: &str = ".kiln-written";
/// What room is kept in.
const UNIT: u64 = 4096;

/// The directory in which containerd looks for what a container wrote.
#[derive(Debug)]
pub struct WritableLayer {
    dir: PathBuf,
    account: Mutex<Account>,
}

#[derive(Debug, Default)]
struct Account {
    file: Option<File>,
    bytes: u64,
    closed: bool,
}

impl WritableLayer {
    /// That of a container with these mounts; none if it writes to a device of its own, which its snapshotter measures.
    /// What a killed shim left there goes.
    pub(super) fn find(mounts: &[Mount]) -> Option<Self> {
        let [mount] = mounts else { return None };
        let dir = match mount.type_.as_str() {
            "overlay" => OverlayMount::parse(&mount.options).ok()?.upper?,
            "bind" if !mount.options.iter().any(|o| o == "ro") => PathBuf::from(&mount.source),
            _ => return None,
        };
        let layer = Self {
            dir,
            account: Mutex::default(),
        };
        if let Err(error) = remove(&layer.path()) {
            tracing::warn!(path = %layer.path().display(), %error, "an old account of writes stays");
        }
        Some(layer)
    }

    fn path(&self) -> PathBuf {
        self.dir.join(NAME)
    }

    fn lock(&self) -> MutexGuard<'_, Account> {
        self.account.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has containerd find that the container's writes take so many bytes.
    pub fn account(&self, bytes: u64) -> io::Result<()> {
        let bytes = bytes.next_multiple_of(UNIT);
        let mut account = self.lock();
        if account.closed || account.bytes == bytes {
            return Ok(());
        }
        let file = match account.file.take() {
            Some(file) => file,
            None => OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(self.path())?,
        };
        let changed = resize(&file, account.bytes, bytes);
        account.file = Some(file);
        changed?;
        account.bytes = bytes;
        Ok(())
    }

    /// The container's writes are gone.
    pub(super) fn close(&self) {
        let mut account = self.lock();
        account.closed = true;
        if account.file.take().is_some()
            && let Err(error) = remove(&self.path())
        {
            tracing::warn!(path = %self.path().display(), %error, "an account of writes stays");
        }
    }
}

fn resize(file: &File, from: u64, to: u64) -> io::Result<()> {
    if to < from {
        return file.set_len(to);
    }
    let signed = |n: u64| i64::try_from(n).map_err(io::Error::other);
    let (at, more) = (signed(from)?, signed(to - from)?);
    Ok(fallocate(file.as_fd(), FallocateFlags::empty(), at, more)?)
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn mount(kind: &str, source: &Path, options: &[String]) -> Vec<Mount> {
        vec![Mount {
            type_: kind.into(),
            source: source.display().to_string(),
            options: options.to_vec(),
            ..Default::default()
        }]
    }

    /// As containerd measures it.
    fn usage(dir: &Path) -> u64 {
        let entries = fs::read_dir(dir).unwrap();
        entries
            .map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512)
            .sum()
    }

    #[test]
    fn usage_follows_what_was_written_both_ways_and_ends_with_the_container() {
        let dir = tempfile::tempdir().unwrap();
        let upper = format!("upperdir={}", dir.path().display());
        let options = ["workdir=/w".to_owned(), upper, "lowerdir=/a".to_owned()];
        let mounts = mount("overlay", Path::new("overlay"), &options);
        let layer = WritableLayer::find(&mounts).unwrap();
        assert_eq!(usage(dir.path()), 0);
        for bytes in [60 << 20, 10 << 20, 11 << 20, 0, 1] {
            layer.account(bytes).unwrap();
            let found = usage(dir.path());
            assert!((bytes..bytes + (64 << 10)).contains(&found), "{found}");
        }
        // As a shim that was killed would have left it.
        let next = WritableLayer::find(&mounts).unwrap();
        assert_eq!(usage(dir.path()), 0);
        next.account(1 << 20).unwrap();
        next.close();
        next.account(1 << 20).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn devices_are_measured_by_their_snapshotter() {
        let dir = Path::new("/dev/mapper/snap-1");
        assert!(WritableLayer::find(&mount("ext4", dir, &[])).is_none());
        assert!(WritableLayer::find(&mount("bind", dir, &["ro".into()])).is_none());
        assert!(WritableLayer::find(&[]).is_none());
    }

    #[test]
    fn disk_without_room_is_an_error_and_the_next_try_counts_from_what_there_is() {
        use nix::mount::{MntFlags, MsFlags, mount as mount_at, umount2};

        let dir = tempfile::tempdir().unwrap();
        let (kind, options) = (Some("tmpfs"), Some("size=1m"));
        if mount_at(kind, dir.path(), kind, MsFlags::empty(), options).is_err() {
            eprintln!("skipped: no mounts here (needs root)");
            return;
        }
        let layer = WritableLayer {
            dir: dir.path().to_owned(),
            account: Mutex::default(),
        };
        layer.account(512 << 10).unwrap();
        let full = layer.account(8 << 20).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
        layer.account(768 << 10).unwrap();
        assert_eq!(usage(dir.path()), 768 << 10);
        layer.close();
        umount2(dir.path(), MntFlags::MNT_DETACH).unwrap();
    }
}
