//! The virtio 1.2 PCI transport (§4.1): one function, one BAR, MSI-X.
//!
//! ```text
//! BAR 0   0x0000 common configuration   0x1000 ISR   0x2000 device configuration
//!         0x3000 notifications, 4 bytes a queue      0x4000 MSI-X table   0x5000 pending bits
//! ```
//!
//! Locks, in the order they are taken: configuration space, common registers, device; the interrupt
//! side is a leaf. A device never calls back into anything but the interrupt side and the event loop.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    Activation, ActiveQueue, DeviceError, DeviceState, DeviceType, Interrupt, InterruptSink,
    SavedQueue, VirtioDevice,
};
use crate::event::{EventLoop, Subscriber, WatchGuard};
use crate::layout;
use crate::memory::GuestRam;
use crate::pci::config::{PciConfigState, PciId};
use crate::pci::msix::MsiTarget;
use crate::pci::root::BAR_STRIDE;
use crate::pci::{Msix, MsixState, PciConfig, PciFunction};

const BAR_LEN: u64 = 0x8000;
const COMMON: u64 = 0x0000;
const COMMON_LEN: u64 = 0x40;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const DEVICE_LEN: u64 = 0x1000;
const NOTIFY: u64 = 0x3000;
const NOTIFY_STEP: u64 = 4;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x5000;
const PART_LEN: u64 = 0x1000;

const NO_VECTOR: u16 = 0xffff;
const FEATURE_VERSION_1: u64 = 1 << 32;
const FEATURE_EVENT_IDX: u64 = 1 << 29;

mod status {
    pub(super) const DRIVER_OK: u8 = 4;
    pub(super) const FEATURES_OK: u8 = 8;
    pub(super) const NEEDS_RESET: u8 = 64;
    pub(super) const FAILED: u8 = 128;
}

/// A queue's kicks leave the guest by exits until it has kicked this often; then it gets an ioeventfd,
/// whose registration waits for a grace period that most slots of a resumed machine never earn.
const KICKS_BEFORE_IOEVENTFD: u32 = 16;

/// Watch tokens with this bit are kicks; devices use the others.
const KICK: u32 = 1 << 31;

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic aborts the process, so a poisoned lock is never seen outside unit tests.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A queue's registers before it becomes a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegisters {
    size: u16,
    enabled: bool,
    vector: u16,
    desc: u64,
    driver: u64,
    device: u64,
}

/// The common configuration's registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommonRegisters {
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    status: u8,
    queue_select: u16,
    config_vector: u16,
    queues: Vec<QueueRegisters>,
}

/// One device with its transport, as saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioPciState {
    /// PCI slot.
    pub slot: u8,
    /// Configuration space.
    pub config: PciConfigState,
    /// MSI-X.
    pub msix: MsixState,
    /// Registers.
    pub common: CommonRegisters,
    /// ISR and configuration generation.
    pub isr: u8,
    /// See above.
    pub generation: u8,
    /// Whether the device was declared broken.
    pub failed: bool,
    /// Queues in operation.
    pub queues: Vec<SavedQueue>,
    /// The device's own state.
    pub device: DeviceState,
}

/// The interrupt side, shared with the device.
#[derive(Debug)]
struct Irq {
    label: String,
    msix: Msix,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    isr: AtomicU8,
    generation: AtomicU8,
    failed: AtomicBool,
}

impl InterruptSink for Irq {
    fn queue(&self, index: u16) {
        self.isr.fetch_or(1, Ordering::SeqCst);
        if let Some(v) = self.queue_vectors.get(usize::from(index)) {
            self.msix.signal(usize::from(v.load(Ordering::SeqCst)));
        }
    }

    fn config(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.isr.fetch_or(2, Ordering::SeqCst);
        self.msix
            .signal(usize::from(self.config_vector.load(Ordering::SeqCst)));
    }

