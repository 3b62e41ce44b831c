//! The directory that a μVM shares with its host: a small tmpfs below which every volume is mounted,
//! and which the guest sees as one virtio-fs file system.
//!
//! **The guest is on the other side of every name in it.** So the tmpfs is mounted twice: read-only where the file server
//! has its root, and writable on a mount that is nowhere but behind a descriptor of this process. Mount points are made
//! through the latter; a guest can't make, move or replace one. A volume's mount is copied detached, cut off from
//! the host and made read-only before it is put in place, by descriptor: a guest that watches finds the volume as it
//! is to be, or none, and no path is looked up that something else could have been put under.
//!
//! The mounts are made in the mount namespace of this process, where volumes live; what they resolve to later
//! (a configMap's new version, a nested mount that arrives) is what the guest sees then. They never
//! propagate outwards: taking the directory away must not unmount anything of the host's.
//!
//! **The directory is never removed recursively.** What is below it belongs to others; it is
//! unmounted, and then removed only if it is empty.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kiln_agent_api::modules::LIBRARY;
use kiln_agent_api::users::IdMap;
use kiln_agent_api::{GUEST_STATE_DIR, proto, slots};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::mounts::{self, Propagation, Reach};

/// Room for the directory's own entries: mount points, no data. The root of a user namespace in the guest has to get
/// through it; on the host, the directories above are root's alone.
const TMPFS_OPTIONS: &std::ffi::CStr = c"mode=0711,size=1m,nr_inodes=4096";

/// A step failed.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// The system refused it.
    #[error("cannot {action} {}", path.display())]
    System {
        /// What was to be done.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The owners of its files can't be others.
    #[error(
        "cannot map the owners of the volume {} for a user namespace: {hint}", path.display()
    )]
    Owners {
        /// The volume.
        path: PathBuf,
        /// What to do.
        hint: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// There is no guest any more to show anything to.
    #[error("the μVM has ended")]
    Closed,
}

fn failed<E: Into<io::Error>>(action: &'static str, path: &Path) -> impl FnOnce(E) -> ShareError {
    move |source| ShareError::System {
        action,
        path: path.to_owned(),
        source: source.into(),
    }
}

/// Where the guest mounts the directory.
pub fn guest_mount_point() -> String {
    format!("{GUEST_STATE_DIR}/shared")
}

/// The guest's mount of the directory, for its whole life.
pub fn guest_mount() -> proto::Mount {
    proto::Mount {
        source: slots::FS_TAG.to_owned(),
        target: guest_mount_point(),
        type_: "virtiofs".into(),
        make_target: true,
        target_mode: 0o711,
        ..Default::default()
    }
}

/// What the guest may do with a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// What the host may.
    Write,
    /// Read it. What is mounted below it stays as writable as the host has it.
    Read,
    /// Read it and what is mounted below it.
    ReadAll,
}

/// To whom a volume's files belong, if not to whom they do on the host.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Owners {
    /// Inside are the owners on the host, outside the ones that the guest sees.
    pub map: IdMap,
    /// Whether that holds for what is mounted below the volume, too.
    pub below: bool,
}

/// A volume as a container wants it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Volume {
    /// A file or directory of the host.
    pub source: PathBuf,
    /// What the guest may do.
    pub access: Access,
    /// Whether what is mounted below it belongs to it.
    pub whole: bool,
    /// Whether mounts that are made below it on the host later are to be seen.
    pub follows_host: bool,
    /// Whose the files are to be.
    pub owners: Option<Owners>,
}

#[derive(Debug, Default)]
struct State {
    /// By volume: its name here, and how many containers use it.
    volumes: HashMap<Volume, (String, usize)>,
    /// Names are never used twice, so that nothing the guest remembers of one is wrong.
    next: u64,
    /// The writable mount of the tmpfs; none when all is over.
    inside: Option<OwnedFd>,
}

/// A μVM's directory.
#[derive(Debug)]
pub struct Share {
    dir: PathBuf,
    state: Mutex<State>,
}

