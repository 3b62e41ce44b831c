//! Mounts in the guest: block devices, virtio-fs, overlays, tmpfs, binds.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use kiln_agent_api::proto;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use thiserror::Error;

use crate::beneath::{self, Found};
use crate::disk;
use crate::lock_watch;
use crate::spans::Spans;
use crate::tree;
use crate::users::{self, Users};

/// Why something is not mounted, or still is.
#[derive(Debug, Error)]
pub(crate) enum StorageError {
    /// The kernel refused.
    #[error("cannot mount {source_name:?} ({kind}) on {target}: {source}")]
    Mount {
        /// The device, tag or folder.
        source_name: String,
        /// The file system.
        kind: String,
        /// Where.
        target: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A device that was announced is not there.
    #[error("{device} did not appear with at least {size} bytes within {limit:?}")]
    NoDevice {
        /// Its path.
        device: String,
        /// The size that was asked for.
        size: u64,
        /// How long it was waited for.
        limit: Duration,
    },
    /// Still in use, or not to be removed.
    #[error("cannot unmount {target}: {source}")]
    Unmount {
        /// Where.
        target: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file or folder.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// "make", "write", ...
        action: &'static str,
        /// The file.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The owners of its files can't be mapped.
    #[error(
        "cannot map the owners of what is mounted on {target} for the container's user namespace: {source}"
    )]
    Owners {
        /// Where.
        target: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A mount of the pod that wants a container's user namespace.
    #[error("the mount on {0} is for a container with a user namespace, and there is none")]
    NoUsers(String),
    /// A path that could mean something else than it says.
    #[error("{0:?} is not an absolute path without \"..\"")]
    Path(String),
    /// The announcements can't be heard.
    #[error("cannot listen to the kernel's device events: {0}")]
    Events(#[from] io::Error),
}

pub(crate) type Result<T> = std::result::Result<T, StorageError>;

/// Flags by their names in fstab; false: the name takes the flag away.
const FLAGS: [(&str, bool, MsFlags); 22] = [
    ("ro", true, MsFlags::MS_RDONLY),
    ("rw", false, MsFlags::MS_RDONLY),
    ("nosuid", true, MsFlags::MS_NOSUID),
    ("suid", false, MsFlags::MS_NOSUID),
    ("nodev", true, MsFlags::MS_NODEV),
    ("dev", false, MsFlags::MS_NODEV),
    ("noexec", true, MsFlags::MS_NOEXEC),
    ("exec", false, MsFlags::MS_NOEXEC),
    ("sync", true, MsFlags::MS_SYNCHRONOUS),
    ("dirsync", true, MsFlags::MS_DIRSYNC),
    ("noatime", true, MsFlags::MS_NOATIME),
    ("atime", false, MsFlags::MS_NOATIME),
    ("nodiratime", true, MsFlags::MS_NODIRATIME),
    ("diratime", false, MsFlags::MS_NODIRATIME),
    ("relatime", true, MsFlags::MS_RELATIME),
    ("norelatime", false, MsFlags::MS_RELATIME),
    ("strictatime", true, MsFlags::MS_STRICTATIME),
    ("silent", true, MsFlags::MS_SILENT),
    ("loud", false, MsFlags::MS_SILENT),
    ("mand", true, MsFlags::MS_MANDLOCK),
    ("nomand", false, MsFlags::MS_MANDLOCK),
    ("defaults", false, MsFlags::empty()),
];

/// What a list of options means.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    flags: MsFlags,
    bind: Option<MsFlags>,
    propagation: Option<MsFlags>,
    data: String,
}

fn parse_options(kind: &str, options: &[String]) -> Options {
    let bind_flags = |word: &str| match word {
        "bind" => Some(MsFlags::MS_BIND),
        "rbind" => Some(MsFlags::MS_BIND | MsFlags::MS_REC),
        _ => None,
    };
    let mut parsed = Options {
        flags: MsFlags::empty(),
        bind: bind_flags(kind),
        propagation: None,
        data: String::new(),
    };
    for option in options {
        let propagation = match option.strip_prefix('r').unwrap_or(option) {
            "shared" => Some(MsFlags::MS_SHARED),
            "slave" => Some(MsFlags::MS_SLAVE),
            "private" => Some(MsFlags::MS_PRIVATE),
            "unbindable" => Some(MsFlags::MS_UNBINDABLE),
            _ => None,
        };
        let recursive = if option.starts_with('r') {
            MsFlags::MS_REC
        } else {
            MsFlags::empty()
        };
        let flag = FLAGS.iter().find(|(name, _, _)| name == option);
        if let Some(flags) = bind_flags(option) {
            parsed.bind = Some(flags);
        } else if let Some(propagation) = propagation {
            parsed.propagation = Some(propagation | recursive);
        } else if let Some((_, set, flag)) = flag {
            parsed.flags.set(*flag, *set);
        } else if !option.is_empty() {
            if !parsed.data.is_empty() {
                parsed.data.push(',');
            }
            parsed.data.push_str(option);
        }
    }
    parsed
}

/// Mounts all, in order; if one fails, unmounts those before it. Blocks the thread. Returns what each took. `users` is the
/// container's user namespace, if these are its mounts and it has one.
pub(crate) fn add(mounts: &[proto::Mount], users: Option<&Users>) -> Result<Spans> {
    let mut spans = Spans::new();
    for (done, mount) in mounts.iter().enumerate() {
        if let Err(error) = spans.now(&mount.type_, || add_one(mount, users)) {
            let own = |mount: &&proto::Mount| !mount.of_pod;
            for earlier in mounts[..done].iter().filter(own).rev() {
                // The first error is the one to report.
                detach(&earlier.target);
            }
            return Err(error);
        }
    }
    Ok(spans)
}

fn add_one(wanted: &proto::Mount, users: Option<&Users>) -> Result<()> {
    let target = checked(&wanted.target)?;
    if let Some(tree) = wanted.tree.as_ref() {
        return tree::put(target, tree);
    }
    // Two containers that begin at once are not to mount it twice.
    static OF_POD: Mutex<()> = Mutex::new(());
    let _alone = wanted
        .of_pod
        .then(|| OF_POD.lock().unwrap_or_else(PoisonError::into_inner));
    if wanted.of_pod && is_mount_point(target) {
        return Ok(());
    }
    let no_users = || StorageError::NoUsers(wanted.target.clone());
    let owner = match wanted.owned_by_user_namespace {
        true => {
            let map = &users.ok_or_else(no_users)?.map;
            Some(map.user(0).zip(map.group(0)).ok_or_else(no_users)?)
        }
        false => None,
    };
    let owners = match wanted.idmapped {
        true => Some(users.ok_or_else(no_users)?),
        false => None,
    };
    for folder in &wanted.make_directories {
        let folder = checked(folder)?;
        make_folder(folder, 0o755)?;
        if let Some((uid, gid)) = owner {
            std::os::unix::fs::chown(folder, Some(uid), Some(gid))
                .map_err(|source| file_error("give away", folder, source))?;
        }
    }
    let beneath = match wanted.beneath.as_ref() {
        Some(place) => Some(beneath::find(Path::new(&wanted.source), place)?),
        None => None,
    };
    let beneath = beneath.as_ref().map(Found::path);
    let disk = disk::find(wanted)?;
    let source = beneath
        .as_deref()
        .or(disk.as_deref())
        .unwrap_or(&wanted.source);
    let options = parse_options(&wanted.type_, &wanted.options);
    let read_only = options.flags.contains(MsFlags::MS_RDONLY);
    // A file system that is mounted read-only needs nothing of its device.
    if let Some(disk) = &disk
        && (options.bind.is_some() || !read_only)
    {
        disk::set_read_only(disk, read_only)?;
    }
    let ahead = disk.as_deref().filter(|_| wanted.type_ == "erofs");
    let _open_until_mounted = ahead.and_then(disk::read_ahead);
    if wanted.make_target {
        let file = options.bind.is_some() && !Path::new(source).is_dir();
        make_target(Path::new(&wanted.target), file, wanted.target_mode)?;
    }
    let refused = |error: nix::Error| StorageError::Mount {
        source_name: wanted.source.clone(),
        kind: wanted.type_.clone(),
        target: wanted.target.clone(),
        source: error.into(),
    };
    let target = wanted.target.as_str();
    let nothing = None::<&str>;
    if let Some(bind) = options.bind {
        mount(Some(source), target, nothing, bind, nothing).map_err(refused)?;
        if !options.flags.is_empty() {
            let flags = options.flags | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
            mount(nothing, target, nothing, flags, nothing).map_err(|error| {
                detach(target);
                refused(error)
            })?;
        }
    } else {
        let source = if source.is_empty() { "none" } else { source };
        let data = (!options.data.is_empty()).then_some(options.data.as_str());
        mount(
            Some(source),
            target,
            Some(wanted.type_.as_str()),
            options.flags,
            data,
        )
        .map_err(refused)?;
        if wanted.type_ == "virtiofs" {
            lock_watch::start(Path::new(target));
        }
    }
    if let Some(owned) = wanted.top.as_ref() {
        disk::adopt(Path::new(target), owned).inspect_err(|_| detach(target))?;
    }
    if let Some(users) = owners {
        let mapped = File::open(&users.path)
            .and_then(|namespace| users::map_owners(target, namespace.as_fd()));
        mapped.map_err(|source| {
            detach(target);
            StorageError::Owners {
                target: target.to_owned(),
                source,
            }
        })?;
    }
    if let Some(propagation) = options.propagation {
        mount(nothing, target, nothing, propagation, nothing).map_err(|error| {
            detach(target);
            refused(error)
        })?;
    }
    Ok(())
}

/// Whether something else is mounted there than what its folder lies on.
fn is_mount_point(path: &Path) -> bool {
    let device = |path: &Path| fs::symlink_metadata(path).map(|found| found.dev()).ok();
    let folder = path.parent().and_then(device);
    device(path).is_some_and(|own| Some(own) != folder)
}

/// Takes back a mount of a request that failed; the failure is the error to report.
fn detach(target: &str) {
    if let Err(error) = umount2(target, MntFlags::MNT_DETACH) {
        tracing::error!(target, %error, "a mount of a failed request stays");
    }
}

/// Unmounts all, in order; what is not mounted is as it should be. Blocks the thread.
pub(crate) fn remove(targets: &[String], detach: bool, remove_target: bool) -> Result<()> {
    for target in targets {
        checked(target)?;
        let flags = if detach {
            MntFlags::MNT_DETACH
        } else {
            MntFlags::empty()
        };
        match umount2(target.as_str(), flags | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
            Err(error) => {
                let source = error.into();
                return Err(StorageError::Unmount {
                    target: target.clone(),
                    source,
                });
            }
        }
        if remove_target {
            // Best effort: a folder with something in it is not ours to empty.
            drop(fs::remove_dir(target).or_else(|_| fs::remove_file(target)));
        }
    }
    Ok(())
}

/// Writes a whole file; readers see the old or the new.
pub(crate) fn write_file(request: &proto::WriteFileRequest) -> Result<()> {
    let path = checked(&request.path)?;
    let error = |source| file_error("write", path, source);
    let folder = path.parent().unwrap_or(Path::new("/"));
    make_folder(folder, 0o755)?;
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".new");
    let draft = folder.join(name);
    let mode = if request.mode == 0 {
        0o644
    } else {
        request.mode
    };
    let write = || -> io::Result<()> {
        let mut file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&draft)?;
        file.write_all(&request.data)?;
        nix::unistd::fchown(&file, Some(request.uid.into()), Some(request.gid.into()))?;
        file.set_permissions(fs::Permissions::from_mode(mode & 0o7777))?;
        fs::rename(&draft, path)
    };
    write().map_err(error)
}

