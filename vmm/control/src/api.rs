//! Messages. Descriptors are named by their place in the frame's list.

use std::borrow::Cow;

use kiln_vmm_saved::PageRun;
use serde::{Deserialize, Serialize};

use crate::refusal::RefusalKind;

/// Index of a descriptor in the frame it came with.
pub type FdIndex = u8;

/// A machine to boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSpec {
    /// vCPUs at boot.
    pub cpus: u8,
    /// vCPUs there may ever be.
    pub max_cpus: u8,
    /// Base RAM in bytes.
    pub memory: u64,
    /// Room for memory hot-plug in bytes, a multiple of 1 GiB; 0 for none.
    pub hotplug: u64,
    /// Whether there is a serial port.
    pub serial: bool,
    /// Devices.
    pub devices: Vec<DeviceSpec>,
}

/// A device and its PCI slot (1 to 31).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSpec {
    /// The slot.
    pub slot: u8,
    /// What it is.
    pub kind: DeviceKind,
}

/// Kinds of devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceKind {
    /// A disk, or an empty slot for one; `id` is the serial the guest reads.
    Block {
        /// The disk's serial.
        id: String,
        /// Number of queues.
        queues: u16,
    },
    /// A network card.
    Net {
        /// Queue pairs.
        pairs: u16,
        /// Its address.
        mac: [u8; 6],
    },
    /// Sockets to the host.
    Vsock {
        /// The guest's address.
        cid: u64,
    },
    /// Entropy.
    Rng,
    /// Memory hot-plug.
    Mem,
    /// A folder of the host by virtio-fs; at most one. It can be saved while the guest has it not mounted.
    Fs {
        /// What the guest mounts it by, at most 36 bytes.
        tag: String,
    },
}

/// The host's side of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// A disk image or block device.
    Disk {
        /// Its descriptor.
        fd: FdIndex,
        /// Whether the guest may not write.
        read_only: bool,
    },
    /// A listening, non-blocking Unix socket.
    Listener(FdIndex),
    /// Queues of a tap.
    Tap(Vec<FdIndex>),
    /// The folder behind an [`Fs`](DeviceKind::Fs) device. Mounts that the client makes below it later, in the mount
    /// namespace that the descriptor comes from, are seen by the guest. The VMM has to be started as root for it;
    /// a jailed VMM then keeps the rights to act for all users on one thread, which sees nothing but this folder.
    /// Unmount with `MNT_DETACH`: what the guest looked up stays open in the VMM until it forgets it.
    Directory(FdIndex),
    /// A writable disk whose writes live in the VMM's memory.
    Overlay(Overlay),
}

/// A disk whose writes live in RAM and spill to a file. Its content lasts as long as the process: it is not part of a
/// snapshot, but of `SaveOverlay`. A write for which there is neither RAM nor spill room is an I/O error to the guest; nothing else is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overlay {
    /// What reads find where nothing was written: a file or block device that never changes, such as a template
    /// with an empty file system. With none, or beyond its end, zeroes.
    pub base: Option<FdIndex>,
    /// The disk's size in bytes, whole sectors.
    pub size: u64,
    /// What all overlays of this μVM draw on. The first one brings it; later ones bring none.
    pub pool: Option<OverlayPool>,
}

/// What a guest's flush of an overlay does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Flush {
    /// Nothing: content lasts as long as the process, flushed or not.
    #[default]
    None,
    /// It reaches the spill file, and that file's disk, before it is answered. For comparing with a disk.
    Disk,
}

/// RAM and spill file of a μVM's overlays.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverlayPool {
    /// Most bytes of RAM, at least 1 MiB.
    pub ram: u64,
    /// Where what has no room in RAM goes: an empty file, opened for this VMM alone (`O_TMPFILE`). With none, full
    /// RAM is a full disk.
    pub spill: Option<FdIndex>,
    /// Most bytes of the spill file.
    pub spill_limit: u64,
    /// The place in the node's budget that the client has taken for this VMM, and holds as long as it lives.
    pub budget: Option<BudgetSeat>,
    /// What flushes do. Without a spill file they do nothing.
    pub flush: Flush,
}

