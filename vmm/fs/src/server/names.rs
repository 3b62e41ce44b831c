//! Names in folders: found, made, changed, removed.
//!
//! Not trusted: names, which must be of something in the folder itself, and numbers of folders.

use std::ffi::CStr;

use super::{Body, Reply, Request, Served, Server, is_root};
use crate::host::{Answer, Errno, Numbers, done, number, stat};
use crate::wire::{Arguments, ROOT};

/// Longest target of a link (`PATH_MAX`).
const LONGEST: usize = 4096;
/// What else than the type's bits a mode has.
const BITS: u32 = 0o7777;

impl Server {
    /// Adds what a name stands for now, which the guest is told of.
    fn found(&mut self, parent: u64, name: &CStr, body: &mut Body) -> Served {
        let (id, stat) = self.nodes.look_up(parent, name)?;
        self.put_entry(id, &stat, body);
        Ok(Reply::Body)
    }

    pub(super) fn lookup(
        &mut self,
        request: &Request<'_>,
        args: &mut Arguments<'_>,
        body: &mut Body,
    ) -> Served {
        let parent = request.header.node;
        if is_root(parent) && matches!(args.clone().text()?.to_bytes(), b"." | b"..") {
            // Above the root is the root.
            let stat = stat(self.nodes.fd(ROOT)?)?;
            self.put_entry(ROOT, &stat, body);
            return Ok(Reply::Body);
        }
        self.found(parent, args.name()?, body)
    }

    pub(super) fn forget(&mut self, request: &Request<'_>, args: &mut Arguments<'_>) -> Served {
        self.nodes.forget(request.header.node, args.u64()?);
        Ok(Reply::Nothing)
    }

    pub(super) fn batch_forget(&mut self, args: &mut Arguments<'_>) -> Served {
        let (count, _) = (args.u32()?, args.u32()?);
        for _ in 0..count {
            // The request's length ends a count that is too large.
            let (id, lookups) = (args.u64()?, args.u64()?);
            self.nodes.forget(id, lookups);
        }
        Ok(Reply::Nothing)
    }

    pub(super) fn readlink(&mut self, request: &Request<'_>, body: &mut Body) -> Served {
        let id = request.header.node;
        if self.nodes.kind(id)? != libc::S_IFLNK {
            return Err(Errno(libc::EINVAL).into());
        }
        let fd = self.nodes.fd(id)?;
        body.0.resize(LONGEST.min(request.room()), 0);
        // SAFETY: an empty string, and a buffer of that length.
        let len = unsafe {
            let (to, room) = (body.0.as_mut_ptr(), body.0.len());
            libc::readlinkat(fd, c"".as_ptr(), to.cast(), room)
        };
        body.0
            .truncate(usize::try_from(len).map_err(|_| Errno::last())?);
        Ok(Reply::Body)
    }

    /// Makes something by a name as the request's user, and tells the guest of it.
    fn make(
        &mut self,
        request: &Request<'_>,
        umask: u32,
        name: &CStr,
        body: &mut Body,
        call: impl FnOnce(libc::c_int, *const libc::c_char) -> libc::c_int,
    ) -> Served {
        let header = &request.header;
        let dir = self.nodes.fd(header.node)?;
        let acting = self.own.act_for(header.uid, header.gid, umask)?;
        let made = done(call(dir, name.as_ptr()));
        drop(acting);
        made?;
        self.found(header.node, name, body)
    }

    pub(super) fn symlink(
        &mut self,
        request: &Request<'_>,
        args: &mut Arguments<'_>,
        body: &mut Body,
    ) -> Served {
        let (name, target) = (args.name()?, args.text()?);
        self.make(request, 0, name, body, |dir, name| {
            // SAFETY: strings that live through the call.
            unsafe { libc::symlinkat(target.as_ptr(), dir, name) }
        })
    }

    pub(super) fn mknod(
        &mut self,
        request: &Request<'_>,
        args: &mut Arguments<'_>,
        body: &mut Body,
    ) -> Served {
        let (mode, _device, umask, _) = (args.u32()?, args.u32()?, args.u32()?, args.u32()?);
        let name = args.name()?;
        match mode & libc::S_IFMT {
            0 | libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK => {}
            // It would be the node's device, and not the pod's.
            libc::S_IFCHR | libc::S_IFBLK => return Err(Errno(libc::EPERM).into()),
            _ => return Err(Errno(libc::EINVAL).into()),
        }
        self.make(request, umask, name, body, |dir, name| {
            // SAFETY: a string that lives through the call.
            unsafe { libc::mknodat(dir, name, mode & (libc::S_IFMT | BITS), 0) }
        })
    }

    pub(super) fn mkdir(
        &mut self,
        request: &Request<'_>,
        args: &mut Arguments<'_>,
        body: &mut Body,
    ) -> Served {
        let (mode, umask, name) = (args.u32()?, args.u32()?, args.name()?);
        self.make(request, umask, name, body, |dir, name| {
            // SAFETY: a string that lives through the call.
            unsafe { libc::mkdirat(dir, name, mode & BITS) }
        })
    }

    pub(super) fn unlink(
        &mut self,
        request: &Request<'_>,
        args: &mut Arguments<'_>,
        flags: i32,
    ) -> Served {
        let name = args.name()?;
        let dir = self.nodes.fd(request.header.node)?;
        // SAFETY: a string that lives through the call.
        done(unsafe { libc::unlinkat(dir, name.as_ptr(), flags) })?;
        Ok(Reply::Body)
    }

    pub(super) fn rename(
        &mut self,
        request: &Request<'_>,
        args: &mut Arguments<'_>,
        with_flags: bool,
    ) -> Served {
        let to = args.u64()?;
        let mut flags = 0;
        if with_flags {
            (flags, _) = (args.u32()?, args.u32()?);
        }
        // Leaving a device node behind is not among them.
        if flags & !(libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE) != 0 {
            return Err(Errno(libc::EINVAL).into());
        }
        let (old, new) = (args.name()?, args.name()?);
        let from = request.header.node;
        let (old_dir, new_dir) = self.nodes.two(from, to)?;
        let (old_name, new_name) = (old.as_ptr(), new.as_ptr());
        // The C library's function makes another call where there are no flags.
        let call = libc::SYS_renameat2;
        // SAFETY: strings that live through the call.
        number(unsafe { libc::syscall(call, old_dir, old_name, new_dir, new_name, flags) })?;
        self.nodes.renamed(to, new);
        if flags & libc::RENAME_EXCHANGE != 0 {
            self.nodes.renamed(from, old);
        }
        Ok(Reply::Body)
    }

    pub(super) fn link(
        &mut self,
        request: &Request<'_>,
        args: &mut Arguments<'_>,
        body: &mut Body,
    ) -> Served {
        let (id, name) = (args.u64()?, args.name()?);
        let dir = request.header.node;
        let (fd, dir_fd) = self.nodes.two(id, dir)?;
        self.link_open(fd, dir_fd, name)?;
        self.found(dir, name, body)
    }

    /// Links what a descriptor stands for: by its number, which takes no right to search everywhere.
    fn link_open(&self, fd: i32, dir: i32, name: &CStr) -> Answer<()> {
        let number = Numbers::name(fd);
        let old = number.as_c_str().as_ptr();
        let flags = libc::AT_SYMLINK_FOLLOW;
        // SAFETY: strings that live through the call.
        done(unsafe { libc::linkat(self.numbers.fd(), old, dir, name.as_ptr(), flags) })
    }
}
