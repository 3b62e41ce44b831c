//! The few KVM ioctls the probe needs, as bare system calls.
//!
//! The probe's child runs between `clone` and `_exit` in a copy of a process that may have had many
//! threads, where only async-signal-safe calls are sound: no allocation, no locks. That rules out
//! `kvm-ioctls`, whose wrappers allocate.

use std::ffi::{c_int, c_ulong};

use kvm_bindings as kvm;

const fn number(direction: c_ulong, nr: c_ulong, size: usize) -> c_ulong {
    direction << 30 | (size as c_ulong) << 16 | (kvm::KVMIO as c_ulong) << 8 | nr
}
const fn none(nr: c_ulong) -> c_ulong {
    number(0, nr, 0)
}
const fn write<T>(nr: c_ulong) -> c_ulong {
    number(1, nr, size_of::<T>())
}
const fn read<T>(nr: c_ulong) -> c_ulong {
    number(2, nr, size_of::<T>())
}
const fn both<T>(nr: c_ulong) -> c_ulong {
    number(3, nr, size_of::<T>())
}

pub(crate) const GET_API_VERSION: c_ulong = none(0x00);
pub(crate) const CREATE_VM: c_ulong = none(0x01);
pub(crate) const CHECK_EXTENSION: c_ulong = none(0x03);
pub(crate) const GET_VCPU_MMAP_SIZE: c_ulong = none(0x04);
pub(crate) const GET_SUPPORTED_CPUID: c_ulong = both::<kvm::kvm_cpuid2>(0x05);
pub(crate) const CREATE_VCPU: c_ulong = none(0x41);
pub(crate) const SET_USER_MEMORY_REGION: c_ulong = write::<kvm::kvm_userspace_memory_region>(0x46);
pub(crate) const SET_TSS_ADDR: c_ulong = none(0x47);
pub(crate) const SET_IDENTITY_MAP_ADDR: c_ulong = write::<u64>(0x48);
pub(crate) const CREATE_IRQCHIP: c_ulong = none(0x60);
pub(crate) const SET_GSI_ROUTING: c_ulong = write::<kvm::kvm_irq_routing>(0x6a);
pub(crate) const IRQFD: c_ulong = write::<kvm::kvm_irqfd>(0x76);
pub(crate) const IOEVENTFD: c_ulong = write::<kvm::kvm_ioeventfd>(0x79);
pub(crate) const RUN: c_ulong = none(0x80);
pub(crate) const GET_REGS: c_ulong = read::<kvm::kvm_regs>(0x81);
pub(crate) const SET_REGS: c_ulong = write::<kvm::kvm_regs>(0x82);
pub(crate) const GET_SREGS: c_ulong = read::<kvm::kvm_sregs>(0x83);
pub(crate) const SET_SREGS: c_ulong = write::<kvm::kvm_sregs>(0x84);
pub(crate) const SET_CPUID2: c_ulong = write::<kvm::kvm_cpuid2>(0x90);

// The formula, checked against numbers as `linux/kvm.h` documents them for x86-64.
const _: () = assert!(
    CREATE_VM == 0xae01
        && GET_SUPPORTED_CPUID == 0xc008_ae05
        && SET_USER_MEMORY_REGION == 0x4020_ae46
        && SET_GSI_ROUTING == 0x4008_ae6a
        && IRQFD == 0x4020_ae76
        && IOEVENTFD == 0x4040_ae79
        && RUN == 0xae80
        && GET_REGS == 0x8090_ae81
        && SET_SREGS == 0x4138_ae84
);

fn errno() -> c_int {
    // SAFETY: the address of the calling thread's errno is always valid.
    unsafe { *libc::__errno_location() }
}

fn result(value: c_int) -> Result<c_int, c_int> {
    if value < 0 { Err(errno()) } else { Ok(value) }
}

/// An ioctl whose argument is a number.
pub(crate) fn value(fd: c_int, request: c_ulong, argument: u64) -> Result<c_int, c_int> {
    // SAFETY: the requests of this module that take a number touch no memory of the caller, save
    // the run area, which the kernel shares by a mapping of its own.
    result(unsafe { libc::ioctl(fd, request, argument) })
}

/// An ioctl whose argument is a structure.
///
/// # Safety
/// `T` is what `request` expects, flexible array included.
pub(crate) unsafe fn pointer<T>(
    fd: c_int,
    request: c_ulong,
    argument: &mut T,
) -> Result<c_int, c_int> {
    // SAFETY: the caller's promise; the reference is valid and exclusive for the call.
    result(unsafe { libc::ioctl(fd, request, std::ptr::from_mut(argument)) })
}
