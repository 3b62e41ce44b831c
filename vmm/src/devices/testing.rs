//! The driver's side of a virtqueue, for tests and fuzzing: honest by its helpers, hostile through
//! direct access to everything a real driver can write.

use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::event::{EventLoop, Subscriber};
use crate::memory::GuestRam;
use crate::virtio::testing::RecordingSink;
use crate::virtio::{Activation, ActiveQueue, VirtioDevice};

/// Descriptor flags.
pub const NEXT: u16 = 1;
/// The device writes this buffer.
pub const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Where [`Driver`]s keep their rings; everything from here up is theirs.
pub const RINGS_BASE: u64 = 0x1000;
const RING_STRIDE: u64 = 0x4000;
/// First address that tests may use for buffers.
pub const BUFFERS_BASE: u64 = 0x10_0000;

/// Guest memory of this many bytes, from address 0.
pub fn memory(len: usize) -> GuestRam {
    #[expect(clippy::unwrap_used, reason = "a test without memory can't go on")]
    let map = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len)]).unwrap();
    GuestMemoryAtomic::new(map)
}

/// One descriptor, as it lies in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Desc {
    /// Guest address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`] or anything else.
    pub flags: u16,
    /// Next descriptor.
    pub next: u16,
}

impl Desc {
    /// The sixteen bytes of it.
    pub fn bytes(self) -> [u8; 16] {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&self.addr.to_le_bytes());
        raw[8..12].copy_from_slice(&self.len.to_le_bytes());
        raw[12..14].copy_from_slice(&self.flags.to_le_bytes());
        raw[14..].copy_from_slice(&self.next.to_le_bytes());
        raw
    }
}

/// A driver's view of one queue.
#[derive(Debug)]
pub struct Driver {
    memory: GuestRam,
    /// Entries.
    pub size: u16,
    /// The queue's number.
    pub index: u16,
    next_desc: u16,
    avail_idx: u16,
    seen_used: u16,
}

impl Driver {
    /// A driver for queue `index`; its rings have a fixed place in guest memory.
    pub fn new(memory: &GuestRam, index: u16, size: u16) -> Self {
        let memory = memory.clone();
        Driver {
            memory,
            size,
            index,
            next_desc: 0,
            avail_idx: 0,
            seen_used: 0,
        }
    }

    /// Address of the descriptor table.
    pub fn desc_table(&self) -> u64 {
        RINGS_BASE + u64::from(self.index) * RING_STRIDE
    }

    /// Address of the available ring.
    pub fn avail_ring(&self) -> u64 {
        self.desc_table() + 0x2000
    }

    /// Address of the used ring.
    pub fn used_ring(&self) -> u64 {
        self.desc_table() + 0x2800
    }

    /// The device's side of the queue.
    pub fn queue(&self) -> ActiveQueue {
        let build = || -> Option<ActiveQueue> {
            let mut queue = Queue::new(self.size).ok()?;
            queue
                .try_set_desc_table_address(GuestAddress(self.desc_table()))
                .ok()?;
            queue
                .try_set_avail_ring_address(GuestAddress(self.avail_ring()))
                .ok()?;
            queue
                .try_set_used_ring_address(GuestAddress(self.used_ring()))
                .ok()?;
            queue.set_ready(true);
            let kick = Arc::new(EventFd::new(EFD_NONBLOCK).ok()?);
            Some(ActiveQueue {
                index: self.index,
                queue,
                kick,
            })
        };
        #[expect(clippy::unwrap_used, reason = "a test without a queue can't go on")]
        build().unwrap()
    }

    /// Writes anywhere in guest memory, as a driver can; what is outside is left out.
    pub fn poke(&self, addr: u64, bytes: &[u8]) {
        let _ = self.memory.memory().write_slice(bytes, GuestAddress(addr));
    }

    /// Reads guest memory; zeroes where there is none.
    pub fn peek(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        let _ = self
            .memory
            .memory()
            .read_slice(&mut out, GuestAddress(addr));
        out
    }

    /// Puts a descriptor into the table as it is.
    pub fn set_desc(&self, index: u16, desc: Desc) {
        self.poke(self.desc_table() + u64::from(index) * 16, &desc.bytes());
    }

    /// Makes a chain of readable and then writable buffers available. Returns its head.
    pub fn add(&mut self, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> u16 {
        let head = self.next_desc;
        let all = readable
            .iter()
            .map(|b| (b, 0))
            .chain(writable.iter().map(|b| (b, WRITE)));
        let count = readable.len() + writable.len();
        for (i, (&(addr, len), flags)) in all.enumerate() {
            let next = (self.next_desc + 1) % self.size;
            let more = if i + 1 < count { NEXT } else { 0 };
            self.set_desc(
                self.next_desc,
                Desc {
                    addr,
                    len,
                    flags: flags | more,
                    next,
                },
            );
            self.next_desc = next;
        }
        self.make_available(head);
        head
    }

    /// Puts a head on the available ring, whatever it is.
    pub fn make_available(&mut self, head: u16) {
        let place = u64::from(self.avail_idx % self.size);
        self.poke(self.avail_ring() + 4 + 2 * place, &head.to_le_bytes());
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.set_avail_idx(self.avail_idx);
    }

    /// Sets the available index to anything.
    pub fn set_avail_idx(&mut self, index: u16) {
        self.avail_idx = index;
        self.poke(self.avail_ring() + 2, &index.to_le_bytes());
    }

    /// The next used chain not yet seen: its head and the bytes written.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        let raw = self.peek(self.used_ring() + 2, 2);
        let index = u16::from_le_bytes([*raw.first()?, *raw.get(1)?]);
        if index == self.seen_used {
            return None;
        }
        let place = u64::from(self.seen_used % self.size);
        let raw = self.peek(self.used_ring() + 4 + 8 * place, 8);
        self.seen_used = self.seen_used.wrapping_add(1);
        let id = u32::from_le_bytes(raw.get(..4)?.try_into().ok()?);
        let len = u32::from_le_bytes(raw.get(4..8)?.try_into().ok()?);
        Some((u16::try_from(id).ok()?, len))
    }
}

