//! What the child does: makes a VM as kiln does, and takes the guest through its steps.
//!
//! Everything here runs after `clone` in the child (see [`crate::contained`]): bare system calls
//! and memory that was there before.

use std::ffi::c_int;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering::Relaxed};

use kvm_bindings as kvm;

use crate::contained::Zeroable;
use crate::guest::{self, Step};
use crate::ioctl;

/// Capabilities kiln cannot do without, each with the least value that will do.
pub(crate) const REQUIRED: [(u32, i32, &str); 19] = [
    (kvm::KVM_CAP_IRQCHIP, 1, "KVM_CAP_IRQCHIP"),
    (kvm::KVM_CAP_USER_MEMORY, 1, "KVM_CAP_USER_MEMORY"),
    (kvm::KVM_CAP_EXT_CPUID, 1, "KVM_CAP_EXT_CPUID"),
    (kvm::KVM_CAP_MP_STATE, 1, "KVM_CAP_MP_STATE"),
    (kvm::KVM_CAP_IRQ_ROUTING, 1, "KVM_CAP_IRQ_ROUTING"),
    (kvm::KVM_CAP_IRQFD, 1, "KVM_CAP_IRQFD"),
    (kvm::KVM_CAP_IOEVENTFD, 1, "KVM_CAP_IOEVENTFD"),
    (kvm::KVM_CAP_SIGNAL_MSI, 1, "KVM_CAP_SIGNAL_MSI"),
    (kvm::KVM_CAP_ADJUST_CLOCK, 1, "KVM_CAP_ADJUST_CLOCK"),
    (kvm::KVM_CAP_VCPU_EVENTS, 1, "KVM_CAP_VCPU_EVENTS"),
    (kvm::KVM_CAP_DEBUGREGS, 1, "KVM_CAP_DEBUGREGS"),
    (kvm::KVM_CAP_XSAVE, 1, "KVM_CAP_XSAVE"),
    (kvm::KVM_CAP_XCRS, 1, "KVM_CAP_XCRS"),
    (kvm::KVM_CAP_GET_TSC_KHZ, 1, "KVM_CAP_GET_TSC_KHZ"),
    (
        kvm::KVM_CAP_TSC_DEADLINE_TIMER,
        1,
        "KVM_CAP_TSC_DEADLINE_TIMER",
    ),
    (kvm::KVM_CAP_IMMEDIATE_EXIT, 1, "KVM_CAP_IMMEDIATE_EXIT"),
    (
        kvm::KVM_CAP_IOEVENTFD_ANY_LENGTH,
        1,
        "KVM_CAP_IOEVENTFD_ANY_LENGTH",
    ),
    (kvm::KVM_CAP_NR_MEMSLOTS, 32, "KVM_CAP_NR_MEMSLOTS"),
    (kvm::KVM_CAP_MAX_VCPUS, 1, "KVM_CAP_MAX_VCPUS"),
];

/// Which call of the host's side was the last one made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Call {
    None = 0,
    ApiVersion,
    CreateVm,
    CreateIrqchip,
    SetTss,
    Memory,
    CreateVcpu,
    RunArea,
    Cpuid,
    Registers,
    EventFd,
    Routing,
    Irqfd,
    Ioeventfd,
    Run,
    ImmediateExit,
}

impl Call {
    const ALL: [(Call, &str); 16] = [
        (Call::None, "nothing"),
        (Call::ApiVersion, "KVM_GET_API_VERSION"),
        (Call::CreateVm, "KVM_CREATE_VM"),
        (Call::CreateIrqchip, "KVM_CREATE_IRQCHIP"),
        (Call::SetTss, "KVM_SET_TSS_ADDR"),
        (Call::Memory, "KVM_SET_USER_MEMORY_REGION"),
        (Call::CreateVcpu, "KVM_CREATE_VCPU"),
        (Call::RunArea, "mapping the vCPU's run area"),
        (Call::Cpuid, "KVM_SET_CPUID2"),
        (Call::Registers, "KVM_SET_SREGS"),
        (Call::EventFd, "eventfd"),
        (Call::Routing, "KVM_SET_GSI_ROUTING"),
        (Call::Irqfd, "KVM_IRQFD"),
        (Call::Ioeventfd, "KVM_IOEVENTFD"),
        (Call::Run, "KVM_RUN"),
        (Call::ImmediateExit, "KVM_RUN with immediate_exit"),
    ];

