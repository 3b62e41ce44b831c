//! Those on the node's disk: a disk image in the volume's directory, with a file system that the guest alone mounts. What a
//! container writes there crosses to the host a block at a time, and not a system call at a time; the kubelet counts the
//! image's blocks, and a new sandbox of the pod finds what the last one wrote.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kiln_agent_api::{GUEST_DISKS, proto};
use kiln_store::private;
use kiln_uvm::ext4;
use nix::errno::Errno;
use nix::sys::statvfs::fstatvfs;
use nix::unistd::{Whence, lseek64};

use super::super::{DISK_WAIT_MS, unnamed};
use super::EmptyDir;
use crate::error::{Error, Result};
use crate::uvm::{GuestDisk, Uvm};

/// The image's name in the volume's directory.
const IMAGE: &str = ".kiln-disk";
/// The folder of the store with empty file systems, by their size.
const EMPTY: &str = "volumes";
/// As many volumes of a pod as are disks. The bus has 32 slots, and each container needs one at least.
const MOST: usize = 8;
/// No directory of a volume has more below it that holds nothing; one with a file is not asked as far.
const MOST_DIRECTORIES: usize = 1000;
/// How long a sandbox that has ended may hold on to its disks.
const LOCK_LIMIT: Duration = Duration::from_secs(10);
const LOCK_PAUSE: Duration = Duration::from_millis(50);
/// Sizes of file systems are whole multiples of it.
const UNIT: u64 = 1 << 20;
/// A journal, for a VMM may be killed, but the least one: the kubelet counts it as the pod's. One group of groups, so that
/// what is not empty at first lies together. Nothing is initialized that the file's holes say already.
const OPTIONS: &[&str] = &[
    "-i",
    "32768",
    "-G",
    "4096",
    "-J",
    "size=4",
    "-O",
    "^metadata_csum,^resize_inode,^orphan_file,uninit_bg,sparse_super2",
    "-E",
    "num_backup_sb=0,lazy_itable_init=1,lazy_journal_init=1,nodiscard",
];
/// Tables of inodes stay holes, and so do blocks that are free again.
const MOUNT: [&str; 2] = ["noinit_itable", "discard"];

/// Where the volumes of a pod are that are disks of its guest.
#[derive(Debug, Default)]
pub(in super::super) struct Disks(tokio::sync::Mutex<BTreeMap<PathBuf, Option<Held>>>);

/// A disk of the guest's, as long as the pod lives.
#[derive(Debug)]
struct Held {
    disk: GuestDisk,
    /// Locked: two guests that mount it would destroy it.
    _image: File,
}

/// Where disks are made and attached.
#[derive(Clone, Copy)]
pub(in super::super) struct Place<'a> {
    pub(in super::super) store: &'a Path,
    pub(in super::super) uvm: &'a Arc<dyn Uvm>,
}

impl Disks {
    /// What mounts the disk that a volume is; none if it is shown by virtio-fs: it holds files already that the node or
    /// another runtime put there, or the pod has too many.
    pub(in super::super) async fn mount(
        &self,
        volume: &EmptyDir,
        place: Place<'_>,
    ) -> Result<Option<proto::Mount>> {
        let mut known = self.0.lock().await;
        if !known.contains_key(&volume.top) {
            let disks = known.values().flatten().count();
            let held = match disks < MOST {
                true => attach(&volume.top, place).await?,
                false => None,
            };
            if held.is_none() {
                tracing::debug!(volume = %volume.top.display(), disks, "a volume is no disk");
            }
            known.insert(volume.top.clone(), held);
        }
        let held = known.get(&volume.top).and_then(Option::as_ref);
        Ok(held.map(|held| {
            let name = volume.top.file_name().unwrap_or(OsStr::new("volume"));
            proto::Mount {
                source: held.disk.path.clone(),
                target: format!("{GUEST_DISKS}/{}", name.display()),
                type_: "ext4".into(),
                options: MOUNT.map(str::to_owned).to_vec(),
                wait_ms: DISK_WAIT_MS,
                min_size: held.disk.size,
                make_target: true,
                of_pod: true,
                top: Some(volume.owned.told()).into(),
                ..Default::default()
            }
        }))
    }
}

