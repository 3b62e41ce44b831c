//! The device: one queue of small requests, and a configuration that says what is wanted.

use std::fmt::{self, Debug};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::blocks::{Blocks, Run};
use crate::devices::chain::{Chain, ChainError};
use crate::devices::read_config;
use crate::devices::ring::{self, Complaints, Handled, RingError};
use crate::memory::{GuestRam, HotplugRegion};
use crate::virtio::{
    Activation, ActiveQueue, DeviceError, DeviceState, DeviceType, Interrupt, SavedQueue,
    StateError, VirtioDevice,
};

const KIND: &str = "mem";
const VERSION: u16 = 1;
const QUEUE_SIZES: [u16; 1] = [64];
const CONFIG_LEN: usize = 56;
const REQUEST_LEN: usize = 24;
const RESPONSE_LEN: usize = 10;
/// The guest must not touch unplugged memory (`VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`).
const F_UNPLUGGED_INACCESSIBLE: u64 = 1;
/// Linux adds memory in blocks of this size and uses none that is only partly usable.
const GUEST_BLOCK: u64 = 128 << 20;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plug,
    Unplug,
    UnplugAll,
    State,
}

/// How a request is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Ack,
    /// Fine as such, but more than is wanted.
    Nack,
    /// Possibly later.
    Busy,
    /// Never.
    Error,
    /// For a state request: all, none, or some of the blocks are plugged.
    Plugged,
    Unplugged,
    Mixed,
}

impl Answer {
    fn bytes(self) -> [u8; RESPONSE_LEN] {
        let (kind, state) = match self {
            Answer::Ack | Answer::Plugged => (0, 0),
            Answer::Nack => (1, 0),
            Answer::Busy => (2, 0),
            Answer::Error => (3, 0),
            Answer::Unplugged => (0, 1),
            Answer::Mixed => (0, 2),
        };
        let mut raw = [0; RESPONSE_LEN];
        raw[0] = kind;
        raw[8] = state;
        raw
    }
}

/// Sizes in bytes, all multiples of the block size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemStatus {
    /// The most that can ever be plugged.
    pub region: u64,
    /// What the VMM wants.
    pub requested: u64,
    /// What the guest has.
    pub plugged: u64,
}

/// Told of every change of [`MemStatus::plugged`], on the device thread with the device locked: it must
/// not wait and not call the device.
type Observer = Arc<dyn Fn(MemStatus) + Send + Sync>;

/// A virtio-mem device.
pub struct Mem {
    region: Arc<dyn HotplugRegion>,
    blocks: Blocks,
    requested: u64,
    usable: u64,
    observer: Option<Observer>,
    active: Option<Active>,
    complaints: Complaints,
    /// The driver has not heard of the present configuration.
    unannounced: bool,
}

#[derive(Debug)]
struct Active {
    memory: GuestRam,
    queue: ActiveQueue,
    interrupt: Interrupt,
}

#[derive(Debug, Serialize, Deserialize)]
struct MemState {
    base: u64,
    region: u64,
    block_size: u64,
    usable: u64,
    requested: u64,
    blocks: Blocks,
}

impl Mem {
    /// A device over the machine's hot-plug region, with nothing plugged and nothing wanted.
    pub fn new(region: Arc<dyn HotplugRegion>) -> Self {
        let count = region.len() / region.block_size().max(1);
        Mem {
            region,
            blocks: Blocks::new(count),
            requested: 0,
            usable: 0,
            observer: None,
            active: None,
            complaints: Complaints::new(KIND),
            unannounced: false,
        }
    }

    /// Has `observer` told of every change of the plugged size, on the device thread with this device
    /// locked: it must neither wait nor call the device.
    pub fn observe(&mut self, observer: impl Fn(MemStatus) + Send + Sync + 'static) {
        self.observer = Some(Arc::new(observer));
    }

    /// Sizes as they are now.
    pub fn status(&self) -> MemStatus {
        MemStatus {
            region: self.region.len(),
            requested: self.requested,
            plugged: self.blocks.count() * self.region.block_size(),
        }
    }

    /// Bytes of the region that the driver may use now. Guest memory restored with this device must be
    /// visible to at least here.
    pub fn usable(&self) -> u64 {
        self.usable
    }

