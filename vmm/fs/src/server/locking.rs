//! Requests for locks, among them those that wait.
//!
//! Not trusted: owners, ranges and handles. How many wait is bounded by the queue that their requests came by.

use std::mem;
use std::time::{Duration, Instant};

use kiln_lockwatch::Wait;

use super::{Body, Finished, Refusal, Reply, Request, Served, Server, send};
use crate::host::{Answer, Errno};
use crate::locks::{Range, TAKEN, Waiter, Wanted, Watcher, whole};
use crate::view::Buffers;
use crate::wire::{Arguments, ROOT};
use crate::{ServerError, Span, View};

/// The lock is on the whole file (`FUSE_LK_FLOCK`).
const WHOLE: u32 = 1;

/// What all requests for locks say.
struct Asked {
    handle: u64,
    owner: u64,
    range: Range,
    whole: bool,
}

fn parse(args: &mut Arguments<'_>) -> Result<Asked, Refusal> {
    let (handle, owner) = (args.u64()?, args.u64()?);
    let (start, end) = (args.u64()?, args.u64()?);
    let (kind, _pid) = (args.flags()?, args.u32()?);
    let flags = args.u32()?;
    Ok(Asked {
        handle,
        owner,
        range: Range::new(start, end, kind)?,
        whole: flags & WHOLE != 0,
    })
}

impl Server {
    pub(super) fn getlk(
        &mut self,
        request: &Request<'_>,
        args: &mut Arguments<'_>,
        body: &mut Body,
    ) -> Served {
        let asked = parse(args)?;
        let handle = self.handles.file(asked.handle, request.header.node)?;
        let found = self
            .locks
            .get(&self.numbers, handle, asked.owner, asked.range)?;
        body.i64(found.start).i64(found.end());
        // Whose it is, is nothing that the guest's processes have a number for.
        body.u32(found.kind.unsigned_abs()).u32(0);
        Ok(Reply::Body)
    }

    pub(super) fn setlk(
        &mut self,
        request: &Request<'_>,
        args: &mut Arguments<'_>,
        wait: bool,
    ) -> Served {
        let asked = parse(args)?;
        let wanted = if asked.whole {
            let operation = match asked.range.kind {
                libc::F_RDLCK => libc::LOCK_SH,
                libc::F_WRLCK => libc::LOCK_EX,
                _ => libc::LOCK_UN,
            };
            Wanted::Whole { operation }
        } else {
            Wanted::Range {
                owner: asked.owner,
                range: asked.range,
            }
        };
        let (node, handle) = (request.header.node, asked.handle);
        let tried = self.with_room(|server| server.try_lock(node, handle, wanted));
        if !self.locks.waiting.is_empty() {
            // Also what fails may have given something up: a lock that is made another is given up first.
            self.locks.hurry();
        }
        match tried {
            Err(TAKEN) if wait => {
                self.locks.wait(Waiter {
                    unique: request.header.unique,
                    thread: request.header.thread,
                    since: Instant::now(),
                    ticket: request.ticket,
                    node,
                    handle,
                    wanted,
                    writable: request.to.to_vec(),
                    ended: None,
                });
                Ok(Reply::Later)
            }
            other => {
                other?;
                Ok(Reply::Body)
            }
        }
    }

    fn try_lock(&mut self, node: u64, handle: u64, wanted: Wanted) -> Answer<()> {
        let handle = self.handles.file(handle, node)?;
        let locked = match wanted {
            Wanted::Range { owner, range } => self.locks.set(&self.numbers, handle, owner, range),
            Wanted::Whole { operation } => {
                handle.locked = true;
                whole(handle.fd(), operation)
            }
        };
        locked.map_err(|error| match error.0 {
            libc::EACCES => TAKEN,
            _ => error,
        })
    }

    pub(super) fn interrupt(&mut self, request: &Request<'_>, args: &mut Arguments<'_>) -> Served {
        if self.locks.interrupt(args.u64()?) || request.room() == 0 {
            return Ok(Reply::Nothing);
        }
        // It may have come before what it interrupts: the guest asks once more.
        Err(Errno(libc::EAGAIN).into())
    }

