//! The device: three queues, a listener, and the table of connections.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::connection::{Connection, Ended, Next};
use super::packet::{EVENT_TRANSPORT_RESET, HEADER_LEN, HOST_CID, Header, Op, TYPE_STREAM};
use crate::devices::chain::Chain;
use crate::devices::read_config;
use crate::devices::ring::{self, Complaints, Handled, Mem, RingError, TurnEnd};
use crate::devices::slab::Slab;
use crate::event::{WatchGuard, Watches};
use crate::memory::GuestRam;
use crate::virtio::{
    Activation, ActiveQueue, DeviceError, DeviceState, DeviceType, Interrupt, SavedQueue,
    VirtioDevice,
};

const KIND: &str = "vsock";
const VERSION: u16 = 1;
const QUEUE_SIZES: [u16; 3] = [128, 256, 16];
const RX: u16 = 0;
const TX: u16 = 1;
const EVENTS: u16 = 2;
/// Token of the listener; connections have their number plus one.
const LISTENER: u32 = 0;
/// Streams at once. A client beyond that finds its socket closed.
const MAX_CONNECTIONS: usize = 1024;
/// Resets owed to packets that belong to no connection. When there are as many, the guest's packets wait.
const MAX_REPLIES: usize = 64;
/// Host ports are handed out from here on.
const FIRST_PORT: u32 = 1 << 30;

/// A virtio-vsock device.
#[derive(Debug)]
pub struct Vsock {
    cid: u64,
    listener: Option<UnixListener>,
    next_port: u32,
    reset_owed: bool,
    active: Option<Active>,
    complaints: Complaints,
    /// Accepting failed for want of something; to be tried again when a stream has ended.
    accept_again: bool,
}

#[derive(Debug)]
struct Active {
    memory: GuestRam,
    rx: ActiveQueue,
    tx: ActiveQueue,
    events: ActiveQueue,
    interrupt: Interrupt,
    watches: Watches,
    _listening: Option<WatchGuard>,
    connections: Slab<Connection>,
    count: usize,
    by_ports: BTreeMap<(u32, u32), usize>,
    /// Connections with something for the guest.
    ready: VecDeque<usize>,
    /// Resets for packets that belong to no connection.
    replies: VecDeque<Header>,
    /// Chains were left on the transmit queue because `replies` was full.
    tx_waits: bool,
    hold: Hold,
}

/// Whether the guest still has to hear that its old connections are gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hold {
    None,
    /// The event waits for a buffer.
    Owed,
    /// The guest gives a buffer back when it has handled the event; its available index was this.
    Sent(u16),
}

#[derive(Debug, Serialize, Deserialize)]
struct VsockState {
    cid: u64,
    next_port: u32,
    /// Connections that the guest believes in.
    connections: u32,
    /// A reset of an earlier restore that the guest has not handled yet.
    reset_owed: bool,
}

impl Vsock {
    /// A device for the guest address `cid`, whose clients come to `listener`. Without a listener there are
    /// no clients.
    pub fn new(cid: u64, listener: Option<UnixListener>) -> Self {
        Vsock {
            cid,
            listener,
            next_port: FIRST_PORT,
            reset_owed: false,
            active: None,
            complaints: Complaints::new(KIND),
            accept_again: false,
        }
    }

    /// Number of streams, those still shaking hands and those only half gone included.
    pub fn connections(&self) -> usize {
        self.active.as_ref().map_or(0, |active| active.count)
    }

    /// Stops the device if a queue is beyond use.
    fn check(&mut self, result: Result<(), RingError>) {
        if let (Err(e), Some(active)) = (result, &self.active) {
            active.interrupt.fail_device(e);
        }
    }