    fn fail(&self, reason: &str) {
        if !self.failed.swap(true, Ordering::SeqCst) {
            tracing::warn!(device = %self.label, reason, "device stopped because of its driver");
            self.isr.fetch_or(2, Ordering::SeqCst);
            self.msix
                .signal(usize::from(self.config_vector.load(Ordering::SeqCst)));
        }
    }
}

/// Turns guest writes to an address into eventfd signals, without an exit to this process.
pub trait DoorbellHost: Send + Sync + std::fmt::Debug {
    /// Starts doing so; `false` if it can't be done.
    fn add(&self, address: u64, signal: &EventFd) -> bool;
    /// Ends what `add` started with the same arguments.
    fn remove(&self, address: u64, signal: &EventFd);
}

/// KVM's ioeventfds.
#[derive(Debug)]
pub struct KvmDoorbells(pub Arc<VmFd>);

impl DoorbellHost for KvmDoorbells {
    fn add(&self, address: u64, signal: &EventFd) -> bool {
        self.0
            .register_ioevent(signal, &IoEventAddress::Mmio(address), NoDatamatch)
            .is_ok()
    }

    fn remove(&self, address: u64, signal: &EventFd) {
        // It was registered with these very arguments, so there is nothing to fail.
        let _ = self
            .0
            .unregister_ioevent(signal, &IoEventAddress::Mmio(address), NoDatamatch);
    }
}

/// What the transport needs of the machine.
#[derive(Clone, Debug)]
pub struct TransportEnv {
    /// For ioeventfds.
    pub doorbells: Arc<dyn DoorbellHost>,
    /// Where MSI messages go.
    pub msi: Arc<dyn MsiTarget>,
    /// Guest memory.
    pub ram: GuestRam,
    /// The device thread.
    pub events: EventLoop,
}

#[derive(Debug)]
struct Doorbell {
    kick: Arc<EventFd>,
    /// On the device thread, unless the device has a thread of its own that waits for kicks.
    _watch: Option<WatchGuard>,
    kicks: AtomicU32,
    /// Guest address of the registered ioeventfd, 0 for none.
    ioevent: AtomicU64,
}

#[derive(Debug, Default)]
struct Common {
    regs: CommonRegisters,
    active: bool,
}

/// A virtio device on the PCI bus.
#[derive(Debug)]
pub struct VirtioPci {
    slot: u8,
    env: TransportEnv,
    config: Mutex<PciConfig>,
    msix_cap: usize,
    /// Where the BAR answers, 0 while it does not; copied out of `config` for the dispatch.
    bar: AtomicU64,
    common: Mutex<Common>,
    device: Mutex<Box<dyn VirtioDevice>>,
    /// Whether the device takes events; changes only with the device's lock held.
    live: AtomicBool,
    irq: Arc<Irq>,
    doorbells: Mutex<Vec<Option<Arc<Doorbell>>>>,
    max_sizes: Vec<u16>,
    features: u64,
    /// Ourselves, for watches.
    this: Weak<VirtioPci>,
}

/// Why a transport's state was refused.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The PCI side does not match.
    #[error("saved PCI {what} of slot {slot} does not belong to this kind of device; bake again")]
    Mismatch {
        /// Which part.
        what: &'static str,
        /// The slot.
        slot: u8,
    },
    /// The device refused.
    #[error("device in slot {slot} could not be saved or restored")]
    Device {
        /// The slot.
        slot: u8,
        /// Its reason.
        #[source]
        source: DeviceError,
    },
}

impl VirtioPci {
    /// Puts a fresh device behind a transport.
    pub fn new(slot: u8, device: Box<dyn VirtioDevice>, env: TransportEnv) -> Arc<Self> {
        let kind = device.device_type();
        let max_sizes = device.queue_max_sizes().to_vec();
        let features = device.features() | FEATURE_VERSION_1;
        let msix = Msix::new(max_sizes.len() + 1, env.msi.clone());
        let (config, msix_cap) = config_space(kind, slot, msix.len());
        let mut common = Common::default();
        common.regs.queues = fresh_queues(&max_sizes);
        common.regs.config_vector = NO_VECTOR;
        let irq = Arc::new(Irq {
            label: format!("{kind:?} in slot {slot}"),
            msix,
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: max_sizes
                .iter()
                .map(|_| AtomicU16::new(NO_VECTOR))
                .collect(),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            failed: AtomicBool::new(false),
        });
        Arc::new_cyclic(|this| Self {
            slot,
            env,
            config: Mutex::new(config),
            msix_cap,
            bar: AtomicU64::new(0),
            common: Mutex::new(common),
            device: Mutex::new(device),
            live: AtomicBool::new(false),
            irq,
            doorbells: Mutex::new(max_sizes.iter().map(|_| None).collect()),
            max_sizes,
            features,
            this: this.clone(),
        })
    }

