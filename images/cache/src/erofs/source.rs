//! Reaching directories and files of the layers, however deep they lie.
//!
//! Paths are opened relative to a layer's own descriptor and never through symbolic links.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags};

use super::error::ImageError;
use crate::lowers::Lowers;

/// What one `openat` takes at most, below the kernel's `PATH_MAX`.
const LONGEST_PATH: usize = 4000;

/// A directory of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SourceDir {
    pub(crate) layer: usize,
    /// Relative to the layer, without slashes at its ends; empty for the layer itself.
    pub(crate) path: Box<[u8]>,
}

impl SourceDir {
    pub(crate) fn join(&self, name: &[u8]) -> SourceDir {
        let mut path = Vec::with_capacity(self.path.len() + 1 + name.len());
        path.extend_from_slice(&self.path);
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        SourceDir {
            layer: self.layer,
            path: path.into(),
        }
    }
}

/// The layers, opened.
#[derive(Debug)]
pub(crate) struct Layers {
    roots: Vec<(PathBuf, OwnedFd)>,
}

impl Layers {
    pub(crate) fn open(lowers: &Lowers) -> Result<Layers, ImageError> {
        if lowers.dirs.is_empty() {
            return Err(ImageError::NoLayers);
        }
        let roots = lowers
            .dirs
            .iter()
            .map(|path| {
                // The layer itself may be named through symbolic links.
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                rustix::fs::open(path, flags, Mode::empty())
                    .map(|fd| (path.clone(), fd))
                    .map_err(|e| ImageError::OpenLayer {
                        path: path.clone(),
                        source: e.into(),
                    })
            })
            .collect::<Result<_, _>>()?;
        Ok(Layers { roots })
    }

    pub(crate) fn count(&self) -> usize {
        self.roots.len()
    }

    /// For messages: where a thing lies on this machine.
    pub(crate) fn path(&self, dir: &SourceDir, name: &[u8]) -> PathBuf {
        let mut path = self.roots[dir.layer].0.clone();
        path.push(OsStr::from_bytes(&dir.path));
        if !name.is_empty() {
            path.push(OsStr::from_bytes(name));
        }
        path
    }

    pub(crate) fn read_error(
        &self,
        dir: &SourceDir,
        name: &[u8],
        e: impl Into<io::Error>,
    ) -> ImageError {
        ImageError::Read {
            path: self.path(dir, name),
            source: e.into(),
        }
    }

    pub(crate) fn open_dir(&self, dir: &SourceDir) -> rustix::io::Result<OwnedFd> {
        let root = self.roots[dir.layer].1.as_fd();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        if dir.path.is_empty() {
            return rustix::fs::openat(root, ".", flags, Mode::empty());
        }
        let mut rest = &dir.path[..];
        let mut at: Option<OwnedFd> = None;
        while rest.len() > LONGEST_PATH {
            let cut = rest[..LONGEST_PATH]
                .iter()
                .rposition(|b| *b == b'/')
                .ok_or(rustix::io::Errno::NAMETOOLONG)?;
            let from = at.as_ref().map_or(root, AsFd::as_fd);
            at = Some(rustix::fs::openat(
                from,
                &rest[..cut],
                flags,
                Mode::empty(),
            )?);
            rest = &rest[cut + 1..];
        }
        let from = at.as_ref().map_or(root, AsFd::as_fd);
        rustix::fs::openat(from, rest, flags, Mode::empty())
    }
}

/// Opens a file for reading, without leaving a trace in its access time where that is allowed.
pub(crate) fn open_file(dir: BorrowedFd<'_>, name: &[u8]) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    match rustix::fs::openat(dir, name, flags | OFlags::NOATIME, Mode::empty()) {
        // Only the owner may, or who has CAP_FOWNER.
        Err(rustix::io::Errno::PERM) => rustix::fs::openat(dir, name, flags, Mode::empty()),
        result => result,
    }
}
