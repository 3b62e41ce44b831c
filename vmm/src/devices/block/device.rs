//! The device itself: queues in, backend requests out, completions back.

use std::collections::VecDeque;
use std::fs::File;
use std::io;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::backend::{
    BlockBackend, BlockOp, BlockRequest, Completion, Content, IoBuffers, RequestTag, SECTOR_SIZE,
    Submitted,
};
use super::request::{self, Command, Geometry, Range, RequestError, Status};
use crate::devices::chain::{Chain, Segments};
use crate::devices::read_config;
use crate::devices::ring::{self, Complaints, Handled, Mem, RingError, TurnEnd};
use crate::devices::slab::Slab;
use crate::event::{WatchGuard, Watches};
use crate::memory::GuestRam;
use crate::virtio::{
    Activation, ActiveQueue, DeviceError, DeviceState, DeviceType, Interrupt, SavedQueue,
    StateError, VirtioDevice,
};

const KIND: &str = "block";
const VERSION: u16 = 1;
const CONFIG_LEN: usize = 60;
/// Token of the backend's completion descriptor.
const COMPLETIONS: u32 = 0;
const ID_LEN: usize = VIRTIO_BLK_ID_BYTES as usize;

/// What a disk is to the guest, constant for the device's life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockConfig {
    /// Name that the guest reads as the disk's serial; cut to 20 bytes.
    pub id: String,
    /// Number of queues, at least 1.
    pub queues: u16,
    /// Entries of each queue; a power of two.
    pub queue_size: u16,
    /// Tells the driver at probe time that the disk is read-only. A slot leaves it `false` and refuses
    /// writes while a read-only backend is in it.
    pub read_only: bool,
}

/// A virtio-blk device.
#[derive(Debug)]
pub struct Block {
    id: [u8; ID_LEN],
    queue_sizes: Vec<u16>,
    read_only: bool,
    backend: Option<Box<dyn BlockBackend>>,
    complaints: Complaints,
    active: Option<Active>,
    done: Vec<Completion>,
    /// The capacity the driver last heard of, if that was before a restore.
    restored_capacity: Option<u64>,
}

#[derive(Debug)]
struct Active {
    memory: GuestRam,
    queues: Vec<ActiveQueue>,
    interrupt: Interrupt,
    watches: Watches,
    completions: Option<WatchGuard>,
    requests: Slab<Request>,
    /// What the backend had no room for. While there is some, no chain is taken off any queue.
    waiting: VecDeque<BlockRequest>,
    /// Whether chains were left on a queue for want of room.
    left_over: bool,
    /// Used position of each queue when its driver was last considered for an interrupt.
    notified: Vec<u16>,
}

/// A guest's request that the backend has, wholly or in part.
#[derive(Debug)]
struct Request {
    /// Position of its queue in `Active::queues`.
    queue: usize,
    head: u16,
    status: Segments,
    /// Bytes written to the guest if all goes well, the status byte included.
    written: u32,
    /// Ranges still to be done, last first.
    rest: Vec<Range>,
}

#[derive(Debug, Serialize, Deserialize)]
struct BlockState {
    id: [u8; ID_LEN],
    queue_sizes: Vec<u16>,
    read_only: bool,
    capacity: u64,
}

impl Block {
    /// A device with no backend: a slot, or a disk about to get its backend.
    pub fn new(config: &BlockConfig) -> Self {
        let mut id = [0; ID_LEN];
        for (to, from) in id.iter_mut().zip(config.id.bytes()) {
            *to = from;
        }
        Block {
            id,
            queue_sizes: vec![config.queue_size; usize::from(config.queues.max(1))],
            read_only: config.read_only,
            backend: None,
            complaints: Complaints::new(KIND),
            active: None,
            done: Vec::new(),
            restored_capacity: None,
        }
    }

    /// Whether there is a disk in the slot.
    pub fn is_attached(&self) -> bool {
        self.backend.is_some()
    }

    /// Capacity in bytes as the guest sees it.
    pub fn capacity(&self) -> u64 {
        self.geometry().capacity
    }

