//! A guest that speaks FUSE by hand, well or badly.

use std::ptr::NonNull;

use super::*;

const HALF: usize = 2 << 20;
/// Answers have a place each.
const ANSWER: usize = 1 << 17;

pub(super) mod op {
    pub(in crate::tests) use crate::wire::op::*;
}

/// A request's answer: its body, or the error.
pub(super) type Told = Result<Vec<u8>, i32>;

pub(super) struct Guest {
    memory: NonNull<u8>,
    pub(super) view: View,
    pub(super) server: Server,
    pub(super) uid: u32,
    pub(super) gid: u32,
    unique: u64,
}

/// What is known of a file, as an answer has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) ino: u64,
    pub(super) size: u64,
    pub(super) mode: u32,
    pub(super) links: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Numbers of 32 and 64 bits, and bytes, one after the other.
macro_rules! raw {
    ($($part:expr),* $(,)?) => {{
        let mut all: Vec<u8> = Vec::new();
        $(all.extend_from_slice($crate::tests::guest::AsBytes::bytes(&$part).as_slice());)*
        all
    }};
}
pub(super) use raw;

pub(super) trait AsBytes {
    fn bytes(&self) -> Vec<u8>;
}

impl AsBytes for u32 {
    fn bytes(&self) -> Vec<u8> {
        self.to_le_bytes().to_vec()
    }
}

impl AsBytes for i32 {
    fn bytes(&self) -> Vec<u8> {
        self.to_le_bytes().to_vec()
    }
}

impl AsBytes for u64 {
    fn bytes(&self) -> Vec<u8> {
        self.to_le_bytes().to_vec()
    }
}

impl AsBytes for &[u8] {
    fn bytes(&self) -> Vec<u8> {
        self.to_vec()
    }
}

/// A name, with its zero.
impl AsBytes for &str {
    fn bytes(&self) -> Vec<u8> {
        [self.as_bytes(), b"\0"].concat()
    }
}

impl Guest {
    pub(super) fn new(dir: &std::path::Path) -> Self {
        // SAFETY: a new anonymous mapping, which stays for the life of the test process.
        let memory = unsafe {
            let (prot, flags) = (
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            );
            libc::mmap(std::ptr::null_mut(), 2 * HALF, prot, flags, -1, 0)
        };
        assert_ne!(memory, libc::MAP_FAILED);
        let memory = NonNull::new(memory.cast::<u8>()).unwrap();
        // SAFETY: just mapped, and accessed only by copying, below.
        let view = unsafe { View::new(&[(memory, 2 * HALF)]) }.unwrap();
        let server = Server::new(&Options {
            root: dir.to_str().unwrap().to_owned(),
            ..Options::default()
        })
        .unwrap();
        let mut guest = Guest {
            memory,
            view,
            server,
            uid: 0,
            gid: 0,
            unique: 100,
        };
        // All that a guest may be capable of.
        let all = raw![7u32, 45u32, 1u32 << 20, u32::MAX, u32::MAX];
        guest.ask(op::INIT, 0, &all).unwrap();
        guest
    }

    /// Puts a request into memory, and what comes after its arguments.
    fn put(&mut self, opcode: u32, node: u64, body: &[u8]) -> [Span; 2] {
        self.unique += 2;
        let len = 40 + body.len() as u32;
        let header = raw![
            len,
            opcode,
            self.unique,
            node,
            self.uid,
            self.gid,
            1u32,
            0u32
        ];
        let raw = [&header, body].concat();
        assert!(raw.len() <= HALF);
        // SAFETY: the first half is mapped, and nobody else uses it now.
        unsafe { std::ptr::copy_nonoverlapping(raw.as_ptr(), self.memory.as_ptr(), raw.len()) };
        let start = self.memory.as_ptr() as usize;
        // In pieces that have nothing to do with what is in them.
        let first = raw.len().min(50);
        let (one, other) = (first as u32, (raw.len() - first) as u32);
        [
            Span {
                addr: start,
                len: one,
            },
            Span {
                addr: start + first,
                len: other,
            },
        ]
    }

    pub(super) fn place(&self, ticket: usize) -> [Span; 2] {
        let start = self.memory.as_ptr() as usize + HALF + ticket * ANSWER;
        [
            Span {
                addr: start,
                len: 16,
            },
            Span {
                addr: start + 16,
                len: ANSWER as u32 - 16,
            },
        ]
    }

    /// Sends a request whose answer may come later. Gives what became of it, and its number.
    pub(super) fn start(
        &mut self,
        opcode: u32,
        node: u64,
        body: &[u8],
        ticket: usize,
    ) -> (Result<Outcome, ServerError>, u64) {
        let readable = self.put(opcode, node, body);
        let place = self.place(ticket);
        let outcome = self.server.handle(&self.view, ticket, &readable, &place);
        (outcome, self.unique)
    }

    pub(super) fn told(&self, ticket: usize, len: usize) -> Told {
        let start = self.place(ticket)[0].addr as *const u8;
        // SAFETY: the answer's place is mapped, and nobody writes to it now.
        let answer = unsafe { std::slice::from_raw_parts(start, len) }.to_vec();
        assert_eq!(u32_at(&answer, 0) as usize, len);
        match i32::from_le_bytes(answer[4..8].try_into().unwrap()) {
            0 => Ok(answer[16..].to_vec()),
            error => {
                assert_eq!(len, 16);
                Err(-error)
            }
        }
    }