/// Makes a folder and those above it.
pub(crate) fn make_folder(path: &Path, mode: u32) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .map_err(|source| file_error("make", path, source))
}

fn make_target(path: &Path, file: bool, mode: u32) -> Result<()> {
    if !file {
        return make_folder(path, if mode == 0 { 0o755 } else { mode });
    }
    if let Some(folder) = path.parent() {
        make_folder(folder, 0o755)?;
    }
    let mode = if mode == 0 { 0o644 } else { mode };
    match File::options()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
    {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            Err(file_error("make", path, source))
        }
        _ => Ok(()),
    }
}

fn checked(path: &str) -> Result<&Path> {
    let parsed = Path::new(path);
    let plain = parsed.is_absolute() && !path.split('/').any(|part| part == "..");
    if plain {
        Ok(parsed)
    } else {
        Err(StorageError::Path(path.to_owned()))
    }
}

pub(crate) fn file_error(action: &'static str, path: &Path, source: io::Error) -> StorageError {
    StorageError::File {
        action,
        path: path.display().to_string(),
        source,
    }
}

/// What mounts of a request leave behind, the last first.
#[derive(Debug, Clone, Default)]
pub(crate) struct Placed {
    targets: Vec<String>,
    /// Made for the mounts, and theirs with all that is in them.
    folders: Vec<PathBuf>,
    /// Where disks of the pod's are mounted, which stay.
    disks: Vec<PathBuf>,
}

