//! Messages of the FUSE protocol (`linux/fuse.h`): little-endian numbers one after the other.
//!
//! Not trusted: anything that is read here. It has been copied out of guest memory before.

use std::ffi::CStr;
use std::time::Duration;

use crate::host::{Errno, Stat};
use crate::server::Refusal;

/// `struct fuse_in_header`.
pub(crate) const IN_HEADER: usize = 40;
/// `struct fuse_out_header`.
pub(crate) const OUT_HEADER: usize = 16;
/// `struct fuse_write_in`: data come after it.
pub(crate) const WRITE_IN: usize = 40;
/// `struct fuse_dirent` without its name.
pub(crate) const DIRENT: usize = 24;
/// `struct fuse_entry_out`.
pub(crate) const ENTRY: usize = 128;

/// The root's node.
pub(crate) const ROOT: u64 = 1;
pub(crate) const MAJOR: u32 = 7;
/// The first with FUSE_STATX.
pub(crate) const MINOR: u32 = 39;

/// What is asked for.
#[rustfmt::skip]
pub(crate) mod op {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RMDIR: u32 = 11;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FSYNC: u32 = 20;
    pub(crate) const SETXATTR: u32 = 21;
    pub(crate) const GETXATTR: u32 = 22;
    pub(crate) const LISTXATTR: u32 = 23;
    pub(crate) const REMOVEXATTR: u32 = 24;
    pub(crate) const FLUSH: u32 = 25;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const FSYNCDIR: u32 = 30;
    pub(crate) const GETLK: u32 = 31;
    pub(crate) const SETLK: u32 = 32;
    pub(crate) const SETLKW: u32 = 33;
    pub(crate) const ACCESS: u32 = 34;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const IOCTL: u32 = 39;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const READDIRPLUS: u32 = 44;
    pub(crate) const RENAME2: u32 = 45;
    pub(crate) const LSEEK: u32 = 46;
    pub(crate) const COPY_FILE_RANGE: u32 = 47;
    pub(crate) const SYNCFS: u32 = 50;
    pub(crate) const TMPFILE: u32 = 51;
    pub(crate) const STATX: u32 = 52;
}

/// What is agreed on at the mount.
#[rustfmt::skip]
pub(crate) mod init {
    pub(crate) const ASYNC_READ: u64 = 1 << 0;
    pub(crate) const POSIX_LOCKS: u64 = 1 << 1;
    pub(crate) const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub(crate) const BIG_WRITES: u64 = 1 << 5;
    pub(crate) const DONT_MASK: u64 = 1 << 6;
    pub(crate) const FLOCK_LOCKS: u64 = 1 << 10;
    pub(crate) const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub(crate) const DO_READDIRPLUS: u64 = 1 << 13;
    pub(crate) const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub(crate) const PARALLEL_DIROPS: u64 = 1 << 18;
    pub(crate) const POSIX_ACL: u64 = 1 << 20;
    pub(crate) const MAX_PAGES: u64 = 1 << 22;
    pub(crate) const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub(crate) const SETXATTR_EXT: u64 = 1 << 29;
    pub(crate) const INIT_EXT: u64 = 1 << 30;
}

/// A request's header.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Header {
    pub(crate) len: usize,
    pub(crate) opcode: u32,
    pub(crate) unique: u64,
    pub(crate) node: u64,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// The thread that asks, as the guest's first process knows it.
    pub(crate) thread: u32,
}

impl Header {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, Refusal> {
        let mut fields = Arguments::new(bytes);
        Ok(Header {
            len: fields.u32()? as usize,
            opcode: fields.u32()?,
            unique: fields.u64()?,
            node: fields.u64()?,
            uid: fields.u32()?,
            gid: fields.u32()?,
            thread: fields.u32()?,
        })
    }
}

/// What follows a request's header.
#[derive(Clone, Copy)]
pub(crate) struct Arguments<'a>(&'a [u8]);

