//! What a container wrote, where containerd looks for it.
//!
//! Writes go to the μVM's overlay, in RAM or spilled, and containerd measures a directory of its snapshotter that stays empty.
//! So a file lies there whose blocks are as many as the container's writes take: its usage, and with it the kubelet's
//! limits and eviction, count what was written, and the disk has the room kept that writes in RAM may need when they
//! leave it.
//!
//! What has been spilled takes its room already, in the μVM's spill file. So that it is not taken twice, the file itself
//! gets a name in the directory of a container that wrote at least as much, and counts there.
//!
//! The directory is containerd's. Nothing of the guest names it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use containerd_shim_protos::api::Mount;
use kiln_cache::OverlayMount;
use nix::fcntl::{FallocateFlags, fallocate};

use super::unnamed;

/// The file's name among what a snapshotter would have of the container.
const NAME: &str = ".kiln-written";
/// The spill file's.
const SPILLED: &str = ".kiln-spilled";
/// What room is kept in.
const UNIT: u64 = 4096;
/// What `st_blocks` counts.
const BLOCK: u64 = 512;

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
        layer.remove(NAME);
        layer.remove(SPILLED);
        Some(layer)
    }

    fn remove(&self, name: &str) {
        let path = self.dir.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), %error, "an account of writes stays");
            }
            _ => {}
        }
    }

    fn link(&self, spill: &File) -> io::Result<()> {
        unnamed::name(spill, &self.dir.join(SPILLED))
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
                .open(self.dir.join(NAME))?,
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
        if account.file.take().is_some() {
            self.remove(NAME);
        }
    }
}

/// Where the spill file of a pod has a name.
#[derive(Debug, Default)]
pub struct Spilled {
    holder: Option<Arc<WritableLayer>>,
    /// It has no name and will not have one: a file that has lost its last name can't have another.
    nameless: bool,
}

impl Spilled {
    /// Has containerd find that the containers' writes take so many bytes, those in the spill file included.
    pub fn account(
        &mut self,
        spill: Option<&File>,
        layers: &[(Arc<WritableLayer>, u64)],
    ) -> io::Result<()> {
        let spilled = match spill.filter(|_| !self.nameless) {
            Some(file) => file.metadata()?.blocks() * BLOCK,
            None => 0,
        };
        let chosen = self.choose(spilled, layers);
        // Before it is named there: better too little for a moment than too much.
        account_all(layers, chosen.as_ref(), spilled)?;
        let old = match (&self.holder, &chosen) {
            (Some(old), Some(new)) if Arc::ptr_eq(old, new) => return Ok(()),
            (None, None) => return Ok(()),
            (old, _) => old.clone(),
        };
        self.holder = match (chosen, spill) {
            (Some(new), Some(spill)) => match new.link(spill) {
                Ok(()) => Some(new),
                Err(error) => {
                    // On another file system than the snapshots, for instance.
                    tracing::info!(%error, "what is spilled takes room twice");
                    None
                }
            },
            _ => None,
        };
        if let Some(old) = old {
            old.remove(SPILLED);
        }
        if self.holder.is_none() {
            self.nameless = true;
            account_all(layers, None, 0)?;
        }
        Ok(())
    }

    /// A container that wrote at least as much as was spilled: the same one as before, if it still did.
    fn choose(
        &self,
        spilled: u64,
        layers: &[(Arc<WritableLayer>, u64)],
    ) -> Option<Arc<WritableLayer>> {
        let enough = |(_, bytes): &&(Arc<WritableLayer>, u64)| *bytes >= spilled;
        let same = |(layer, _): &&(Arc<WritableLayer>, u64)| {
            self.holder
                .as_ref()
                .is_some_and(|old| Arc::ptr_eq(old, layer))
        };
        let kept = layers.iter().filter(enough).find(same);
        let most = || layers.iter().filter(enough).max_by_key(|(_, bytes)| *bytes);
        let found = kept.or_else(|| most().filter(|_| spilled > 0));
        found.map(|(layer, _)| Arc::clone(layer))
    }

    /// The μVM has ended, and the file's content is nobody's any more. The shim may live on for long.
    pub fn end(&mut self, spill: Option<&File>) {
        self.nameless = true;
        if let Some(error) = spill.and_then(|file| file.set_len(0).err()) {
            tracing::warn!(%error, "what was spilled keeps its room until the shim ends");
        }
        if let Some(holder) = self.holder.take() {
            holder.remove(SPILLED);
        }
    }
}