impl Share {
    /// Makes the directory.
    pub fn create(dir: &Path) -> Result<Self, ShareError> {
        // What an earlier attempt left.
        remove(dir).map_err(failed("clear the shared directory", dir))?;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(failed("make the shared directory", dir))?;
        Self::mount_on(dir)
    }

    /// Uses a directory that is there, empty.
    pub fn mount_on(dir: &Path) -> Result<Self, ShareError> {
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        mount("kiln", dir, "tmpfs", flags, TMPFS_OPTIONS)
            .map_err(failed("mount a tmpfs on the shared directory", dir))?;
        let inside = File::open(dir)
            .and_then(|view| {
                let writable = mounts::copy(dir, false)?;
                mounts::restrict(&writable, mounts::RESTRICTED, Propagation::Private)?;
                let read_only = mounts::RESTRICTED | mounts::READ_ONLY;
                mounts::restrict(&view, read_only, Propagation::Private)?;
                Ok(writable)
            })
            .map_err(failed("keep the guest from changing", dir));
        let inside = inside.inspect_err(|_| {
            // The failure that counts is being reported.
            let _ = remove(dir);
        })?;
        Ok(Self {
            dir: dir.to_owned(),
            state: Mutex::new(State {
                inside: Some(inside),
                ..State::default()
            }),
        })
    }

