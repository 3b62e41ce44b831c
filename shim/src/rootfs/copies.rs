//! Volumes that the kubelet writes for containers to read: config maps, secrets, projected and downward API volumes. The guest has
//! a copy of its own, so that reading one asks nobody, and programs that watch one are told of changes. When the kubelet has
//! put new content in the place of the old, the guest's is replaced as well, in one step there, too.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use kiln_agent_api::{GUEST_COPIES, proto};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::kubelet::{self, Owned};
use crate::error::Error;
use crate::spec::SpecMount;
use crate::uvm::Uvm;

/// The folders of such volumes among a pod's.
const KINDS: [&str; 4] = [
    "kubernetes.io~configmap",
    "kubernetes.io~secret",
    "kubernetes.io~projected",
    "kubernetes.io~downward-api",
];
/// Links to the folder of the version that counts; the files' names link through it.
const DATA: &str = "..data";
/// No more bytes are copied: they go to the guest in one message. A config map or secret has at most one MiB.
const MOST: usize = 3 << 20;
/// How often content that changes while it is read is read again.
const ATTEMPTS: u32 = 10;
/// How long the kubelet takes to be done with the names, once the content is another.
const PAUSE: Duration = Duration::from_millis(20);

/// Where a pod's guest has copies.
#[derive(Debug, Default)]
pub(super) struct Copies(OnceLock<Option<Arc<Watcher>>>);

/// Follows the originals.
#[derive(Debug)]
struct Watcher {
    inotify: AsyncFd<Watch>,
    tops: Mutex<HashMap<WatchDescriptor, PathBuf>>,
}

/// As something that has a descriptor's number, which tokio asks for.
#[derive(Debug)]
struct Watch(Inotify);

impl AsRawFd for Watch {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// The directory of such a volume that a mount is of, whole and to be read only, if the pod, whose uid this is, has it.
pub(super) fn find(mount: &SpecMount, pod: Option<&str>) -> Option<PathBuf> {
    let source = Path::new(&mount.source);
    let read_only = mount.has("ro") || mount.has("rro");
    // A copy could not have the owners of a user namespace that the node maps.
    if !mount.is_bind() || !read_only || mount.owners().is_some() {
        return None;
    }
    let kind = source.parent()?.file_name()?;
    if !KINDS.iter().any(|known| kind == *known) {
        return None;
    }
    let top = fs::canonicalize(source).ok()?;
    kubelet::is_volume(&top, pod?, kind).then_some(top)
}

impl Copies {
    /// What makes the guest's copy of a volume; none if it is shown by virtio-fs.
    pub(super) fn mount(&self, top: &Path, uvm: &Arc<dyn Uvm>) -> Option<proto::Mount> {
        let watcher = self.0.get_or_init(|| Watcher::start(uvm)).as_ref()?;
        // Before it is read: no change is missed.
        if let Err(error) = watcher.follow(top) {
            tracing::debug!(volume = %top.display(), %error, "a volume can't be watched");
            return None;
        }
        match copy(top) {
            Ok(copy) => copy,
            Err(error) => {
                tracing::debug!(volume = %top.display(), %error, "a volume can't be copied");
                None
            }
        }
    }
}

impl Watcher {
    fn start(uvm: &Arc<dyn Uvm>) -> Option<Arc<Self>> {
        let make = || -> io::Result<Self> {
            let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
            // SAFETY: a `Watch` is the same open descriptor until it is dropped, which is when the `AsyncFd` that
            // owns it is.
            let inotify =
                unsafe { AsyncFd::register_with_interest(Watch(inotify), Interest::READABLE) };
            Ok(Self {
                inotify: inotify?,
                tops: Mutex::default(),
            })
        };
        match make() {
            Ok(watcher) => {
                let watcher = Arc::new(watcher);
                tokio::spawn(Arc::clone(&watcher).run(Arc::downgrade(uvm)));
                Some(watcher)
            }
            Err(error) => {
                tracing::warn!(%error, "volumes can't be watched, and are shown by virtio-fs");
                None
            }
        }
    }

    fn follow(&self, top: &Path) -> nix::Result<()> {
        let what = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_ONLYDIR;
        let mut tops = self.tops.lock().unwrap_or_else(PoisonError::into_inner);
        let watch = self.inotify.get_ref().0.add_watch(top, what)?;
        tops.insert(watch, top.to_owned());
        Ok(())
    }