fn account_all(
    layers: &[(Arc<WritableLayer>, u64)],
    holder: Option<&Arc<WritableLayer>>,
    spilled: u64,
) -> io::Result<()> {
    for (layer, bytes) in layers {
        let holds = holder.is_some_and(|holder| Arc::ptr_eq(holder, layer));
        layer.account(bytes.saturating_sub(if holds { spilled } else { 0 }))?;
    }
    Ok(())
}

fn resize(file: &File, from: u64, to: u64) -> io::Result<()> {
    if to < from {
        return file.set_len(to);
    }
    let signed = |n: u64| i64::try_from(n).map_err(io::Error::other);
    let (at, more) = (signed(from)?, signed(to - from)?);
    Ok(fallocate(file.as_fd(), FallocateFlags::empty(), at, more)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    const MIB: u64 = 1 << 20;

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

    fn layer(dir: &Path) -> Arc<WritableLayer> {
        fs::create_dir_all(dir).unwrap();
        Arc::new(WritableLayer {
            dir: dir.to_owned(),
            account: Mutex::default(),
        })
    }

    /// Without a name, with so many bytes in it.
    fn spill(dir: &Path, bytes: u64) -> File {
        let file = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_TMPFILE)
            .open(dir)
            .unwrap();
        resize(&file, 0, bytes).unwrap();
        file
    }

    fn is_near(found: u64, wanted: u64) {
        let near = wanted..wanted + (64 << 10);
        assert!(near.contains(&found), "{found}, and not {wanted}");
    }

    #[test]
    fn what_is_spilled_counts_once_and_moves_to_who_wrote_more() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let (first, second) = (layer(&a), layer(&b));
        let file = spill(dir.path(), 50 * MIB);
        let mut spilled = Spilled::default();
        let mut account = |of_first, of_second| {
            let layers = [(first.clone(), of_first), (second.clone(), of_second)];
            spilled.account(Some(&file), &layers).unwrap();
            is_near(usage(&a), of_first);
            is_near(usage(&b), of_second);
            file.metadata().unwrap().nlink()
        };
        assert_eq!(account(60 * MIB, MIB), 1);
        assert!(a.join(SPILLED).exists());
        // It stays where it is, as long as it may.
        assert_eq!(account(55 * MIB, 90 * MIB), 1);
        assert!(a.join(SPILLED).exists());
        assert_eq!(account(10 * MIB, 90 * MIB), 1);
        assert!(b.join(SPILLED).exists() && !a.join(SPILLED).exists());
        // Nobody wrote as much as all together spilled: it takes its room twice, and is right.
        assert_eq!(account(30 * MIB, 40 * MIB), 0);
        assert_eq!(account(90 * MIB, 40 * MIB), 0);
    }

    #[test]
    fn spill_file_outlives_a_container_and_goes_with_the_uvm() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let (first, second) = (layer(&a), layer(&b));
        let file = spill(dir.path(), 50 * MIB);
        let mut spilled = Spilled::default();
        let alone = |layer: &Arc<WritableLayer>| [(layer.clone(), 60 * MIB)];
        spilled.account(Some(&file), &alone(&first)).unwrap();
        first.close();
        is_near(usage(&a), 50 * MIB);
        spilled.account(Some(&file), &alone(&second)).unwrap();
        assert_eq!(usage(&a), 0);
        is_near(usage(&b), 60 * MIB);
        spilled.end(Some(&file));
        assert_eq!(file.metadata().unwrap().blocks(), 0);
        assert_eq!(file.metadata().unwrap().nlink(), 0);
        is_near(usage(&b), 10 * MIB);
    }

    #[test]
    fn spill_file_on_another_disk_is_no_reason_to_count_less() {
        let dir = tempfile::tempdir().unwrap();
        let a = dir.path().join("a");
        let elsewhere = File::create(dir.path().join("gone")).unwrap();
        fs::remove_file(dir.path().join("gone")).unwrap();
        resize(&elsewhere, 0, 5 * MIB).unwrap();
        let mut spilled = Spilled::default();
        // A file that has lost its name can't get one, as one of another file system can't.
        let layers = [(layer(&a), 20 * MIB)];
        spilled.account(Some(&elsewhere), &layers).unwrap();
        is_near(usage(&a), 20 * MIB);
        spilled.account(None, &layers).unwrap();
        is_near(usage(&a), 20 * MIB);
    }
}