    /// Puts a disk into the empty slot and tells the guest, if one is running. On resume it comes
    /// before the device is activated and needs no interrupt, if the capacity is as it was saved.
    pub fn attach(&mut self, backend: Box<dyn BlockBackend>) -> Result<(), DeviceError> {
        if self.backend.is_some() {
            return Err(DeviceError::Busy(
                "there is a disk in this slot already; detach it first".to_owned(),
            ));
        }
        if self.read_only && !backend.read_only() {
            return Err(DeviceError::Usage(
                "this disk is announced as read-only; attach it read-only".to_owned(),
            ));
        }
        self.backend = Some(backend);
        self.signal_config();
        Ok(())
    }

    /// Takes the disk out of the slot, after finishing what is in flight, and tells the guest. What the
    /// guest asks of the slot from now on fails; it should have closed the disk before.
    pub fn detach(&mut self) -> Result<Box<dyn BlockBackend>, DeviceError> {
        if self.backend.is_none() {
            return Err(DeviceError::Usage(
                "there is no disk in this slot".to_owned(),
            ));
        }
        let drained = self.drain();
        if let Some(active) = &mut self.active {
            active.completions = None;
        }
        let Some(backend) = self.backend.take() else {
            return Err(DeviceError::Usage(
                "there is no disk in this slot".to_owned(),
            ));
        };
        self.signal_config();
        self.check(drained);
        Ok(backend)
    }

    /// Saves a disk's content that is nowhere but in this process; see [`BlockBackend::save`].
    pub fn save_content(&self, into: &File) -> io::Result<Content> {
        self.backend
            .as_ref()
            .map_or(Ok(Content::Elsewhere), |backend| backend.save(into))
    }

    fn signal_config(&self) {
        if let Some(active) = &self.active {
            active.interrupt.signal_config();
        }
    }

    fn geometry(&self) -> Geometry {
        geometry(self.backend.as_deref())
    }

    /// Stops the device if its queues or its engine are beyond use.
    fn check(&mut self, result: Result<(), Failure>) {
        if let (Err(failure), Some(active)) = (result, &self.active) {
            active.interrupt.fail_device(failure);
        }
    }

    /// Takes requests off one queue and answers what is finished.
    fn serve(&mut self, position: usize) -> Result<(), Failure> {
        let disk = self.geometry();
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let Active {
            memory,
            queues,
            requests,
            waiting,
            ..
        } = active;
        let Some(queue) = queues.get_mut(position) else {
            return Ok(());
        };
        let mem = memory.memory().into_inner();
        let (backend, done, id) = (&mut self.backend, &mut self.done, &self.id);
        let end = ring::turn(queue, &mem, &mut self.complaints, |chain, complaints| {
            if !waiting.is_empty() {
                return Ok(Handled::NoRoom);
            }
            match start(&mem, &chain, disk, id) {
                Start::Answered(len) => Ok(Handled::Used(len)),
                Start::Bad(error, len) => {
                    complaints.add(error);
                    Ok(Handled::Used(len))
                }
                Start::Ask {
                    first,
                    data,
                    request,
                } => {
                    let tag = requests.insert(Request {
                        queue: position,
                        ..request
                    });
                    let ask = first.ask(tag, IoBuffers::new(mem.clone(), data));
                    submit(backend.as_deref_mut(), ask, done, waiting);
                    Ok(Handled::Kept)
                }
            }
        })?;
        active.left_over |= end == TurnEnd::NoRoom;
        self.collect()
    }

    /// Passes gathered requests on and answers what has finished.
    fn collect(&mut self) -> Result<(), Failure> {
        loop {
            if let Some(backend) = &mut self.backend {
                backend.kick().map_err(Failure::Engine)?;
                backend
                    .completions(&mut self.done)
                    .map_err(Failure::Engine)?;
            }
            // With nothing done, too: what was answered without the backend has told nobody yet.
            let nothing = self.done.is_empty();
            self.answer()?;
            if nothing && self.done.is_empty() {
                break;
            }
        }
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        if active.left_over && active.waiting.is_empty() {
            active.left_over = false;
            active.queues.iter().for_each(ActiveQueue::rekick);
        }
        if active.completions.is_none()
            && let Some(fd) = self
                .backend
                .as_ref()
                .and_then(|backend| backend.completion_fd())
        {
            let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
            let guard = active
                .watches
                .watch(fd, COMPLETIONS, edges)
                .map_err(Failure::Engine)?;
            active.completions = Some(guard);
            // What finished before the watch began gave no edge.
            return self.collect();
        }
        Ok(())
    }

