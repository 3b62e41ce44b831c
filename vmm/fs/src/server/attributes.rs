//! What is known of files: attributes, extended attributes, file systems.

use std::os::fd::{AsRawFd, RawFd};

use super::{Body, Refusal, Reply, Request, Served, Server};
use crate::credentials::Unprivileged;
use crate::host::{Errno, Numbers, Path, Stat, done, stat};
use crate::wire::Arguments;
use crate::xattr;

/// What SETATTR changes (`FATTR_…`).
mod set {
    pub(super) const MODE: u32 = 1 << 0;
    pub(super) const UID: u32 = 1 << 1;
    pub(super) const GID: u32 = 1 << 2;
    pub(super) const SIZE: u32 = 1 << 3;
    pub(super) const ATIME: u32 = 1 << 4;
    pub(super) const MTIME: u32 = 1 << 5;
    pub(super) const HANDLE: u32 = 1 << 6;
    pub(super) const ATIME_NOW: u32 = 1 << 7;
    pub(super) const MTIME_NOW: u32 = 1 << 8;
    pub(super) const KILL_SUIDGID: u32 = 1 << 11;
}

/// GETATTR is of an open file (`FUSE_GETATTR_FH`).
const OF_HANDLE: u32 = 1;
/// The list of who may access is given by somebody who may not keep the bit that sets the group.
const KILL_SGID: u32 = 1;
/// Of an id that is not to change.
const UNCHANGED: u32 = u32::MAX;

impl Server {
    fn put_attributes(&mut self, stat: &Stat, body: &mut Body) {
        let valid = self.validity(stat).attributes;
        let ino = self.nodes.shown(stat);
        body.u64(valid.as_secs()).u32(valid.subsec_nanos()).u32(0);
        body.attributes(ino, stat);
    }

    /// A node, by way of what is open of it if the request says so.
    fn described(&mut self, node: u64, flags: u32, handle: u64) -> Result<Stat, Refusal> {
        let fd = match flags & OF_HANDLE {
            0 => self.nodes.fd(node)?,
            _ => self.opened(handle, node)?,
        };
        Ok(stat(fd)?)
    }

    pub(super) fn getattr(
        &mut self,
        request: &Request<'_>,
        args: &mut Arguments<'_>,
        body: &mut Body,
    ) -> Served {
        let (flags, _, handle) = (args.u32()?, args.u32()?, args.u64()?);
        let stat = self.described(request.header.node, flags, handle)?;
        self.put_attributes(&stat, body);
        Ok(Reply::Body)
    }

    pub(super) fn statx(
        &mut self,
        request: &Request<'_>,
        args: &mut Arguments<'_>,
        body: &mut Body,
    ) -> Served {
        /// Numbers that the answer ends with, all zero.
        const SPARE: usize = 14 * 8;
        let (flags, _, handle) = (args.u32()?, args.u32()?, args.u64()?);
        let (_how, _mask) = (args.u32()?, args.u32()?);
        let stat = self.described(request.header.node, flags, handle)?;
        let valid = self.validity(&stat).attributes;
        let ino = self.nodes.shown(&stat);
        body.u64(valid.as_secs()).u32(valid.subsec_nanos()).u32(0);
        body.u64(0).u64(0);
        let s = &stat.0;
        let mask = s.stx_mask & (libc::STATX_BASIC_STATS | libc::STATX_BTIME);
        body.u32(mask).u32(s.stx_blksize).u64(s.stx_attributes);
        body.u32(s.stx_nlink).u32(s.stx_uid).u32(s.stx_gid);
        body.u16(s.stx_mode).u16(0);
        body.u64(ino).u64(s.stx_size).u64(s.stx_blocks);
        body.u64(s.stx_attributes_mask);
        for time in [s.stx_atime, s.stx_btime, s.stx_ctime, s.stx_mtime] {
            body.i64(time.tv_sec).u32(time.tv_nsec).u32(0);
        }
        body.u32(s.stx_rdev_major).u32(s.stx_rdev_minor);
        // The guest has a device of its own for the mount.
        body.u32(0).u32(0).zeros(SPARE);
        Ok(Reply::Body)
    }

