//! Files: opened, read, written, closed.
//!
//! Not trusted: what a name stands for. Something else than a regular file may have taken its place, and is not opened.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{SystemTime, UNIX_EPOCH};

use super::{Body, Refusal, Reply, Request, Served, Server};
use crate::credentials::Unprivileged;
use crate::handles::Handle;
use crate::host::{Answer, Errno, Stat, Time, done, number, open_at, stat};
use crate::nodes::Seen;
use crate::wire::{Arguments, IN_HEADER, OUT_HEADER, WRITE_IN};

/// Of OPEN's arguments: who opens may not keep the bits that set ids.
const OPEN_KILL_SUIDGID: u32 = 1;
/// Of OPEN's answer (`FOPEN_…`).
const KEEP_CACHE: u32 = 1 << 1;
const NO_FLUSH: u32 = 1 << 5;
/// Of WRITE's arguments: from the guest's cache, not by a file that somebody has open; and as above.
const WRITE_CACHE: u32 = 1;
const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// Of FSYNC's arguments.
const DATA_ONLY: u32 = 1;
/// What one request reads at most, as what it writes.
const MOST: usize = 1 << 20;
/// What one request copies at most: others wait for it.
const MOST_COPIED: u64 = 64 << 20;
/// Other bits of a mode than the type's.
const BITS: u32 = 0o7777;

/// What of a guest's flags the host's file is opened with. Appending is said with each write.
fn host_flags(flags: i32) -> Answer<i32> {
    const TAKEN: i32 =
        libc::O_ACCMODE | libc::O_TRUNC | libc::O_DIRECT | libc::O_SYNC | libc::O_NOATIME;
    if flags & libc::O_ACCMODE == libc::O_ACCMODE {
        return Err(Errno(libc::EINVAL));
    }
    Ok(flags & TAKEN)
}

/// Whether so much time has passed since that another change would have another time.
fn has_settled(times: [Time; 2]) -> bool {
    const LONG: i64 = 2;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |now| now.as_secs() as i64);
    times.iter().all(|time| time.0.saturating_add(LONG) < now)
}

impl Server {
    /// Whether what the guest has in its cache of a file is what the file has now. Remembers what it has.
    fn is_as_seen(&mut self, id: u64, fd: RawFd) -> Answer<bool> {
        let s = stat(fd)?.0;
        let now = Seen {
            modified: (s.stx_mtime.tv_sec, s.stx_mtime.tv_nsec),
            changed: (s.stx_ctime.tv_sec, s.stx_ctime.tv_nsec),
            size: s.stx_size,
        };
        let same = self.nodes.seen(id) == Some(now);
        // A change that comes within the same tick of the clock would go unseen.
        let settled = has_settled([now.modified, now.changed]);
        self.nodes.set_seen(id, settled.then_some(now));
        Ok(same)
    }

    /// Adds an open file, and what the guest is told of it.
    fn add_file(
        &mut self,
        id: u64,
        fd: OwnedFd,
        flags: i32,
        is_new: bool,
        body: &mut Body,
    ) -> Answer<()> {
        let mut how = 0;
        if flags & libc::O_ACCMODE == libc::O_RDONLY {
            how |= NO_FLUSH;
        }
        if !is_new && self.is_as_seen(id, fd.as_raw_fd())? {
            how |= KEEP_CACHE;
        }
        self.nodes.pin(id);
        let handle = self.handles.add(Handle::file(id, fd, flags));
        body.u64(handle).u32(how).u32(0);
        Ok(())
    }

    /// Opens a regular file that is there.
    fn open_file(&mut self, id: u64, flags: i32, how: u32) -> Answer<OwnedFd> {
        let mut guard = None;
        if flags & libc::O_TRUNC != 0 && how & OPEN_KILL_SUIDGID != 0 {
            guard = self.unprivileged_if_needed(id)?;
        }
        let opened = self.open_node(id, libc::S_IFREG, flags);
        drop(guard);
        opened
    }

    /// For a change that is to take bits away that set ids, if a file has such.
    pub(super) fn unprivileged_if_needed(&mut self, id: u64) -> Answer<Option<Unprivileged>> {
        let sets_ids = stat(self.nodes.fd(id)?)?.sets_ids();
        sets_ids.then(Unprivileged::new).transpose()
    }

    pub(super) fn open(
        &mut self,
        request: &Request<'_>,
        args: &mut Arguments<'_>,
        body: &mut Body,
    ) -> Served {
        let (flags, how) = (host_flags(args.flags()?)?, args.u32()?);
        let id = request.header.node;
        let fd = self.open_file(id, flags, how)?;
        self.add_file(id, fd, flags, false, body)?;
        Ok(Reply::Body)
    }