    /// Accepts whoever is waiting.
    fn accept(&mut self) {
        self.accept_again = false;
        while let (true, Some(listener)) = (self.active.is_some(), &self.listener) {
            match listener.accept() {
                Ok((stream, _)) => {
                    if let Some(id) = self.admit(stream) {
                        // The first edge would come by itself; a greeting that is there saves the wait.
                        self.client_ready(id, EventSet::IN);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => {
                    self.complaints
                        .add(format_args!("a client can't be accepted: {e}"));
                    self.accept_again = true;
                    return;
                }
            }
        }
    }

    /// Makes a connection of a client, if there is room for one.
    fn admit(&mut self, stream: UnixStream) -> Option<usize> {
        let active = self.active.as_mut()?;
        if active.count >= MAX_CONNECTIONS && !active.evict() {
            self.complaints
                .add("too many connections, a client is turned away");
            return None;
        }
        let port = active.free_port(&mut self.next_port);
        let fd = stream.as_raw_fd();
        let id = active
            .connections
            .insert(Connection::new(stream, self.cid, port));
        active.count += 1;
        let interest =
            EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        // At most `MAX_CONNECTIONS`.
        match active.watches.watch(fd, id as u32 + 1, interest) {
            Ok(watch) => {
                active.connections.get_mut(id)?.keep(watch);
                Some(id)
            }
            Err(e) => {
                self.complaints
                    .add(format_args!("a client can't be watched: {e}"));
                active.remove(id);
                None
            }
        }
    }

    /// A client's socket is ready for something.
    fn client_ready(&mut self, id: usize, ready: EventSet) {
        let Some(active) = &mut self.active else {
            return;
        };
        let Some(connection) = active.connections.get_mut(id) else {
            return;
        };
        let result = connection.on_ready(ready).and_then(|()| connection.greet());
        match result {
            Ok(asks) => {
                if asks && let Some(ports) = connection.ports() {
                    active.by_ports.insert(ports, id);
                }
                active.enqueue(id);
            }
            Err(e) => {
                tracing::debug!(connection = id, "vsock stream ends: {e}");
                active.end(id);
            }
        }
    }

    /// Handles the guest's packets.
    fn transmit(&mut self) -> Result<(), RingError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let mem = active.memory.memory().into_inner();
        let cid = self.cid;
        let since = active.tx.queue.next_used();
        // The queue is worked on while the rest of `active` is changed by what is found on it.
        let Active {
            tx,
            connections,
            count,
            by_ports,
            ready,
            replies,
            ..
        } = active;
        let mut table = Table {
            connections,
            count,
            by_ports,
            ready,
            replies,
        };
        let end = ring::turn(tx, &mem, &mut self.complaints, |chain, complaints| {
            if table.replies.len() >= MAX_REPLIES {
                return Ok(Handled::NoRoom);
            }
            if let Err(e) = table.packet(&mem, &chain, cid) {
                complaints.add(e);
            }
            Ok(Handled::Used(0))
        })?;
        ring::notify(tx, &mem, &active.interrupt, since)?;
        active.tx_waits = end == TurnEnd::NoRoom;
        self.receive()
    }

    /// Gives the guest what there is for it, as far as it has buffers.
    fn receive(&mut self) -> Result<(), RingError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        if active.hold != Hold::None {
            return Ok(());
        }
        let mem = active.memory.memory().into_inner();
        let since = active.rx.queue.next_used();
        let mut share = active.rx.queue.size();
        while !(active.replies.is_empty() && active.ready.is_empty()) {
            if share == 0 {
                active.rx.rekick();
                break;
            }
            share -= 1;
            let Some(chain) = ring::pull(&mut active.rx, &mem, &mut self.complaints)? else {
                break;
            };
            // A byte beyond the header, so that any packet can be sent in any buffer.
            if chain.writable.len() <= HEADER_LEN {
                self.complaints
                    .add("receive buffer is too small for a packet");
                ring::add_used(&mut active.rx, &mem, chain.head, 0)?;
                continue;
            }
            let Some(header) = active.next_packet(&mem, &chain) else {
                ring::put_back(&mut active.rx);
                break;
            };
            let len = match header.write(&mem, &chain) {
                // At most header and `MAX_DATA`.
                Ok(()) => HEADER_LEN as u32 + header.len,
                Err(e) => {
                    self.complaints.add(e);
                    0
                }
            };
            ring::add_used(&mut active.rx, &mem, chain.head, len)?;
        }
        ring::notify(&mut active.rx, &mem, &active.interrupt, since)?;
        if active.tx_waits && active.replies.len() < MAX_REPLIES {
            active.tx_waits = false;
            active.tx.rekick();
        }
        Ok(())
    }

    /// Sends the transport reset event if one is owed, and sees whether it was handled.
    fn work_on_hold(&mut self) -> Result<(), RingError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let mem = active.memory.memory();
        let queue = &mut active.events;
        if active.hold == Hold::Owed {
            let since = queue.queue.next_used();
            let Some(chain) = ring::pull(queue, &mem, &mut self.complaints)? else {
                return Ok(());
            };
            let event = EVENT_TRANSPORT_RESET.to_le_bytes();
            let len = match chain.writable.write(&*mem, 0, &event) {
                Ok(()) => event.len() as u32,
                Err(e) => {
                    self.complaints.add(e);
                    0
                }
            };
            ring::add_used(queue, &mem, chain.head, len)?;
            active.hold = if len == 0 {
                Hold::Owed
            } else {
                Hold::Sent(ask_for_kick(queue, &mem)?)
            };
            ring::notify(queue, &mem, &active.interrupt, since)?;
        } else if let Hold::Sent(before) = active.hold
            && ask_for_kick(queue, &mem)? != before
        {
            active.hold = Hold::None;
        }
        if active.hold == Hold::None {
            self.receive()?;
        }
        Ok(())
    }
}

