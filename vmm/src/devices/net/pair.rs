//! One pair of queues: receiving straight into the guest's buffers, sending straight out of them.

use std::collections::VecDeque;
use std::io;

use virtio_queue::QueueT;

use super::tap::{NetBackend, VNET_HEADER_LEN};
use crate::devices::chain::Chain;
use crate::devices::ring::{self, Complaints, Handled, Mem, RingError, TurnEnd};
use crate::virtio::{ActiveQueue, Interrupt};

/// A frame of 64 KiB for the guest's stack, its Ethernet header, and ours.
const MAX_PACKET: u64 = 65_536 + 14 + VNET_HEADER_LEN as u64;
/// Ethernet's smallest useful packet: a header.
const MIN_PACKET: u64 = 14 + VNET_HEADER_LEN as u64;
/// What a driver without segmentation offload has to have room for.
const PLAIN_PACKET: u64 = 1514 + 4 + VNET_HEADER_LEN as u64;
/// Vectors of one system call (`UIO_MAXIOV`).
const MAX_IOVECS: usize = 1024;
/// Where the number of buffers of a packet lies in its header.
const NUM_BUFFERS_AT: u64 = 10;

/// How the driver wants packets laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    /// A packet may take several chains.
    pub(super) mergeable: bool,
    /// Packets may be of up to 64 KiB.
    pub(super) large: bool,
}

/// A receive and a transmit queue.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) rx: ActiveQueue,
    pub(super) tx: ActiveQueue,
    /// Receive buffers taken off the ring and not filled yet, in ring order.
    buffers: VecDeque<Chain>,
    /// The backend may have packets.
    pub(super) readable: bool,
    /// The backend took no more; packets wait on the transmit queue.
    tx_waits: bool,
}

impl Pair {
    pub(super) fn new(rx: ActiveQueue, tx: ActiveQueue) -> Self {
        Pair {
            rx,
            tx,
            buffers: VecDeque::new(),
            readable: true,
            tx_waits: false,
        }
    }

    /// Gives unfilled buffers back to the ring, so that the queue's position can be saved.
    pub(super) fn put_back(&mut self) {
        for _ in self.buffers.drain(..) {
            ring::put_back(&mut self.rx);
        }
    }

    /// The backend can take packets again.
    pub(super) fn writable(&mut self) {
        if std::mem::take(&mut self.tx_waits) {
            self.tx.rekick();
        }
    }