    pub(super) fn create(
        &mut self,
        request: &Request<'_>,
        args: &mut Arguments<'_>,
        body: &mut Body,
    ) -> Served {
        let asked = args.flags()?;
        let (mode, umask, how) = (args.u32()?, args.u32()?, args.u32()?);
        let name = args.name()?;
        let (header, flags) = (request.header, host_flags(asked)?);
        // What is there already may be something that must not be opened, so only what is new is opened here. It is
        // opened without O_DIRECT, which a file system may refuse after it has made the file.
        let new = flags & !(libc::O_TRUNC | libc::O_DIRECT) | libc::O_CREAT | libc::O_EXCL;
        let made = self.with_room(|server| {
            let dir = server.nodes.fd(header.node)?;
            let _acting = server.own.act_for(header.uid, header.gid, umask)?;
            open_at(dir, name, new | libc::O_NOFOLLOW, mode & BITS)
        });
        let is_new = made.is_ok();
        let (id, stat, fd) = match made {
            Ok(fd) => self.know(header.node, name, fd, flags)?,
            Err(Errno(libc::EEXIST)) if asked & libc::O_EXCL == 0 => {
                let (id, stat) = self.nodes.look_up(header.node, name)?;
                match self.open_file(id, flags, how) {
                    Ok(fd) => (id, stat, fd),
                    Err(error) => {
                        self.nodes.forget(id, 1);
                        return Err(error.into());
                    }
                }
            }
            Err(error) => return Err(error.into()),
        };
        self.put_entry(id, &stat, body);
        self.add_file(id, fd, flags, is_new, body)?;
        Ok(Reply::Body)
    }

    /// Makes a file that has no name until it is given one.
    pub(super) fn tmpfile(
        &mut self,
        request: &Request<'_>,
        args: &mut Arguments<'_>,
        body: &mut Body,
    ) -> Served {
        let asked = args.flags()?;
        let (mode, umask, _how) = (args.u32()?, args.u32()?, args.u32()?);
        let (header, flags) = (request.header, host_flags(asked)?);
        let new = flags & !(libc::O_TRUNC | libc::O_DIRECT) | libc::O_TMPFILE;
        let fd = self.with_room(|server| {
            let dir = server.nodes.fd(header.node)?;
            let _acting = server.own.act_for(header.uid, header.gid, umask)?;
            open_at(dir, c".", new | asked & libc::O_EXCL, mode & BITS)
        })?;
        let (id, stat, fd) = self.know(header.node, c"", fd, flags)?;
        self.put_entry(id, &stat, body);
        self.add_file(id, fd, flags, true, body)?;
        Ok(Reply::Body)
    }

    /// Makes a new file one that the guest knows. Gives it as it is to be open.
    fn know(
        &mut self,
        parent: u64,
        name: &CStr,
        fd: OwnedFd,
        flags: i32,
    ) -> Answer<(u64, Stat, OwnedFd)> {
        let number = fd.as_raw_fd();
        let path = self.with_room(|server| server.numbers.open(number, libc::O_PATH))?;
        let stat = stat(number)?;
        let id = self.nodes.enter(path, &stat, parent, name)?;
        let mut fd = fd;
        if flags & libc::O_DIRECT != 0 {
            // Without it, if the host's file system can't.
            let again = self.numbers.open(number, flags & !libc::O_TRUNC);
            fd = again.unwrap_or(fd);
        }
        Ok((id, stat, fd))
    }

    pub(super) fn read(&mut self, request: &Request<'_>, args: &mut Arguments<'_>) -> Served {
        let (number_, offset, size) = (args.u64()?, args.offset()?, args.u32()? as usize);
        let fd = self.handles.file(number_, request.header.node)?.fd();
        let size = size.min(request.room()).min(MOST);
        request.to.iovecs(OUT_HEADER, size, &mut self.iovecs);
        let (list, count) = (self.iovecs.as_ptr(), self.iovecs.len());
        // SAFETY: at most 1024 buffers, all of them in guest memory, which stays mapped and which nobody has references
        // into.
        let len = unsafe { libc::preadv(fd, list, count as libc::c_int, offset) };
        let len = number(len as libc::c_long)?;
        Ok(Reply::Data(
            usize::try_from(len).map_err(|_| Errno(libc::EIO))?,
        ))
    }

    pub(super) fn write(
        &mut self,
        request: &Request<'_>,
        args: &mut Arguments<'_>,
        body: &mut Body,
    ) -> Served {
        let (number_, offset, size) = (args.u64()?, args.offset()?, args.u32()? as usize);
        let (how, _owner, flags) = (args.u32()?, args.u64()?, args.flags()?);
        const DATA: usize = IN_HEADER + WRITE_IN;
        if size > request.from.len().saturating_sub(DATA) {
            return Err(Refusal::Malformed("it has less data than it says"));
        }
        let id = request.header.node;
        let handle = self.handles.file(number_, id)?;
        handle.written = true;
        let fd = handle.fd();
        let mut guard = None;
        if how & WRITE_KILL_SUIDGID != 0 && stat(fd)?.sets_ids() {
            guard = Some(Unprivileged::new()?);
        }
        // Where the end is, the guest can't know: others write to the file as well.
        let append = flags & libc::O_APPEND != 0 && how & WRITE_CACHE == 0;
        request.from.iovecs(DATA, size, &mut self.iovecs);
        let (list, count) = (self.iovecs.as_ptr(), self.iovecs.len());
        // SAFETY: as for reading.
        let len = unsafe {
            let count = count as libc::c_int;
            if append {
                libc::pwritev2(fd, list, count, offset, libc::RWF_APPEND)
            } else {
                libc::pwritev(fd, list, count, offset)
            }
        };
        let len = number(len as libc::c_long)?;
        drop(guard);
        body.u32(u32::try_from(len).map_err(|_| Errno(libc::EIO))?)
            .u32(0);
        Ok(Reply::Body)
    }

