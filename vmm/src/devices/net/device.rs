//! The device: queue pairs, a control queue, and the link.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::control::{self, Command, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6};
use super::pair::{Layout, Pair};
use super::tap::{NetBackend, Offloads};
use crate::devices::read_config;
use crate::devices::ring::{self, Complaints, Handled, RingError};
use crate::event::{WatchGuard, Watches};
use crate::memory::GuestRam;
use crate::virtio::{
    Activation, ActiveQueue, DeviceError, DeviceState, DeviceType, Interrupt, SavedQueue,
    StateError, VirtioDevice,
};

const KIND: &str = "net";
const VERSION: u16 = 1;
const CONFIG_LEN: usize = 12;
const CONTROL_QUEUE_SIZE: u16 = 64;
const STATUS_LINK_UP: u16 = 1;

/// What a network card is to the guest, constant for the device's life but for the address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConfig {
    /// Address the driver finds when it probes the card.
    pub mac: [u8; 6],
    /// Pairs of queues, at least 1.
    pub pairs: u16,
    /// Entries of each receive and transmit queue; a power of two. 256 suits Linux.
    pub queue_size: u16,
}

/// A virtio-net device.
#[derive(Debug)]
pub struct Net {
    queue_sizes: Vec<u16>,
    pairs: u16,
    regs: Registers,
    // Before `backends`: a watch ends before its descriptor is closed.
    active: Option<Active>,
    backends: Vec<Box<dyn NetBackend>>,
    complaints: Complaints,
    /// The driver has not heard of the present link state.
    unannounced: bool,
    /// Driver state came from a restore: the next activation goes on with it.
    restored: bool,
}

/// What the driver can change or has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    mac: [u8; 6],
    /// Whether the VMM wants the link up; without a backend it is down all the same.
    link_wanted: bool,
    /// Link state as the driver knows it, or is about to be told.
    link_up: bool,
    /// Pairs in use.
    active_pairs: u16,
    /// Bits of [`GUEST_CSUM`] and so on.
    offloads: u64,
}

#[derive(Debug)]
struct Active {
    memory: GuestRam,
    pairs: Vec<Pair>,
    control: Option<ActiveQueue>,
    control_index: u16,
    layout: Layout,
    interrupt: Interrupt,
    watches: Watches,
    guards: Vec<WatchGuard>,
}

#[derive(Debug, Serialize, Deserialize)]
struct NetState {
    pairs: u16,
    queue_sizes: Vec<u16>,
    regs: Registers,
}

impl Net {
    /// A card without a cable.
    pub fn new(config: &NetConfig) -> Self {
        let pairs = config.pairs.max(1);
        let mut queue_sizes = vec![config.queue_size; usize::from(pairs) * 2];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        Net {
            queue_sizes,
            pairs,
            regs: Registers {
                mac: config.mac,
                link_wanted: true,
                link_up: false,
                active_pairs: 1,
                offloads: 0,
            },
            active: None,
            backends: Vec::new(),
            complaints: Complaints::new(KIND),
            unannounced: false,
            restored: false,
        }
    }

    /// The card's address: the one it was made with, or the one the driver has set.
    pub fn mac(&self) -> [u8; 6] {
        self.regs.mac
    }

    /// Gives the card another address. A driver that has probed the card does not look again: its
    /// guest has to set the address itself.
    pub fn set_mac(&mut self, mac: [u8; 6]) {
        self.regs.mac = mac;
    }

    /// Whether the driver sees the link up.
    pub fn link_up(&self) -> bool {
        self.regs.link_up
    }

