//! Layers, put on top of each other in one directory.
//!
//! Every path is walked from the directory's own descriptor, one component at a time and never
//! through a link, so that nothing in a layer reaches a file outside. Where a layer has a
//! directory and what lies below has something else, the directory takes its place, as it does in a
//! stack of overlay mounts.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;
use tar::{Entry, EntryType};

use crate::Error;

/// A file of this name hides the file named after the prefix in the layers below.
const WHITEOUT: &[u8] = b".wh.";
/// A file of this name hides everything that the layers below have in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// What a link is whose header names nothing.
const NO_TARGET: &str = "a link to nothing";

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

pub(crate) struct Tree {
    root: OwnedFd,
}

/// What an entry is to have beside its content.
struct Attributes {
    owner: (u32, u32),
    mode: u32,
    modified: i64,
    extended: Vec<(OsString, Vec<u8>)>,
}

/// Reason why an entry is not in the tree; [`Tree::apply`] adds the names of the entry and of its layer.
enum Fault {
    System(io::Error),
    Malformed(&'static str),
    Leaves(PathBuf),
    Dangling(PathBuf),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Fault {
        Fault::System(error)
    }
}

impl From<Errno> for Fault {
    fn from(error: Errno) -> Fault {
        Fault::System(error.into())
    }
}

impl Fault {
    fn of(self, layer: &str, path: &Path) -> Error {
        let (layer, path) = (layer.to_owned(), path.to_owned());
        match self {
            Fault::System(source) => Error::Entry {
                layer,
                path,
                source,
            },
            Fault::Malformed(what) => Error::Malformed { layer, path, what },
            Fault::Leaves(path) => Error::Leaves { layer, path },
            Fault::Dangling(target) => Error::Dangling {
                layer,
                path,
                target,
            },
        }
    }
}

type Result<T, E = Fault> = std::result::Result<T, E>;

impl Tree {
    pub(crate) fn open(path: &Path) -> Result<Tree, Error> {
        let root = rustix::fs::openat(CWD, path, DIRECTORY, Mode::empty())
            .map_err(|errno| Error::file("open", path)(errno.into()))?;
        Ok(Tree { root })
    }

    /// Puts a layer, which errors call `name`, on top of what is there.
    pub(crate) fn apply(&self, name: &str, layer: &mut dyn Read) -> Result<(), Error> {
        let mut seen = HashSet::new();
        let mut directories = Vec::new();
        let mut archive = tar::Archive::new(layer);
        for entry in archive.entries().map_err(Error::layer(name))? {
            let mut entry = entry.map_err(Error::layer(name))?;
            let path = entry.path().map_err(Error::layer(name))?.into_owned();
            let placed = self.place(&path, &mut entry, &mut seen, &mut directories);
            placed.map_err(|fault| fault.of(name, &path))?;
        }
        // Last, since what is made in a directory changes its time; the deepest first.
        for (path, modified) in directories.iter().rev() {
            self.set_time_of(path, *modified)
                .map_err(|fault| fault.of(name, path))?;
        }
        Ok(())
    }

    fn set_time_of(&self, path: &Path, modified: i64) -> Result<()> {
        match self.existing_parent(path)? {
            Some((parent, name)) => set_time(parent.as_fd(), &name, modified),
            None => Ok(()),
        }
    }