    /// Asks the guest to have `bytes` plugged. Growing may wait for the kernel, not for the guest.
    pub fn request(&mut self, bytes: u64) -> Result<(), DeviceError> {
        let block = self.region.block_size();
        if bytes > self.region.len() {
            return Err(DeviceError::Usage(format!(
                "{bytes} bytes of hot-plugged memory are more than the {} this machine was made \
                 for; bake it with more",
                self.region.len()
            )));
        }
        if !bytes.is_multiple_of(block) {
            return Err(DeviceError::Usage(format!(
                "{bytes} bytes of hot-plugged memory are not a multiple of {block}; round them"
            )));
        }
        let wanted = self.usable_for(bytes).max(self.in_use());
        if wanted != self.usable {
            self.region
                .set_usable(wanted)
                .map_err(|source| DeviceError::Io {
                    action: "resizing the hot-plug region",
                    source,
                })?;
            self.usable = wanted;
        }
        if bytes != self.requested {
            self.requested = bytes;
            self.unannounced = true;
        }
        self.announce();
        Ok(())
    }

    /// Asks the guest once more, if it has not followed: a driver that met something busy tries again at once.
    pub fn remind(&mut self) {
        self.unannounced |= self.status().plugged != self.requested;
        self.announce();
    }

    /// Usable part of the region for so much memory: whole blocks as Linux counts them, and one to
    /// spare, since a block may hold something that can't be moved.
    fn usable_for(&self, bytes: u64) -> u64 {
        let block = self.region.block_size();
        let whole = |bytes: u64| bytes.div_ceil(GUEST_BLOCK).saturating_mul(GUEST_BLOCK);
        let all = self.region.len() - self.region.len() % block;
        if bytes == 0 {
            0
        } else {
            whole(bytes).saturating_add(GUEST_BLOCK).min(all)
        }
    }

    /// The part of the region up to the last plugged block, in whole blocks as Linux counts them.
    fn in_use(&self) -> u64 {
        let end = self.blocks.end() * self.region.block_size();
        (end.div_ceil(GUEST_BLOCK) * GUEST_BLOCK).min(self.region.len())
    }

    fn announce(&mut self) {
        if self.unannounced
            && let Some(active) = &self.active
        {
            active.interrupt.signal_config();
            self.unannounced = false;
        }
    }

    fn serve(&mut self) -> Result<(), RingError> {
        let Some(mut active) = self.active.take() else {
            return Ok(());
        };
        let mem = active.memory.memory();
        let since = active.queue.queue.next_used();
        let before = self.blocks.count();
        let mut complaints = std::mem::replace(&mut self.complaints, Complaints::new(KIND));
        let result = ring::turn(
            &mut active.queue,
            &mem,
            &mut complaints,
            |chain, complaints| {
                let len = self.answer(&mem, &chain, complaints).unwrap_or_else(|e| {
                    complaints.add(e);
                    0
                });
                Ok(Handled::Used(len))
            },
        )
        .and_then(|_| ring::notify(&mut active.queue, &mem, &active.interrupt, since));
        drop(mem);
        self.complaints = complaints;
        self.active = Some(active);
        if self.blocks.count() != before
            && let Some(observer) = &self.observer
        {
            observer(self.status());
        }
        result
    }

    fn answer(
        &mut self,
        mem: &ring::Mem,
        chain: &Chain,
        complaints: &mut Complaints,
    ) -> Result<u32, ChainError> {
        let mut raw = [0; REQUEST_LEN];
        chain.readable.read(mem, 0, &mut raw)?;
        // Before anything is changed: there must be room to say so.
        chain.writable.range(0, RESPONSE_LEN as u64)?;
        let answer = self.request_from_guest(&raw);
        if answer == Answer::Error {
            complaints.add(format_args!("request refused: {raw:02x?}"));
        }
        chain.writable.write(mem, 0, &answer.bytes())?;
        Ok(RESPONSE_LEN as u32)
    }

    fn request_from_guest(&mut self, raw: &[u8; REQUEST_LEN]) -> Answer {
        let number = |at: usize, len: usize| {
            raw.iter()
                .skip(at)
                .take(len)
                .rev()
                .fold(0, |all, b| all << 8 | u64::from(*b))
        };
        let kind = match number(0, 2) {
            0 => Kind::Plug,
            1 => Kind::Unplug,
            2 => Kind::UnplugAll,
            3 => Kind::State,
            _ => return Answer::Error,
        };
        if kind == Kind::UnplugAll {
            return self.unplug_all();
        }
        let Some(run) = self.run(number(8, 8), number(16, 2)) else {
            return Answer::Error;
        };
        let plugged = self.blocks.count_in(&run);
        let all = run.end - run.start;
        match kind {
            Kind::Plug if plugged > 0 => Answer::Error,
            Kind::Plug => self.plug(&run),
            Kind::Unplug if plugged < all => Answer::Error,
            Kind::Unplug => self.unplug(&run),
            _ if plugged == all => Answer::Plugged,
            _ if plugged == 0 => Answer::Unplugged,
            _ => Answer::Mixed,
        }
    }