/// Asks for a kick when the driver adds a buffer to those it has added so far. Gives its index.
fn ask_for_kick(active: &mut ActiveQueue, mem: &Mem) -> Result<u16, RingError> {
    let broken = |source| RingError::Broken {
        queue: EVENTS,
        source,
    };
    let at = active.queue.next_avail();
    loop {
        let added = active
            .queue
            .avail_idx(mem, std::sync::atomic::Ordering::Acquire)
            .map_err(broken)?
            .0;
        // With EVENT_IDX the kick comes at the position the queue is at, and ours is behind.
        active.queue.set_next_avail(added);
        let more = active.queue.enable_notification(mem).map_err(broken);
        active.queue.set_next_avail(at);
        if !more? {
            return Ok(added);
        }
    }
}

impl Active {
    fn enqueue(&mut self, id: usize) {
        enqueue(&mut self.connections, &mut self.ready, id);
    }

    /// Takes a connection out and tells the guest, if it knows of it.
    fn end(&mut self, id: usize) {
        let Active {
            connections,
            count,
            by_ports,
            ready,
            replies,
            ..
        } = self;
        Table {
            connections,
            count,
            by_ports,
            ready,
            replies,
        }
        .end(id);
    }

    /// Takes a connection out without a word to the guest.
    fn remove(&mut self, id: usize) {
        let Active {
            connections,
            count,
            by_ports,
            ready,
            replies,
            ..
        } = self;
        Table {
            connections,
            count,
            by_ports,
            ready,
            replies,
        }
        .remove(id);
    }

    /// Makes room by ending a connection that only waits for the guest's goodbye.
    fn evict(&mut self) -> bool {
        let lingering = self.by_ports.values().copied().find(|id| {
            self.connections
                .get_mut(*id)
                .is_some_and(|c| c.is_lingering())
        });
        if let Some(id) = lingering {
            self.end(id);
        }
        lingering.is_some()
    }

    /// A host port that no connection has.
    fn free_port(&self, next: &mut u32) -> u32 {
        loop {
            let port = *next;
            *next = next.checked_add(1).unwrap_or(FIRST_PORT);
            // There are 3 · 2^30 ports and at most `MAX_CONNECTIONS` in use.
            if self
                .by_ports
                .range((port, 0)..=(port, u32::MAX))
                .next()
                .is_none()
            {
                return port;
            }
        }
    }

    /// The next thing to tell the guest; data goes into `chain`.
    fn next_packet(&mut self, mem: &Mem, chain: &Chain) -> Option<Header> {
        if let Some(header) = self.replies.pop_front() {
            return Some(header);
        }
        while let Some(id) = self.ready.pop_front() {
            let Some(connection) = self.connections.get_mut(id) else {
                continue;
            };
            connection.queued = false;
            match connection.next_packet(mem, chain) {
                Next::Packet(header) => {
                    // To the back: the streams take turns.
                    self.enqueue(id);
                    return Some(header);
                }
                Next::Nothing => self.enqueue(id),
                Next::Last(header) => {
                    self.remove(id);
                    return Some(header);
                }
            }
        }
        None
    }
}

fn enqueue(connections: &mut Slab<Connection>, ready: &mut VecDeque<usize>, id: usize) {
    if let Some(connection) = connections.get_mut(id)
        && !connection.queued
        && connection.has_something()
    {
        connection.queued = true;
        ready.push_back(id);
    }
}

/// The connections and what is owed to the guest: [`Active`] without its queues.
struct Table<'a> {
    connections: &'a mut Slab<Connection>,
    count: &'a mut usize,
    by_ports: &'a mut BTreeMap<(u32, u32), usize>,
    ready: &'a mut VecDeque<usize>,
    replies: &'a mut VecDeque<Header>,
}

