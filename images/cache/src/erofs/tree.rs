//! The tree an image will show, in memory: everything but the files' content.

use std::sync::Arc;

use super::format::{FileType, RawXattr};
use super::source::SourceDir;

/// An inode's place in [`Tree::inodes`].
pub(crate) type InodeIndex = usize;

/// The merged tree. The first inode is the root; directories stand in depth-first order, and so do
/// the other inodes, each at its first name.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) inodes: Vec<Inode>,
    /// Attributes that EROFS has no place for, and that were left out.
    pub(crate) xattrs_left_out: u64,
}

#[derive(Debug)]
pub(crate) struct Inode {
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: i64,
    pub(crate) mtime_nsec: u32,
    pub(crate) nlink: u32,
    pub(crate) xattrs: Option<XattrSet>,
    pub(crate) content: Content,
}

/// Sorted attributes of one inode. Equal sets share memory.
pub(crate) type XattrSet = Arc<[RawXattr]>;

#[derive(Debug)]
pub(crate) enum Content {
    /// Sorted by name, `.` and `..` included.
    Directory(Vec<Dirent>),
    File(FileContent),
    Symlink(Box<[u8]>),
    /// The device number as it goes to disk.
    CharDevice(u32),
    BlockDevice(u32),
    Fifo,
    Socket,
}

#[derive(Debug)]
pub(crate) struct Dirent {
    pub(crate) name: Arc<[u8]>,
    pub(crate) inode: InodeIndex,
}

#[derive(Debug)]
pub(crate) struct FileContent {
    pub(crate) size: u64,
    pub(crate) dir: Arc<SourceDir>,
    pub(crate) name: Arc<[u8]>,
    /// The parts that have data, if the file has holes worth keeping.
    pub(crate) runs: Option<Vec<Run>>,
}

/// A part of a sparse file that has data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl Content {
    pub(crate) fn file_type(&self) -> FileType {
        match self {
            Content::Directory(_) => FileType::Directory,
            Content::File(_) => FileType::Regular,
            Content::Symlink(_) => FileType::Symlink,
            Content::CharDevice(_) => FileType::CharDevice,
            Content::BlockDevice(_) => FileType::BlockDevice,
            Content::Fifo => FileType::Fifo,
            Content::Socket => FileType::Socket,
        }
    }
}