    /// The PCI slot.
    pub fn slot(&self) -> u8 {
        self.slot
    }

    /// Which device this is.
    pub fn kind(&self) -> DeviceType {
        lock(&self.device).device_type()
    }

    /// Calls the device as what it is; `None` if it is something else.
    pub fn with<D: VirtioDevice, R>(&self, f: impl FnOnce(&mut D) -> R) -> Option<R> {
        let mut device = lock(&self.device);
        let any: &mut dyn std::any::Any = &mut **device;
        any.downcast_mut::<D>().map(f)
    }

    /// Stops the device's work; see [`VirtioDevice::pause`].
    pub fn pause(&self) -> Result<(), DeviceError> {
        lock(&self.device).pause()
    }

    /// Ends a pause.
    pub fn unpause(&self) {
        lock(&self.device).unpause();
    }

    /// Whether the driver has taken the device into operation.
    pub fn is_active(&self) -> bool {
        lock(&self.common).active
    }

    /// Saves transport and device. The machine stands still and the device is paused.
    pub fn save(&self) -> Result<VirtioPciState, TransportError> {
        let failed = |source| TransportError::Device {
            slot: self.slot,
            source,
        };
        let device = lock(&self.device);
        Ok(VirtioPciState {
            slot: self.slot,
            config: lock(&self.config).save(),
            msix: self.irq.msix.save(),
            common: lock(&self.common).regs.clone(),
            isr: self.irq.isr.load(Ordering::SeqCst),
            generation: self.irq.generation.load(Ordering::SeqCst),
            failed: self.irq.failed.load(Ordering::SeqCst),
            queues: device.queues(),
            device: device.save().map_err(failed)?,
        })
    }

    /// Brings a fresh transport with its fresh device to a saved state.
    pub fn restore(&self, state: &VirtioPciState) -> Result<(), TransportError> {
        let slot = self.slot;
        let mismatch = |what| TransportError::Mismatch { what, slot };
        let failed = |source| TransportError::Device { slot, source };
        {
            let mut config = lock(&self.config);
            if !config.restore(&state.config) {
                return Err(mismatch("configuration"));
            }
            self.bar.store(config.bar0().unwrap_or(0), Ordering::SeqCst);
        }
        if !self.irq.msix.restore(&state.msix) {
            return Err(mismatch("MSI-X table"));
        }
        let mut common = lock(&self.common);
        if state.common.queues.len() != self.max_sizes.len() {
            return Err(mismatch("queue count"));
        }
        common.regs.clone_from(&state.common);
        self.irq
            .config_vector
            .store(state.common.config_vector, Ordering::SeqCst);
        for (live, saved) in self.irq.queue_vectors.iter().zip(&state.common.queues) {
            live.store(saved.vector, Ordering::SeqCst);
        }
        self.irq.isr.store(state.isr, Ordering::SeqCst);
        self.irq
            .generation
            .store(state.generation, Ordering::SeqCst);
        self.irq.failed.store(state.failed, Ordering::SeqCst);
        lock(&self.device).restore(&state.device).map_err(failed)?;
        if common.regs.status & status::DRIVER_OK == 0 || state.failed {
            return Ok(());
        }
        let mut queues = Vec::with_capacity(state.queues.len());
        for q in &state.queues {
            let damaged = |_| mismatch("queue");
            queues.push((q.index, q.to_queue().map_err(damaged)?));
        }
        self.start(&mut common, queues).map_err(failed)
    }