/// What was wrong with a packet.
#[derive(Debug, thiserror::Error)]
enum PacketError {
    #[error("packet without a header: {0}")]
    Short(#[from] crate::devices::chain::ChainError),
    #[error("packet from {from} to {to} is not for this device")]
    Address { from: u64, to: u64 },
    #[error(transparent)]
    Ended(#[from] Ended),
}

impl Table<'_> {
    /// Handles one packet of the guest's.
    fn packet(&mut self, mem: &Mem, chain: &Chain, cid: u64) -> Result<(), PacketError> {
        let header = Header::read(mem, chain)?;
        if header.src_cid != cid || header.dst_cid != HOST_CID {
            return Err(PacketError::Address {
                from: header.src_cid,
                to: header.dst_cid,
            });
        }
        let id = self
            .by_ports
            .get(&(header.dst_port, header.src_port))
            .copied();
        let connection = id.and_then(|id| self.connections.get_mut(id));
        let (Some(id), Some(connection)) = (id, connection) else {
            // Nobody can be connected to, and nothing else is expected. A reset is not answered.
            if header.op != Op::Reset {
                self.replies.push_back(header.reset_for());
            }
            return Ok(());
        };
        let result = if header.kind == TYPE_STREAM {
            connection.on_packet(mem, &header, chain)
        } else {
            Err(Ended::Guest("a packet that is not of a stream"))
        };
        match result {
            Ok(()) => {
                enqueue(self.connections, self.ready, id);
                Ok(())
            }
            Err(ended) => {
                if header.op == Op::Reset {
                    self.remove(id);
                } else {
                    self.end(id);
                }
                match ended {
                    Ended::Guest(_) => Err(ended.into()),
                    _ => Ok(()),
                }
            }
        }
    }

    fn end(&mut self, id: usize) {
        if let Some(connection) = self.connections.get_mut(id)
            && connection.ports().is_some()
        {
            self.replies.push_back(connection.reset());
        }
        self.remove(id);
    }

    fn remove(&mut self, id: usize) {
        if let Some(connection) = self.connections.remove(id) {
            *self.count -= 1;
            if let Some(ports) = connection.ports() {
                self.by_ports.remove(&ports);
            }
        }
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType::Vsock
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.cid.to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // All of it is read-only.
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation {
            memory,
            queues,
            interrupt,
            watches,
            ..
        } = activation;
        let [rx, tx, events] = <[ActiveQueue; 3]>::try_from(queues)
            .map_err(|_| DeviceError::Driver("not all three queues are enabled"))?;
        let listening = match &self.listener {
            Some(listener) => {
                let io = |source| DeviceError::Io {
                    action: "watching the vsock listener",
                    source,
                };
                listener.set_nonblocking(true).map_err(io)?;
                let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
                Some(
                    watches
                        .watch(listener.as_raw_fd(), LISTENER, edges)
                        .map_err(io)?,
                )
            }
            None => None,
        };
        let hold = if std::mem::take(&mut self.reset_owed) {
            Hold::Owed
        } else {
            Hold::None
        };
        self.active = Some(Active {
            memory,
            rx,
            tx,
            events,
            interrupt,
            watches,
            _listening: listening,
            connections: Slab::new(),
            count: 0,
            by_ports: BTreeMap::new(),
            ready: VecDeque::new(),
            replies: VecDeque::new(),
            tx_waits: false,
            hold,
        });
        if hold == Hold::Owed {
            let result = self.work_on_hold();
            self.check(result);
        }
        Ok(())
    }

    fn queue_event(&mut self, queue: u16) {
        let result = match queue {
            RX => self.receive(),
            TX => self.transmit(),
            _ => self.work_on_hold(),
        };
        self.check(result);
    }

    fn event(&mut self, token: u32, ready: EventSet) {
        match token.checked_sub(1) {
            None => self.accept(),
            Some(id) => {
                self.client_ready(id as usize, ready);
                if self.accept_again {
                    self.accept();
                }
            }
        }
        let result = self.receive();
        self.check(result);
    }

    fn reset(&mut self) {
        self.active = None;
        // The driver starts anew: it has no connections to be told of.
        self.reset_owed = false;
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        // Every packet is handled when it comes; what waits, waits on the host's side.
        Ok(())
    }

    fn unpause(&mut self) {
        self.accept();
        let ids: Vec<usize> = match &mut self.active {
            Some(active) => active.connections.numbers().collect(),
            None => return,
        };
        for id in ids {
            self.client_ready(id, EventSet::IN | EventSet::OUT);
        }
        let result = self.receive();
        self.check(result);
    }

    fn queues(&self) -> Vec<SavedQueue> {
        self.active
            .iter()
            .flat_map(|active| [&active.rx, &active.tx, &active.events])
            .map(ActiveQueue::save)
            .collect()
    }

    fn save(&self) -> Result<DeviceState, DeviceError> {
        // A client that has not named its port yet is unknown to the guest.
        let known = self
            .active
            .as_ref()
            .map_or(0, |active| active.by_ports.len());
        let state = VsockState {
            cid: self.cid,
            next_port: self.next_port,
            connections: u32::try_from(known).unwrap_or(u32::MAX),
            reset_owed: self.reset_owed
                || self
                    .active
                    .as_ref()
                    .is_some_and(|active| active.hold != Hold::None),
        };
        Ok(DeviceState::encode(KIND, VERSION, &state)?)
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        let state: VsockState = state.decode(KIND, VERSION)?;
        self.cid = state.cid;
        self.next_port = state.next_port.max(FIRST_PORT);
        self.reset_owed = state.reset_owed || state.connections > 0;
        Ok(())
    }
}