    /// Sends a request and takes its answer. `Err(0)`: it makes no sense to the server.
    pub(super) fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Told {
        match self.start(opcode, node, body, 0).0 {
            Ok(Outcome::Done(0)) => Ok(Vec::new()),
            Ok(Outcome::Done(len)) => self.told(0, len),
            Ok(Outcome::Later) => panic!("it waits"),
            Err(_) => Err(0),
        }
    }

    pub(super) fn lookup(&mut self, parent: u64, name: &str) -> Result<(u64, Known), i32> {
        let entry = self.ask(op::LOOKUP, parent, &raw![name])?;
        Ok((u64_at(&entry, 0), known(&entry[40..])))
    }

    pub(super) fn forget(&mut self, node: u64, count: u64) {
        assert_eq!(self.ask(op::FORGET, node, &raw![count]), Ok(Vec::new()));
    }

    pub(super) fn getattr(&mut self, node: u64) -> Result<Known, i32> {
        let told = self.ask(op::GETATTR, node, &raw![0u32, 0u32, 0u64])?;
        Ok(known(&told[16..]))
    }

    /// Gives node and handle.
    pub(super) fn create(
        &mut self,
        parent: u64,
        name: &str,
        flags: i32,
        mode: u32,
    ) -> Result<(u64, u64), i32> {
        let body = raw![flags, mode, 0u32, 0u32, name];
        let told = self.ask(op::CREATE, parent, &body)?;
        Ok((u64_at(&told, 0), u64_at(&told, 128)))
    }

    /// Gives the handle, and how it is open.
    pub(super) fn open(&mut self, node: u64, flags: i32) -> Result<(u64, u32), i32> {
        let told = self.ask(op::OPEN, node, &raw![flags, 0u32])?;
        Ok((u64_at(&told, 0), u32_at(&told, 8)))
    }

    pub(super) fn release(&mut self, node: u64, handle: u64) -> Told {
        self.ask(op::RELEASE, node, &raw![handle, 0u32, 0u32, 0u64])
    }

    pub(super) fn flush(&mut self, node: u64, handle: u64, owner: u64) -> Told {
        self.ask(op::FLUSH, node, &raw![handle, 0u32, 0u32, owner])
    }

    pub(super) fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Told {
        let body = raw![handle, offset, size, 0u32, 0u64, 0u32, 0u32];
        self.ask(op::READ, node, &body)
    }

    pub(super) fn write(
        &mut self,
        node: u64,
        handle: u64,
        offset: u64,
        data: &[u8],
        how: u32,
        flags: i32,
    ) -> Result<u32, i32> {
        let size = data.len() as u32;
        let body = raw![handle, offset, size, how, 0u64, flags, 0u32, data];
        Ok(u32_at(&self.ask(op::WRITE, node, &body)?, 0))
    }

    /// Changes what the bits say; the numbers are size, mode, user and group.
    pub(super) fn setattr(
        &mut self,
        node: u64,
        valid: u32,
        handle: u64,
        (size, mode, uid, gid): (u64, u32, u32, u32),
    ) -> Result<Known, i32> {
        let body = raw![
            valid, 0u32, handle, size, 0u64, 1000u64, 2000u64, 0u64, 1u32, 2u32, 0u32, mode, 0u32,
            uid, gid, 0u32
        ];
        let told = self.ask(op::SETATTR, node, &body)?;
        Ok(known(&told[16..]))
    }

    /// All names of a folder with their types, read `size` bytes at a time.
    pub(super) fn list(
        &mut self,
        node: u64,
        size: u32,
        plus: bool,
    ) -> Result<Vec<(String, u32)>, i32> {
        let opened = self.ask(op::OPENDIR, node, &raw![0u32, 0u32])?;
        let handle = u64_at(&opened, 0);
        let (mut names, mut offset) = (Vec::new(), 0u64);
        loop {
            let part = self.list_part(node, handle, offset, size, plus)?;
            let Some(last) = part.last() else {
                break;
            };
            offset = last.2;
            names.extend(part.into_iter().map(|(name, kind, _)| (name, kind)));
        }
        self.ask(op::RELEASEDIR, node, &raw![handle, 0u32, 0u32, 0u64])?;
        Ok(names)
    }

    /// Name, type and next place of what one request lists.
    pub(super) fn list_part(
        &mut self,
        node: u64,
        handle: u64,
        offset: u64,
        size: u32,
        plus: bool,
    ) -> Result<Vec<(String, u32, u64)>, i32> {
        let opcode = if plus { op::READDIRPLUS } else { op::READDIR };
        let body = raw![handle, offset, size, 0u32, 0u64, 0u32, 0u32];
        let told = self.ask(opcode, node, &body)?;
        assert!(told.len() <= size as usize);
        let (mut at, mut part) = (0, Vec::new());
        while at < told.len() {
            if plus {
                let found = u64_at(&told, at);
                if found != 0 {
                    self.forget(found, 1);
                }
                at += 128;
            }
            let (next, len) = (u64_at(&told, at + 8), u32_at(&told, at + 16) as usize);
            let name = String::from_utf8(told[at + 24..at + 24 + len].to_vec()).unwrap();
            part.push((name, u32_at(&told, at + 20), next));
            at += (24 + len).next_multiple_of(8);
        }
        Ok(part)
    }
}

/// Takes `struct fuse_attr` apart.
pub(super) fn known(attributes: &[u8]) -> Known {
    Known {
        ino: u64_at(attributes, 0),
        size: u64_at(attributes, 8),
        mode: u32_at(attributes, 60),
        links: u32_at(attributes, 64),
        uid: u32_at(attributes, 68),
        gid: u32_at(attributes, 72),
    }
}