    fn place<R: Read>(
        &self,
        path: &Path,
        entry: &mut Entry<'_, R>,
        seen: &mut HashSet<PathBuf>,
        directories: &mut Vec<(PathBuf, i64)>,
    ) -> Result<()> {
        let path = clean(path)?;
        let kind = entry.header().entry_type();
        let attributes = attributes(entry)?;
        let Some(name) = path.file_name() else {
            // The root itself.
            rustix::fs::fchown(&self.root, owner(&attributes).0, owner(&attributes).1)?;
            rustix::fs::fchmod(&self.root, Mode::from_raw_mode(attributes.mode))?;
            return Ok(());
        };
        if let Some(hidden) = name.as_bytes().strip_prefix(WHITEOUT) {
            return self.hide(&path, name, OsStr::from_bytes(hidden), seen);
        }
        for ancestor in path.ancestors().take_while(|a| !a.as_os_str().is_empty()) {
            seen.insert(ancestor.to_owned());
        }
        let parent = self.parent(&path)?;
        let at = parent.as_fd();
        if kind == EntryType::Directory {
            make_directory(at, name)?;
            apply_to_directory(at, name, &attributes)?;
            directories.push((path, attributes.modified));
            return Ok(());
        }
        remove(at, name)?;
        match kind {
            EntryType::Link => {
                let target = entry.link_name()?.ok_or(Fault::Malformed(NO_TARGET))?;
                let target = clean(&target)?;
                let Some((from, old)) = self.existing_parent(&target)? else {
                    return Err(Fault::Dangling(target));
                };
                // The other name has the attributes already.
                return match rustix::fs::linkat(from, old, at, name, AtFlags::empty()) {
                    Err(Errno::NOENT) => Err(Fault::Dangling(target)),
                    linked => Ok(linked?),
                };
            }
            EntryType::Symlink => {
                let target = entry.link_name_bytes().ok_or(Fault::Malformed(NO_TARGET))?;
                rustix::fs::symlinkat(OsStr::from_bytes(&target), at, name)?;
            }
            EntryType::Char | EntryType::Block | EntryType::Fifo => {
                let (kind, device) = special(kind, entry)?;
                rustix::fs::mknodat(at, name, kind, Mode::from_raw_mode(0o600), device)?;
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let file = rustix::fs::openat(at, name, flags, Mode::from_raw_mode(0o600))?;
                let mut file = File::from(file);
                io::copy(entry, &mut file)?;
                rustix::fs::fchown(&file, owner(&attributes).0, owner(&attributes).1)?;
                // After the owner, whose change takes these away.
                for (key, value) in &attributes.extended {
                    set_xattr(rustix::fs::fsetxattr(
                        &file,
                        key.as_os_str(),
                        value,
                        XattrFlags::empty(),
                    ))?;
                }
                rustix::fs::fchmod(&file, Mode::from_raw_mode(attributes.mode))?;
                return set_time(at, name, attributes.modified);
            }
            // Headers for what follows, which the reader has taken in already.
            _ => return Ok(()),
        }
        let (user, group) = owner(&attributes);
        rustix::fs::chownat(at, name, user, group, AtFlags::SYMLINK_NOFOLLOW)?;
        if kind != EntryType::Symlink {
            let mode = Mode::from_raw_mode(attributes.mode);
            rustix::fs::chmodat(at, name, mode, AtFlags::empty())?;
        }
        set_time(at, name, attributes.modified)
    }

    /// Takes away what the layers below have.
    fn hide(
        &self,
        path: &Path,
        name: &OsStr,
        hidden: &OsStr,
        seen: &HashSet<PathBuf>,
    ) -> Result<()> {
        let Some((parent, _)) = self.existing_parent(path)? else {
            return Ok(());
        };
        let directory = path.parent().unwrap_or(Path::new(""));
        if name.as_bytes() == OPAQUE {
            return clear(parent.as_fd(), directory, seen);
        }
        if hidden.is_empty() || seen.contains(&directory.join(hidden)) {
            return Ok(());
        }
        remove(parent.as_fd(), hidden)
    }

    /// The directory that an entry lies in; it is made if need be.
    fn parent(&self, path: &Path) -> Result<OwnedFd> {
        let mut at = self.root.try_clone()?;
        for part in path.parent().into_iter().flat_map(Path::components) {
            let name = part.as_os_str();
            make_directory(at.as_fd(), name)?;
            at = rustix::fs::openat(&at, name, DIRECTORY, Mode::empty())?;
        }
        Ok(at)
    }

    /// The directory that a path lies in, if it is there, and the path's last component.
    fn existing_parent(&self, path: &Path) -> Result<Option<(OwnedFd, OsString)>> {
        let Some(name) = path.file_name() else {
            return Ok(None);
        };
        let mut at = self.root.try_clone()?;
        for part in path.parent().into_iter().flat_map(Path::components) {
            at = match rustix::fs::openat(&at, part.as_os_str(), DIRECTORY, Mode::empty()) {
                Ok(next) => next,
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
                Err(error) => return Err(error.into()),
            };
        }
        Ok(Some((at, name.to_owned())))
    }
}

/// A path of a layer, relative to its root.
fn clean(path: &Path) -> Result<PathBuf> {
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(part) => clean.push(part),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(Fault::Leaves(path.to_owned()));
            }
        }
    }
    Ok(clean)
}