    /// The agent's question who waits, and its word of who is to wait no longer. Only it has the root open.
    pub(super) fn ioctl(&mut self, request: &Request<'_>, args: &mut Arguments<'_>) -> Served {
        let (_handle, _flags, command) = (args.u64()?, args.u32()?, args.u32()?);
        let (_address, asked, room) = (args.u64()?, args.u32()?, args.u32()?);
        let header = &request.header;
        let is_it = header.node == ROOT && header.uid == 0 && command == kiln_lockwatch::COMMAND;
        let len = kiln_lockwatch::LEN;
        if !is_it || (asked as usize, room as usize) != (len, len) {
            return Err(Errno(libc::ENOTTY).into());
        }
        let mut question = [0; kiln_lockwatch::LEN];
        question.copy_from_slice(args.bytes(len)?);
        for wait in kiln_lockwatch::decode(&question) {
            self.locks.interrupt(wait.unique);
        }
        if self.locks.watcher.is_some() {
            return Err(Errno(libc::EBUSY).into());
        }
        self.locks.watcher = Some(Watcher {
            unique: header.unique,
            ticket: request.ticket,
            writable: request.to.to_vec(),
            ended: false,
        });
        Ok(Reply::Later)
    }

    /// Answers who watches, if there is somebody to tell of.
    fn tell_watcher(&mut self, view: &View) -> Option<Finished> {
        let watcher = self.locks.watcher.as_ref()?;
        let ended = watcher.ended;
        let waits = self.locks.long_waits();
        if waits.is_empty() && !ended {
            return None;
        }
        let watcher = self.locks.watcher.take()?;
        let error = if ended { libc::EINTR } else { 0 };
        let body = answer(&waits);
        let body = if ended { &[][..] } else { &body };
        Some(Finished {
            ticket: watcher.ticket,
            result: sent(view, &watcher.writable, watcher.unique, error, body),
        })
    }

    /// How long until [`Server::finished`] may have something to tell, if anything waits.
    pub fn wait(&self) -> Option<Duration> {
        self.locks.until_due()
    }

    /// Tries again what waits, if it is time, and answers what waits no longer.
    pub fn finished(&mut self, view: &View) -> Vec<Finished> {
        let mut finished = Vec::new();
        finished.extend(self.tell_watcher(view));
        if self.locks.waiting.is_empty() {
            return finished;
        }
        let due = self.locks.is_due();
        let mut still = Vec::new();
        for waiter in mem::take(&mut self.locks.waiting) {
            let result = match waiter.ended {
                Some(error) => Err(error),
                None if due => self.try_lock(waiter.node, waiter.handle, waiter.wanted),
                None => Err(TAKEN),
            };
            if result == Err(TAKEN) {
                still.push(waiter);
                continue;
            }
            let error = result.err().map_or(0, |error| error.0);
            finished.push(Finished {
                ticket: waiter.ticket,
                result: sent(view, &waiter.writable, waiter.unique, error, &[]),
            });
        }
        self.locks.waiting = still;
        if due {
            self.locks.put_off();
        }
        finished
    }
}

/// `struct fuse_ioctl_out`, all of it zero, and who waits.
fn answer(waits: &[Wait]) -> Vec<u8> {
    const HEADER: usize = 16;
    let mut body = vec![0; HEADER];
    body.extend_from_slice(&kiln_lockwatch::encode(waits));
    body
}

/// Sends an answer to a request of a while ago.
fn sent(
    view: &View,
    writable: &[Span],
    unique: u64,
    error: i32,
    body: &[u8],
) -> Result<usize, ServerError> {
    let to = Buffers::new(view, writable)?;
    let no_room = || ServerError::Request("there is no room for its answer".to_owned());
    send(to, unique, error, body, 0).ok_or_else(no_room)
}
