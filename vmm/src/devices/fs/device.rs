//! The device as its driver finds it. Requests are the server's thread's to take and to answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::KIND;
use super::lines::{Answer, Lines};
use super::server::FsServer;
use crate::devices::read_config;
use crate::event::WatchGuard;
use crate::virtio::{
    Activation, DeviceError, DeviceState, DeviceType, Interrupt, SavedQueue, StateError,
    VirtioDevice,
};

const VERSION: u16 = 1;
const TAG_LEN: usize = 36;
/// Token of the server's event.
const NEWS: u32 = 0;

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
    /// The guest has mounted it and not unmounted.
    session: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Active {
    _news: Option<WatchGuard>,
    interrupt: Interrupt,
    /// The queues of a device without a server, whose requests are all refused.
    lines: Option<Lines>,
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
            session: Arc::default(),
        }
    }

    /// Whether the guest has it mounted.
    pub fn is_mounted(&self) -> bool {
        self.session.load(Ordering::SeqCst)
    }

    /// Gives the device its server, which has to be there when its driver begins.
    pub fn attach(&mut self, server: FsServer) -> Result<(), DeviceError> {
        if self.server.is_some() {
            return Err(DeviceError::Busy(
                "the device has a file server already".to_owned(),
            ));
        }
        if self.active.is_some() {
            return Err(DeviceError::Busy(
                "the device is in use without a file server; have its driver reset it first"
                    .to_owned(),
            ));
        }
        self.server = Some(server);
        Ok(())
    }

    /// Passes on what the server's thread tells.
    fn hear(&self) {
        let (Some(active), Some(server)) = (&self.active, &self.server) else {
            return;
        };
        let news = server.news();
        for queue in news.queues() {
            active.interrupt.signal_queue(queue);
        }
        if let Some(what) = news.broken {
            active.interrupt.fail_device(what);
        }
    }

    /// Refuses what is asked of a device without a server.
    fn refuse(&mut self) {
        let Some(Active {
            interrupt,
            lines: Some(lines),
            ..
        }) = &mut self.active
        else {
            return;
        };
        let signal = |queue| interrupt.signal_queue(queue);
        let refused = lines.turn(|| true, signal, |_, _, _| Answer::Error(libc::ENODEV));
        if let Err(e) = refused {
            interrupt.fail_device(e);
        }
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

    fn doorbell(&self) -> Option<Arc<EventFd>> {
        self.server.as_ref().map(FsServer::bell)
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
        let lines = Lines::new(memory, queues, self.session.clone());
        let (news, lines) = match &self.server {
            None => (None, Some(lines)),
            Some(server) => {
                let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
                let watched = watches.watch(server.event(), NEWS, edges);
                let news = watched.map_err(|source| DeviceError::Io {
                    action: "watching the file server",
                    source,
                })?;
                server.begin(lines);
                (Some(news), None)
            }
        };
        self.active = Some(Active {
            _news: news,
            interrupt,
            lines,
        });
        Ok(())
    }

    fn queue_event(&mut self, _queue: u16) {
        match &self.server {
            Some(server) => server.ring(),
            None => self.refuse(),
        }
    }

    fn event(&mut self, _token: u32, _ready: EventSet) {
        self.hear();
    }

    fn reset(&mut self) {
        if let Some(server) = &self.server {
            server.end();
        }
        self.session.store(false, Ordering::SeqCst);
        self.active = None;
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        if let Some(server) = &self.server {
            server.hold();
        }
        self.hear();
        Ok(())
    }

    fn unpause(&mut self) {
        if let Some(server) = &self.server {
            server.release();
        }
    }

    fn queues(&self) -> Vec<SavedQueue> {
        let Some(active) = &self.active else {
            return Vec::new();
        };
        match (&active.lines, &self.server) {
            (Some(lines), _) => lines.save(),
            (None, Some(server)) => server.queues(),
            (None, None) => Vec::new(),
        }
    }

    fn save(&self) -> Result<DeviceState, DeviceError> {
        if self.is_mounted() {
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