    /// Turns completions into used chains, or into the next range of the same request.
    fn answer(&mut self) -> Result<(), Failure> {
        let mut done = std::mem::take(&mut self.done);
        let result = done
            .drain(..)
            .try_for_each(|completion| self.answer_one(&completion));
        // Answering may have finished more; those come after, in the list kept for its allocation.
        done.append(&mut self.done);
        self.done = done;
        result?;
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let mem = active.memory.memory();
        for (queue, notified) in active.queues.iter_mut().zip(&mut active.notified) {
            ring::notify(queue, &mem, &active.interrupt, *notified)?;
            *notified = queue.queue.next_used();
        }
        while let Some(request) = active.waiting.pop_front() {
            let before = active.waiting.len();
            let backend = self.backend.as_deref_mut();
            submit(backend, request, &mut self.done, &mut active.waiting);
            if active.waiting.len() > before {
                // Put back at the end; order among requests in flight means nothing.
                break;
            }
        }
        Ok(())
    }

    fn answer_one(&mut self, completion: &Completion) -> Result<(), Failure> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        // A tag comes from `requests` and is answered once.
        let Ok(tag) = usize::try_from(completion.tag.0) else {
            return Ok(());
        };
        let mem = active.memory.memory().into_inner();
        let status = match &completion.result {
            Ok(()) => {
                let next = active
                    .requests
                    .get_mut(tag)
                    .and_then(|request| request.rest.pop());
                if let Some(next) = next {
                    let ask = next.ask(tag, IoBuffers::new(mem, Segments::default()));
                    let backend = self.backend.as_deref_mut();
                    submit(backend, ask, &mut self.done, &mut active.waiting);
                    return Ok(());
                }
                Status::Ok
            }
            Err(e) if e.kind() == io::ErrorKind::Unsupported => Status::Unsupported,
            Err(e) => {
                self.complaints.add(format_args!("disk I/O failed: {e}"));
                Status::IoError
            }
        };
        let Some(request) = active.requests.remove(tag) else {
            return Ok(());
        };
        let Some(queue) = active.queues.get_mut(request.queue) else {
            return Ok(());
        };
        let written = if status == Status::Ok {
            request.written
        } else {
            1
        };
        if let Err(e) = request::write_status(&mem, &request.status, status) {
            self.complaints.add(e);
        }
        ring::add_used(queue, &mem, request.head, written)?;
        Ok(())
    }

    /// Finishes everything in flight and answers it.
    fn drain(&mut self) -> Result<(), Failure> {
        while self
            .active
            .as_ref()
            .is_some_and(|active| !active.requests.is_empty())
        {
            if let Some(backend) = &mut self.backend {
                backend.kick().map_err(Failure::Engine)?;
                backend.drain(&mut self.done).map_err(Failure::Engine)?;
            }
            if self.done.is_empty() {
                return Err(Failure::Lost);
            }
            self.answer()?;
        }
        Ok(())
    }

    /// Finishes everything in flight and everything on the queues; the driver stands still.
    fn finish_all(&mut self) -> Result<(), Failure> {
        loop {
            self.drain()?;
            let Some(active) = &mut self.active else {
                return Ok(());
            };
            active.left_over = false;
            for position in 0..active.queues.len() {
                self.serve(position)?;
            }
            self.answer()?;
            self.drain()?;
            if !self.active.as_ref().is_some_and(|active| active.left_over) {
                return Ok(());
            }
        }
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
        ];
        if self.queue_sizes.len() > 1 {
            bits.push(VIRTIO_BLK_F_MQ);
        }
        if self.read_only {
            bits.push(VIRTIO_BLK_F_RO);
        } else {
            bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        bits.iter().fold(0, |all, bit| all | 1 << bit)
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config_space(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // Only the cache mode could be written, and that is not on offer.
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation {
            memory,
            queues,
            interrupt,
            watches,
            ..
        } = activation;
        let notified = queues.iter().map(|queue| queue.queue.next_used()).collect();
        self.active = Some(Active {
            memory,
            queues,
            interrupt,
            watches,
            completions: None,
            requests: Slab::new(),
            waiting: VecDeque::new(),
            left_over: false,
            notified,
        });
        if self
            .restored_capacity
            .take()
            .is_some_and(|known| known != self.capacity())
        {
            self.signal_config();
        }
        Ok(())
    }

    fn queue_event(&mut self, queue: u16) {
        let position = self.active.as_ref().and_then(|active| {
            active
                .queues
                .iter()
                .position(|active| active.index == queue)
        });
        if let Some(position) = position {
            let served = self.serve(position);
            self.check(served);
        }
    }

    fn event(&mut self, _token: u32, _ready: EventSet) {
        let collected = self.collect();
        self.check(collected);
    }

    fn reset(&mut self) {
        if let Some(backend) = &mut self.backend
            && let Err(e) = backend.drain(&mut self.done)
        {
            // The backend keeps the buffers; it must not be asked again.
            tracing::error!("disk I/O can't be finished, giving the disk up: {e}");
            self.backend = None;
        }
        self.done.clear();
        self.active = None;
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        self.finish_all().map_err(|e| DeviceError::Io {
            action: "finishing disk I/O",
            source: io::Error::other(e),
        })
    }

    fn unpause(&mut self) {
        // Nothing was in flight, so nothing can have become ready.
    }

    fn queues(&self) -> Vec<SavedQueue> {
        self.active
            .as_ref()
            .map(|active| active.queues.iter().map(ActiveQueue::save).collect())
            .unwrap_or_default()
    }

    fn save(&self) -> Result<DeviceState, DeviceError> {
        let state = BlockState {
            id: self.id,
            queue_sizes: self.queue_sizes.clone(),
            read_only: self.read_only,
            capacity: self.capacity(),
        };
        Ok(DeviceState::encode(KIND, VERSION, &state)?)
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        let state: BlockState = state.decode(KIND, VERSION)?;
        let mismatch = |what: &str| StateError::Damaged {
            kind: KIND,
            what: what.to_owned(),
        };
        if state.queue_sizes != self.queue_sizes {
            return Err(mismatch("the queues are others than this device's").into());
        }
        if state.read_only != self.read_only {
            return Err(mismatch("read-only differs from this device's").into());
        }
        self.id = state.id;
        self.restored_capacity = Some(state.capacity);
        Ok(())
    }
}