    /// Plugs the cable in: one backend for each queue pair, or for fewer. The link comes up unless it
    /// was set down.
    pub fn attach(&mut self, backends: Vec<Box<dyn NetBackend>>) -> Result<(), DeviceError> {
        if !self.backends.is_empty() {
            return Err(DeviceError::Busy(
                "the card has a tap already; detach it first".to_owned(),
            ));
        }
        if backends.is_empty() || backends.len() > usize::from(self.pairs) {
            return Err(DeviceError::Usage(format!(
                "{} tap queues for a card with {} queue pairs; pass between 1 and as many",
                backends.len(),
                self.pairs
            )));
        }
        self.backends = backends;
        if let Err(e) = self.connect() {
            self.disconnect();
            return Err(e);
        }
        self.update_link();
        if self.active.is_some() {
            self.look_again();
        }
        Ok(())
    }

    /// Pulls the cable out. The link goes down; what the guest sends is lost.
    pub fn detach(&mut self) -> Result<Vec<Box<dyn NetBackend>>, DeviceError> {
        if self.backends.is_empty() {
            return Err(DeviceError::Usage("the card has no tap".to_owned()));
        }
        let backends = self.disconnect();
        self.update_link();
        // Packets that waited for the old tap go the way of those that come now.
        self.look_again();
        Ok(backends)
    }

    /// Sets the link up or down, whether or not there is a cable.
    pub fn set_link(&mut self, up: bool) {
        self.regs.link_wanted = up;
        self.update_link();
    }

    fn update_link(&mut self) {
        let up = self.regs.link_wanted && !self.backends.is_empty();
        if up != self.regs.link_up {
            self.regs.link_up = up;
            self.unannounced = true;
        }
        if self.unannounced
            && let Some(active) = &self.active
        {
            active.interrupt.signal_config();
            self.unannounced = false;
        }
    }

    /// Sets the backends up as the driver wants them and watches them.
    fn connect(&mut self) -> Result<(), DeviceError> {
        let failed = |action| move |source| DeviceError::Io { action, source };
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let offloads = Offloads::from_bits(self.regs.offloads);
        for (backend, i) in self.backends.iter().zip(0u32..) {
            backend
                .set_offloads(offloads)
                .map_err(failed("setting the tap's offloads"))?;
            let edges = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
            let guard = active
                .watches
                .watch(backend.fd(), i, edges)
                .map_err(failed("watching the tap"))?;
            active.guards.push(guard);
        }
        self.enable_pairs()
            .map_err(failed("choosing the tap's queues"))
    }

    fn disconnect(&mut self) -> Vec<Box<dyn NetBackend>> {
        if let Some(active) = &mut self.active {
            active.guards.clear();
        }
        std::mem::take(&mut self.backends)
    }

    /// Has incoming packets spread over the pairs the driver uses.
    fn enable_pairs(&self) -> std::io::Result<()> {
        if self.backends.len() < 2 {
            return Ok(());
        }
        for (backend, i) in self.backends.iter().zip(0..) {
            backend.set_enabled(i < self.regs.active_pairs)?;
        }
        Ok(())
    }

    /// Looks at everything that may have become possible.
    fn look_again(&mut self) {
        let Some(active) = &mut self.active else {
            return;
        };
        for pair in &mut active.pairs {
            pair.readable = true;
            pair.writable();
        }
        for i in 0..active.pairs.len() {
            let result = self.receive(i);
            self.check(result);
        }
    }

    fn check(&mut self, result: Result<(), RingError>) {
        if let (Err(e), Some(active)) = (result, &self.active) {
            active.interrupt.fail_device(e);
        }
    }

