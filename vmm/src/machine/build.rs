//! Putting a machine together: to boot, and to resume.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, OnceLock};

use kiln_overlay::Overlay;
use kiln_vmm_control::PageRun;
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;

use super::config::{DeviceKind, DeviceSpec, MachineConfig};
use super::exits::{Board, Observer, lock};
use super::{Enter, EnterVcpu, Machine, MachineError};
use crate::acpi::{self, AcpiConfig, Event};
use crate::boot::{self, BootFiles};
use crate::cpu::thread::{ExitHandler, Vcpus};
use crate::cpu::{CpuError, cpuid};
use crate::devices::block::{Block, BlockConfig, FileBackend, OverlayBackend, Rings};
use crate::devices::fs::{Fs, FsConfig, FsServer};
use crate::devices::mem::Mem;
use crate::devices::net::{Net, NetBackend, NetConfig, Tap};
use crate::devices::rng::Rng;
use crate::devices::vsock::Vsock;
use crate::event::EventLoop;
use crate::layout;
use crate::map_ahead::map_ahead;
use crate::memory::{HostMemory, Memory};
use crate::pci::PciRoot;
use crate::pci::msix::KvmMsi;
use crate::platform::hotplug::HotplugRegisters;
use crate::platform::serial::Console;
use crate::snapshot::MachineState;
use crate::timeline::Timeline;
use crate::virtio::pci::{KvmDoorbells, TransportEnv, VirtioPci};
use crate::virtio::{DeviceError, VirtioDevice};
use crate::vm::VmSeed;

/// The host's side of a device.
#[derive(Debug)]
pub enum HostEnd {
    /// A disk image or block device.
    Disk {
        /// The file.
        file: File,
        /// Whether the guest may not write.
        read_only: bool,
    },
    /// A disk whose writes live in this process.
    Overlay(Overlay),
    /// A socket that host programs connect to.
    Listener(UnixListener),
    /// Tap queues.
    Tap(Vec<OwnedFd>),
    /// A folder and the thread that serves it: started early, because it keeps rights that the process gives up.
    Files(FsServer),
}

/// Host sides by PCI slot. A device without one has nothing behind it until something is attached.
pub type HostEnds = BTreeMap<u8, HostEnd>;

/// What a machine boots from.
#[derive(Debug)]
pub struct BootSpec {
    /// Its parts.
    pub config: MachineConfig,
    /// The kernel.
    pub kernel: File,
    /// The initramfs.
    pub initrd: Option<File>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Where the serial port's output goes.
    pub console: Option<File>,
    /// Host sides of devices.
    pub ends: HostEnds,
    /// For disks.
    pub rings: Rings,
}

/// What a machine resumes from.
#[derive(Debug)]
pub struct ResumeSpec {
    /// The decoded state file.
    pub state: MachineState,
    /// The memory file.
    pub memory: File,
    /// Where the serial port's output goes.
    pub console: Option<File>,
    /// Host sides of devices.
    pub ends: HostEnds,
    /// For disks.
    pub rings: Rings,
    /// Pages of the memory file that the guest touches first.
    pub touched: Vec<PageRun>,
}