async fn attach(dir: &Path, Place { store, uvm }: Place<'_>) -> Result<Option<Held>> {
    let (dir, empty) = (dir.to_owned(), store.join(EMPTY));
    let failed = format!("make a disk of the volume {}", dir.display());
    let making = tokio::task::spawn_blocking({
        let dir = dir.clone();
        move || open_or_make(&dir, &empty)
    });
    let made = making.await.map_err(|e| Error::failed(&*failed, e))?;
    let Some(Image { file, made }) = made.map_err(|e| Error::failed(&*failed, e))? else {
        return Ok(None);
    };
    lock(&file, &dir).await?;
    let copy = file.try_clone().map_err(|e| Error::failed(&*failed, e))?;
    match uvm.attach_disk(copy, false).await {
        Ok(disk) => Ok(Some(Held { disk, _image: file })),
        Err(Error::ResourceExhausted(why)) if made => {
            tracing::debug!(volume = %dir.display(), why, "no slot for a volume's disk");
            fs::remove_file(dir.join(IMAGE)).map_err(|e| Error::failed(&*failed, e))?;
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Waits for the end of whoever has the image. The lock goes with the descriptor, to the VMM.
async fn lock(image: &File, dir: &Path) -> Result<()> {
    let begun = tokio::time::Instant::now();
    loop {
        match image.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if begun.elapsed() < LOCK_LIMIT => {
                tokio::time::sleep(LOCK_PAUSE).await;
            }
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Unavailable(format!(
                    "the volume {} is in use by another μVM, which has not ended within {} s: \
                     `kiln ps` shows it",
                    dir.display(),
                    LOCK_LIMIT.as_secs()
                )));
            }
            Err(TryLockError::Error(error)) => {
                return Err(Error::failed(
                    format!("lock the volume {}", dir.display()),
                    error,
                ));
            }
        }
    }
}

/// A volume's image.
#[derive(Debug)]
struct Image {
    file: File,
    /// Whether it was made just now.
    made: bool,
}

/// The image of the volume in `dir`; none if the volume has other content. `empty` is where empty file systems are kept.
fn open_or_make(dir: &Path, empty: &Path) -> io::Result<Option<Image>> {
    match existing(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        found => return found.map(|file| Some(Image { file, made: false })),
    }
    if !holds_directories_only(dir)? {
        return Ok(None);
    }
    let space = fstatvfs(File::open(dir)?)?;
    // What a container of any runtime would see the volume to be.
    let size = space.blocks().saturating_mul(space.fragment_size()) / UNIT * UNIT;
    let template = template(empty, size.max(64 * UNIT))?;
    let file = match unnamed::make(dir) {
        Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(None),
        made => made?,
    };
    copy(&template, &file)?;
    // A node that loses power is not to find a part of it.
    file.sync_data()?;
    unnamed::name(&file, &dir.join(IMAGE))?;
    Ok(Some(Image { file, made: true }))
}

/// One that is there. What a guest could have put in its place, when the volume was shown by virtio-fs, is refused.
fn existing(dir: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(dir.join(IMAGE))?;
    let found = file.metadata()?;
    if found.is_file() && found.nlink() == 1 {
        return Ok(file);
    }
    Err(io::Error::other(format!(
        "its {IMAGE} is no file of its own: remove it"
    )))
}

/// Whether there is nothing but directories, as the kubelet makes them for parts of volumes.
fn holds_directories_only(dir: &Path) -> io::Result<bool> {
    let mut open = vec![dir.to_owned()];
    let mut seen = 0;
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            seen += 1;
            if seen > MOST_DIRECTORIES || !entry.file_type()?.is_dir() {
                return Ok(false);
            }
            open.push(entry.path());
        }
    }
    Ok(true)
}

/// An empty file system of a size, which is made if need be.
fn template(empty: &Path, size: u64) -> io::Result<File> {
    let path = empty.join(format!("ext4-{}", size / UNIT));
    match File::open(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        found => return found,
    }
    private::directory(empty).map_err(io::Error::other)?;
    let file = unnamed::make(empty)?;
    file.set_len(size)?;
    ext4::format(Path::new(&unnamed::path(&file)), OPTIONS).map_err(io::Error::other)?;
    file.sync_all()?;
    match unnamed::name(&file, &path) {
        // Another shim was quicker.
        Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error),
        _ => Ok(file),
    }
}