    async fn run(self: Arc<Self>, uvm: Weak<dyn Uvm>) {
        loop {
            let changed = match self.changed().await {
                Ok(changed) => changed,
                Err(error) => {
                    tracing::error!(%error, "volumes can't be watched any more: the guest keeps what it has");
                    return;
                }
            };
            if changed.is_empty() {
                continue;
            }
            // Names come after the content.
            tokio::time::sleep(PAUSE).await;
            let Some(uvm) = uvm.upgrade() else { return };
            for top in changed {
                renew(&top, uvm.as_ref()).await;
            }
        }
    }

    /// Waits until something has happened; the volumes that are others now.
    async fn changed(&self) -> io::Result<Vec<PathBuf>> {
        let mut ready = self.inotify.readable().await?;
        let events = match ready.try_io(|watch| Ok(watch.get_ref().0.read_events()?)) {
            Ok(events) => events?,
            Err(_would_block) => return Ok(Vec::new()),
        };
        let tops = self.tops.lock().unwrap_or_else(PoisonError::into_inner);
        let mut changed: Vec<PathBuf> = Vec::new();
        for event in events {
            // Versions come and go on the way to one that counts.
            let counts = |name: &OsStr| name == DATA || !name.as_encoded_bytes().starts_with(b"..");
            if let Some(top) = tops.get(&event.wd)
                && event.name.as_deref().is_some_and(counts)
                && !changed.contains(top)
            {
                changed.push(top.clone());
            }
        }
        Ok(changed)
    }
}

async fn renew(top: &Path, uvm: &dyn Uvm) {
    let stale = "the guest keeps the earlier content of a volume";
    match copy(top) {
        Ok(Some(copy)) => {
            if let Err(error) = uvm.guest().mount(vec![copy]).await {
                tracing::warn!(volume = %top.display(), error = Error::from(error).chain(), stale);
            }
        }
        Ok(None) => {
            tracing::warn!(volume = %top.display(), most = MOST, "it is too large now: {stale}");
        }
        // The pod is being removed.
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => tracing::warn!(volume = %top.display(), %error, stale),
    }
}

/// What makes the guest's copy what the volume is now; none if it is not the kubelet's doing, or too large.
fn copy(top: &Path) -> io::Result<Option<proto::Mount>> {
    let mut left = ATTEMPTS;
    loop {
        match read(top) {
            // Another version has taken the place of the one that was being read.
            Err(error) if error.kind() == ErrorKind::NotFound && left > 0 => left -= 1,
            Err(error) => return Err(error),
            Ok(tree) => {
                let name = top.file_name().unwrap_or_default();
                return Ok(tree.map(|tree| proto::Mount {
                    target: format!("{GUEST_COPIES}/{}", name.display()),
                    type_: "tree".into(),
                    of_pod: true,
                    tree: Some(tree).into(),
                    ..Default::default()
                }));
            }
        }
    }
}

fn read(top: &Path) -> io::Result<Option<proto::Tree>> {
    let Some(version) = link(&top.join(DATA))? else {
        return Ok(None);
    };
    let folder = top.join(&version);
    let mut tree = proto::Tree {
        top: told(top)?,
        owned: told(&folder)?,
        version,
        ..Default::default()
    };
    let mut room = MOST;
    if !read_folder(&folder, "", &mut tree.entries, &mut room)? {
        return Ok(None);
    }
    for entry in fs::read_dir(top)? {
        let entry = entry?;
        let Some(name) = entry.file_name().to_str().map(str::to_owned) else {
            return Ok(None);
        };
        if name.starts_with("..") {
            continue;
        }
        let Some(target) = link(&entry.path())? else {
            return Ok(None);
        };
        tree.links.push(proto::TreeLink {
            name,
            target,
            ..Default::default()
        });
    }
    Ok(Some(tree))
}

/// Where a link leads; none if it is something else.
fn link(path: &Path) -> io::Result<Option<String>> {
    match fs::read_link(path) {
        Ok(target) => Ok(target.to_str().map(str::to_owned)),
        Err(error) if error.kind() == ErrorKind::InvalidInput => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads what is in a folder; false if there is too much, or something else than files and folders.
fn read_folder(
    folder: &Path,
    path: &str,
    entries: &mut Vec<proto::TreeEntry>,
    room: &mut usize,
) -> io::Result<bool> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let Some(name) = entry
            .file_name()
            .to_str()
            .map(|name| format!("{path}{name}"))
        else {
            return Ok(false);
        };
        let (kind, at) = (entry.file_type()?, entry.path());
        let mut one = proto::TreeEntry {
            path: name,
            owned: told(&at)?,
            folder: kind.is_dir(),
            ..Default::default()
        };
        if kind.is_file() {
            if entry.metadata()?.len() > *room as u64 {
                return Ok(false);
            }
            one.data = fs::read(&at)?;
        } else if !kind.is_dir() {
            return Ok(false);
        }
        let Some(less) = room.checked_sub(one.data.len() + one.path.len()) else {
            return Ok(false);
        };
        *room = less;
        let below = kind.is_dir().then(|| format!("{}/", one.path));
        entries.push(one);
        if let Some(below) = below
            && !read_folder(&at, &below, entries, room)?
        {
            return Ok(false);
        }
    }
    Ok(true)
}

fn told(path: &Path) -> io::Result<protobuf::MessageField<proto::Owned>> {
    let owned = Owned::of(&fs::symlink_metadata(path)?);
    Ok(Some(owned.told()).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A volume as the kubelet writes one.
    fn write(top: &Path, version: &str, files: &[(&str, &str)]) {
        fs::create_dir_all(top.join(version)).unwrap();
        for (path, text) in files {
            let file = top.join(version).join(path);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(&file, text).unwrap();
            let name = path.split('/').next().unwrap();
            let link = top.join(name);
            if fs::symlink_metadata(&link).is_err() {
                symlink(format!("..data/{name}"), &link).unwrap();
            }
        }
        symlink(version, top.join("..data_tmp")).unwrap();
        fs::rename(top.join("..data_tmp"), top.join(DATA)).unwrap();
    }

    #[test]
    fn what_counts_is_copied_with_its_names() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("config");
        write(&top, "..1", &[("old", "gone")]);
        fs::remove_file(top.join("old")).unwrap();
        write(&top, "..2", &[("a", "one"), ("deep/b", "two")]);
        let mount = copy(&top).unwrap().unwrap();
        assert_eq!(mount.target, "/run/kiln/copies/config");
        let tree = mount.tree.unwrap();
        assert_eq!(tree.version, "..2");
        let mut entries: Vec<_> = tree
            .entries
            .iter()
            .map(|entry| (entry.path.as_str(), entry.folder, entry.data.as_slice()))
            .collect();
        entries.sort_unstable();
        let expected: [(&str, bool, &[u8]); 3] = [
            ("a", false, b"one"),
            ("deep", true, b""),
            ("deep/b", false, b"two"),
        ];
        assert_eq!(entries, expected);
        let mut links: Vec<_> = tree
            .links
            .iter()
            .map(|link| (link.name.as_str(), link.target.as_str()))
            .collect();
        links.sort_unstable();
        assert_eq!(links, [("a", "..data/a"), ("deep", "..data/deep")]);
    }

    #[test]
    fn what_is_too_large_or_of_another_making_is_not_copied() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("config");
        write(
            &top,
            "..1",
            &[("a", &"x".repeat(MOST / 2)), ("b", &"x".repeat(MOST / 2))],
        );
        assert!(copy(&top).unwrap().is_none());
        write(&top, "..2", &[("a", "small")]);
        fs::remove_file(top.join("b")).unwrap();
        assert!(copy(&top).unwrap().is_some());
        fs::write(top.join("plain"), "").unwrap();
        assert!(copy(&top).unwrap().is_none());
        fs::remove_file(top.join("plain")).unwrap();
        symlink("/etc/passwd", top.join("..2/link")).unwrap();
        assert!(copy(&top).unwrap().is_none());
    }

    #[test]
    fn only_whole_volumes_of_the_pod_that_are_read_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let pod = fs::canonicalize(dir.path()).unwrap().join("u");
        let top = pod.join("volumes/kubernetes.io~secret/s");
        let other = pod.join("volumes/kubernetes.io~csi/s");
        for dir in [&top, &other] {
            fs::create_dir_all(dir).unwrap();
        }
        let find = |source: &Path, access: &str, pod: Option<&str>| {
            let mount = SpecMount {
                kind: "bind".into(),
                source: source.display().to_string(),
                options: vec!["rbind".into(), access.into()],
                ..SpecMount::default()
            };
            find(&mount, pod)
        };
        assert_eq!(find(&top, "ro", Some("u")), Some(top.clone()));
        assert_eq!(find(&top, "rw", Some("u")), None);
        assert_eq!(find(&top, "ro", Some("v")), None);
        assert_eq!(find(&top, "ro", None), None);
        assert_eq!(find(&other, "ro", Some("u")), None);
        assert_eq!(find(&top.join("file"), "ro", Some("u")), None);
    }
}
