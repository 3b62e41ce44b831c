//! The server: takes a request apart, has it served, and sends the answer.

mod attributes;
mod data;
mod folders;
mod locking;
mod names;

use std::mem;
use std::os::fd::{OwnedFd, RawFd};
use std::time::Duration;

use crate::credentials::Own;
use crate::handles::Handles;
use crate::host::{Answer, Errno, Numbers, Stat};
use crate::locks::Locks;
use crate::nodes::Nodes;
use crate::view::Buffers;
use crate::wire::{
    Arguments, Body, Header, IN_HEADER, MAJOR, MINOR, OUT_HEADER, ROOT, Validity, WRITE_IN, init,
    op,
};
use crate::{ServerError, Span, View};

/// The most bytes of a request's arguments: the largest are an attribute's name and value.
const MOST_ARGUMENTS: usize = 128 << 10;
/// Pages of a request's data, and their bytes.
const MAX_PAGES: u16 = 256;
const MAX_WRITE: u32 = 1 << 20;
/// For how long what is said of folders holds, and of what was found by reading a folder.
const FOLDERS: Duration = Duration::from_secs(1);
const LISTED: Duration = Duration::from_millis(100);

/// Why a request is not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// It is answered so.
    Error(Errno),
    /// No guest's kernel would send it.
    Malformed(&'static str),
}

impl From<Errno> for Refusal {
    fn from(error: Errno) -> Self {
        Refusal::Error(error)
    }
}

/// What has become of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is answered, by so many bytes in its writable buffers.
    Done(usize),
    /// It waits for a lock. [`Server::finished`] will tell of it.
    Later,
}

/// A request that waited, and waits no longer.
#[derive(Debug)]
pub struct Finished {
    /// What was said with the request.
    pub ticket: usize,
    /// Bytes written, or why there is no answer.
    pub result: Result<usize, ServerError>,
}

/// How a request is answered.
enum Reply {
    /// By what is in the body, which may be nothing.
    Body,
    /// So many bytes of data are in the guest's buffers already.
    Data(usize),
    /// Not at all.
    Nothing,
    Later,
}

type Served = Result<Reply, Refusal>;

/// A request, taken apart.
struct Request<'a> {
    header: Header,
    /// All of it, as it lies in guest memory.
    from: Buffers<'a>,
    to: Buffers<'a>,
    ticket: usize,
}

impl Request<'_> {
    /// Bytes that there are for an answer's body.
    fn room(&self) -> usize {
        self.to.len().saturating_sub(OUT_HEADER)
    }
}

/// A file server for one folder, on one thread.
///
/// It opens files with the rights of the thread it runs on, and takes on the user and group of a request
/// where it creates something: the thread needs the capabilities for that.
pub struct Server {
    own: Own,
    numbers: Numbers,
    nodes: Nodes,
    handles: Handles,
    locks: Locks,
    timeout: Duration,
    /// SETXATTR has the fields that were added to it.
    long_setxattr: bool,
    // Kept from request to request: arguments, answers, and what the host's calls take.
    input: Vec<u8>,
    body: Body,
    iovecs: Vec<libc::iovec>,
    entries: Vec<u8>,
}

impl Server {
    pub(crate) fn with(numbers: Numbers, root: OwnedFd, timeout: Duration) -> Answer<Self> {
        Ok(Server {
            own: Own::of_this_thread(),
            numbers,
            nodes: Nodes::new(root, most_open())?,
            handles: Handles::default(),
            locks: Locks::new(),
            timeout,
            long_setxattr: false,
            input: Vec::new(),
            body: Body::default(),
            iovecs: Vec::new(),
            entries: Vec::new(),
        })
    }

    /// Handles one request, of which its answer is told by `ticket` if it has to wait.
    pub fn handle(
        &mut self,
        view: &View,
        ticket: usize,
        readable: &[Span],
        writable: &[Span],
    ) -> Result<Outcome, ServerError> {
        let (from, to) = Buffers::check(view, readable, writable)?;
        let (mut input, mut body) = (mem::take(&mut self.input), mem::take(&mut self.body));
        let outcome = self.answer(from, to, ticket, &mut input, &mut body);
        (self.input, self.body) = (input, body);
        outcome.map_err(|what| ServerError::Request(what.to_owned()))
    }