fn attributes<R: Read>(entry: &mut Entry<'_, R>) -> Result<Attributes> {
    let header = entry.header();
    let id = |id: io::Result<u64>| -> Result<u32> {
        u32::try_from(id?).map_err(|_| Fault::Malformed("owned by a number that is too large"))
    };
    let mut attributes = Attributes {
        owner: (id(header.uid())?, id(header.gid())?),
        mode: header.mode()? & 0o7777,
        modified: i64::try_from(header.mtime()?).unwrap_or_default(),
        extended: Vec::new(),
    };
    if let Some(extensions) = entry.pax_extensions()? {
        for extension in extensions {
            let extension = extension?;
            let key = extension.key_bytes();
            if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                let name = OsStr::from_bytes(name).to_owned();
                let value = extension.value_bytes().to_vec();
                attributes.extended.push((name, value));
            }
        }
    }
    Ok(attributes)
}

fn owner(attributes: &Attributes) -> (Option<Uid>, Option<Gid>) {
    let (user, group) = attributes.owner;
    (Some(Uid::from_raw(user)), Some(Gid::from_raw(group)))
}

/// Attributes that this file system or kernel has no place for are left out, as they would be on a
/// node whose snapshots lie here.
fn set_xattr(result: rustix::io::Result<()>) -> Result<()> {
    match result {
        Err(Errno::NOTSUP) => Ok(()),
        other => Ok(other?),
    }
}

fn special<R: Read>(kind: EntryType, entry: &Entry<'_, R>) -> Result<(FileType, u64)> {
    let kind = match kind {
        EntryType::Fifo => return Ok((FileType::Fifo, 0)),
        EntryType::Block => FileType::BlockDevice,
        _ => FileType::CharacterDevice,
    };
    let header = entry.header();
    let no_number = || Fault::Malformed("a device without a number");
    let major = header.device_major()?.ok_or_else(no_number)?;
    let minor = header.device_minor()?.ok_or_else(no_number)?;
    Ok((kind, rustix::fs::makedev(major, minor)))
}

fn set_time(at: BorrowedFd<'_>, name: &OsStr, modified: i64) -> Result<()> {
    let time = Timespec {
        tv_sec: modified,
        tv_nsec: 0,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    Ok(rustix::fs::utimensat(
        at,
        name,
        &times,
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

/// A directory by this name, in place of what is no directory.
fn make_directory(at: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
    match rustix::fs::mkdirat(at, name, Mode::from_raw_mode(0o755)) {
        Ok(()) => return Ok(()),
        Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    let stat = rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        return Ok(());
    }
    remove(at, name)?;
    Ok(rustix::fs::mkdirat(at, name, Mode::from_raw_mode(0o755))?)
}

fn apply_to_directory(at: BorrowedFd<'_>, name: &OsStr, attributes: &Attributes) -> Result<()> {
    let directory = rustix::fs::openat(at, name, DIRECTORY, Mode::empty())?;
    let (user, group) = owner(attributes);
    rustix::fs::fchown(&directory, user, group)?;
    for (key, value) in &attributes.extended {
        let flags = XattrFlags::empty();
        set_xattr(rustix::fs::fsetxattr(
            &directory,
            key.as_os_str(),
            value,
            flags,
        ))?;
    }
    Ok(rustix::fs::fchmod(
        &directory,
        Mode::from_raw_mode(attributes.mode),
    )?)
}

fn entries(directory: &OwnedFd) -> Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(OsStr::from_bytes(name).to_owned());
        }
    }
    Ok(names)
}

/// Removes what is there by this name, with all that is in it.
fn remove(at: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
    match rustix::fs::unlinkat(at, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(error) => return Err(error.into()),
    }
    let directory = rustix::fs::openat(at, name, DIRECTORY, Mode::empty())?;
    for inner in entries(&directory)? {
        remove(directory.as_fd(), &inner)?;
    }
    Ok(rustix::fs::unlinkat(at, name, AtFlags::REMOVEDIR)?)
}

/// Removes from a directory what this layer has not put there.
fn clear(at: BorrowedFd<'_>, path: &Path, seen: &HashSet<PathBuf>) -> Result<()> {
    let directory = rustix::fs::openat(at, ".", DIRECTORY, Mode::empty())?;
    for name in entries(&directory)? {
        let inner = path.join(&name);
        if !seen.contains(&inner) {
            remove(at, &name)?;
            continue;
        }
        let stat = rustix::fs::statat(at, &name, AtFlags::SYMLINK_NOFOLLOW)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            let below = rustix::fs::openat(at, &name, DIRECTORY, Mode::empty())?;
            clear(below.as_fd(), &inner, seen)?;
        }
    }
    Ok(())
}