    pub(crate) fn name(number: u32) -> &'static str {
        Call::ALL
            .iter()
            .find(|(call, _)| *call as u32 == number)
            .map_or("an unknown call", |c| c.1)
    }
}

/// What the child answers. `verdict` is written last.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Progress {
    pub(crate) verdict: AtomicU32,
    pub(crate) call: AtomicU32,
    /// Steps the guest has finished.
    pub(crate) steps: AtomicU32,
    pub(crate) errno: AtomicI32,
    pub(crate) exit_reason: AtomicU32,
    /// Sub-error of an internal error, hardware reason of a failed entry, value of a wrong output.
    pub(crate) detail: AtomicU64,
    pub(crate) rip: AtomicU64,
    pub(crate) capability: AtomicU32,
    pub(crate) capability_value: AtomicI32,
    pub(crate) max_vcpus: AtomicI32,
    pub(crate) memory_slots: AtomicI32,
}
// SAFETY: atomics only; zero is a value of each.
unsafe impl Zeroable for Progress {}

/// The child's verdict. Zero means that it never came to one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Verdict {
    Usable = 1,
    MissingCapability,
    CallFailed,
    UnexpectedExit,
    WrongOutput,
    WrongResult,
    NoDoorbell,
    NoImmediateExit,
    ApiVersion,
}

const IRQCHIP_PINS: u32 = 24;
const CPUID_ENTRIES: usize = 256;

#[repr(C)]
struct Cpuid {
    nent: u32,
    padding: u32,
    entries: [kvm::kvm_cpuid_entry2; CPUID_ENTRIES],
}

#[repr(C)]
struct Routing {
    nr: u32,
    flags: u32,
    entry: kvm::kvm_irq_routing_entry,
}

// What stands before a flexible array must be what the kernel's structure has there.
const _: () = assert!(std::mem::offset_of!(Cpuid, entries) == size_of::<kvm::kvm_cpuid2>());
const _: () = assert!(std::mem::offset_of!(Routing, entry) == size_of::<kvm::kvm_irq_routing>());

/// Memory and descriptors prepared by the parent.
pub(crate) struct Prepared<'a> {
    pub(crate) kvm: c_int,
    /// Guest memory: `guest::MEMORY` bytes, page-aligned, private to the child after the copy.
    pub(crate) memory: *mut u8,
    pub(crate) progress: &'a Progress,
}

/// Takes the guest through all its steps. The answer is in `progress`; the exit code says nothing.
pub(crate) fn probe(with: &Prepared<'_>) -> i32 {
    let verdict = match drive(with) {
        Ok(()) => Verdict::Usable,
        Err(verdict) => verdict,
    };
    with.progress.verdict.store(verdict as u32, Relaxed);
    0
}

impl Prepared<'_> {
    fn call<T>(&self, call: Call, result: Result<T, c_int>) -> Result<T, Verdict> {
        self.progress.call.store(call as u32, Relaxed);
        result.map_err(|errno| {
            self.progress.errno.store(errno, Relaxed);
            Verdict::CallFailed
        })
    }

    fn memory(&self) -> &[u8] {
        // SAFETY: the parent mapped MEMORY bytes here; the only vCPU that writes to them is this
        // very thread, and not while it runs this.
        unsafe { std::slice::from_raw_parts(self.memory, guest::MEMORY) }
    }
}