    /// Hands the queues to the device and puts their doorbells on the device thread, or the device's own.
    fn start(&self, common: &mut Common, queues: Vec<(u16, Queue)>) -> Result<(), DeviceError> {
        let Some(this) = self.this.upgrade() else {
            return Err(DeviceError::Driver("the device is being removed"));
        };
        let memory = self.env.ram.memory();
        let watches = self.env.events.watches(this);
        let own = lock(&self.device).doorbell();
        let mut active = Vec::with_capacity(queues.len());
        let mut doorbells: Vec<Option<Arc<Doorbell>>> =
            self.max_sizes.iter().map(|_| None).collect();
        for (index, queue) in queues {
            if !queue.is_valid(&*memory) {
                return Err(DeviceError::Driver("a queue lies outside guest memory"));
            }
            let io = |action| move |source| DeviceError::Io { action, source };
            let (kick, watch) = match &own {
                Some(bell) => (bell.clone(), None),
                None => {
                    let kick =
                        Arc::new(EventFd::new(EFD_NONBLOCK).map_err(io("making a doorbell"))?);
                    let token = KICK | u32::from(index);
                    // Edge-triggered: every write wakes the loop, and nobody has to read the counter.
                    let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
                    let watch = watches
                        .watch(std::os::fd::AsRawFd::as_raw_fd(&*kick), token, edges)
                        .map_err(io("watching a doorbell"))?;
                    (kick, Some(watch))
                }
            };
            let Some(place) = doorbells.get_mut(usize::from(index)) else {
                return Err(DeviceError::Driver("a queue has an index out of range"));
            };
            *place = Some(Arc::new(Doorbell {
                kick: kick.clone(),
                _watch: watch,
                kicks: AtomicU32::new(0),
                ioevent: AtomicU64::new(0),
            }));
            active.push(ActiveQueue { index, queue, kick });
        }
        *lock(&self.doorbells) = doorbells;
        let activation = Activation {
            memory: self.env.ram.clone(),
            queues: active,
            features: common.regs.driver_features,
            interrupt: Interrupt::new(self.irq.clone()),
            watches,
        };
        let mut device = lock(&self.device);
        match device.activate(activation) {
            Ok(()) => {
                self.live.store(true, Ordering::SeqCst);
                common.active = true;
                Ok(())
            }
            Err(e) => {
                self.drop_doorbells();
                Err(e)
            }
        }
    }

    fn drop_doorbells(&self) {
        for place in lock(&self.doorbells).iter_mut() {
            if let Some(bell) = place.take() {
                self.unregister(&bell);
            }
        }
    }

    fn unregister(&self, bell: &Doorbell) {
        let at = bell.ioevent.swap(0, Ordering::SeqCst);
        if at != 0 {
            self.env.doorbells.remove(at, &bell.kick);
        }
    }

    /// Takes the device out of operation, as its driver's reset does.
    pub fn reset(&self) {
        self.reset_locked(&mut lock(&self.common));
    }

    fn reset_locked(&self, common: &mut Common) {
        self.drop_doorbells();
        if common.active {
            let mut device = lock(&self.device);
            self.live.store(false, Ordering::SeqCst);
            device.reset();
        }
        *common = Common::default();
        common.regs.queues = fresh_queues(&self.max_sizes);
        common.regs.config_vector = NO_VECTOR;
        self.irq.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        for v in &self.irq.queue_vectors {
            v.store(NO_VECTOR, Ordering::SeqCst);
        }
        self.irq.isr.store(0, Ordering::SeqCst);
        self.irq.failed.store(false, Ordering::SeqCst);
    }

