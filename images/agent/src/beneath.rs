//! Places in directories that containers write to. A container can put a link wherever it likes, and the agent has all the
//! rights that the container lacks: so every step is taken from a descriptor, and none follows a link.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Component, Path};

use kiln_agent_api::proto;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, fchmod, mkdirat};
use nix::unistd::{Gid, Uid, fchown};

use crate::storage::{Result, StorageError, file_error};

/// A place that was found. It stays the same one whatever becomes of its name.
#[derive(Debug)]
pub(crate) struct Found(OwnedFd);

impl Found {
    /// How it is named as long as this lives.
    pub(crate) fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.0.as_raw_fd())
    }
}

/// Finds a place below a directory, and makes what is missing.
pub(crate) fn find(top: &Path, place: &proto::Beneath) -> Result<Found> {
    let path = Path::new(&place.path);
    let mut names = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => names.push(name),
            Component::CurDir => {}
            _ => return Err(StorageError::Path(place.path.clone())),
        }
    }
    let failed = |error: Errno| {
        let source = match error {
            Errno::ELOOP => io::Error::other("there is a link on the way, which is not followed"),
            error => error.into(),
        };
        file_error("find", &top.join(path), source)
    };
    let mut at = open(AT_FDCWD, top, OFlag::O_DIRECTORY, ResolveFlag::empty()).map_err(failed)?;
    for name in names {
        at = step(&at, Path::new(name), place).map_err(failed)?;
    }
    Ok(Found(at))
}

/// One name further. A link is refused as such: `O_PATH` would open it if it were told not to follow it.
fn step(from: &OwnedFd, name: &Path, place: &proto::Beneath) -> nix::Result<OwnedFd> {
    let plain = ResolveFlag::RESOLVE_BENEATH
        | ResolveFlag::RESOLVE_NO_SYMLINKS
        | ResolveFlag::RESOLVE_NO_XDEV;
    match open(from, name, OFlag::empty(), plain) {
        Err(Errno::ENOENT) => {}
        found => return found,
    }
    match mkdirat(from, name, Mode::S_IRWXU) {
        // Somebody was quicker: it is theirs.
        Err(Errno::EEXIST) => open(from, name, OFlag::empty(), plain),
        Err(error) => Err(error),
        Ok(()) => {
            let made = open_directory(from, name, plain)?;
            fchown(
                &made,
                Some(Uid::from_raw(place.owned.uid)),
                Some(Gid::from_raw(place.owned.gid)),
            )?;
            // After the owner, whose change takes bits away; not by the umask.
            fchmod(&made, Mode::from_bits_truncate(place.owned.mode))?;
            Ok(made)
        }
    }
}

fn open_directory(from: &OwnedFd, name: &Path, resolve: ResolveFlag) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat2(from, name, OpenHow::new().flags(flags).resolve(resolve))
}

fn open(from: impl AsFd, name: &Path, flags: OFlag, resolve: ResolveFlag) -> nix::Result<OwnedFd> {
    let flags = flags | OFlag::O_PATH | OFlag::O_CLOEXEC;
    openat2(from, name, OpenHow::new().flags(flags).resolve(resolve))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};

    fn place(path: &str) -> proto::Beneath {
        proto::Beneath {
            path: path.into(),
            owned: Some(proto::Owned {
                mode: 0o2770,
                uid: nix::unistd::getuid().as_raw(),
                gid: nix::unistd::getgid().as_raw(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        }
    }

    #[test]
    fn what_is_missing_is_made_and_what_is_there_stays() {
        let top = tempfile::tempdir().unwrap();
        let found = find(top.path(), &place("a/b")).unwrap();
        let made = fs::metadata(top.path().join("a/b")).unwrap();
        assert_eq!(made.mode() & 0o7777, 0o2770);
        assert_eq!(fs::metadata(found.path()).unwrap().ino(), made.ino());
        fs::write(top.path().join("a/file"), "text").unwrap();
        let file = find(top.path(), &place("a/file")).unwrap();
        assert_eq!(fs::read_to_string(file.path()).unwrap(), "text");
    }

    #[test]
    fn links_are_not_followed_wherever_they_are() {
        let top = tempfile::tempdir().unwrap();
        let secret = tempfile::tempdir().unwrap();
        fs::create_dir(secret.path().join("below")).unwrap();
        symlink(secret.path(), top.path().join("out")).unwrap();
        symlink(".", top.path().join("here")).unwrap();
        for path in ["out", "out/below", "out/new", "here/new"] {
            let error = find(top.path(), &place(path)).unwrap_err().to_string();
            assert!(error.contains("link"), "{path}: {error}");
        }
        assert!(!secret.path().join("new").exists());
        for path in ["../x", "a/../../x", "/etc"] {
            assert!(find(top.path(), &place(path)).is_err(), "{path}");
        }
    }
}