impl Block {
    /// Configuration space (virtio 1.2 §5.2.4).
    fn config_space(&self) -> [u8; CONFIG_LEN] {
        let queue_size = self.queue_sizes.first().copied().unwrap_or(1);
        // One descriptor each for header and status.
        let seg_max = u32::from(queue_size.saturating_sub(2).max(1));
        // At least 1 and as configured in a `u16`.
        let queues = u16::try_from(self.queue_sizes.len()).unwrap_or(u16::MAX);
        let mut space = [0; CONFIG_LEN];
        let mut put = |at: usize, bytes: &[u8]| {
            for (to, from) in space.iter_mut().skip(at).zip(bytes) {
                *to = *from;
            }
        };
        put(0, &(self.capacity() / SECTOR_SIZE).to_le_bytes());
        put(12, &seg_max.to_le_bytes());
        // Sectors of 512 bytes, in physical blocks of 2^3 sectors: a page.
        put(20, &512u32.to_le_bytes());
        put(24, &[3]);
        put(34, &queues.to_le_bytes());
        put(36, &request::MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &request::MAX_DISCARD_SEGMENTS.to_le_bytes());
        put(44, &8u32.to_le_bytes());
        put(48, &request::MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[1]);
        space
    }
}

/// Why the device can't go on.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error("the disk's I/O engine failed: {0}")]
    Engine(#[source] io::Error),
    #[error("the disk's backend lost a request")]
    Lost,
}