/// A `kiln_overlay::Seat` as the VMM gets to know of it. Part of the first request only: a VMM that runs a guest, and
/// may have been broken by it, must never get these descriptors. It closes them before the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BudgetSeat {
    /// The whole budget, read-only.
    pub view: FdIndex,
    /// What the VMM maps its own page from.
    pub page: FdIndex,
    /// Its slot.
    pub number: u16,
}

/// What the client asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Boots a machine. First request only.
    Boot {
        /// Its parts.
        machine: MachineSpec,
        /// The kernel.
        kernel: FdIndex,
        /// The initramfs.
        initrd: Option<FdIndex>,
        /// The kernel's command line.
        cmdline: String,
        /// Where the serial port's output goes.
        console: Option<FdIndex>,
        /// Host sides by slot.
        ends: Vec<(u8, End)>,
        /// How many disks, of those given now and later, get a ring for their I/O; others get threads.
        rings: u8,
    },
    /// Resumes a machine. First request only.
    Resume {
        /// The state file.
        state: FdIndex,
        /// The memory file.
        memory: FdIndex,
        /// Where the serial port's output goes.
        console: Option<FdIndex>,
        /// Host sides by slot.
        ends: Vec<(u8, End)>,
        /// How many disks, of those given now and later, get a ring for their I/O; others get threads.
        rings: u8,
        /// Pages that the guest touches first. They are mapped before it runs: it need not leave for each of them.
        touched: Vec<PageRun>,
        /// Whether to read pages of the memory file singly, as the guest needs them, so that the page cache tells
        /// afterwards which ones it did.
        one_by_one: bool,
    },
    /// Saves the machine, which is paused for it.
    Snapshot {
        /// Where the state goes: an empty file.
        state: FdIndex,
        /// Where memory goes: an empty file.
        memory: FdIndex,
        /// Kept in the header.
        digest: [u8; 32],
        /// Whether the machine goes on afterwards.
        go_on: bool,
    },
    /// Asks where guest memory lies in the VMM's process, for a client that copies it from there. Answered by `Memory`.
    Memory,
    /// Writes all but the memory of a paused machine, which the client has copied, into an empty file.
    SaveState {
        /// The file.
        state: FdIndex,
        /// Kept in the header.
        digest: [u8; 32],
        /// Whole huge pages of base RAM that hold no data, as ranges from start to end.
        holes: Vec<(u64, u64)>,
    },
    /// Stops vCPUs and devices.
    Pause,
    /// Lets them run.
    Unpause,
    /// Puts a disk into an empty slot, or into a new one by PCI hot-plug. Answered by `Slot`.
    AttachBlock {
        /// Which slot; `None` takes the first empty one, or plugs one.
        slot: Option<u8>,
        /// The disk.
        fd: FdIndex,
        /// Whether the guest may not write.
        read_only: bool,
    },
    /// Takes a disk out.
    DetachBlock {
        /// Which slot.
        slot: u8,
    },
    /// Puts taps behind a network card, or pulls the cable.
    SetNet {
        /// Which slot.
        slot: u8,
        /// Queues; none pulls the cable.
        taps: Vec<FdIndex>,
        /// A new address for drivers that still have to probe.
        mac: Option<[u8; 6]>,
    },
    /// Changes size; answered by `Stats` when the guest has followed, or by an error after the time is up. A guest
    /// that gave back what memory it could, and not all of it, has followed too: the figures say how far it came,
    /// and it goes on trying by itself.
    Resize {
        /// vCPUs.
        cpus: u8,
        /// Memory in bytes, base RAM included.
        memory: u64,
        /// How long the guest may take; 0 asks and does not wait for it.
        timeout_ms: u32,
    },
    /// Asks for figures.
    Stats,
    /// Ends machine and process.
    Stop,
    /// Puts an overlay into an empty slot, or into a new one by PCI hot-plug. Answered by `Slot`.
    AttachOverlay {
        /// Which slot; `None` takes the first empty one, or plugs one.
        slot: Option<u8>,
        /// The disk.
        overlay: Overlay,
    },
    /// Changes how much the overlays may take. RAM above its new limit is spilled as fast as the file takes it.
    LimitOverlays {
        /// Most bytes of RAM.
        ram: u64,
        /// Most bytes of the spill file.
        spill_limit: u64,
    },
    /// Writes an overlay's content into an empty file, which is the `base` of the same slot's overlay when the
    /// machine is resumed. Between `Pause` and `Snapshot`. Answered by `SavedOverlay`.
    SaveOverlay {
        /// Which slot.
        slot: u8,
        /// The file.
        into: FdIndex,
    },
    /// Plugs a network card by PCI hot-plug, with a tap behind it. Answered by `Slot`.
    PlugNet {
        /// Queues.
        taps: Vec<FdIndex>,
        /// The card's address.
        mac: [u8; 6],
    },
}