    /// Moves packets from the backend to the guest until one of them has no more.
    pub(super) fn receive(
        &mut self,
        mem: &Mem,
        backend: &dyn NetBackend,
        layout: Layout,
        interrupt: &Interrupt,
        complaints: &mut Complaints,
    ) -> Result<(), RingError> {
        let since = self.rx.queue.next_used();
        let mut share = self.rx.queue.size();
        let mut overflow = Vec::new();
        while self.readable {
            if share == 0 {
                self.rx.rekick();
                break;
            }
            share -= 1;
            if !self.gather(mem, layout, complaints)? {
                break;
            }
            let mut iovecs = Vec::with_capacity(8);
            for chain in self.fillable(layout) {
                // Checked when the chain was parsed; what does not resolve any more is no room.
                let _ = chain.writable.iovecs(mem, &mut iovecs);
            }
            iovecs.truncate(MAX_IOVECS - 1);
            let room: u64 = iovecs.iter().map(|vector| vector.iov_len as u64).sum();
            if room < MAX_PACKET {
                // Catches what the guest has no room for: the packet is lost, not cut.
                overflow.resize(MAX_PACKET as usize, 0u8);
                iovecs.push(libc::iovec {
                    iov_base: overflow.as_mut_ptr().cast(),
                    iov_len: overflow.len(),
                });
            }
            // SAFETY: all vectors but the last point into guest memory, which `mem` keeps mapped and
            // nobody holds references to; the last, if any, to `overflow`, which outlives the call.
            match unsafe { backend.receive(&iovecs) } {
                Ok(len) if len as u64 <= room && len >= VNET_HEADER_LEN => {
                    self.deliver(mem, len as u64, complaints)?;
                }
                Ok(0) => self.readable = false,
                Ok(len) => complaints.add(format_args!("packet of {len} bytes dropped")),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    complaints.add(format_args!("receiving failed: {e}"));
                    self.readable = false;
                }
            }
        }
        ring::notify(&mut self.rx, mem, interrupt, since)
    }

    fn fillable(&self, layout: Layout) -> impl Iterator<Item = &Chain> {
        self.buffers
            .iter()
            .take(if layout.mergeable { usize::MAX } else { 1 })
    }

    /// Takes buffers off the ring until any packet fits. Whether the backend may be asked for one.
    fn gather(
        &mut self,
        mem: &Mem,
        layout: Layout,
        complaints: &mut Complaints,
    ) -> Result<bool, RingError> {
        for _ in 0..=self.rx.queue.size() {
            let room: u64 = self
                .fillable(layout)
                .map(|chain| chain.writable.len())
                .sum();
            // More than a ring holds can't come; then what there is has to do.
            let all = self.buffers.len() >= usize::from(self.rx.queue.size())
                || (!layout.mergeable && !self.buffers.is_empty());
            if room >= MAX_PACKET || all {
                return Ok(true);
            }
            match ring::pull(&mut self.rx, mem, complaints)? {
                Some(chain) if chain.writable.len() > VNET_HEADER_LEN as u64 => {
                    self.buffers.push_back(chain);
                }
                Some(chain) => {
                    // `put_back` will go back one too few for a buffer before this one. That is between
                    // the driver and its malformed buffer.
                    complaints.add("receive buffer is too small for a header");
                    ring::add_used(&mut self.rx, mem, chain.head, 0)?;
                }
                None => return Ok(!layout.large && room >= PLAIN_PACKET),
            }
        }
        self.rx.rekick();
        Ok(false)
    }

    /// Hands the buffers that a packet of `len` bytes was received into to the driver.
    fn deliver(
        &mut self,
        mem: &Mem,
        len: u64,
        complaints: &mut Complaints,
    ) -> Result<(), RingError> {
        let mut count = 0u16;
        let mut left = len;
        for chain in &self.buffers {
            count += 1;
            left = left.saturating_sub(chain.writable.len());
            if left == 0 {
                break;
            }
        }
        if let Some(first) = self.buffers.front()
            && let Err(e) = first
                .writable
                .write(mem, NUM_BUFFERS_AT, &count.to_le_bytes())
        {
            complaints.add(e);
        }
        let mut left = len;
        for _ in 0..count {
            let Some(chain) = self.buffers.pop_front() else {
                break;
            };
            let part = chain.writable.len().min(left);
            left -= part;
            // At most `MAX_PACKET`.
            ring::add_used(&mut self.rx, mem, chain.head, part as u32)?;
        }
        Ok(())
    }

    /// Moves packets from the guest to the backend; without one they are dropped.
    pub(super) fn transmit(
        &mut self,
        mem: &Mem,
        backend: Option<&dyn NetBackend>,
        interrupt: &Interrupt,
        complaints: &mut Complaints,
    ) -> Result<(), RingError> {
        let since = self.tx.queue.next_used();
        let mut iovecs = Vec::with_capacity(8);
        let end = ring::turn(&mut self.tx, mem, complaints, |chain, complaints| {
            let Some(backend) = backend else {
                return Ok(Handled::Used(0));
            };
            let len = chain.readable.len();
            iovecs.clear();
            if !(MIN_PACKET..=MAX_PACKET).contains(&len)
                || chain.readable.iovecs(mem, &mut iovecs).is_err()
                || iovecs.len() > MAX_IOVECS
            {
                complaints.add(format_args!("packet of {len} bytes can't be sent"));
                return Ok(Handled::Used(0));
            }
            // SAFETY: the vectors point into guest memory, which `mem` keeps mapped.
            match unsafe { backend.send(&iovecs) } {
                Ok(_) => Ok(Handled::Used(0)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Handled::NoRoom),
                // An interface that is down, or a header the kernel does not like: the packet is lost.
                Err(e) => {
                    complaints.add(format_args!("sending failed: {e}"));
                    Ok(Handled::Used(0))
                }
            }
        })?;
        self.tx_waits = end == TurnEnd::NoRoom;
        ring::notify(&mut self.tx, mem, interrupt, since)
    }
}