impl Placed {
    pub(crate) fn by(mounts: &[proto::Mount]) -> Self {
        let backwards = || mounts.iter().filter(|mount| !mount.of_pod).rev();
        Self {
            targets: backwards().map(|mount| mount.target.clone()).collect(),
            folders: backwards()
                .flat_map(|mount| mount.make_directories.iter().rev().map(PathBuf::from))
                .collect(),
            disks: mounts
                .iter()
                .filter(|mount| mount.of_pod && mount.top.is_some())
                .map(|mount| mount.target.clone().into())
                .collect(),
        }
    }

    /// Takes all of it away. Blocks the thread.
    pub(crate) fn remove(&self) -> Result<()> {
        // A volume may still be written back: detached, that goes on behind.
        remove(&self.targets, true, false)?;
        disk::write_back(&self.disks);
        for folder in &self.folders {
            match fs::remove_dir_all(folder) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(file_error("remove", folder, source));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(kind: &str, list: &[&str]) -> Options {
        parse_options(
            kind,
            &list.iter().map(ToString::to_string).collect::<Vec<_>>(),
        )
    }

    #[test]
    fn options_become_flags_and_data() {
        let parsed = options("ext4", &["ro", "nosuid", "data=ordered", "suid", "discard"]);
        assert_eq!(parsed.flags, MsFlags::MS_RDONLY);
        assert_eq!(parsed.data, "data=ordered,discard");
        assert_eq!((parsed.bind, parsed.propagation), (None, None));
    }

    #[test]
    fn binds_are_known_by_type_or_option() {
        assert_eq!(options("bind", &["ro"]).bind, Some(MsFlags::MS_BIND));
        let recursive = Some(MsFlags::MS_BIND | MsFlags::MS_REC);
        assert_eq!(options("rbind", &[]).bind, recursive);
        let parsed = options("none", &["rbind", "rslave", "rw"]);
        assert_eq!(parsed.bind, recursive);
        assert_eq!(
            parsed.propagation,
            Some(MsFlags::MS_SLAVE | MsFlags::MS_REC)
        );
        assert!(parsed.data.is_empty());
    }

    #[test]
    fn relatime_and_ro_are_no_propagation() {
        let parsed = options("ext4", &["relatime", "rw", "ro"]);
        assert_eq!(parsed.flags, MsFlags::MS_RELATIME | MsFlags::MS_RDONLY);
        assert_eq!(parsed.propagation, None);
    }

    #[test]
    fn paths_with_dots_are_refused() {
        assert!(checked("/run/kiln").is_ok());
        assert!(checked("/run/..x").is_ok());
        for wrong in ["", "run", "/run/../etc"] {
            assert!(checked(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_file_is_replaced_whole() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("sub/hosts");
        let mut request = proto::WriteFileRequest::new();
        request.path = path.display().to_string();
        request.data = b"127.0.0.1 localhost\n".to_vec();
        request.mode = 0o640;
        // SAFETY: these calls cannot fail and touch no memory.
        (request.uid, request.gid) = unsafe { (libc::getuid(), libc::getgid()) };
        write_file(&request).expect("write");
        assert_eq!(fs::read(&path).expect("read"), request.data);
        assert_eq!(
            fs::metadata(&path).expect("stat").permissions().mode() & 0o777,
            0o640
        );
        assert_eq!(
            fs::read_dir(folder.path().join("sub"))
                .expect("list")
                .count(),
            1
        );
    }

    #[test]
    fn what_was_made_for_a_mount_goes_with_it() {
        let folder = tempfile::tempdir().expect("folder");
        let at = |name: &str| folder.path().join(name).display().to_string();
        let mut mount = proto::Mount::new();
        mount.target = at("nothing-mounted");
        mount.make_directories = vec![at("c1"), at("c1/upper"), at("c1/work")];
        for made in &mount.make_directories {
            fs::create_dir(made).expect("make");
        }
        fs::write(at("c1/upper/file"), "x").expect("write");
        let placed = Placed::by(&[mount]);
        placed.remove().expect("remove");
        assert_eq!(fs::read_dir(folder.path()).expect("list").count(), 0);
        placed.remove().expect("again");
    }
}