/// What a μVM's overlays take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverlayFigures {
    /// Bytes of RAM with data.
    pub ram: u64,
    /// Bytes of RAM they may take now: their own limit, or their share of the node's budget.
    pub ram_limit: u64,
    /// Bytes of the spill file.
    pub spill: u64,
    /// Most bytes of it.
    pub spill_limit: u64,
    /// Bytes written to it so far.
    pub spilled: u64,
    /// Chunks brought back from it so far.
    pub returned_chunks: u64,
    /// Writes that had to wait for room so far, and for how long together.
    pub stalls: u64,
    /// In nanoseconds.
    pub stall_ns: u64,
    /// Times the spill file failed.
    pub spill_errors: u64,
    /// Bytes written to the disks that are attached.
    pub written: u64,
    /// Bytes read from them that were in RAM.
    pub read_ram: u64,
    /// Bytes read from them that were in the spill file.
    pub read_spill: u64,
    /// Bytes read from them that nobody had written.
    pub read_base: u64,
}

/// One step of a start, as the VMM sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// Its name.
    pub name: Cow<'static, str>,
    /// When it began, in nanoseconds after the process's start.
    pub start_ns: u64,
    /// How long it took.
    pub duration_ns: u64,
}

/// A device as it is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// Its place and kind.
    pub spec: DeviceSpec,
    /// For block slots: whether there is a disk.
    pub attached: bool,
}

/// Exit codes of the process, which say how its machine ended.
pub mod exit {
    /// The guest powered off, or the client stopped the machine.
    pub const ENDED: i32 = 0;
    /// The VMM or KVM could not go on; the log says why.
    pub const FAILED: i32 = 1;
    /// The guest asked for a reset.
    pub const RESET: i32 = 3;
    /// The guest's kernel panicked.
    pub const PANICKED: i32 = 4;
}

/// What the VMM answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// Done.
    Done,
    /// The machine runs.
    Started {
        /// The kernel's version text.
        kernel: String,
        /// Where the time went.
        steps: Vec<Span>,
    },
    /// The snapshot is written.
    Saved {
        /// Bytes of state.
        state_bytes: u64,
        /// Pages with data.
        data_pages: u64,
        /// Pages left out.
        zero_pages: u64,
    },
    /// Where guest memory lies: addresses and lengths, in the order of a memory file.
    Memory(Vec<(u64, u64)>),
    /// The overlay's content is written.
    SavedOverlay {
        /// Bytes of data in the file; the rest are holes.
        bytes: u64,
    },
    /// The disk is in this slot.
    Slot(u8),
    /// Figures.
    Stats {
        /// vCPUs.
        cpus: u8,
        /// Memory in bytes.
        memory: u64,
        /// Whether paused.
        paused: bool,
        /// Devices.
        devices: Vec<DeviceInfo>,
        /// Overlays, if there are any.
        overlays: Option<OverlayFigures>,
    },
    /// Not done.
    Refused {
        /// What kind of reason there is.
        kind: RefusalKind,
        /// The whole chain of causes.
        why: String,
    },
}