impl Machine {
    /// Builds a machine about to enter a kernel. It runs when [`start`](Self::start) is called.
    pub fn boot(
        seed: VmSeed,
        events: EventLoop,
        mut spec: BootSpec,
        observer: Arc<dyn Observer>,
        enter: EnterVcpu,
    ) -> Result<(Arc<Self>, String), MachineError> {
        spec.config.check()?;
        let config = spec.config;
        let memory = HostMemory::fresh(config.memory)?.attach(seed.vm.clone())?;
        let tables = AcpiConfig {
            boot_cpus: config.boot_cpus,
            max_cpus: config.max_cpus,
            serial: config.serial,
        };
        let rsdp = acpi::write_tables(memory.ram(), &tables)?;
        let files = BootFiles {
            kernel: &mut spec.kernel,
            initrd: spec.initrd.as_mut(),
            cmdline: &spec.cmdline,
        };
        let loaded = boot::load(memory.ram(), config.memory.ram, files, rsdp)?;

        let console = config
            .serial
            .then(|| Mutex::new(Console::new(seed.vm.clone(), spec.console.take())));
        let hotplug = HotplugRegisters::new(config.boot_cpus);
        let board = board(&seed, console, hotplug, observer);
        let supported = seed
            .kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|source| MachineError::Kvm {
                call: "KVM_GET_SUPPORTED_CPUID",
                source,
            })?;
        let boot_cpus = config.boot_cpus;
        let machine = Self::assemble(seed, events, board, memory, config, enter, spec.rings);
        let ends = &mut spec.ends;
        for spec in lock(&machine.config).devices.clone() {
            let device = machine.make_device(&spec, ends.remove(&spec.slot))?;
            machine.add_device(spec.slot, device);
        }
        for index in 0..boot_cpus {
            let fd = machine.create_vcpu(index, &cpuid::for_vcpu(&supported, index))?;
            if index == 0 {
                boot::set_boot_registers(&fd, machine.memory.ram(), loaded.entry).map_err(|e| {
                    match e {
                        boot::RegsError::Boot(e) => MachineError::Boot(e),
                        boot::RegsError::Cpu(e) => MachineError::Cpu(e),
                    }
                })?;
            }
            machine.start_vcpu(index, fd, Vec::new())?;
        }
        Ok((machine, loaded.version))
    }

    /// Builds a machine as it was saved. It runs when [`start`](Self::start) is called.
    pub fn resume(
        seed: VmSeed,
        events: EventLoop,
        host_memory: HostMemory,
        mut spec: ResumeSpec,
        observer: Arc<dyn Observer>,
        enter: EnterVcpu,
        timeline: &mut Timeline,
    ) -> Result<Arc<Self>, MachineError> {
        let kvm = |call| move |source| MachineError::Kvm { call, source };
        let state = spec.state;
        let config = MachineConfig::from(state.config);
        config.check().map_err(MachineError::SavedConfig)?;

        let memory = host_memory.attach(seed.vm.clone())?;
        timeline.mark("vmm.memory_slots");

        for chip in &state.irqchips {
            seed.vm.set_irqchip(chip).map_err(kvm("KVM_SET_IRQCHIP"))?;
        }
        let console = match &state.serial {
            Some(saved) => Some(Mutex::new(
                Console::restore(seed.vm.clone(), spec.console.take(), saved)
                    .ok_or(MachineError::Damaged("the serial port's registers"))?,
            )),
            None => None,
        };
        let board = board(
            &seed,
            console,
            HotplugRegisters::restore(&state.hotplug),
            observer,
        );
        let machine = Self::assemble(seed, events, board, memory, config, enter, spec.rings);
        timeline.mark("vmm.irqchip");

        // The clock before the vCPUs: their kvmclock MSRs publish it to the guest.
        let clock = kvm_bindings::kvm_clock_data {
            clock: state.clock.clock,
            ..Default::default()
        };
        machine
            .board
            .vm
            .set_clock(&clock)
            .map_err(kvm("KVM_SET_CLOCK"))?;
        for saved in &state.vcpus {
            let index = saved.index;
            let fd = machine
                .board
                .vm
                .create_vcpu(u64::from(index))
                .map_err(|source| CpuError::Kvm {
                    call: "KVM_CREATE_VCPU",
                    index,
                    source,
                })?;
            saved.restore(&fd)?;
            let touched = match index {
                0 => std::mem::take(&mut spec.touched),
                _ => Vec::new(),
            };
            machine.start_vcpu(index, fd, touched)?;
        }
        timeline.mark("vmm.vcpus");

        // After the vCPUs: a device that finds a disk of another size than was saved interrupts one. Disks before their
        // device's state, so that a device sees on activation what it will serve.
        let specs = lock(&machine.config).devices.clone();
        if specs.len() != state.devices.len() {
            return Err(MachineError::Damaged("the list of devices"));
        }
        for (spec_, saved) in specs.iter().zip(&state.devices) {
            if spec_.slot != saved.slot {
                return Err(MachineError::Damaged("the order of devices"));
            }
            let end = spec.ends.remove(&spec_.slot);
            let device = machine.make_device(spec_, end)?;
            machine.add_device(spec_.slot, device).restore(saved)?;
        }
        timeline.mark("vmm.devices");

        machine.new_generation()?;
        timeline.mark("vmm.generation");
        Ok(machine)
    }

    fn assemble(
        seed: VmSeed,
        events: EventLoop,
        board: Arc<Board>,
        memory: Arc<Memory>,
        config: MachineConfig,
        enter: EnterVcpu,
        rings: Rings,
    ) -> Arc<Self> {
        let env = TransportEnv {
            doorbells: Arc::new(KvmDoorbells(seed.vm.clone())),
            msi: Arc::new(KvmMsi(seed.vm.clone())),
            ram: memory.ram().clone(),
            events: events.clone(),
        };
        Arc::new(Self {
            board,
            memory,
            events,
            env,
            kvm: seed.kvm,
            config: Mutex::new(config),
            devices: Mutex::default(),
            paused: Mutex::default(),
            rings,
            enter_vcpu: Enter(enter),
        })
    }

    /// Makes a device of its description and the host's side of it.
    pub(super) fn make_device(
        &self,
        spec: &DeviceSpec,
        end: Option<HostEnd>,
    ) -> Result<Box<dyn VirtioDevice>, MachineError> {
        make_device(spec, end, &self.memory, &self.rings)
    }

    /// Puts a device on the bus.
    pub(super) fn add_device(&self, slot: u8, device: Box<dyn VirtioDevice>) -> Arc<VirtioPci> {
        let function = VirtioPci::new(slot, device, self.env.clone());
        self.board.pci.set(slot, Some(function.clone()));
        lock(&self.devices).insert(slot, function.clone());
        function
    }

    pub(super) fn create_vcpu(
        &self,
        index: u8,
        cpuid: &kvm_bindings::CpuId,
    ) -> Result<kvm_ioctls::VcpuFd, CpuError> {
        let kvm = |call| {
            move |source| CpuError::Kvm {
                call,
                index,
                source,
            }
        };
        let fd = self
            .board
            .vm
            .create_vcpu(u64::from(index))
            .map_err(kvm("KVM_CREATE_VCPU"))?;
        fd.set_cpuid2(cpuid).map_err(kvm("KVM_SET_CPUID2"))?;
        Ok(fd)
    }

    /// Starts a vCPU's thread, which maps these pages before the vCPU runs.
    pub(super) fn start_vcpu(
        &self,
        index: u8,
        fd: kvm_ioctls::VcpuFd,
        touched: Vec<PageRun>,
    ) -> Result<(), CpuError> {
        let handler: Arc<dyn ExitHandler> = self.board.clone();
        let (enter, memory) = (self.enter_vcpu.0.clone(), self.memory.clone());
        self.board.vcpus.add(index, fd, handler, move |fd| {
            map_ahead(fd, &memory, &touched);
            enter()
        })
    }

    /// Gives the machine a new generation id and announces it: a resumed guest learns that it is a copy.
    fn new_generation(&self) -> Result<(), MachineError> {
        use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
        let mut id = [0u8; 16];
        // SAFETY: the buffer is 16 bytes long and writable.
        let n = unsafe { libc::getrandom(id.as_mut_ptr().cast(), id.len(), 0) };
        if n != 16 {
            return Err(MachineError::Io {
                action: "drawing a generation id",
                source: std::io::Error::last_os_error(),
            });
        }
        let ram = self.memory.ram().memory();
        ram.write_slice(&id, GuestAddress(layout::VMGENID))
            .map_err(|e| MachineError::Io {
                action: "writing the generation id",
                source: std::io::Error::other(e),
            })?;
        self.board.event(Event::Generation);
        Ok(())
    }
}

