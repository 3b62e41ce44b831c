//! The device: requests go to the server's thread and come back as used chains.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::server::{Done, FsServer, Job};
use crate::devices::chain::Chain;
use crate::devices::read_config;
use crate::devices::ring::{self, Complaints, Handled, Mem, RingError};
use crate::devices::slab::Slab;
use crate::event::{WatchGuard, Watches};
use crate::memory::GuestRam;
use crate::virtio::{
    Activation, ActiveQueue, DeviceError, DeviceState, DeviceType, Interrupt, SavedQueue,
    StateError, VirtioDevice,
};

const KIND: &str = "fs";
const VERSION: u16 = 1;
const TAG_LEN: usize = 36;
const IN_HEADER_LEN: usize = 40;
const OUT_HEADER_LEN: u32 = 16;
const OP_INIT: u32 = 26;
const OP_DESTROY: u32 = 38;
/// Token of the server's completion event.
const COMPLETIONS: u32 = 0;

/// What a file system device is to the guest, constant for its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsConfig {
    /// What the guest mounts it by; cut to 36 bytes.
    pub tag: String,
    /// Entries of each of the two queues; a power of two, at most 512.
    pub queue_size: u16,
}

/// A virtio-fs device.
#[derive(Debug)]
pub struct Fs {
    tag: [u8; TAG_LEN],
    queue_sizes: [u16; 2],
    // Before the server: a watch ends before its descriptor is closed.
    active: Option<Active>,
    server: Option<FsServer>,
    complaints: Complaints,
    /// The guest has mounted it and not unmounted.
    session: bool,
}

#[derive(Debug)]
struct Active {
    completions: Option<WatchGuard>,
    memory: GuestRam,
    queues: Vec<ActiveQueue>,
    interrupt: Interrupt,
    watches: Watches,
    requests: Slab<Request>,
}

/// A request that the server has.
#[derive(Debug)]
struct Request {
    /// Position of its queue.
    queue: usize,
    chain: Chain,
    unique: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct FsState {
    tag: String,
    queue_sizes: [u16; 2],
}

impl Fs {
    /// A device without a server: the guest can't mount it yet.
    pub fn new(config: &FsConfig) -> Self {
        let mut tag = [0; TAG_LEN];
        for (to, from) in tag.iter_mut().zip(config.tag.bytes()) {
            *to = from;
        }
        Fs {
            tag,
            queue_sizes: [config.queue_size; 2],
            active: None,
            server: None,
            complaints: Complaints::new(KIND),
            session: false,
        }
    }

    /// Whether the guest has it mounted.
    pub fn is_mounted(&self) -> bool {
        self.session
    }

    /// Gives the device its server.
    pub fn attach(&mut self, server: FsServer) -> Result<(), DeviceError> {
        if self.server.is_some() {
            return Err(DeviceError::Busy(
                "the device has a file server already".to_owned(),
            ));
        }
        self.server = Some(server);
        self.watch()
    }

    fn watch(&mut self) -> Result<(), DeviceError> {
        let (Some(active), Some(server)) = (&mut self.active, &self.server) else {
            return Ok(());
        };
        let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let guard = active
            .watches
            .watch(server.fd(), COMPLETIONS, edges)
            .map_err(|source| DeviceError::Io {
                action: "watching the file server",
                source,
            })?;
        active.completions = Some(guard);
        Ok(())
    }

    fn check(&mut self, result: Result<(), RingError>) {
        if let (Err(e), Some(active)) = (result, &self.active) {
            active.interrupt.fail_device(e);
        }
    }

    fn serve(&mut self, position: usize) -> Result<(), RingError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let Active {
            memory,
            queues,
            interrupt,
            requests,
            ..
        } = active;
        let Some(queue) = queues.get_mut(position) else {
            return Ok(());
        };
        let mem = memory.memory().into_inner();
        let since = queue.queue.next_used();
        let (server, session) = (&mut self.server, &mut self.session);
        ring::turn(queue, &mem, &mut self.complaints, |chain, complaints| {
            let mut header = [0; IN_HEADER_LEN];
            if let Err(e) = chain.readable.read(&*mem, 0, &mut header) {
                complaints.add(e);
                return Ok(Handled::Used(0));
            }
            let number = |at: usize, len: usize| {
                header
                    .iter()
                    .skip(at)
                    .take(len)
                    .rev()
                    .fold(0, |all, b| all << 8 | u64::from(*b))
            };
            let (opcode, unique) = (number(4, 4), number(8, 8));
            let Some(server) = server.as_mut() else {
                return Ok(Handled::Used(answer_error(
                    &mem,
                    &chain,
                    unique,
                    libc::ENODEV,
                )));
            };
            if opcode == u64::from(OP_INIT) {
                *session = true;
            } else if opcode == u64::from(OP_DESTROY) {
                *session = false;
            }
            let (readable, writable) = (chain.readable.clone(), chain.writable.clone());
            let tag = requests.insert(Request {
                queue: position,
                chain,
                unique,
            });
            if server.submit(Job::Request {
                tag,
                mem: mem.clone(),
                readable,
                writable,
            }) {
                return Ok(Handled::Kept);
            }
            let Some(request) = requests.remove(tag) else {
                return Ok(Handled::Used(0));
            };
            complaints.add("the file server is gone");
            Ok(Handled::Used(answer_error(
                &mem,
                &request.chain,
                unique,
                libc::ENODEV,
            )))
        })?;
        ring::notify(queue, &mem, interrupt, since)
    }