    fn answer(
        &mut self,
        from: Buffers<'_>,
        to: Buffers<'_>,
        ticket: usize,
        input: &mut Vec<u8>,
        body: &mut Body,
    ) -> Result<Outcome, &'static str> {
        let mut raw = [0; IN_HEADER];
        if !from.read(0, &mut raw) {
            return Err("it has no header");
        }
        let header = Header::parse(&raw).map_err(|_| "it has no header")?;
        let mut len = header
            .len
            .checked_sub(IN_HEADER)
            .filter(|_| header.len <= from.len())
            .ok_or("its length is not what it says")?;
        if header.opcode == op::WRITE {
            len = len.min(WRITE_IN);
        }
        if len > MOST_ARGUMENTS {
            return Err("its arguments are too long");
        }
        input.resize(len, 0);
        if !from.read(IN_HEADER, input) {
            return Err("its length is not what it says");
        }
        let answerless = [op::FORGET, op::BATCH_FORGET, op::INTERRUPT, op::DESTROY];
        if to.len() < OUT_HEADER && !answerless.contains(&header.opcode) {
            return Err("there is no room for an answer");
        }
        body.0.clear();
        let request = Request {
            header,
            from,
            to,
            ticket,
        };
        let served = self.serve(&request, Arguments::new(input), body);
        let (error, sent, data) = match served {
            Ok(Reply::Later) => return Ok(Outcome::Later),
            Ok(Reply::Nothing) => return Ok(Outcome::Done(0)),
            Ok(Reply::Body) => (0, body.0.as_slice(), 0),
            Ok(Reply::Data(len)) => (0, &[][..], len),
            // The limit is the thread's, but to the guest it is the file system's.
            Err(Refusal::Error(Errno(libc::EMFILE))) => (libc::ENFILE, &[][..], 0),
            Err(Refusal::Error(Errno(error))) => (error, &[][..], 0),
            Err(Refusal::Malformed(what)) => return Err(what),
        };
        let len = send(to, header.unique, error, sent, data);
        len.map(Outcome::Done)
            .ok_or("there is no room for its answer")
    }

    fn serve(&mut self, request: &Request<'_>, mut args: Arguments<'_>, body: &mut Body) -> Served {
        let args = &mut args;
        match request.header.opcode {
            op::LOOKUP => self.lookup(request, args, body),
            op::FORGET => self.forget(request, args),
            op::BATCH_FORGET => self.batch_forget(args),
            op::READLINK => self.readlink(request, body),
            op::SYMLINK => self.symlink(request, args, body),
            op::MKNOD => self.mknod(request, args, body),
            op::MKDIR => self.mkdir(request, args, body),
            op::UNLINK => self.unlink(request, args, 0),
            op::RMDIR => self.unlink(request, args, libc::AT_REMOVEDIR),
            op::RENAME => self.rename(request, args, false),
            op::RENAME2 => self.rename(request, args, true),
            op::LINK => self.link(request, args, body),
            op::GETATTR => self.getattr(request, args, body),
            op::STATX => self.statx(request, args, body),
            op::SETATTR => self.setattr(request, args, body),
            op::STATFS => self.statfs(request, body),
            op::ACCESS => self.access(request, args),
            op::SETXATTR => self.setxattr(request, args),
            op::GETXATTR => self.getxattr(request, args, body),
            op::LISTXATTR => self.listxattr(request, args, body),
            op::REMOVEXATTR => self.removexattr(request, args),
            op::OPEN => self.open(request, args, body),
            op::CREATE => self.create(request, args, body),
            op::TMPFILE => self.tmpfile(request, args, body),
            op::READ => self.read(request, args),
            op::WRITE => self.write(request, args, body),
            op::FLUSH => self.flush(request, args),
            op::RELEASE => self.release(request, args),
            op::FSYNC => self.fsync(request, args, false),
            op::FALLOCATE => self.fallocate(request, args),
            op::LSEEK => self.lseek(request, args, body),
            op::COPY_FILE_RANGE => self.copy_file_range(request, args, body),
            op::OPENDIR => self.opendir(request, body),
            op::READDIR => self.readdir(request, args, body, false),
            op::READDIRPLUS => self.readdir(request, args, body, true),
            op::RELEASEDIR => self.releasedir(request, args),
            op::FSYNCDIR => self.fsync(request, args, true),
            op::SYNCFS => self.syncfs(),
            op::GETLK => self.getlk(request, args, body),
            op::SETLK => self.setlk(request, args, false),
            op::SETLKW => self.setlk(request, args, true),
            op::INTERRUPT => self.interrupt(request, args),
            op::INIT => self.init(args, body),
            op::DESTROY => {
                self.forget_everything();
                Ok(if request.to.len() < OUT_HEADER {
                    Reply::Nothing
                } else {
                    Reply::Body
                })
            }
            op::IOCTL => self.ioctl(request, args),
            _ => Err(Errno(libc::ENOSYS).into()),
        }
    }

    /// Agrees with the guest on what both can do. Not offered are a cache of what is to be written, which would hide what
    /// others write, and finding files by handles (`EXPORT_SUPPORT`): a number that was forgotten can't be found again.
    fn init(&mut self, args: &mut Arguments<'_>, body: &mut Body) -> Served {
        const OFFERED: u64 = init::ASYNC_READ
            | init::POSIX_LOCKS
            | init::ATOMIC_O_TRUNC
            | init::BIG_WRITES
            | init::DONT_MASK
            | init::FLOCK_LOCKS
            | init::AUTO_INVAL_DATA
            | init::DO_READDIRPLUS
            | init::READDIRPLUS_AUTO
            | init::PARALLEL_DIROPS
            | init::POSIX_ACL
            | init::MAX_PAGES
            | init::HANDLE_KILLPRIV_V2
            | init::SETXATTR_EXT
            | init::INIT_EXT;
        const LARGE: u64 = init::BIG_WRITES | init::MAX_PAGES;
        /// Requests that the guest has under way beside those that somebody waits for, and of how many it holds back.
        const BACKGROUND: u16 = 64;
        const CONGESTED: u16 = 48;
        const PAGE: u32 = 4096;
        /// Bytes of `struct fuse_init_out` after the second half of the flags.
        const REST: usize = 28;
        let (major, _minor) = (args.u32()?, args.u32()?);
        let (readahead, low) = (args.u32()?, args.u32()?);
        let mut capable = u64::from(low);
        if capable & init::INIT_EXT != 0 {
            // An older guest's request ends before.
            capable |= u64::from(args.u32().unwrap_or(0)) << 32;
        }
        if major < MAJOR {
            return Err(Errno(libc::EPROTO).into());
        }
        // What was left of another mount.
        self.forget_everything();
        let flags = OFFERED & capable;
        self.long_setxattr = flags & init::SETXATTR_EXT != 0;
        let large = flags & LARGE == LARGE;
        body.u32(MAJOR).u32(MINOR).u32(readahead);
        // The lower half.
        body.u32(flags as u32).u16(BACKGROUND).u16(CONGESTED);
        body.u32(if large { MAX_WRITE } else { PAGE });
        // Times are exact to the nanosecond.
        body.u32(1).u16(if large { MAX_PAGES } else { 0 }).u16(0);
        body.u32((flags >> 32) as u32).zeros(REST);
        Ok(Reply::Body)
    }

    fn forget_everything(&mut self) {
        self.locks.clear();
        self.handles.clear();
        self.nodes.clear();
    }

    /// Closes everything the guest has open, as if it had unmounted. Gives the tickets of requests that waited; they are
    /// not answered.
    pub fn forget_all(&mut self) -> Vec<usize> {
        self.forget_everything();
        let waiting = mem::take(&mut self.locks.waiting).into_iter();
        let watcher = self.locks.watcher.take();
        waiting
            .map(|waiter| waiter.ticket)
            .chain(watcher.map(|watcher| watcher.ticket))
            .collect()
    }

    /// Puts an entry into an answer: what the guest is told of a file that it has found.
    fn put_entry(&mut self, id: u64, stat: &Stat, body: &mut Body) {
        let valid = self.validity(stat);
        let ino = self.nodes.shown(stat);
        body.entry(id, valid, ino, stat);
    }

    /// A name that is no folder's is asked for anew each time; that brings attributes with it, so theirs may hold longer.
    fn validity(&self, stat: &Stat) -> Validity {
        let folder = stat.kind() == libc::S_IFDIR;
        let attributes = FOLDERS.min(self.timeout);
        Validity {
            name: if folder { attributes } else { Duration::ZERO },
            attributes,
        }
    }

    /// Does what needs a descriptor. If the thread has none left, those go that can be opened again.
    fn with_room<T>(&mut self, mut call: impl FnMut(&mut Self) -> Answer<T>) -> Answer<T> {
        match call(self) {
            Err(Errno(libc::EMFILE)) if self.nodes.give_way() => call(self),
            other => other,
        }
    }

    /// Opens a node, which must be of a type that can be opened without consequences.
    fn open_node(&mut self, id: u64, kind: u32, flags: i32) -> Answer<OwnedFd> {
        self.must_be(id, kind)?;
        self.with_room(|server| {
            let fd = server.nodes.fd(id)?;
            match server.numbers.open(fd, flags) {
                // The host's file system can't do without its cache.
                Err(Errno(libc::EINVAL)) if flags & libc::O_DIRECT != 0 => {
                    server.numbers.open(fd, flags & !libc::O_DIRECT)
                }
                other => other,
            }
        })
    }

    fn must_be(&self, id: u64, kind: u32) -> Answer<()> {
        let is = self.nodes.kind(id)?;
        if is == kind {
            return Ok(());
        }
        Err(Errno(match (kind, is) {
            (libc::S_IFDIR, _) => libc::ENOTDIR,
            (_, libc::S_IFDIR) => libc::EISDIR,
            (_, libc::S_IFLNK) => libc::ELOOP,
            _ => libc::ENXIO,
        }))
    }

    /// The descriptor of what the guest has open by that number, whether file or folder.
    fn opened(&mut self, handle: u64, node: u64) -> Answer<RawFd> {
        if let Ok(handle) = self.handles.folder(handle, node) {
            return Ok(handle.fd());
        }
        self.handles.file(handle, node).map(|handle| handle.fd())
    }

    #[cfg(test)]
    pub(crate) fn numbers(&self) -> RawFd {
        self.numbers.fd()
    }

    /// How many files the guest knows, and of how many a descriptor is open.
    #[cfg(test)]
    pub(crate) fn known(&self) -> (usize, usize) {
        self.nodes.counts()
    }

    #[cfg(test)]
    pub(crate) fn keep_open(&mut self, most: usize) {
        self.nodes.keep_open(most);
    }
}