    fn receive(&mut self, i: usize) -> Result<(), RingError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let (Some(pair), Some(backend)) = (active.pairs.get_mut(i), self.backends.get(i)) else {
            return Ok(());
        };
        let mem = active.memory.memory();
        pair.receive(
            &mem,
            &**backend,
            active.layout,
            &active.interrupt,
            &mut self.complaints,
        )
    }

    fn transmit(&mut self, i: usize) -> Result<(), RingError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let Some(pair) = active.pairs.get_mut(i) else {
            return Ok(());
        };
        // With fewer taps than pairs, the pairs share them. A link that is down takes nothing.
        let backend = if self.regs.link_up {
            self.backends.get(i % self.backends.len().max(1))
        } else {
            None
        };
        let mem = active.memory.memory();
        let backend = backend.map(|backend| &**backend);
        pair.transmit(&mem, backend, &active.interrupt, &mut self.complaints)
    }

    fn control(&mut self) -> Result<(), RingError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let Some(mut queue) = active.control.take() else {
            return Ok(());
        };
        let mem = active.memory.memory();
        let interrupt = active.interrupt.clone();
        let since = queue.queue.next_used();
        let mut complaints = std::mem::replace(&mut self.complaints, Complaints::new(KIND));
        let result = ring::turn(&mut queue, &mem, &mut complaints, |chain, complaints| {
            if chain.writable.is_empty() {
                complaints.add("control command without room for its answer");
                return Ok(Handled::Used(0));
            }
            let done = control::parse(&mem, &chain).is_some_and(|command| self.obey(command));
            if !done {
                complaints.add("control command refused");
            }
            Ok(Handled::Used(control::acknowledge(&mem, &chain, done)))
        })
        .and_then(|_| ring::notify(&mut queue, &mem, &interrupt, since));
        self.complaints = complaints;
        if let Some(active) = &mut self.active {
            active.control = Some(queue);
        }
        result
    }

    /// Does what a command says. Whether it could be done.
    fn obey(&mut self, command: Command) -> bool {
        match command {
            Command::Mac(mac) => {
                self.regs.mac = mac;
                true
            }
            Command::Pairs(pairs) => {
                let usable = self.active.as_ref().map_or(0, |active| active.pairs.len());
                if pairs == 0 || usize::from(pairs) > usable {
                    return false;
                }
                self.regs.active_pairs = pairs;
                self.enable_pairs().is_ok()
            }
            Command::Offloads(offloads) => {
                let set = self
                    .backends
                    .iter()
                    .all(|backend| backend.set_offloads(offloads).is_ok());
                if set {
                    let bits = [
                        (offloads.checksum, GUEST_CSUM),
                        (offloads.tso4, GUEST_TSO4),
                        (offloads.tso6, GUEST_TSO6),
                    ];
                    self.regs.offloads = bits
                        .iter()
                        .filter(|(on, _)| *on)
                        .fold(0, |all, (_, bit)| all | bit);
                }
                set
            }
        }
    }
}