    pub(super) fn setattr(
        &mut self,
        request: &Request<'_>,
        args: &mut Arguments<'_>,
        body: &mut Body,
    ) -> Served {
        let (valid, _, handle) = (args.u32()?, args.u32()?, args.u64()?);
        let (size, _owner) = (args.u64()?, args.u64()?);
        let (atime, mtime, _ctime) = (args.u64()?, args.u64()?, args.u64()?);
        let (atime_ns, mtime_ns, _) = (args.u32()?, args.u32()?, args.u32()?);
        let (mode, _) = (args.u32()?, args.u32()?);
        let (uid, gid, _) = (args.u32()?, args.u32()?, args.u32()?);
        let node = request.header.node;
        let is = |bit: u32| valid & bit != 0;
        if is(set::SIZE) {
            let size = i64::try_from(size).map_err(|_| Errno(libc::EFBIG))?;
            let handle = is(set::HANDLE).then_some(handle);
            self.set_size(node, handle, size, is(set::KILL_SUIDGID))?;
        }
        let fd = self.nodes.fd(node)?;
        if is(set::UID | set::GID) {
            let uid = if is(set::UID) { uid } else { UNCHANGED };
            let gid = if is(set::GID) { gid } else { UNCHANGED };
            let (name, flags) = (c"".as_ptr(), libc::AT_EMPTY_PATH);
            // SAFETY: a constant string.
            done(unsafe { libc::fchownat(fd, name, uid, gid, flags) })?;
        }
        // After the owner, whose change takes bits away.
        if is(set::MODE) {
            self.set_mode(fd, mode)?;
        }
        let time = |given, now, seconds: u64, nanoseconds: u32| libc::timespec {
            // Negative ones are before 1970.
            tv_sec: seconds as i64,
            tv_nsec: match (is(given), is(now)) {
                (_, true) => libc::UTIME_NOW,
                (true, false) => nanoseconds.into(),
                (false, false) => libc::UTIME_OMIT,
            },
        };
        let atime = time(set::ATIME, set::ATIME_NOW, atime, atime_ns);
        let mtime = time(set::MTIME, set::MTIME_NOW, mtime, mtime_ns);
        if [&atime, &mtime]
            .iter()
            .any(|time| time.tv_nsec != libc::UTIME_OMIT)
        {
            let times = [atime, mtime];
            let (name, flags) = (c"".as_ptr(), libc::AT_EMPTY_PATH);
            // SAFETY: a constant string, and two times.
            done(unsafe { libc::utimensat(fd, name, times.as_ptr(), flags) })?;
        }
        let stat = stat(fd)?;
        self.put_attributes(&stat, body);
        Ok(Reply::Body)
    }

    fn set_mode(&self, fd: RawFd, mode: u32) -> Result<(), Refusal> {
        const BITS: u32 = 0o7777;
        let number = Numbers::name(fd);
        let (dir, name) = (self.numbers.fd(), number.as_c_str().as_ptr());
        // By its number, which is followed to the file itself: a descriptor that opens nothing can't be changed by.
        // SAFETY: a string that lives through the call.
        Ok(done(unsafe { libc::fchmodat(dir, name, mode & BITS, 0) })?)
    }

    /// Cuts a file, or makes it longer: by what is open for writing if that was said.
    fn set_size(
        &mut self,
        node: u64,
        handle: Option<u64>,
        size: i64,
        kill: bool,
    ) -> Result<(), Refusal> {
        let writable = handle
            .map(|handle| self.handles.file(handle, node))
            .transpose()?;
        let by_handle = writable
            .filter(|handle| handle.writable)
            .map(|handle| handle.fd());
        let mut guard: Option<Unprivileged> = None;
        if kill {
            guard = self.unprivileged_if_needed(node)?;
        }
        let cut = match by_handle {
            // SAFETY: numbers only.
            Some(fd) => done(unsafe { libc::ftruncate(fd, size) }),
            None => {
                let file = self.open_node(node, libc::S_IFREG, libc::O_WRONLY)?;
                let fd = file.as_raw_fd();
                // SAFETY: numbers only.
                done(unsafe { libc::ftruncate(fd, size) })
            }
        };
        drop(guard);
        Ok(cut?)
    }