impl<'a> Arguments<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Arguments(bytes)
    }

    /// The next so many bytes.
    pub(crate) fn bytes(&mut self, len: usize) -> Result<&'a [u8], Refusal> {
        let (now, later) = self.0.split_at_checked(len).ok_or(Refusal::Malformed(
            "the request is shorter than its arguments",
        ))?;
        self.0 = later;
        Ok(now)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Refusal> {
        let bytes = self.bytes(N)?.try_into();
        bytes.map_err(|_| Refusal::Malformed("the request is shorter than its arguments"))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Refusal> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Refusal> {
        self.array().map(u64::from_le_bytes)
    }

    /// Flags of system calls, whose type is signed.
    pub(crate) fn flags(&mut self) -> Result<i32, Refusal> {
        self.array().map(i32::from_le_bytes)
    }

    /// A place in a file, or a length.
    pub(crate) fn offset(&mut self) -> Result<i64, Refusal> {
        i64::try_from(self.u64()?).map_err(|_| Errno(libc::EINVAL).into())
    }

    /// Bytes up to a zero.
    pub(crate) fn text(&mut self) -> Result<&'a CStr, Refusal> {
        let text = CStr::from_bytes_until_nul(self.0)
            .map_err(|_| Refusal::Malformed("a name does not end"))?;
        self.bytes(text.count_bytes() + 1)?;
        Ok(text)
    }

    /// The name of something in a folder, and not of what is above it or elsewhere.
    pub(crate) fn name(&mut self) -> Result<&'a CStr, Refusal> {
        let name = self.text()?;
        let bytes = name.to_bytes();
        if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
            return Err(Errno(libc::EINVAL).into());
        }
        Ok(name)
    }
}

/// An answer's body.
#[derive(Debug, Default)]
pub(crate) struct Body(pub(crate) Vec<u8>);

impl Body {
    pub(crate) fn u16(&mut self, number: u16) -> &mut Self {
        self.bytes(&number.to_le_bytes())
    }

    pub(crate) fn u32(&mut self, number: u32) -> &mut Self {
        self.bytes(&number.to_le_bytes())
    }

    pub(crate) fn u64(&mut self, number: u64) -> &mut Self {
        self.bytes(&number.to_le_bytes())
    }

    pub(crate) fn i64(&mut self, number: i64) -> &mut Self {
        self.bytes(&number.to_le_bytes())
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(crate) fn zeros(&mut self, count: usize) -> &mut Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }

    /// `struct fuse_attr`.
    pub(crate) fn attributes(&mut self, ino: u64, stat: &Stat) -> &mut Self {
        let s = &stat.0;
        self.u64(ino).u64(s.stx_size).u64(s.stx_blocks);
        let times = [s.stx_atime, s.stx_mtime, s.stx_ctime];
        for time in times {
            self.i64(time.tv_sec);
        }
        for time in times {
            self.u32(time.tv_nsec);
        }
        let (major, minor) = (s.stx_rdev_major, s.stx_rdev_minor);
        // As the kernel encodes device numbers in 32 bits.
        let device = minor & 0xff | major << 8 | (minor & !0xff) << 12;
        self.u32(s.stx_mode.into()).u32(s.stx_nlink);
        self.u32(s.stx_uid).u32(s.stx_gid);
        self.u32(device).u32(s.stx_blksize).u32(0)
    }

    /// `struct fuse_entry_out`. Ids are never given twice, so all are of one generation.
    pub(crate) fn entry(&mut self, node: u64, valid: Validity, ino: u64, stat: &Stat) -> &mut Self {
        const GENERATION: u64 = 1;
        self.u64(node).u64(GENERATION);
        self.u64(valid.name.as_secs())
            .u64(valid.attributes.as_secs());
        self.u32(valid.name.subsec_nanos());
        self.u32(valid.attributes.subsec_nanos());
        self.attributes(ino, stat)
    }
}

/// For how long the guest may go by what it was told.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Validity {
    pub(crate) name: Duration,
    pub(crate) attributes: Duration,
}