fn geometry(backend: Option<&dyn BlockBackend>) -> Geometry {
    backend.map_or(
        Geometry {
            capacity: 0,
            read_only: false,
        },
        |backend| Geometry {
            capacity: backend.capacity(),
            read_only: backend.read_only(),
        },
    )
}

impl Range {
    fn ask(self, tag: usize, buffers: IoBuffers) -> BlockRequest {
        let tag = RequestTag(tag as u64);
        BlockRequest {
            tag,
            op: self.op,
            offset: self.offset,
            len: self.len,
            buffers,
        }
    }
}

/// What a chain turned out to be.
enum Start {
    /// Answered already, with so many bytes written.
    Answered(u32),
    /// Wrong, and answered as such.
    Bad(RequestError, u32),
    /// For the backend.
    Ask {
        first: Range,
        data: Segments,
        request: Request,
    },
}

/// Reads a chain and answers it if the backend is not needed.
fn start(mem: &Mem, chain: &Chain, disk: Geometry, id: &[u8; ID_LEN]) -> Start {
    let status = match request::status_segment(chain) {
        Ok(status) => status,
        Err(error) => return Start::Bad(error, 0),
    };
    let answer = |written: u32, result: Status| match request::write_status(mem, &status, result) {
        Ok(()) => Start::Answered(written.saturating_add(1)),
        Err(error) => Start::Bad(error.into(), 0),
    };
    let ask = |first, data: Segments, written: u64, rest| Start::Ask {
        first,
        data,
        request: Request {
            queue: 0,
            head: chain.head,
            status: status.clone(),
            written: u32::try_from(written.saturating_add(1)).unwrap_or(u32::MAX),
            rest,
        },
    };
    match request::parse(mem, chain, disk) {
        Ok(Command::Transfer { op, offset, data }) => {
            let len = data.len();
            let written = if op == BlockOp::Read { len } else { 0 };
            ask(Range { offset, len, op }, data, written, Vec::new())
        }
        // Nothing was ever written to a disk that can't be written, or that is not there.
        Ok(Command::Flush) if disk.read_only || disk.capacity == 0 => answer(0, Status::Ok),
        Ok(Command::Flush) => {
            let first = Range {
                offset: 0,
                len: 0,
                op: BlockOp::Flush,
            };
            ask(first, Segments::default(), 0, Vec::new())
        }
        Ok(Command::Ranges(mut ranges)) => {
            ranges.reverse();
            match ranges.pop() {
                Some(first) => ask(first, Segments::default(), 0, ranges),
                None => answer(0, Status::Ok),
            }
        }
        Ok(Command::GetId { data }) => {
            let len = data.len().min(ID_LEN as u64) as usize;
            match data.write(mem, 0, id.get(..len).unwrap_or_default()) {
                // At most 20.
                Ok(()) => answer(len as u32, Status::Ok),
                Err(error) => Start::Bad(error.into(), 0),
            }
        }
        Err(error) => match request::write_status(mem, &status, error.status()) {
            Ok(()) => Start::Bad(error, 1),
            Err(_) => Start::Bad(error, 0),
        },
    }
}

/// Hands a request to the backend and sorts its answer.
fn submit(
    backend: Option<&mut (dyn BlockBackend + 'static)>,
    request: BlockRequest,
    done: &mut Vec<Completion>,
    waiting: &mut VecDeque<BlockRequest>,
) {
    let tag = request.tag;
    match backend.map(|backend| backend.submit(request)) {
        Some(Submitted::Done(completion)) => done.push(completion),
        Some(Submitted::Pending) => {}
        Some(Submitted::Busy(request)) => waiting.push_back(request),
        None => done.push(Completion {
            tag,
            result: Err(io::ErrorKind::NotFound.into()),
        }),
    }
}
