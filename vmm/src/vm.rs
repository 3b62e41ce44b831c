//! The KVM objects every machine starts with.

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use kvm_ioctls::{Kvm, VmFd};

use crate::layout;

/// Why there is no VM.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// `/dev/kvm` can't be opened.
    #[error("/dev/kvm can't be opened; run `kiln doctor` to see what this machine can do")]
    Open(#[source] kvm_ioctls::Error),
    /// The thread that makes the VM could not give its rights up.
    #[error("entering the jail failed")]
    Jail(#[source] std::io::Error),
    /// A KVM call failed.
    #[error("{call} failed")]
    Call {
        /// The call.
        call: &'static str,
        /// KVM's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// A VM with its interrupt controllers, and nothing else.
#[derive(Debug)]
pub struct VmSeed {
    /// The KVM system descriptor.
    pub kvm: Kvm,
    /// The VM.
    pub vm: Arc<VmFd>,
}

impl VmSeed {
    /// Opens `/dev/kvm` (or takes `kvm`, an open descriptor of it) and makes the VM.
    ///
    /// KVM_CREATE_VM can wait for an RCU grace period (it starts a kernel thread for `nx_huge_pages` and moves
    /// it to our cgroup), many times what all the rest of a resume takes. So this runs on a thread of its own
    /// while the main thread reads its command; in a process that was started ahead of time it is long over.
    pub fn create(kvm: Option<OwnedFd>) -> Result<Self, VmError> {
        let call = |call| move |source| VmError::Call { call, source };
        let kvm = match kvm {
            // SAFETY: ownership of an open descriptor is passed on; if it is not KVM's, the ioctls fail.
            Some(fd) => unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) },
            None => Kvm::new().map_err(VmError::Open)?,
        };
        let vm = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
        // Intel without unrestricted guests runs real mode in a task whose pages KVM needs from us.
        vm.set_tss_address(layout::KVM_TSS as usize)
            .map_err(call("KVM_SET_TSS_ADDR"))?;
        // Local APICs, I/O APIC, PICs. No PIT: Linux uses the TSC deadline timer, and a PIT's thread costs two
        // grace periods at the end.
        vm.create_irq_chip().map_err(call("KVM_CREATE_IRQCHIP"))?;
        Ok(Self {
            kvm,
            vm: Arc::new(vm),
        })
    }
}