/// Copies what is not a hole: next to nothing.
fn copy(from: &File, to: &File) -> io::Result<()> {
    let end = from.metadata()?.len();
    to.set_len(end)?;
    let end = i64::try_from(end).map_err(io::Error::other)?;
    let mut at = 0;
    loop {
        let data = match lseek64(from.as_fd(), at, Whence::SeekData) {
            Err(Errno::ENXIO) => return Ok(()),
            found => found?,
        };
        let hole = lseek64(from.as_fd(), data, Whence::SeekHole)?;
        let (begin, end) = (data.cast_unsigned(), hole.min(end).cast_unsigned());
        let length = usize::try_from(end - begin).map_err(io::Error::other)?;
        let mut content = vec![0; length];
        from.read_exact_at(&mut content, begin)?;
        to.write_all_at(&content, begin)?;
        at = hole;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A volume's directory, and where empty file systems are kept.
    fn folders() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let (volume, empty) = (dir.path().join("volume"), dir.path().join("empty"));
        fs::create_dir(&volume).unwrap();
        (dir, volume, empty)
    }

    #[test]
    fn image_is_made_once_and_is_as_large_as_the_disk_and_next_to_nothing() {
        let (_dir, volume, empty) = folders();
        // A part of the volume that the kubelet has made already.
        fs::create_dir_all(volume.join("part/deep")).unwrap();
        let image = open_or_make(&volume, &empty).unwrap().unwrap();
        assert!(image.made);
        let found = fs::metadata(volume.join(IMAGE)).unwrap();
        let space = nix::sys::statvfs::statvfs(&volume).unwrap();
        let disk = space.blocks() * space.fragment_size();
        assert!(found.len() <= disk.max(64 * UNIT) && found.len() + UNIT > disk);
        assert!(found.blocks() * 512 < UNIT, "{} blocks", found.blocks());
        let mut magic = [0; 2];
        image.file.read_exact_at(&mut magic, 1080).unwrap();
        assert_eq!(magic, [0x53, 0xef]);
        image.file.write_all_at(b"mine", 0).unwrap();
        let again = open_or_make(&volume, &empty).unwrap().unwrap();
        let mut mine = [0; 4];
        again.file.read_exact_at(&mut mine, 0).unwrap();
        assert_eq!((again.made, &mine), (false, b"mine"));
        // What it was copied from is as it was.
        let other = volume.with_file_name("other");
        fs::create_dir(&other).unwrap();
        let other = open_or_make(&other, &empty).unwrap().unwrap();
        other.file.read_exact_at(&mut mine, 0).unwrap();
        assert_eq!(mine, [0; 4]);
        assert_eq!(fs::read_dir(&empty).unwrap().count(), 1);
    }

    #[test]
    fn volume_with_files_is_no_disk() {
        let (_dir, volume, empty) = folders();
        fs::create_dir(volume.join("part")).unwrap();
        fs::write(volume.join("part/file"), "").unwrap();
        assert!(open_or_make(&volume, &empty).unwrap().is_none());
        assert!(!volume.join(IMAGE).exists());
    }

    #[test]
    fn image_that_is_a_link_is_refused() {
        let (_dir, volume, empty) = folders();
        let secret = volume.with_file_name("secret");
        fs::write(&secret, "secret").unwrap();
        symlink(&secret, volume.join(IMAGE)).unwrap();
        open_or_make(&volume, &empty).unwrap_err();
        fs::remove_file(volume.join(IMAGE)).unwrap();
        fs::hard_link(&secret, volume.join(IMAGE)).unwrap();
        let error = open_or_make(&volume, &empty).unwrap_err().to_string();
        assert!(error.contains("remove it"), "{error}");
        assert_eq!(fs::read_to_string(&secret).unwrap(), "secret");
    }

    #[tokio::test]
    async fn image_that_another_guest_has_is_waited_for() {
        let (_dir, volume, empty) = folders();
        let first = open_or_make(&volume, &empty).unwrap().unwrap().file;
        lock(&first, &volume).await.unwrap();
        let second = open_or_make(&volume, &empty).unwrap().unwrap().file;
        let waiting = tokio::spawn({
            let volume = volume.clone();
            async move { lock(&second, &volume).await }
        });
        tokio::time::sleep(2 * LOCK_PAUSE).await;
        assert!(!waiting.is_finished());
        drop(first);
        waiting.await.unwrap().unwrap();
    }
}