    fn set_status(&self, common: &mut Common, value: u8) {
        if value == 0 {
            self.reset_locked(common);
            return;
        }
        let old = common.regs.status;
        // A driver may only add bits; NEEDS_RESET is ours.
        let mut new = (old | value) & !status::NEEDS_RESET;
        if new & !old & status::FEATURES_OK != 0 {
            let wanted = common.regs.driver_features;
            if wanted & !self.features != 0 || wanted & FEATURE_VERSION_1 == 0 {
                new &= !status::FEATURES_OK;
            }
        }
        common.regs.status = new;
        let go = new & !old & status::DRIVER_OK != 0
            && new & status::FEATURES_OK != 0
            && new & status::FAILED == 0;
        if !go || common.active {
            return;
        }
        let event_idx = common.regs.driver_features & FEATURE_EVENT_IDX != 0;
        let mut queues = Vec::new();
        for ((i, r), max) in (0u16..).zip(&common.regs.queues).zip(&self.max_sizes) {
            if r.enabled {
                match make_queue(r, *max, event_idx) {
                    Ok(q) => queues.push((i, q)),
                    Err(e) => {
                        self.irq.fail(&format!("queue {i}: {e}"));
                        return;
                    }
                }
            }
        }
        if let Err(e) = self.start(common, queues) {
            self.irq.fail(&format!("activation: {e}"));
        }
    }

    fn common_read(&self, offset: u64, data: &mut [u8]) {
        let c = lock(&self.common);
        let r = &c.regs;
        let q = r
            .queues
            .get(usize::from(r.queue_select))
            .copied()
            .unwrap_or_default();
        let max = self
            .max_sizes
            .get(usize::from(r.queue_select))
            .copied()
            .unwrap_or(0);
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let failed = if self.irq.failed.load(Ordering::SeqCst) {
            status::NEEDS_RESET
        } else {
            0
        };
        // The registers as bytes, little-endian, in the order of struct virtio_pci_common_cfg.
        let mut image = [0u8; COMMON_LEN as usize];
        let mut put = |at: usize, bytes: &[u8]| {
            for (cell, b) in image.iter_mut().skip(at).zip(bytes) {
                *cell = *b;
            }
        };
        put(0, &r.device_feature_select.to_le_bytes());
        put(
            4,
            &half(self.features, r.device_feature_select).to_le_bytes(),
        );
        put(8, &r.driver_feature_select.to_le_bytes());
        put(
            12,
            &half(r.driver_features, r.driver_feature_select).to_le_bytes(),
        );
        put(16, &r.config_vector.to_le_bytes());
        put(18, &(self.max_sizes.len() as u16).to_le_bytes());
        put(
            20,
            &[
                r.status | failed,
                self.irq.generation.load(Ordering::SeqCst),
            ],
        );
        put(22, &r.queue_select.to_le_bytes());
        put(24, &(if max == 0 { 0 } else { q.size }).to_le_bytes());
        put(26, &q.vector.to_le_bytes());
        put(28, &u16::from(q.enabled).to_le_bytes());
        put(30, &r.queue_select.to_le_bytes());
        put(32, &q.desc.to_le_bytes());
        put(40, &q.driver.to_le_bytes());
        put(48, &q.device.to_le_bytes());
        for (b, cell) in data.iter_mut().zip(image.iter().skip(offset as usize)) {
            *b = *cell;
        }
    }

    fn common_write(&self, offset: u64, data: &[u8]) {
        let mut value = [0u8; 8];
        for (v, b) in value.iter_mut().zip(data) {
            *v = *b;
        }
        let value = u64::from_le_bytes(value);
        let mut c = lock(&self.common);
        let vectors = self.irq.msix.len();
        let vector = |v: u64| {
            if v < vectors as u64 {
                v as u16
            } else {
                NO_VECTOR
            }
        };
        match (offset, data.len()) {
            (0, 4) => c.regs.device_feature_select = value as u32,
            (8, 4) => c.regs.driver_feature_select = value as u32,
            (12, 4) if c.regs.status & status::FEATURES_OK == 0 => {
                match c.regs.driver_feature_select {
                    0 => {
                        let high = c.regs.driver_features & !0xffff_ffff;
                        c.regs.driver_features = high | value;
                    }
                    1 => {
                        let low = c.regs.driver_features & 0xffff_ffff;
                        c.regs.driver_features = low | (value << 32);
                    }
                    _ => {}
                }
            }
            (16, 2) => {
                c.regs.config_vector = vector(value);
                self.irq
                    .config_vector
                    .store(c.regs.config_vector, Ordering::SeqCst);
            }
            (20, 1) => self.set_status(&mut c, value as u8),
            (22, 2) => c.regs.queue_select = value as u16,
            _ => self.queue_write(&mut c, offset, data.len(), value, vector(value)),
        }
    }