#[derive(Debug)]
struct Forward(std::sync::Mutex<Vec<(u32, vmm_sys_util::epoll::EventSet)>>);

impl Subscriber for Forward {
    fn ready(&self, token: u32, events: vmm_sys_util::epoll::EventSet) {
        if let Ok(mut list) = self.0.lock() {
            list.push((token, events));
        }
    }
}

/// A device in operation, with a driver for each of its queues and a loop turned by hand.
#[derive(Debug)]
pub struct Bench<D> {
    /// The device.
    pub device: D,
    /// Guest memory.
    pub memory: GuestRam,
    /// One driver a queue.
    pub drivers: Vec<Driver>,
    /// Interrupts so far.
    pub sink: Arc<RecordingSink>,
    kicks: Vec<(u16, Arc<EventFd>)>,
    events: EventLoop,
    ready: Arc<Forward>,
}

impl<D: VirtioDevice> Bench<D> {
    /// Activates `device` with queues of at most `queue_size` and all its features.
    pub fn new(device: D, memory_len: usize, queue_size: u16) -> Self {
        let features = device.features();
        Self::with_features(device, memory_len, queue_size, features)
    }

    /// The same with features of the driver's choice.
    pub fn with_features(device: D, memory_len: usize, queue_size: u16, features: u64) -> Self {
        let memory = memory(memory_len);
        let drivers = device
            .queue_max_sizes()
            .iter()
            .zip(0..)
            .map(|(max, index)| Driver::new(&memory, index, queue_size.min(*max)))
            .collect();
        #[expect(clippy::unwrap_used, reason = "a test without a loop can't go on")]
        let events = EventLoop::new().unwrap();
        let (sink, _) = RecordingSink::new();
        let ready = Arc::new(Forward(std::sync::Mutex::default()));
        let mut bench = Bench {
            device,
            memory,
            drivers,
            sink,
            kicks: Vec::new(),
            events,
            ready,
        };
        bench.activate(features);
        bench
    }

    /// Activates the device anew, with fresh queues.
    pub fn activate(&mut self, features: u64) {
        let mut queues: Vec<_> = self.drivers.iter().map(Driver::queue).collect();
        if let Some(bell) = self.device.doorbell() {
            for queue in &mut queues {
                queue.kick = bell.clone();
            }
        }
        self.activate_with(features, queues);
    }

    /// Activates the device with the queues given, as after a restore.
    pub fn activate_with(&mut self, features: u64, queues: Vec<ActiveQueue>) {
        // A doorbell of the device's own is its own to hear.
        self.kicks = match self.device.doorbell() {
            Some(_) => Vec::new(),
            None => queues.iter().map(|q| (q.index, q.kick.clone())).collect(),
        };
        let (sink, interrupt) = RecordingSink::new();
        self.sink = sink;
        let activation = Activation {
            memory: self.memory.clone(),
            queues,
            features,
            interrupt,
            watches: self.events.watches(self.ready.clone()),
        };
        #[expect(
            clippy::unwrap_used,
            reason = "a test of an inactive device can't go on"
        )]
        self.device.activate(activation).unwrap();
    }

    /// Kicks a queue and runs the device until nothing is pending.
    pub fn kick(&mut self, queue: u16) {
        self.device.queue_event(queue);
        self.run();
    }

    /// Delivers every pending kick and event, round after round, as long as there are any.
    pub fn run(&mut self) {
        for _ in 0..10_000 {
            if !self.step() {
                return;
            }
        }
        panic!("the device never comes to rest");
    }

    /// Delivers what is pending once. Returns whether there was anything.
    pub fn step(&mut self) -> bool {
        let mut any = false;
        if self.sink.failure().is_some() {
            return false;
        }
        let _ = self.events.drain(&self.events.still());
        let ready = self
            .ready
            .0
            .lock()
            .map(|mut list| std::mem::take(&mut *list))
            .unwrap_or_default();
        for (token, events) in ready {
            any = true;
            self.device.event(token, events);
        }
        for (queue, kick) in self.kicks.clone() {
            if kick.read().is_ok() {
                any = true;
                self.device.queue_event(queue);
            }
        }
        any
    }

    /// Runs the device until `until` holds; fails after ten seconds.
    pub fn run_until(&mut self, mut until: impl FnMut(&mut Self) -> bool) {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !until(self) {
            assert!(
                std::time::Instant::now() < deadline,
                "the device does not do what is waited for"
            );
            if !self.step() {
                std::thread::yield_now();
            }
        }
    }

    /// Whether the device was stopped.
    pub fn failed(&self) -> bool {
        self.sink.failure().is_some()
    }
}