fn board(
    seed: &VmSeed,
    console: Option<Mutex<Console>>,
    hotplug: HotplugRegisters,
    observer: Arc<dyn Observer>,
) -> Arc<Board> {
    Arc::new(Board {
        vm: seed.vm.clone(),
        pci: PciRoot::default(),
        hotplug: Mutex::new(hotplug),
        console,
        vcpus: Arc::new(Vcpus::default()),
        outcome: OnceLock::new(),
        observer,
    })
}

fn make_device(
    spec: &DeviceSpec,
    end: Option<HostEnd>,
    memory: &Arc<Memory>,
    rings: &Rings,
) -> Result<Box<dyn VirtioDevice>, MachineError> {
    let slot = spec.slot;
    let wrong = |what: &str| MachineError::Usage(format!("slot {slot}: {what}"));
    let device = |source: DeviceError| MachineError::Device { slot, source };
    match (&spec.kind, end) {
        (DeviceKind::Block { id, queues }, end) => {
            let mut block = Block::new(&BlockConfig {
                id: id.clone(),
                queues: *queues,
                queue_size: 128,
                read_only: false,
            });
            match end {
                Some(HostEnd::Disk { file, read_only }) => {
                    block
                        .attach(Box::new(open_disk(slot, file, read_only, rings)?))
                        .map_err(device)?;
                }
                Some(HostEnd::Overlay(overlay)) => {
                    block
                        .attach(Box::new(OverlayBackend::new(overlay)))
                        .map_err(device)?;
                }
                Some(_) => return Err(wrong("a disk wants a file or an overlay")),
                None => {}
            }
            Ok(Box::new(block))
        }
        (DeviceKind::Vsock { cid }, Some(HostEnd::Listener(listener))) => {
            Ok(Box::new(Vsock::new(*cid, Some(listener))))
        }
        (DeviceKind::Vsock { cid }, None) => Ok(Box::new(Vsock::new(*cid, None))),
        (DeviceKind::Rng, None) => Ok(Box::new(Rng::new())),
        (DeviceKind::Mem, None) => Ok(Box::new(Mem::new(memory.clone()))),
        (DeviceKind::Net { pairs, mac }, end) => {
            let mut net = Net::new(&NetConfig {
                mac: *mac,
                pairs: *pairs,
                queue_size: 256,
            });
            match end {
                Some(HostEnd::Tap(queues)) => {
                    net.attach(open_taps(slot, queues)?).map_err(device)?;
                }
                Some(_) => return Err(wrong("a network card wants taps")),
                None => {}
            }
            Ok(Box::new(net))
        }
        (DeviceKind::Fs { tag }, end) => {
            let mut fs = Fs::new(&FsConfig {
                tag: tag.clone(),
                queue_size: 128,
            });
            match end {
                Some(HostEnd::Files(server)) => fs.attach(server).map_err(device)?,
                Some(_) => return Err(wrong("a shared folder wants a directory")),
                None => {}
            }
            Ok(Box::new(fs))
        }
        (kind, Some(_)) => Err(wrong(&format!("{kind:?} takes no such host side"))),
    }
}

/// Tap queues as back ends.
pub(super) fn open_taps(
    slot: u8,
    queues: Vec<OwnedFd>,
) -> Result<Vec<Box<dyn NetBackend>>, MachineError> {
    let mut taps: Vec<Box<dyn NetBackend>> = Vec::with_capacity(queues.len());
    for fd in queues {
        let tap = Tap::new(fd).map_err(|source| MachineError::Tap { slot, source })?;
        taps.push(Box::new(tap));
    }
    Ok(taps)
}

/// A disk's file as a back end.
pub(super) fn open_disk(
    slot: u8,
    file: File,
    read_only: bool,
    rings: &Rings,
) -> Result<FileBackend, MachineError> {
    let mut disk =
        FileBackend::new(file, read_only).map_err(|source| MachineError::Disk { slot, source })?;
    disk.start(rings).map_err(|source| MachineError::Io {
        action: "preparing a disk's I/O",
        source,
    })?;
    Ok(disk)
}