fn drive(with: &Prepared<'_>) -> Result<(), Verdict> {
    let progress = with.progress;
    let version = ioctl::value(with.kvm, ioctl::GET_API_VERSION, 0);
    if with.call(Call::ApiVersion, version)? != 12 {
        return Err(Verdict::ApiVersion);
    }
    for (capability, least, _) in REQUIRED {
        let found =
            ioctl::value(with.kvm, ioctl::CHECK_EXTENSION, u64::from(capability)).unwrap_or(0);
        match capability {
            kvm::KVM_CAP_MAX_VCPUS => progress.max_vcpus.store(found, Relaxed),
            kvm::KVM_CAP_NR_MEMSLOTS => progress.memory_slots.store(found, Relaxed),
            _ => {}
        }
        if found < least {
            progress.capability.store(capability, Relaxed);
            progress.capability_value.store(found, Relaxed);
            return Err(Verdict::MissingCapability);
        }
    }

    let vm = with.call(Call::CreateVm, ioctl::value(with.kvm, ioctl::CREATE_VM, 0))?;
    // Intel CPUs without unrestricted guests need these; others take no notice.
    with.call(
        Call::SetTss,
        ioctl::value(vm, ioctl::SET_TSS_ADDR, 0xfffb_d000),
    )?;
    let mut identity_map = 0xfffb_c000u64;
    // SAFETY: the request takes a pointer to a 64-bit address.
    let done = unsafe { ioctl::pointer(vm, ioctl::SET_IDENTITY_MAP_ADDR, &mut identity_map) };
    with.call(Call::SetTss, done)?;
    with.call(
        Call::CreateIrqchip,
        ioctl::value(vm, ioctl::CREATE_IRQCHIP, 0),
    )?;
    let mut region = kvm::kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: guest::MEMORY as u64,
        userspace_addr: with.memory as u64,
    };
    // SAFETY: the structure of this request; the memory outlives the VM, which ends with us.
    let done = unsafe { ioctl::pointer(vm, ioctl::SET_USER_MEMORY_REGION, &mut region) };
    with.call(Call::Memory, done)?;

    let vcpu = with.call(Call::CreateVcpu, ioctl::value(vm, ioctl::CREATE_VCPU, 0))?;
    let run = map_run_area(with, vcpu)?;
    let vendor = set_cpuid(with, vcpu)?;
    set_registers(with, vcpu)?;
    let wake = wire_msi(with, vm)?;
    let doorbell = wire_doorbell(with, vm)?;

    for step in Step::ALL {
        run_to_output(with, vcpu, run, step)?;
        if !guest::check(step, with.memory(), vendor) {
            return Err(Verdict::WrongResult);
        }
        if step == Step::UserMode {
            // The guest goes to sleep next; this wakes it.
            with.call(Call::Irqfd, write_event(wake))?;
        }
        if step == Step::Doorbell && !event_is_set(doorbell) {
            return Err(Verdict::NoDoorbell);
        }
        progress.steps.store(step as u32, Relaxed);
    }

    // SAFETY: the run area is shared with the kernel only, which is not in KVM_RUN now.
    unsafe { (*run.at).immediate_exit = 1 };
    progress.call.store(Call::ImmediateExit as u32, Relaxed);
    match ioctl::value(vcpu, ioctl::RUN, 0) {
        Err(libc::EINTR) => Ok(()),
        _ => Err(Verdict::NoImmediateExit),
    }
}

/// The page or so that a vCPU shares with its owner.
#[derive(Clone, Copy)]
struct RunArea {
    at: *mut kvm::kvm_run,
    size: usize,
}

fn map_run_area(with: &Prepared<'_>, vcpu: c_int) -> Result<RunArea, Verdict> {
    let size = with
        .call(
            Call::RunArea,
            ioctl::value(with.kvm, ioctl::GET_VCPU_MMAP_SIZE, 0),
        )?
        .unsigned_abs() as usize;
    if size < size_of::<kvm::kvm_run>() {
        return Err(Verdict::CallFailed);
    }
    // SAFETY: a new shared mapping of the vCPU; size as the kernel says.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            vcpu,
            0,
        )
    };
    let mapped = if at == libc::MAP_FAILED {
        Err(libc::ENOMEM)
    } else {
        Ok(RunArea {
            at: at.cast(),
            size,
        })
    };
    with.call(Call::RunArea, mapped)
}

