//! What an image is made of: a stack of overlayfs lower directories, or one plain directory.

use std::path::{Path, PathBuf};

/// Directories whose merged content becomes an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lowers {
    pub(crate) dirs: Vec<PathBuf>,
    pub(crate) rules: Rules,
}

/// How the directories are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rules {
    /// As overlayfs does, with its attributes in `trusted.overlay.`.
    Overlay,
    /// As overlayfs does when mounted with `userxattr`: its attributes are in `user.overlay.`.
    OverlayUser,
    /// One directory, everything in it as it is.
    Plain,
}

impl Lowers {
    /// The layers of an overlay mount, top first, as `lowerdir=` lists them. Whiteouts, opaque
    /// directories and redirects mean what they mean to overlayfs.
    pub fn overlay(dirs: Vec<PathBuf>) -> Lowers {
        Lowers {
            dirs,
            rules: Rules::Overlay,
        }
    }

    /// The same for a mount with the option `userxattr`.
    pub fn overlay_with_user_xattrs(dirs: Vec<PathBuf>) -> Lowers {
        Lowers {
            dirs,
            rules: Rules::OverlayUser,
        }
    }

    /// One directory, in which nothing has a special meaning (a bind mount).
    pub fn plain(dir: PathBuf) -> Lowers {
        Lowers {
            dirs: vec![dir],
            rules: Rules::Plain,
        }
    }

    /// The directories, top first.
    pub fn dirs(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.dirs.iter().map(PathBuf::as_path)
    }
}

impl Rules {
    /// The prefix of overlayfs' own attributes.
    pub(crate) fn overlay_prefix(self) -> Option<&'static [u8]> {
        match self {
            Rules::Overlay => Some(b"trusted.overlay."),
            Rules::OverlayUser => Some(b"user.overlay."),
            Rules::Plain => None,
        }
    }
}
