//! The directory that a μVM shares with its host: a small tmpfs below which every volume is mounted,
//! and which the guest sees as one virtio-fs file system.
//!
//! **It is nowhere on the host.** It is the root of a mount namespace of its own ([`apart`]), which ends with the process. A
//! volume's mount is copied in the mount namespace of the calling thread, where volumes live, and moved from there. What it
//! resolves to later (a configMap's new version, a nested mount that arrives) is what the guest sees then. Mounts never
//! propagate outwards: taking the directory away must not unmount anything of the host's.
//!
//! **The guest is on the other side of every name in it.** So the tmpfs is mounted twice: read-only where the file server
//! has its root, and writable on a mount that is nowhere but behind a descriptor of this process. Mount points are made
//! through the latter; a guest can't make, move or replace one. A volume's mount is copied detached, cut off from
//! the host and made read-only before it is put in place, by descriptor: a guest that watches finds the volume as it
//! is to be, or none, and no path is looked up that something else could have been put under.

mod apart;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kiln_agent_api::modules::LIBRARY;
use kiln_agent_api::users::IdMap;
use kiln_agent_api::{GUEST_STATE_DIR, proto, slots};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

use crate::mounts::{self, Propagation, Reach};
use apart::Apart;

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
    /// There is no place to mount anything in.
    #[error(
        "cannot make a mount namespace for volumes; it takes root, and a place in user.max_mnt_namespaces of the node"
    )]
    Apart(#[source] io::Error),
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
    /// None when all is over.
    place: Option<Place>,
}

/// Where the volumes are mounted.
#[derive(Debug)]
struct Place {
    /// The tmpfs as the guest sees it.
    view: OwnedFd,
    /// It once more, writable.
    inside: OwnedFd,
    /// The thread whose `/` it is. The last one to go: nothing of it is open then.
    apart: Apart,
}

impl Place {
    fn make() -> io::Result<Self> {
        let apart = Apart::begin()?;
        let (view, inside) = apart.run(|| {
            let view = OwnedFd::from(File::open("/")?);
            let inside = mounts::copy(Path::new("/"), false)?;
            mounts::restrict(&inside, mounts::RESTRICTED, Propagation::Private)?;
            let read_only = mounts::RESTRICTED | mounts::READ_ONLY;
            mounts::restrict(&view, read_only, Propagation::Private)?;
            io::Result::Ok((view, inside))
        })??;
        Ok(Self {
            view,
            inside,
            apart,
        })
    }

    fn put(&self, name: &str, tree: Tree) -> io::Result<()> {
        make_point(&self.inside, name, tree.is_dir)
            .and_then(|()| self.point(name))
            .and_then(|point| self.apart.run(move || mounts::put(tree.mount, point))?)
            .inspect_err(|_| remove_point(&self.inside, name))
    }

    /// A mount point, on the mount that the guest sees.
    fn point(&self, name: &str) -> io::Result<OwnedFd> {
        let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let point = rustix::fs::openat2(&self.view, name, flags, Mode::empty(), beneath)?;
        // A link that stands last is opened as such.
        match FileType::from_raw_mode(rustix::fs::fstat(&point)?.st_mode) {
            FileType::Directory | FileType::RegularFile => Ok(point),
            _ => Err(Errno::LOOP.into()),
        }
    }

    fn take_away(&self, name: &str) -> io::Result<()> {
        let path = Path::new("/").join(name);
        // Detached: the VMM may have files of it open until the guest forgets them.
        let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        self.apart.run(move || unmount(path, flags))??;
        remove_point(&self.inside, name);
        Ok(())
    }
}

/// A μVM's directory.
#[derive(Debug)]
pub struct Share {
    state: Mutex<State>,
}

impl Share {
    /// Makes the directory.
    pub fn make() -> Result<Self, ShareError> {
        let place = Place::make().map_err(ShareError::Apart)?;
        Ok(Self {
            state: Mutex::new(State {
                place: Some(place),
                ..State::default()
            }),
        })
    }

    /// The directory as the guest is to see it, for the VMM.
    pub fn open(&self) -> Result<File, ShareError> {
        let state = self.lock();
        let place = state.place.as_ref().ok_or(ShareError::Closed)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(&place.view, c".", flags, Mode::empty());
        opened
            .map(File::from)
            .map_err(|e| ShareError::Apart(e.into()))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a volume visible to the guest and returns the path it has there. Every call is to be
    /// answered by one of [`release`](Self::release).
    pub fn add(&self, volume: &Volume) -> Result<String, ShareError> {
        let mut state = self.lock();
        let State {
            volumes,
            next,
            place: Some(place),
        } = &mut *state
        else {
            return Err(ShareError::Closed);
        };
        if let Some((name, users)) = volumes.get_mut(volume) {
            *users += 1;
            return Ok(format!("{}/{name}", guest_mount_point()));
        }
        let tree = Tree::of(volume)?;
        let name = next.to_string();
        *next += 1;
        place
            .put(&name, tree)
            .map_err(failed("show the guest the volume", &volume.source))?;
        let path = format!("{}/{name}", guest_mount_point());
        volumes.insert(volume.clone(), (name, 1));
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
        let state = self.lock();
        let place = state.place.as_ref().ok_or(ShareError::Closed)?;
        place
            .put(LIBRARY, tree)
            .map_err(failed("show the guest its kernel's modules", library))
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
        let Some(place) = &state.place else { return };
        if let Err(error) = place.take_away(&name) {
            tracing::warn!(volume = %volume.source.display(), %error, "a volume stays mounted");
        }
    }

    /// Takes everything away. Nothing can be added afterwards.
    pub fn close(&self) {
        let mut state = self.lock();
        state.place = None;
        state.volumes.clear();
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
fn make_point(inside: impl AsFd, name: &str, is_dir: bool) -> io::Result<()> {
    if is_dir {
        rustix::fs::mkdirat(&inside, name, Mode::RWXU)?;
    } else {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        rustix::fs::openat(&inside, name, flags, Mode::RUSR | Mode::WUSR)?;
    }
    Ok(())
}

/// Only ever an empty directory or an empty file.
fn remove_point(inside: impl AsFd, name: &str) {
    let removed = match rustix::fs::unlinkat(&inside, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => rustix::fs::unlinkat(&inside, name, AtFlags::REMOVEDIR),
        result => result,
    };
    match removed {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => tracing::warn!(name, %error, "a mount point stays"),
    }
}

#[cfg(test)]
mod tests;