    /// Of the file system that the node is on.
    pub(super) fn statfs(&mut self, request: &Request<'_>, body: &mut Body) -> Served {
        /// Numbers that the answer ends with, all zero.
        const SPARE: usize = 7 * 4;
        let fd = self.nodes.fd(request.header.node)?;
        // SAFETY: all-zero is a valid statfs, which the kernel fills in.
        let (result, s) = unsafe {
            let mut s: libc::statfs = std::mem::zeroed();
            (libc::fstatfs(fd, &raw mut s), s)
        };
        done(result)?;
        // Sizes of blocks and lengths of names fit 32 bits.
        let small = |number: i64| u32::try_from(number).unwrap_or(u32::MAX);
        body.u64(s.f_blocks).u64(s.f_bfree).u64(s.f_bavail);
        body.u64(s.f_files).u64(s.f_ffree);
        body.u32(small(s.f_bsize)).u32(small(s.f_namelen));
        body.u32(small(s.f_frsize)).zeros(SPARE);
        Ok(Reply::Body)
    }

    /// Whether the request's user may do something, by the mode alone. The guest's kernel asks itself, and knows all of a
    /// user's groups; it asks the server only where it is told to.
    pub(super) fn access(&mut self, request: &Request<'_>, args: &mut Arguments<'_>) -> Served {
        const ROOT_USER: u32 = 0;
        let mask = args.u32()? & 0o7;
        let header = &request.header;
        let s = stat(self.nodes.fd(header.node)?)?.0;
        let mode = u32::from(s.stx_mode);
        let granted = if header.uid == ROOT_USER {
            let runs = mode & libc::S_IFMT == libc::S_IFDIR || mode & 0o111 != 0;
            0o6 | u32::from(runs)
        } else if header.uid == s.stx_uid {
            mode >> 6
        } else if header.gid == s.stx_gid {
            mode >> 3
        } else {
            mode
        };
        if mask & !granted != 0 {
            return Err(Errno(libc::EACCES).into());
        }
        Ok(Reply::Body)
    }

    fn path(&mut self, request: &Request<'_>) -> Result<Path, Refusal> {
        let fd = self.nodes.fd(request.header.node)?;
        Ok(self.numbers.path(fd))
    }

    pub(super) fn setxattr(&mut self, request: &Request<'_>, args: &mut Arguments<'_>) -> Served {
        let (size, flags) = (args.u32()? as usize, args.flags()?);
        let mut how = 0;
        if self.long_setxattr {
            (how, _) = (args.u32()?, args.u32()?);
        }
        let name = args.text()?;
        let value = args.bytes(size)?;
        let path = self.path(request)?;
        xattr::set(&path, name, value, flags)?;
        if how & KILL_SGID != 0 && name.to_bytes() == xattr::ACCESS_LIST {
            let fd = self.nodes.fd(request.header.node)?;
            let mode = u32::from(stat(fd)?.0.stx_mode);
            if mode & libc::S_ISGID != 0 {
                self.set_mode(fd, mode & !libc::S_ISGID)?;
            }
        }
        Ok(Reply::Body)
    }

    pub(super) fn getxattr(
        &mut self,
        request: &Request<'_>,
        args: &mut Arguments<'_>,
        body: &mut Body,
    ) -> Served {
        let (size, _) = (args.u32()?, args.u32()?);
        let name = args.text()?;
        let path = self.path(request)?;
        let room = (size as usize).min(request.room());
        let len = xattr::get(&path, name, &mut body.0, room)?;
        if size == 0 {
            // Lengths are at most 64 KiB.
            body.u32(len as u32).u32(0);
        }
        Ok(Reply::Body)
    }

    pub(super) fn listxattr(
        &mut self,
        request: &Request<'_>,
        args: &mut Arguments<'_>,
        body: &mut Body,
    ) -> Served {
        let (size, _) = (args.u32()?, args.u32()?);
        let path = self.path(request)?;
        xattr::list(&path, &mut body.0)?;
        let len = body.0.len();
        if size == 0 {
            body.0.clear();
            // As above.
            body.u32(len as u32).u32(0);
        } else if len > size as usize {
            return Err(Errno(libc::ERANGE).into());
        }
        Ok(Reply::Body)
    }

    pub(super) fn removexattr(
        &mut self,
        request: &Request<'_>,
        args: &mut Arguments<'_>,
    ) -> Served {
        let name = args.text()?;
        let path = self.path(request)?;
        xattr::remove(&path, name)?;
        Ok(Reply::Body)
    }
}
