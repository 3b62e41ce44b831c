//! Virtqueues as devices hold them and as they are saved.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState};
use vmm_sys_util::eventfd::EventFd;

/// A queue in operation.
#[derive(Debug)]
pub struct ActiveQueue {
    /// The queue's number in the device.
    pub index: u16,
    /// The ring. EVENT_IDX is already set as negotiated.
    pub queue: Queue,
    /// The driver's doorbell, already on the device thread and read there, never by the device; or the device's own.
    pub kick: Arc<EventFd>,
}

impl ActiveQueue {
    /// Asks for another [`queue_event`](super::VirtioDevice::queue_event) after other devices had a turn.
    pub fn rekick(&self) {
        // A full counter means a kick is pending already, which is all that is wanted.
        let _ = self.kick.write(1);
    }

    /// The queue as it goes into saved state.
    pub fn save(&self) -> SavedQueue {
        SavedQueue::new(self.index, &self.queue.state())
    }
}

/// One queue's registers and positions, as saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedQueue {
    /// The queue's number in the device.
    pub index: u16,
    /// Largest size on offer.
    pub max_size: u16,
    /// Size the driver chose.
    pub size: u16,
    /// Position in the available ring.
    pub next_avail: u16,
    /// Position in the used ring.
    pub next_used: u16,
    /// Whether EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// Guest address of the descriptor table.
    pub desc_table: u64,
    /// Guest address of the available ring.
    pub avail_ring: u64,
    /// Guest address of the used ring.
    pub used_ring: u64,
}

impl SavedQueue {
    /// Copies a live queue's state.
    pub fn new(index: u16, state: &QueueState) -> Self {
        Self {
            index,
            max_size: state.max_size,
            size: state.size,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx: state.event_idx_enabled,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        }
    }

    /// Makes a live queue of it again, checking what can be checked without memory.
    pub fn to_queue(&self) -> Result<Queue, virtio_queue::Error> {
        Queue::try_from(QueueState {
            max_size: self.max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: self.event_idx,
            size: self.size,
            ready: true,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
        })
    }
}