    /// The directory as the guest is to see it, for the VMM.
    pub fn open(&self) -> Result<File, ShareError> {
        File::open(&self.dir).map_err(failed("open the shared directory", &self.dir))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a volume visible to the guest and returns the path it has there. Every call is to be
    /// answered by one of [`release`](Self::release).
    pub fn add(&self, volume: &Volume) -> Result<String, ShareError> {
        let mut state = self.lock();
        if state.inside.is_none() {
            return Err(ShareError::Closed);
        }
        if let Some((name, users)) = state.volumes.get_mut(volume) {
            *users += 1;
            return Ok(format!("{}/{name}", guest_mount_point()));
        }
        let tree = Tree::of(volume)?;
        let name = state.next.to_string();
        state.next += 1;
        self.put(&state, &name, &tree)
            .map_err(failed("show the guest the volume", &volume.source))?;
        let path = format!("{}/{name}", guest_mount_point());
        state.volumes.insert(volume.clone(), (name, 1));
        Ok(path)
    }

    /// Shows the guest its kernel's modules, for as long as it lives.
    pub fn offer_modules(&self, library: &Path) -> Result<(), ShareError> {
        let tree = Tree::of(&Volume {
            source: library.to_owned(),
            access: Access::ReadAll,
            whole: false,
            follows_host: false,
            owners: None,
        })?;
        self.put(&self.lock(), LIBRARY, &tree)
            .map_err(failed("show the guest its kernel's modules", library))
    }

    fn put(&self, state: &State, name: &str, tree: &Tree) -> io::Result<()> {
        let inside = state.inside.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        make_point(inside, name, tree.is_dir)
            .and_then(|()| self.point(name))
            .and_then(|point| mounts::put(&tree.mount, &point))
            .inspect_err(|_| remove_point(inside, name))
    }

    /// A mount point, on the mount that the guest sees.
    fn point(&self, name: &str) -> io::Result<OwnedFd> {
        let view = File::open(&self.dir)?;
        let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let point = rustix::fs::openat2(view, name, flags, Mode::empty(), beneath)?;
        // A link that stands last is opened as such.
        match FileType::from_raw_mode(rustix::fs::fstat(&point)?.st_mode) {
            FileType::Directory | FileType::RegularFile => Ok(point),
            _ => Err(Errno::LOOP.into()),
        }
    }

    /// A container needs the volume no longer.
    pub fn release(&self, volume: &Volume) {
        let mut state = self.lock();
        let Some((name, users)) = state.volumes.get_mut(volume) else {
            return;
        };
        *users -= 1;
        if *users > 0 {
            return;
        }
        let name = std::mem::take(name);
        state.volumes.remove(volume);
        // Detached: the VMM may have files of it open until the guest forgets them.
        let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        if let Err(error) = unmount(self.dir.join(&name), flags) {
            tracing::warn!(volume = %volume.source.display(), %error, "a volume stays mounted");
            return;
        }
        if let Some(inside) = &state.inside {
            remove_point(inside, &name);
        }
    }

    /// Takes everything away. Nothing can be added afterwards.
    pub fn close(&self) {
        let mut state = self.lock();
        state.inside = None;
        state.volumes.clear();
        if let Err(error) = remove(&self.dir) {
            tracing::warn!(directory = %self.dir.display(), %error, "a shared directory stays");
        }
    }
}

/// A volume's mount as the guest is to have it, in nobody's sight.
#[derive(Debug)]
struct Tree {
    mount: OwnedFd,
    is_dir: bool,
}

impl Tree {
    fn of(volume: &Volume) -> Result<Self, ShareError> {
        let source = &volume.source;
        let mount =
            mounts::copy(source, volume.whole).map_err(failed("find the volume", source))?;
        let kind = rustix::fs::fstat(&mount).map_err(failed("look at the volume", source))?;
        if let Some(owners) = &volume.owners {
            let unmapped = |hint| {
                move |error| ShareError::Owners {
                    path: source.clone(),
                    hint,
                    source: error,
                }
            };
            let reach = match owners.below {
                true => Reach::Whole,
                false => Reach::Top,
            };
            let users = owners.map.namespace().map_err(unmapped(
                "is user.max_user_namespaces of the node large enough?",
            ))?;
            mounts::map_owners(&mount, reach, users).map_err(unmapped(
                "its file system may have no idmapped mounts; use another one, or hostUsers: true",
            ))?;
        }
        let mut attributes = mounts::RESTRICTED;
        match volume.access {
            Access::Write => {}
            Access::Read => mounts::set(&mount, Reach::Top, mounts::READ_ONLY)
                .map_err(failed("make read-only the volume", source))?,
            Access::ReadAll => attributes |= mounts::READ_ONLY,
        }
        // The copy is a peer of the original until this: unmounting it later would unmount what is
        // mounted below the original, on the host.
        let propagation = match volume.follows_host {
            true => Propagation::FromSource,
            false => Propagation::Private,
        };
        mounts::restrict(&mount, attributes, propagation)
            .map_err(failed("cut off from the host the volume", source))?;
        Ok(Self {
            mount,
            is_dir: FileType::from_raw_mode(kind.st_mode) == FileType::Directory,
        })
    }
}

/// An empty directory or file for a volume to be mounted on.
fn make_point(inside: &OwnedFd, name: &str, is_dir: bool) -> io::Result<()> {
    if is_dir {
        rustix::fs::mkdirat(inside, name, Mode::RWXU)?;
    } else {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        rustix::fs::openat(inside, name, flags, Mode::RUSR | Mode::WUSR)?;
    }
    Ok(())
}

/// Only ever an empty directory or an empty file.
fn remove_point(inside: &OwnedFd, name: &str) {
    let removed = match rustix::fs::unlinkat(inside, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => rustix::fs::unlinkat(inside, name, AtFlags::REMOVEDIR),
        result => result,
    };
    match removed {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => tracing::warn!(name, %error, "a mount point stays"),
    }
}

/// Unmounts a μVM's directory with all that is mounted below it, and removes it. Fine if there is
/// none.
pub fn remove(dir: &Path) -> io::Result<()> {
    loop {
        match unmount(dir, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // Not a mount point (any more).
            Err(Errno::INVAL) => break,
            Err(Errno::NOENT) => return Ok(()),
            // Who may not unmount can't have mounted either.
            Err(Errno::PERM) => break,
            Err(error) => return Err(error.into()),
        }
    }
    match fs::remove_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => {
            if let Some(parent) = dir.parent() {
                // Fails while another μVM has its directory there, as it should.
                let _ = fs::remove_dir(parent);
            }
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests;
