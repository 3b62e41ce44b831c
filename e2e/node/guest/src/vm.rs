//! A VM that never runs.
//!
//! KVM counts the vCPUs whose interrupt controller is off, and changes its own code when the count
//! leaves zero and comes back to it, which is with every vCPU that is made. QEMU 7.2 has a race there: a CPU
//! that translates the code while another one changes it may keep the breakpoint of the change for
//! good, and the node's kernel panics. One vCPU that is never started keeps the count above zero.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;

nix::ioctl_write_int_bad!(create_vm, nix::request_code_none!(0xae, 0x01));
nix::ioctl_write_int_bad!(create_irqchip, nix::request_code_none!(0xae, 0x60));
nix::ioctl_write_int_bad!(create_vcpu, nix::request_code_none!(0xae, 0x41));

/// As long as it lives, so does the VM.
#[derive(Debug)]
pub(crate) struct IdleVm {
    _vm: OwnedFd,
    _vcpu: OwnedFd,
}

impl IdleVm {
    /// Makes it; `None` on a node without KVM.
    pub(crate) fn make() -> Result<Option<Self>> {
        let Ok(kvm) = File::open("/dev/kvm") else {
            return Ok(None);
        };
        let vm = descriptor(|| {
            // SAFETY: KVM_CREATE_VM takes a number, the machine type, and returns a new descriptor.
            unsafe { create_vm(kvm.as_raw_fd(), 0) }
        })
        .context("KVM_CREATE_VM")?;
        // SAFETY: KVM_CREATE_IRQCHIP takes no argument.
        unsafe { create_irqchip(vm.as_raw_fd(), 0) }.context("KVM_CREATE_IRQCHIP")?;
        let vcpu = descriptor(|| {
            // SAFETY: KVM_CREATE_VCPU takes a number, the vCPU's, and returns a new descriptor.
            unsafe { create_vcpu(vm.as_raw_fd(), 0) }
        })
        .context("KVM_CREATE_VCPU")?;
        Ok(Some(IdleVm {
            _vm: vm,
            _vcpu: vcpu,
        }))
    }
}

fn descriptor(make: impl FnOnce() -> Result<i32, Errno>) -> Result<OwnedFd> {
    let raw = make()?;
    // SAFETY: KVM opened the descriptor just now, for nobody but us.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}