/// Sorts the enabled queues into pairs and the control queue.
fn sort(
    queues: Vec<ActiveQueue>,
    control_index: u16,
) -> Result<(Vec<Pair>, Option<ActiveQueue>), DeviceError> {
    let mut pairs = Vec::new();
    let mut control = None;
    let mut receive = None;
    for queue in queues {
        if queue.index == control_index {
            control = Some(queue);
        } else if queue.index > control_index {
            return Err(DeviceError::Driver(
                "a queue beyond the control queue is enabled",
            ));
        } else if queue.index.is_multiple_of(2) {
            receive = Some(queue);
        } else {
            match receive.take() {
                Some(rx) if rx.index + 1 == queue.index => pairs.push(Pair::new(rx, queue)),
                _ => return Err(DeviceError::Driver("a transmit queue has no receive queue")),
            }
        }
    }
    let complete = receive.is_none() && pairs.iter().zip(0..).all(|(p, i)| p.rx.index == 2 * i);
    if pairs.is_empty() || !complete {
        return Err(DeviceError::Driver(
            "the enabled queues are not the first so many pairs",
        ));
    }
    Ok((pairs, control))
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_CTRL_VQ,
            VIRTIO_NET_F_CTRL_MAC_ADDR,
        ];
        if self.pairs > 1 {
            bits.push(VIRTIO_NET_F_MQ);
        }
        bits.iter().fold(0, |all, bit| all | 1 << bit)
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; CONFIG_LEN];
        let status = if self.regs.link_up { STATUS_LINK_UP } else { 0 };
        let fields = self
            .regs
            .mac
            .into_iter()
            .chain(status.to_le_bytes())
            .chain(self.pairs.to_le_bytes());
        for (to, from) in space.iter_mut().zip(fields) {
            *to = from;
        }
        read_config(&space, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // A modern driver sets the address through the control queue.
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation {
            memory,
            queues,
            features,
            interrupt,
            watches,
        } = activation;
        let has = |bit: u32| features & 1 << bit != 0;
        let control_index = if has(VIRTIO_NET_F_MQ) {
            self.pairs * 2
        } else {
            2
        };
        let (pairs, control) = sort(queues, control_index)?;
        if std::mem::take(&mut self.restored) {
            // Packets that waited for a tap when the state was saved are kicked by nobody.
            pairs.iter().for_each(|pair| pair.tx.rekick());
        } else {
            self.regs.active_pairs = 1;
            self.regs.offloads = features & (GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6);
        }
        self.active = Some(Active {
            memory,
            pairs,
            control,
            control_index,
            layout: Layout {
                mergeable: has(VIRTIO_NET_F_MRG_RXBUF),
                large: has(VIRTIO_NET_F_GUEST_TSO4) || has(VIRTIO_NET_F_GUEST_TSO6),
            },
            interrupt,
            watches,
            guards: Vec::new(),
        });
        if let Err(e) = self.connect() {
            self.active = None;
            return Err(e);
        }
        self.update_link();
        Ok(())
    }

    fn queue_event(&mut self, queue: u16) {
        let control = self.active.as_ref().map(|active| active.control_index);
        let i = usize::from(queue / 2);
        let result = if control == Some(queue) {
            self.control()
        } else if queue.is_multiple_of(2) {
            self.receive(i)
        } else {
            self.transmit(i)
        };
        self.check(result);
    }

    fn event(&mut self, token: u32, ready: EventSet) {
        let Some(active) = &mut self.active else {
            return;
        };
        let i = token as usize;
        if ready.contains(EventSet::OUT) {
            let taps = self.backends.len().max(1);
            active
                .pairs
                .iter_mut()
                .skip(i)
                .step_by(taps)
                .for_each(Pair::writable);
        }
        if ready.intersects(EventSet::IN | EventSet::ERROR | EventSet::HANG_UP) {
            if let Some(pair) = active.pairs.get_mut(i) {
                pair.readable = true;
            }
            let result = self.receive(i);
            self.check(result);
        }
    }

    fn reset(&mut self) {
        self.active = None;
        self.restored = false;
        self.regs.active_pairs = 1;
        self.regs.offloads = 0;
        self.unannounced = false;
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        if let Some(active) = &mut self.active {
            active.pairs.iter_mut().for_each(Pair::put_back);
        }
        Ok(())
    }

    fn unpause(&mut self) {
        self.look_again();
    }

    fn queues(&self) -> Vec<SavedQueue> {
        let Some(active) = &self.active else {
            return Vec::new();
        };
        active
            .pairs
            .iter()
            .flat_map(|pair| [&pair.rx, &pair.tx])
            .chain(&active.control)
            .map(ActiveQueue::save)
            .collect()
    }

    fn save(&self) -> Result<DeviceState, DeviceError> {
        let state = NetState {
            pairs: self.pairs,
            queue_sizes: self.queue_sizes.clone(),
            regs: self.regs,
        };
        Ok(DeviceState::encode(KIND, VERSION, &state)?)
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        let state: NetState = state.decode(KIND, VERSION)?;
        let wrong = |what: &str| StateError::Damaged {
            kind: KIND,
            what: what.to_owned(),
        };
        if state.pairs != self.pairs || state.queue_sizes != self.queue_sizes {
            return Err(wrong("the queues are others than this device's").into());
        }
        if state.regs.active_pairs == 0 || state.regs.active_pairs > self.pairs {
            return Err(wrong("more queue pairs are in use than there are").into());
        }
        // The address is the saved one unless the VMM sets another after this.
        self.regs = state.regs;
        self.restored = true;
        Ok(())
    }
}
