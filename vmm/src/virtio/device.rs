//! The device contract.

use std::any::Any;
use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::{ActiveQueue, DeviceState, Interrupt, SavedQueue, StateError};
use crate::event::Watches;
use crate::memory::GuestRam;

/// Virtio device numbers (virtio 1.2 §5) that kiln has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum DeviceType {
    /// Network card.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Entropy source.
    Rng = 4,
    /// Socket device.
    Vsock = 19,
    /// Memory device.
    Mem = 24,
    /// File system device.
    Fs = 26,
}

/// Why a device refused a step of its life cycle.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver asked for something the device does not do.
    #[error("the driver's request is invalid: {0}")]
    Driver(&'static str),
    /// A system call of the device failed.
    #[error("{action} failed")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Saved state does not fit this device.
    #[error("saved device state is unusable")]
    State(#[from] StateError),
    /// The device can't do this now; the text says what has to happen first.
    #[error("{0}")]
    Busy(String),
    /// The device can't do this at all.
    #[error("{0}")]
    Usage(String),
}

/// Everything a device gets when its driver says DRIVER_OK, and again after a restore.
#[derive(Debug)]
pub struct Activation {
    /// Guest memory. Take a view with `memory()` for each batch of work: the map changes on hot-plug.
    pub memory: GuestRam,
    /// The queues the driver enabled, in ascending order of [`ActiveQueue::index`]. A queue the driver
    /// left disabled is absent.
    pub queues: Vec<ActiveQueue>,
    /// Feature bits the driver accepted: always a subset of [`VirtioDevice::features`].
    pub features: u64,
    /// How to interrupt the driver, and how to declare the device broken.
    pub interrupt: Interrupt,
    /// Puts file descriptors of the device's own (a tap, a socket, an io_uring eventfd, a timerfd) on
    /// the device thread. Queue kicks are already there.
    pub watches: Watches,
}

/// A virtio device.
///
/// # Calling order
///
/// The device sits behind one lock; every method is called with it held, so no two run at once.
/// [`queue_event`](Self::queue_event) and [`event`](Self::event) run on the device thread; the others
/// on a vCPU thread or the control thread.
///
/// ```text
///  new ──▶ [restore] ──▶ inactive ──activate──▶ active ──pause──▶ paused ──save──▶ paused
///                           ▲                     │ ▲                │
///                           └───────reset─────────┘ └─────unpause────┘
/// ```
///
/// * `device_type`, `features`, `queue_max_sizes` answer the same for the device's whole life.
/// * `read_config` and `write_config` come in any state. Offsets and lengths are the guest's choice.
/// * `doorbell` is asked for before each `activate`; whose doorbell it is hears kicks while it is paused and after
///   [`Interrupt::fail_device`], too, and has to let them be.
/// * `activate` comes only when inactive, with every queue already checked to lie inside guest memory
///   *as it was then*. After an error the device stays inactive and the transport sets NEEDS_RESET.
/// * `queue_event` and `event` come only when active and not paused; both may be spurious.
/// * `reset` may come in any state except paused, and must work: drop queues, drop `Activation`, cancel
///   or finish requests in flight so that **no guest memory is touched after it returns**. Watches end
///   when they are dropped; the transport removes the kicks.
/// * `pause` comes after all vCPUs have stopped and after the device thread has handled every kick
///   that was pending. When it returns no request is in flight and guest memory is not written until
///   `unpause`. Pausing twice is the same as once. An inactive device is paused too (it does nothing).
/// * `save` comes only when paused. The transport saves features, status, MSI-X and config generation;
///   the device saves its own registers, and its queues through [`queues`](Self::queues).
/// * `restore` comes only on a device fresh from its constructor, before anything else. If the device was
///   active when saved, the transport then calls `activate` with the saved queues and features.
///   Do in `restore` and in an `activate` after it only what is needed: both are on the resume path.
///   After a restore no kick is made up: what was pending had been handled before `pause`.
///
/// # A hostile guest
///
/// Descriptors, ring indices, config writes and everything in guest memory are the guest's choice and may
/// change while they are read. Copy once, check the copy, use the copy. A request that is merely wrong is
/// answered with the device's own error status. A ring that can't be used any more is ended by
/// [`Interrupt::fail_device`]: it logs the reason once, sets DEVICE_NEEDS_RESET, and from then on the
/// transport delivers no events until the driver resets the device. Do not panic, loop without bound
/// (at most `queue.size()` chains a kick, then ask for another turn with [`ActiveQueue::rekick`]), or
/// allocate by a length the guest chose.
///
/// # Host addresses
///
/// The host mapping of guest memory never moves and is never unmapped while the process lives, memory
/// hot-unplug included (it only discards pages). Pointers handed to io_uring therefore stay valid; a
/// guest that unplugs memory under its own request reads zeroes.
pub trait VirtioDevice: Any + Send + Debug {
    /// Which device this is.
    fn device_type(&self) -> DeviceType;

    /// Device-specific feature bits and ring features (EVENT_IDX, INDIRECT_DESC) on offer. The
    /// transport adds VIRTIO_F_VERSION_1.
    fn features(&self) -> u64;

    /// The largest size of each queue, powers of two. Its length is the number of queues.
    fn queue_max_sizes(&self) -> &[u16];

    /// Reads device configuration space. Bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes device configuration space. Writes to read-only fields or past the end are ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// The doorbell of all queues, if the device has a thread of its own that serves them and waits for it. Otherwise
    /// each queue has one, on the device thread.
    fn doorbell(&self) -> Option<Arc<EventFd>> {
        None
    }

    /// Takes the device into operation.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;

    /// Handles a driver's kick of the queue with this index. Not called for a device with a doorbell of its own.
    fn queue_event(&mut self, queue: u16);

    /// Handles readiness of a descriptor registered through [`Watches`], under the token it was given.
    fn event(&mut self, token: u32, ready: EventSet);

    /// Takes the device out of operation and forgets all driver state.
    fn reset(&mut self);

    /// Brings every request in flight to its end and stops.
    fn pause(&mut self) -> Result<(), DeviceError>;

    /// Goes on after [`pause`](Self::pause). What became readable meanwhile is looked at again.
    fn unpause(&mut self);

    /// The queues as they are now, by ascending index; empty when inactive.
    fn queues(&self) -> Vec<SavedQueue>;

    /// The device's own state.
    fn save(&self) -> Result<DeviceState, DeviceError>;

    /// Puts saved state into a fresh device. Unknown kinds and versions are errors.
    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError>;
}