    /// Gives finished requests back to the driver.
    fn answer(&mut self, done: Vec<Done>) -> Result<(), RingError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let mem = active.memory.memory();
        let before: Vec<u16> = active.queues.iter().map(|q| q.queue.next_used()).collect();
        for Done { tag, result } in done {
            let Some(request) = active.requests.remove(tag) else {
                continue;
            };
            let Some(queue) = active.queues.get_mut(request.queue) else {
                continue;
            };
            let len = match result {
                Ok(len) => u32::try_from(len).unwrap_or(u32::MAX),
                Err(e) => {
                    self.complaints.add(e);
                    answer_error(&mem, &request.chain, request.unique, libc::EIO)
                }
            };
            ring::add_used(queue, &mem, request.chain.head, len)?;
        }
        for (queue, since) in active.queues.iter_mut().zip(before) {
            ring::notify(queue, &mem, &active.interrupt, since)?;
        }
        Ok(())
    }

    fn finish_all(&mut self) {
        let done = self
            .server
            .as_mut()
            .map(FsServer::drain)
            .unwrap_or_default();
        let answered = self.answer(done);
        self.check(answered);
    }
}

/// Puts a FUSE error into a chain that has room for one; gives the bytes written.
fn answer_error(mem: &Mem, chain: &Chain, unique: u64, error: i32) -> u32 {
    let mut header = [0; OUT_HEADER_LEN as usize];
    let fields = OUT_HEADER_LEN
        .to_le_bytes()
        .into_iter()
        .chain((-error).to_le_bytes())
        .chain(unique.to_le_bytes());
    for (to, from) in header.iter_mut().zip(fields) {
        *to = from;
    }
    match chain.writable.write(mem, 0, &header) {
        Ok(()) => OUT_HEADER_LEN,
        // Requests that want no answer leave no room for one.
        Err(_) => 0,
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> DeviceType {
        DeviceType::Fs
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; TAG_LEN + 4];
        // One request queue.
        for (to, from) in space
            .iter_mut()
            .zip(self.tag.into_iter().chain(1u32.to_le_bytes()))
        {
            *to = from;
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
            watches,
            ..
        } = activation;
        if queues.len() != 2 {
            return Err(DeviceError::Driver("not both queues are enabled"));
        }
        self.active = Some(Active {
            completions: None,
            memory,
            queues,
            interrupt,
            watches,
            requests: Slab::new(),
        });
        self.watch()
    }

    fn queue_event(&mut self, queue: u16) {
        let served = self.serve(usize::from(queue));
        self.check(served);
    }

    fn event(&mut self, _token: u32, _ready: EventSet) {
        let done = self
            .server
            .as_mut()
            .map(FsServer::finished)
            .unwrap_or_default();
        let answered = self.answer(done);
        self.check(answered);
    }

    fn reset(&mut self) {
        if let Some(server) = &mut self.server {
            server.end();
        }
        self.session = false;
        self.active = None;
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        self.finish_all();
        Ok(())
    }

    fn unpause(&mut self) {
        if let Some(server) = &mut self.server {
            server.release();
        }
    }

    fn queues(&self) -> Vec<SavedQueue> {
        self.active
            .iter()
            .flat_map(|active| &active.queues)
            .map(ActiveQueue::save)
            .collect()
    }

    fn save(&self) -> Result<DeviceState, DeviceError> {
        if self.session {
            return Err(DeviceError::Busy(
                "the guest has mounted the shared folder, whose open files can't be saved; unmount \
                 it first"
                    .to_owned(),
            ));
        }
        if self.server.as_ref().is_some_and(FsServer::is_busy) {
            return Err(DeviceError::Busy(
                "a request of the guest's to the shared folder waits for a lock".to_owned(),
            ));
        }
        let end = self.tag.iter().position(|b| *b == 0).unwrap_or(TAG_LEN);
        let tag = String::from_utf8_lossy(self.tag.get(..end).unwrap_or_default()).into_owned();
        let state = FsState {
            tag,
            queue_sizes: self.queue_sizes,
        };
        Ok(DeviceState::encode(KIND, VERSION, &state)?)
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        let state: FsState = state.decode(KIND, VERSION)?;
        let wrong = |what: &str| StateError::Damaged {
            kind: KIND,
            what: what.to_owned(),
        };
        if state.queue_sizes != self.queue_sizes {
            return Err(wrong("the queues are others than this device's").into());
        }
        if state.tag.len() > TAG_LEN {
            return Err(wrong("the tag is too long").into());
        }
        self.tag = Fs::new(&FsConfig {
            tag: state.tag,
            queue_size: 1,
        })
        .tag;
        Ok(())
    }
}
