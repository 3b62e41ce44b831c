//! The rings: requests are taken off, and answers put back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;

use crate::devices::chain::Chain;
use crate::devices::ring::{self, Complaints, Mem, RingError};
use crate::devices::slab::Slab;
use crate::memory::GuestRam;
use crate::virtio::{ActiveQueue, SavedQueue};

const IN_HEADER_LEN: usize = 40;
const OUT_HEADER_LEN: u32 = 16;
const OP_INIT: u64 = 26;
const OP_DESTROY: u64 = 38;

/// What becomes of a request.
pub(super) enum Answer {
    /// So many bytes were written.
    Written(usize),
    /// It waits, and is answered later, by its number.
    Later,
    /// The guest is told of an error.
    Error(i32),
    /// It could not be understood, or has no room for an answer.
    Failed(String),
}

/// The queues of a device in operation, and what waits in them.
#[derive(Debug)]
pub(super) struct Lines {
    memory: GuestRam,
    queues: Vec<ActiveQueue>,
    complaints: Complaints,
    waiting: Slab<Request>,
    session: Arc<AtomicBool>,
    /// A ring is broken: nothing is done until the driver begins anew.
    broken: bool,
}

#[derive(Debug)]
struct Request {
    /// Position of its queue.
    queue: usize,
    chain: Chain,
    unique: u64,
}

impl Lines {
    /// `session` tells whether the guest has the folder mounted.
    pub(super) fn new(
        memory: GuestRam,
        queues: Vec<ActiveQueue>,
        session: Arc<AtomicBool>,
    ) -> Self {
        Lines {
            memory,
            queues,
            complaints: Complaints::new(super::KIND),
            waiting: Slab::new(),
            session,
            broken: false,
        }
    }

    /// Whether any request is not answered yet.
    pub(super) fn is_busy(&self) -> bool {
        !self.waiting.is_empty()
    }

    pub(super) fn save(&self) -> Vec<SavedQueue> {
        self.queues.iter().map(ActiveQueue::save).collect()
    }

    /// Has `serve` answer what there is, a queue's worth at most of each queue, as long as it may `go_on`. `interrupt` is
    /// told the queues whose driver wants to hear of it, after each answer.
    pub(super) fn turn(
        &mut self,
        go_on: impl Fn() -> bool,
        interrupt: impl Fn(u16),
        mut serve: impl FnMut(&Arc<Mem>, usize, &Chain) -> Answer,
    ) -> Result<(), RingError> {
        let mem = self.memory.memory().into_inner();
        for position in 0..self.queues.len() {
            let served = self.serve_queue(position, &mem, &go_on, &interrupt, &mut serve);
            self.check(served)?;
        }
        Ok(())
    }

    /// Answers a request that waited.
    pub(super) fn answer(
        &mut self,
        number: usize,
        answer: Answer,
        interrupt: impl Fn(u16),
    ) -> Result<(), RingError> {
        let mem = self.memory.memory().into_inner();
        let answered = self.finish(number, answer, &mem, &interrupt);
        self.check(answered)
    }

    fn check(&mut self, done: Result<(), RingError>) -> Result<(), RingError> {
        self.broken |= done.is_err();
        done
    }

    fn serve_queue(
        &mut self,
        position: usize,
        mem: &Arc<Mem>,
        go_on: &impl Fn() -> bool,
        interrupt: &impl Fn(u16),
        serve: &mut impl FnMut(&Arc<Mem>, usize, &Chain) -> Answer,
    ) -> Result<(), RingError> {
        let share = self.queues.get(position).map_or(0, |q| q.queue.size());
        for _ in 0..share {
            let Some(queue) = self.queues.get_mut(position).filter(|_| !self.broken) else {
                return Ok(());
            };
            if !go_on() {
                break;
            }
            let since = queue.queue.next_used();
            let chain = ring::pull(queue, mem, &mut self.complaints)?;
            // Chains that were refused have been given back.
            tell(queue, mem, since, interrupt)?;
            let Some(chain) = chain else {
                return Ok(());
            };
            let mut header = [0; IN_HEADER_LEN];
            let read = chain.readable.read(&**mem, 0, &mut header);
            let number = self.waiting.insert(Request {
                queue: position,
                unique: field(&header, 8, 8),
                chain,
            });
            let answer = match (read, self.waiting.get_mut(number)) {
                (Ok(()), Some(request)) => serve(mem, number, &request.chain),
                (Err(e), _) => {
                    // Nobody can be told of it: what the answer would belong to is in the header.
                    self.complaints.add(e);
                    Answer::Written(0)
                }
                (_, None) => Answer::Later,
            };
            if matches!(answer, Answer::Written(_)) {
                match field(&header, 4, 4) {
                    OP_INIT => self.session.store(true, Ordering::SeqCst),
                    OP_DESTROY => self.session.store(false, Ordering::SeqCst),
                    _ => {}
                }
            }
            self.finish(number, answer, mem, interrupt)?;
        }
        // There may be more: whoever else there is has a turn first.
        if let Some(queue) = self.queues.get(position) {
            queue.rekick();
        }
        Ok(())
    }

    /// Gives a request back to the driver, if it has been answered. A number of none is passed over.
    fn finish(
        &mut self,
        number: usize,
        answer: Answer,
        mem: &Mem,
        interrupt: &impl Fn(u16),
    ) -> Result<(), RingError> {
        if matches!(answer, Answer::Later) {
            return Ok(());
        }
        let Some(request) = self.waiting.remove(number) else {
            return Ok(());
        };
        let len = match answer {
            Answer::Later => 0,
            Answer::Written(len) => u32::try_from(len).unwrap_or(u32::MAX),
            Answer::Error(error) => write_error(mem, &request, error),
            Answer::Failed(what) => {
                self.complaints.add(what);
                write_error(mem, &request, libc::EIO)
            }
        };
        let Some(queue) = self.queues.get_mut(request.queue).filter(|_| !self.broken) else {
            return Ok(());
        };
        let since = queue.queue.next_used();
        ring::add_used(queue, mem, request.chain.head, len)?;
        tell(queue, mem, since, interrupt)
    }
}

fn tell(
    queue: &mut ActiveQueue,
    mem: &Mem,
    since: u16,
    interrupt: &impl Fn(u16),
) -> Result<(), RingError> {
    if ring::wants_to_hear(queue, mem, since)? {
        interrupt(queue.index);
    }
    Ok(())
}

/// A number in a request's header.
fn field(header: &[u8; IN_HEADER_LEN], at: usize, len: usize) -> u64 {
    let bytes = header.iter().skip(at).take(len).rev();
    bytes.fold(0, |all, byte| all << 8 | u64::from(*byte))
}

/// Puts an error where a request has room for one; gives the bytes written.
fn write_error(mem: &Mem, request: &Request, error: i32) -> u32 {
    let mut header = [0; OUT_HEADER_LEN as usize];
    let fields = OUT_HEADER_LEN
        .to_le_bytes()
        .into_iter()
        .chain((-error).to_le_bytes())
        .chain(request.unique.to_le_bytes());
    for (to, from) in header.iter_mut().zip(fields) {
        *to = from;
    }
    match request.chain.writable.write(mem, 0, &header) {
        Ok(()) => OUT_HEADER_LEN,
        // Requests that want no answer leave no room for one.
        Err(_) => 0,
    }
}