/// Promises the guest the CPU that KVM offers, and returns the vendor it should read.
fn set_cpuid(with: &Prepared<'_>, vcpu: c_int) -> Result<[u32; 3], Verdict> {
    let mut cpuid = Cpuid {
        nent: CPUID_ENTRIES as u32,
        padding: 0,
        entries: [kvm::kvm_cpuid_entry2::default(); CPUID_ENTRIES],
    };
    // SAFETY: `nent` entries follow the header, as both requests expect.
    let done = unsafe { ioctl::pointer(with.kvm, ioctl::GET_SUPPORTED_CPUID, &mut cpuid) };
    with.call(Call::Cpuid, done)?;
    let mut vendor = [0; 3];
    for entry in cpuid.entries.iter_mut().take(cpuid.nent as usize) {
        match entry.function {
            0 => vendor = [entry.ebx, entry.edx, entry.ecx],
            // APIC id of the only vCPU.
            1 => entry.ebx &= 0x00ff_ffff,
            0xb | 0x1f => entry.edx = 0,
            _ => {}
        }
    }
    // SAFETY: as above.
    let done = unsafe { ioctl::pointer(vcpu, ioctl::SET_CPUID2, &mut cpuid) };
    with.call(Call::Cpuid, done)?;
    Ok(vendor)
}

fn set_registers(with: &Prepared<'_>, vcpu: c_int) -> Result<(), Verdict> {
    let mut special = kvm::kvm_sregs::default();
    // SAFETY: the structure of both requests.
    let done = unsafe { ioctl::pointer(vcpu, ioctl::GET_SREGS, &mut special) };
    with.call(Call::Registers, done)?;
    // The rest is as after reset: real mode.
    special.cs.base = guest::CODE;
    special.cs.selector = (guest::CODE >> 4) as u16;
    // SAFETY: as above.
    let done = unsafe { ioctl::pointer(vcpu, ioctl::SET_SREGS, &mut special) };
    with.call(Call::Registers, done)?;
    let mut regs = kvm::kvm_regs {
        rip: 0,
        rflags: 2,
        ..Default::default()
    };
    // SAFETY: the structure of this request.
    let done = unsafe { ioctl::pointer(vcpu, ioctl::SET_REGS, &mut regs) };
    with.call(Call::Registers, done)?;
    Ok(())
}

fn event(with: &Prepared<'_>) -> Result<c_int, Verdict> {
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
    with.call(
        Call::EventFd,
        if fd < 0 { Err(libc::EMFILE) } else { Ok(fd) },
    )
}

/// Routes an interrupt line of the VM to an MSI, as every virtio device of kiln does.
fn wire_msi(with: &Prepared<'_>, vm: c_int) -> Result<c_int, Verdict> {
    let mut routing = Routing {
        nr: 1,
        flags: 0,
        entry: kvm::kvm_irq_routing_entry {
            gsi: IRQCHIP_PINS,
            type_: kvm::KVM_IRQ_ROUTING_MSI,
            ..Default::default()
        },
    };
    routing.entry.u.msi = kvm::kvm_irq_routing_msi {
        address_lo: 0xfee0_0000,
        address_hi: 0,
        data: u32::from(guest::MSI_VECTOR),
        ..Default::default()
    };
    // SAFETY: `nr` entries follow the header, as the request expects.
    let done = unsafe { ioctl::pointer(vm, ioctl::SET_GSI_ROUTING, &mut routing) };
    with.call(Call::Routing, done)?;
    let fd = event(with)?;
    let mut irqfd = kvm::kvm_irqfd {
        fd: fd.unsigned_abs(),
        gsi: IRQCHIP_PINS,
        ..Default::default()
    };
    // SAFETY: the structure of this request.
    let done = unsafe { ioctl::pointer(vm, ioctl::IRQFD, &mut irqfd) };
    with.call(Call::Irqfd, done)?;
    Ok(fd)
}

