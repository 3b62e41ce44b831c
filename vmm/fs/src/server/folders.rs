//! Folders: opened, listed, closed.
//!
//! Not trusted: places in a folder, which the host's file system judges, and sizes.

use std::ffi::CStr;
use std::os::fd::RawFd;

use super::{Body, LISTED, Refusal, Reply, Request, Served, Server, is_root};
use crate::handles::Handle;
use crate::host::{Answer, Errno, number};
use crate::wire::{Arguments, DIRENT, ENTRY};

/// The most bytes that are listed at once.
const MOST: usize = 256 << 10;
/// What the host's longest entry takes, and more.
const LEAST: usize = 512;
/// No place in a folder.
const UNKNOWN: i64 = -1;
/// `struct linux_dirent64` without its name.
const HOSTS: usize = 19;

/// One entry as the host lists it.
struct Entry<'a> {
    ino: u64,
    /// Where the next one is.
    next: i64,
    kind: u8,
    name: &'a CStr,
}

/// Takes the first entry off a list.
fn first<'a>(list: &mut &'a [u8]) -> Option<Entry<'a>> {
    let fixed: &[u8; HOSTS] = list.first_chunk()?;
    let [
        i0,
        i1,
        i2,
        i3,
        i4,
        i5,
        i6,
        i7,
        n0,
        n1,
        n2,
        n3,
        n4,
        n5,
        n6,
        n7,
        l0,
        l1,
        kind,
    ] = *fixed;
    let len = usize::from(u16::from_ne_bytes([l0, l1]));
    let (entry, rest) = list.split_at_checked(len)?;
    *list = rest;
    let name = CStr::from_bytes_until_nul(entry.get(HOSTS..)?).ok()?;
    Some(Entry {
        ino: u64::from_ne_bytes([i0, i1, i2, i3, i4, i5, i6, i7]),
        next: i64::from_ne_bytes([n0, n1, n2, n3, n4, n5, n6, n7]),
        kind,
        name,
    })
}

impl Server {
    pub(super) fn opendir(&mut self, request: &Request<'_>, body: &mut Body) -> Served {
        let id = request.header.node;
        let fd = self.open_node(id, libc::S_IFDIR, libc::O_RDONLY | libc::O_DIRECTORY)?;
        self.nodes.pin(id);
        let handle = self.handles.add(Handle::folder(id, fd));
        body.u64(handle).u32(0).u32(0);
        Ok(Reply::Body)
    }

    pub(super) fn releasedir(&mut self, request: &Request<'_>, args: &mut Arguments<'_>) -> Served {
        let id = request.header.node;
        self.handles.remove(args.u64()?, id, true)?;
        self.nodes.unpin(id);
        Ok(Reply::Body)
    }

    /// Lists a folder from a place on; `plus` with what is known of each entry.
    pub(super) fn readdir(
        &mut self,
        request: &Request<'_>,
        args: &mut Arguments<'_>,
        body: &mut Body,
        plus: bool,
    ) -> Served {
        let (number, from, size) = (args.u64()?, args.offset()?, args.u32()? as usize);
        let room = size.min(request.room()).min(MOST);
        let folder = request.header.node;
        let handle = self.handles.folder(number, folder)?;
        let fd = handle.fd();
        if handle.position != from {
            seek(fd, from)?;
        }
        handle.position = UNKNOWN;
        let mut entries = std::mem::take(&mut self.entries);
        // So much of the host's entries as is sure to fit, or likely with what is known of each.
        let wanted = if plus { room / 5 } else { room / 4 * 3 };
        entries.resize(wanted.max(LEAST), 0);
        let listed = list(fd, &mut entries);
        let result = listed.map_err(Refusal::from).and_then(|len| {
            let mut rest = entries.get(..len).unwrap_or_default();
            let mut position = from;
            while let Some(entry) = first(&mut rest) {
                position = entry.next;
                if !self.put(folder, &entry, plus, room, body)? {
                    position = UNKNOWN;
                    break;
                }
            }
            self.handles.folder(number, folder)?.position = position;
            if len > 0 && body.0.is_empty() {
                return Err(Errno(libc::EINVAL).into());
            }
            Ok(Reply::Body)
        });
        self.entries = entries;
        result
    }

    /// Adds an entry to an answer of at most `room` bytes. `false` if it does not fit.
    fn put(
        &mut self,
        folder: u64,
        entry: &Entry<'_>,
        plus: bool,
        room: usize,
        body: &mut Body,
    ) -> Result<bool, Refusal> {
        let name = entry.name.to_bytes();
        let len = (DIRENT + name.len()).next_multiple_of(8);
        if body.0.len() + len + if plus { ENTRY } else { 0 } > room {
            return Ok(false);
        }
        let mut ino = self
            .nodes
            .shown_number(self.nodes.device(folder)?, entry.ino);
        if name == b".." && is_root(folder) {
            // What is above it is nothing of the guest's.
            ino = self.nodes.shown_root();
        }
        if plus {
            let dots = name == b"." || name == b"..";
            let found = (!dots).then(|| self.nodes.look_up(folder, entry.name));
            match found {
                Some(Ok((id, stat))) => {
                    let mut valid = self.validity(&stat);
                    if valid.name.is_zero() {
                        // Long enough to look at each of what was just listed.
                        valid.name = LISTED.min(self.timeout);
                        valid.attributes = valid.name;
                    }
                    ino = self.nodes.shown(&stat);
                    body.entry(id, valid, ino, &stat);
                }
                // The guest is told that there is a name. If there is not any more, it finds that out.
                _ => drop(body.zeros(ENTRY)),
            }
        }
        // A name has at most 255 bytes.
        body.u64(ino).i64(entry.next).u32(name.len() as u32);
        body.u32(entry.kind.into()).bytes(name);
        body.zeros(len - DIRENT - name.len());
        Ok(true)
    }
}

/// Goes to a place in an open folder.
fn seek(fd: RawFd, to: i64) -> Answer<()> {
    // SAFETY: numbers only.
    number(unsafe { libc::lseek(fd, to, libc::SEEK_SET) }).map(drop)
}

/// Lists what comes next in an open folder.
fn list(fd: RawFd, to: &mut [u8]) -> Answer<usize> {
    // SAFETY: a buffer of that length.
    let len = unsafe { libc::syscall(libc::SYS_getdents64, fd, to.as_mut_ptr(), to.len()) };
    usize::try_from(number(len)?).map_err(|_| Errno(libc::EIO))
}