    fn queue_write(&self, c: &mut Common, offset: u64, len: usize, value: u64, vector: u16) {
        let index = usize::from(c.regs.queue_select);
        let max = self.max_sizes.get(index).copied().unwrap_or(0);
        let active = c.active;
        let Some(q) = c.regs.queues.get_mut(index) else {
            return;
        };
        if (offset, len) == (26, 2) {
            q.vector = vector;
            if let Some(live) = self.irq.queue_vectors.get(index) {
                live.store(vector, Ordering::SeqCst);
            }
            return;
        }
        // Everything else is fixed once the device runs or the queue is enabled.
        if active || q.enabled {
            return;
        }
        match (offset, len) {
            (24, 2) => {
                let size = value as u16;
                if size.is_power_of_two() && size <= max {
                    q.size = size;
                }
            }
            (28, 2) => q.enabled = value == 1,
            (32..56, 4 | 8) => {
                let register = match offset & !7 {
                    32 => &mut q.desc,
                    40 => &mut q.driver,
                    _ => &mut q.device,
                };
                *register = match (offset & 7, len) {
                    (0, 8) => value,
                    (0, 4) => (*register & !0xffff_ffff) | value,
                    (4, 4) => (*register & 0xffff_ffff) | (value << 32),
                    _ => *register,
                };
            }
            _ => {}
        }
    }

    /// The driver rang: by an exit, which means there is no ioeventfd (yet).
    fn notify(&self, index: usize) {
        let bell = lock(&self.doorbells).get(index).and_then(Clone::clone);
        let Some(bell) = bell else { return };
        // Fails only if the counter is full of kicks the device has still to see.
        let _ = bell.kick.write(1);
        let kicks = bell.kicks.fetch_add(1, Ordering::Relaxed);
        if kicks != KICKS_BEFORE_IOEVENTFD {
            return;
        }
        let bar = self.bar.load(Ordering::SeqCst);
        let at = bar + NOTIFY + index as u64 * NOTIFY_STEP;
        if self.env.doorbells.add(at, &bell.kick) {
            bell.ioevent.store(at, Ordering::SeqCst);
        }
    }
}

fn fresh_queues(max_sizes: &[u16]) -> Vec<QueueRegisters> {
    max_sizes
        .iter()
        .map(|&size| QueueRegisters {
            size,
            vector: NO_VECTOR,
            ..Default::default()
        })
        .collect()
}

fn make_queue(r: &QueueRegisters, max: u16, event_idx: bool) -> Result<Queue, virtio_queue::Error> {
    let saved = SavedQueue {
        index: 0,
        max_size: max,
        size: r.size,
        next_avail: 0,
        next_used: 0,
        event_idx,
        desc_table: r.desc,
        avail_ring: r.driver,
        used_ring: r.device,
    };
    saved.to_queue()
}