fn wire_doorbell(with: &Prepared<'_>, vm: c_int) -> Result<c_int, Verdict> {
    let fd = event(with)?;
    let mut ioeventfd = kvm::kvm_ioeventfd {
        addr: guest::DOORBELL,
        len: 0,
        fd,
        ..Default::default()
    };
    // SAFETY: the structure of this request.
    let done = unsafe { ioctl::pointer(vm, ioctl::IOEVENTFD, &mut ioeventfd) };
    with.call(Call::Ioeventfd, done)?;
    Ok(fd)
}

fn write_event(fd: c_int) -> Result<(), c_int> {
    let one = 1u64;
    // SAFETY: eight bytes that outlive the call.
    let written = unsafe { libc::write(fd, (&raw const one).cast(), 8) };
    if written == 8 { Ok(()) } else { Err(libc::EIO) }
}

fn event_is_set(fd: c_int) -> bool {
    let mut count = 0u64;
    // SAFETY: eight bytes that outlive the call.
    let taken = unsafe { libc::read(fd, (&raw mut count).cast(), 8) };
    taken == 8 && count == 1
}

fn run_to_output(
    with: &Prepared<'_>,
    vcpu: c_int,
    run: RunArea,
    step: Step,
) -> Result<(), Verdict> {
    loop {
        match ioctl::value(vcpu, ioctl::RUN, 0) {
            Err(libc::EINTR | libc::EAGAIN) => continue,
            result => with.call(Call::Run, result)?,
        };
        break;
    }
    // SAFETY: the kernel is not in KVM_RUN; `run` is mapped for as long as this process lives.
    let area = unsafe { &*run.at };
    with.progress.exit_reason.store(area.exit_reason, Relaxed);
    let output = match area.exit_reason {
        kvm::KVM_EXIT_IO => {
            // SAFETY: the kernel filled in the variant that belongs to this exit reason.
            let io = unsafe { area.__bindgen_anon_1.io };
            let wanted = u32::from(io.direction) == kvm::KVM_EXIT_IO_OUT
                && io.port == guest::PORT
                && io.size == 4
                && io.count == 1;
            let mut value = 0u32;
            if wanted && io.data_offset as usize <= run.size - 4 {
                // SAFETY: KVM puts the datum at this offset, inside the area it had us map.
                value = unsafe {
                    run.at
                        .cast::<u8>()
                        .add(io.data_offset as usize)
                        .cast::<u32>()
                        .read_unaligned()
                };
            }
            Some(value)
        }
        kvm::KVM_EXIT_INTERNAL_ERROR => {
            // SAFETY: as above.
            let suberror = unsafe { area.__bindgen_anon_1.internal.suberror };
            with.progress.detail.store(u64::from(suberror), Relaxed);
            None
        }
        kvm::KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: as above.
            let hardware = unsafe {
                area.__bindgen_anon_1
                    .fail_entry
                    .hardware_entry_failure_reason
            };
            with.progress.detail.store(hardware, Relaxed);
            None
        }
        _ => None,
    };
    if output == Some(step as u32) {
        return Ok(());
    }
    let mut regs = kvm::kvm_regs::default();
    // SAFETY: the structure of this request. Failing leaves zeros, which is good enough here.
    let _ = unsafe { ioctl::pointer(vcpu, ioctl::GET_REGS, &mut regs) };
    with.progress.rip.store(regs.rip, Relaxed);
    match output {
        Some(value) => {
            with.progress.detail.store(u64::from(value), Relaxed);
            Err(Verdict::WrongOutput)
        }
        None => Err(Verdict::UnexpectedExit),
    }
}