    pub(super) fn flush(&mut self, request: &Request<'_>, args: &mut Arguments<'_>) -> Served {
        let (number_, _, _) = (args.u64()?, args.u32()?, args.u32()?);
        let owner = args.u64()?;
        let id = request.header.node;
        let handle = self.handles.file(number_, id)?;
        let written = std::mem::take(&mut handle.written);
        let fd = handle.fd();
        self.locks.give_up(id, owner);
        if written {
            // Some file systems say only now that there was no space.
            // SAFETY: numbers only; what is closed is what was just made.
            unsafe {
                let again = libc::dup(fd);
                done(again)?;
                done(libc::close(again))?;
            }
        }
        Ok(Reply::Body)
    }

    pub(super) fn release(&mut self, request: &Request<'_>, args: &mut Arguments<'_>) -> Served {
        let id = request.header.node;
        let handle = self.handles.remove(args.u64()?, id, false)?;
        for owner in &handle.owners {
            self.locks.give_up(id, *owner);
        }
        if handle.locked {
            drop(handle);
            self.locks.hurry();
        }
        self.nodes.unpin(id);
        Ok(Reply::Body)
    }

    pub(super) fn fsync(
        &mut self,
        request: &Request<'_>,
        args: &mut Arguments<'_>,
        folder: bool,
    ) -> Served {
        let (number_, how) = (args.u64()?, args.u32()?);
        let id = request.header.node;
        let handle = match folder {
            true => self.handles.folder(number_, id)?,
            false => self.handles.file(number_, id)?,
        };
        let fd = handle.fd();
        // SAFETY: numbers only.
        done(unsafe {
            match how & DATA_ONLY {
                0 => libc::fsync(fd),
                _ => libc::fdatasync(fd),
            }
        })?;
        Ok(Reply::Body)
    }

    /// Writes what the host has not written yet of each file system that the guest knows.
    pub(super) fn syncfs(&mut self) -> Served {
        for id in self.nodes.one_of_each_device() {
            let folder = self.open_node(id, libc::S_IFDIR, libc::O_RDONLY | libc::O_DIRECTORY);
            match folder {
                // SAFETY: numbers only.
                Ok(fd) => done(unsafe { libc::syncfs(fd.as_raw_fd()) })?,
                Err(Errno(libc::ESTALE)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Reply::Body)
    }

    pub(super) fn fallocate(&mut self, request: &Request<'_>, args: &mut Arguments<'_>) -> Served {
        let (number_, offset, len) = (args.u64()?, args.offset()?, args.offset()?);
        let mode = args.flags()?;
        let fd = self.handles.file(number_, request.header.node)?.fd();
        // SAFETY: numbers only.
        done(unsafe { libc::fallocate(fd, mode, offset, len) })?;
        Ok(Reply::Body)
    }

    /// Finds data or a hole. Other kinds of seeking are the guest's own.
    pub(super) fn lseek(
        &mut self,
        request: &Request<'_>,
        args: &mut Arguments<'_>,
        body: &mut Body,
    ) -> Served {
        let (number_, offset, whence) = (args.u64()?, args.offset()?, args.flags()?);
        if ![libc::SEEK_DATA, libc::SEEK_HOLE].contains(&whence) {
            return Err(Errno(libc::EINVAL).into());
        }
        let fd = self.handles.file(number_, request.header.node)?.fd();
        // SAFETY: numbers only.
        body.u64(number(unsafe { libc::lseek(fd, offset, whence) })?);
        Ok(Reply::Body)
    }

    pub(super) fn copy_file_range(
        &mut self,
        request: &Request<'_>,
        args: &mut Arguments<'_>,
        body: &mut Body,
    ) -> Served {
        let (number_, mut offset) = (args.u64()?, args.offset()?);
        let (to_node, to_number, mut to_offset) = (args.u64()?, args.u64()?, args.offset()?);
        let (len, flags) = (args.u64()?, args.u64()?);
        if flags != 0 {
            return Err(Errno(libc::EINVAL).into());
        }
        let from = self.handles.file(number_, request.header.node)?.fd();
        let to = self.handles.file(to_number, to_node)?;
        to.written = true;
        let to = to.fd();
        let len = usize::try_from(len.min(MOST_COPIED)).map_err(|_| Errno(libc::EINVAL))?;
        // SAFETY: the kernel reads and writes two offsets.
        let copied =
            unsafe { libc::copy_file_range(from, &raw mut offset, to, &raw mut to_offset, len, 0) };
        let copied = number(copied as libc::c_long)?;
        body.u32(u32::try_from(copied).map_err(|_| Errno(libc::EIO))?)
            .u32(0);
        Ok(Reply::Body)
    }
}