/// Writes an answer whose data are `len` bytes that are there already. Gives its length.
fn send(to: Buffers<'_>, unique: u64, error: i32, body: &[u8], len: usize) -> Option<usize> {
    let total = OUT_HEADER + body.len() + len;
    let mut header = [0; OUT_HEADER];
    let fields = u32::try_from(total).ok()?.to_le_bytes().into_iter();
    let fields = fields
        .chain((-error).to_le_bytes())
        .chain(unique.to_le_bytes());
    for (to, from) in header.iter_mut().zip(fields) {
        *to = from;
    }
    let sent = total <= to.len() && to.write(OUT_HEADER, body) && to.write(0, &header);
    sent.then_some(total)
}

/// How many descriptors nodes may have: the rest of what the thread may have is for what is open.
fn most_open() -> usize {
    const UNKNOWN: u64 = 1024;
    // SAFETY: all-zero is a valid rlimit, which the kernel fills in.
    let limit = unsafe {
        let mut limit: libc::rlimit = mem::zeroed();
        let known = libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0;
        if known { limit.rlim_cur } else { UNKNOWN }
    };
    // None is more than a table of descriptors can hold.
    let limit = usize::try_from(limit.min(1 << 20)).unwrap_or(1 << 10);
    limit - limit / 4
}

/// Whether a node is the one that everything else is found from.
fn is_root(id: u64) -> bool {
    id == ROOT
}