fn config_space(kind: DeviceType, slot: u8, vectors: usize) -> (PciConfig, usize) {
    const VIRTIO_VENDOR: u16 = 0x1af4;
    const VENDOR_CAP: u8 = 0x09;
    const MSIX_CAP: u8 = 0x11;
    let class = match kind {
        DeviceType::Net => 0x02_0000,
        DeviceType::Block => 0x01_8000,
        DeviceType::Mem => 0x05_8000,
        DeviceType::Fs => 0x01_8000,
        DeviceType::Rng | DeviceType::Vsock => 0xff_0000,
    };
    let id = PciId {
        vendor: VIRTIO_VENDOR,
        device: 0x1040 + kind as u16,
        class,
        subsystem: kind as u16,
    };
    let mut config = PciConfig::new(id);
    config.set_bar0(
        (layout::PCI_WINDOW + u64::from(slot) * BAR_STRIDE) as u32,
        BAR_LEN as u32,
    );
    // struct virtio_pci_cap: length, type, BAR, id, padding, offset, length.
    let part = |kind: u8, offset: u64, len: u64, more: &[u8]| {
        let mut body = vec![16 + more.len() as u8, kind, 0, 0, 0, 0];
        body.extend_from_slice(&(offset as u32).to_le_bytes());
        body.extend_from_slice(&(len as u32).to_le_bytes());
        body.extend_from_slice(more);
        body
    };
    config.add_capability(VENDOR_CAP, &part(1, COMMON, COMMON_LEN, &[]));
    config.add_capability(
        VENDOR_CAP,
        &part(2, NOTIFY, PART_LEN, &(NOTIFY_STEP as u32).to_le_bytes()),
    );
    config.add_capability(VENDOR_CAP, &part(3, ISR, 4, &[]));
    config.add_capability(VENDOR_CAP, &part(4, DEVICE, DEVICE_LEN, &[]));
    let mut msix = ((vectors as u16).saturating_sub(1)).to_le_bytes().to_vec();
    msix.extend_from_slice(&(MSIX_TABLE as u32).to_le_bytes());
    msix.extend_from_slice(&(MSIX_PENDING as u32).to_le_bytes());
    let at = config.add_capability(MSIX_CAP, &msix);
    // Enable and function mask.
    config.allow(at + 3, &[0xc0]);
    (config, at)
}

impl PciFunction for VirtioPci {
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        lock(&self.config).read(offset, data);
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        let mut config = lock(&self.config);
        config.write(offset, data);
        let control =
            u16::from_le_bytes([config.get(self.msix_cap + 2), config.get(self.msix_cap + 3)]);
        let bar = config.bar0().unwrap_or(0);
        drop(config);
        self.irq.msix.set_control(control);
        if self.bar.swap(bar, Ordering::SeqCst) != bar {
            // Doorbells moved with the BAR: go back to exits until they are used again.
            for bell in lock(&self.doorbells).iter().flatten() {
                self.unregister(bell);
                bell.kicks.store(0, Ordering::Relaxed);
            }
        }
    }

    fn bar(&self) -> Option<(u64, u64)> {
        let base = self.bar.load(Ordering::SeqCst);
        (base != 0).then_some((base, BAR_LEN))
    }

    fn bar_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let inner = offset % PART_LEN;
        match offset - inner {
            COMMON if inner < COMMON_LEN => self.common_read(inner, data),
            // Reading ISR clears it.
            ISR if inner == 0 => {
                let isr = self.irq.isr.swap(0, Ordering::SeqCst);
                if let Some(b) = data.first_mut() {
                    *b = isr;
                }
            }
            DEVICE => lock(&self.device).read_config(inner, data),
            MSIX_TABLE => self.irq.msix.read_table(inner, data),
            MSIX_PENDING => self.irq.msix.read_pending(inner, data),
            _ => {}
        }
    }

    fn bar_write(&self, offset: u64, data: &[u8]) {
        let inner = offset % PART_LEN;
        match offset - inner {
            COMMON if inner < COMMON_LEN => self.common_write(inner, data),
            DEVICE => lock(&self.device).write_config(inner, data),
            NOTIFY => self.notify((inner / NOTIFY_STEP) as usize),
            MSIX_TABLE => self.irq.msix.write_table(inner, data),
            _ => {}
        }
    }
}

impl Subscriber for VirtioPci {
    fn ready(&self, token: u32, events: EventSet) {
        if self.irq.failed.load(Ordering::SeqCst) {
            return;
        }
        let mut device = lock(&self.device);
        if !self.live.load(Ordering::SeqCst) {
            return;
        }
        if token & KICK != 0 {
            device.queue_event((token & 0xffff) as u16);
        } else {
            device.event(token, events);
        }
    }
}

#[cfg(test)]
mod tests;