    /// The blocks a request names, if they lie in the usable region.
    fn run(&self, addr: u64, count: u64) -> Option<Run> {
        let block = self.region.block_size();
        let offset = addr.checked_sub(self.region.base())?;
        let len = count.checked_mul(block)?;
        let inside = offset
            .checked_add(len)
            .is_some_and(|end| end <= self.usable);
        let first = offset / block;
        (inside && count > 0 && offset.is_multiple_of(block)).then(|| first..first + count)
    }

    fn plug(&mut self, run: &Run) -> Answer {
        let block = self.region.block_size();
        if (self.blocks.count() + (run.end - run.start)) * block > self.requested {
            return Answer::Nack;
        }
        self.blocks.set(run, true);
        Answer::Ack
    }

    fn unplug(&mut self, run: &Run) -> Answer {
        let block = self.region.block_size();
        match self
            .region
            .discard(run.start * block, (run.end - run.start) * block)
        {
            Ok(()) => {
                self.blocks.set(run, false);
                Answer::Ack
            }
            Err(e) => {
                tracing::error!("unplugged memory can't be given back: {e}");
                Answer::Busy
            }
        }
    }

    fn unplug_all(&mut self) -> Answer {
        let end = self.blocks.end();
        if end == 0 {
            Answer::Ack
        } else {
            self.unplug(&(0..end))
        }
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> DeviceType {
        DeviceType::Mem
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << F_UNPLUGGED_INACCESSIBLE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; CONFIG_LEN];
        let fields = [
            (0, self.region.block_size()),
            (16, self.region.base()),
            (24, self.region.len()),
            (32, self.usable),
            (40, self.blocks.count() * self.region.block_size()),
            (48, self.requested),
        ];
        for (at, value) in fields {
            for (to, from) in space.iter_mut().skip(at).zip(value.to_le_bytes()) {
                *to = from;
            }
        }
        read_config(&space, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // All of it is read-only.
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation {
            memory,
            queues,
            interrupt,
            ..
        } = activation;
        let queue = queues
            .into_iter()
            .next()
            .ok_or(DeviceError::Driver("the queue is not enabled"))?;
        self.active = Some(Active {
            memory,
            queue,
            interrupt,
        });
        self.announce();
        Ok(())
    }

    fn queue_event(&mut self, _queue: u16) {
        let served = self.serve();
        if let (Err(e), Some(active)) = (served, &self.active) {
            active.interrupt.fail_device(e);
        }
    }

    fn event(&mut self, _token: u32, _ready: EventSet) {
        // Nothing is watched.
    }

    fn reset(&mut self) {
        // The blocks stay: they hold the guest's memory. A new driver starts by unplugging all.
        self.active = None;
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        // Requests are done as they come; none is ever in flight.
        Ok(())
    }

    fn unpause(&mut self) {}

    fn queues(&self) -> Vec<SavedQueue> {
        self.active
            .iter()
            .map(|active| active.queue.save())
            .collect()
    }

    fn save(&self) -> Result<DeviceState, DeviceError> {
        let state = MemState {
            base: self.region.base(),
            region: self.region.len(),
            block_size: self.region.block_size(),
            usable: self.usable,
            requested: self.requested,
            blocks: self.blocks.clone(),
        };
        Ok(DeviceState::encode(KIND, VERSION, &state)?)
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        let state: MemState = state.decode(KIND, VERSION)?;
        let wrong = |what: &str| StateError::Damaged {
            kind: KIND,
            what: what.to_owned(),
        };
        let block = self.region.block_size();
        let region = (state.base, state.region, state.block_size);
        if region != (self.region.base(), self.region.len(), block) {
            return Err(wrong("the region is another than this machine's").into());
        }
        if !state.blocks.is_sound(state.region / block.max(1)) {
            return Err(wrong("the list of blocks does not fit the region").into());
        }
        let aligned = state.usable.is_multiple_of(block) && state.requested.is_multiple_of(block);
        if !aligned
            || state.usable > state.region
            || state.requested > state.region
            || state.blocks.end() * block > state.usable
        {
            return Err(wrong("the sizes contradict each other").into());
        }
        self.blocks = state.blocks;
        self.usable = state.usable;
        self.requested = state.requested;
        // What was announced before the snapshot was announced to this driver.
        self.unannounced = false;
        Ok(())
    }
}

impl Debug for Mem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mem")
            .field("status", &self.status())
            .field("usable", &self.usable)
            .field("active", &self.active.is_some())
            .finish_non_exhaustive()
    }
}
