//! A vCPU's registers: read out, put back.

use kvm_bindings::{
    CpuId, MsrList, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

/// Why a vCPU could not be made, read or written.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// A KVM call failed.
    #[error("{call} failed for vCPU {index}")]
    Kvm {
        /// The call.
        call: &'static str,
        /// The vCPU.
        index: u8,
        /// KVM's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM refused a part of a saved vCPU.
    #[error("{call} failed for what was saved of vCPU {index}")]
    Restore {
        /// The call.
        call: &'static str,
        /// The vCPU.
        index: u8,
        /// KVM's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM took some model-specific registers, but not this one.
    #[error("KVM refused MSR {msr:#x} of vCPU {index}; the snapshot is from another kind of host")]
    Msr {
        /// The register.
        msr: u32,
        /// The vCPU.
        index: u8,
    },
    /// A list was longer than KVM's bindings allow.
    #[error("too many {what} entries for vCPU {index}")]
    TooMany {
        /// What there were too many of.
        what: &'static str,
        /// The vCPU.
        index: u8,
    },
    /// A thread could not be started.
    #[error("starting the thread of vCPU {index} failed")]
    Thread {
        /// The vCPU.
        index: u8,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
}

/// One vCPU's state as saved. The KVM structs go in as the kernel lays them out.
#[derive(Serialize, Deserialize)]
pub struct VcpuState {
    /// Index and APIC id.
    pub index: u8,
    /// CPUID as shown to the guest.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Frequency of its time-stamp counter in kHz.
    pub tsc_khz: u32,
    /// Running, halted, waiting for start-up.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, control registers, APIC base.
    pub sregs: kvm_sregs,
    /// Vector and floating-point state.
    pub xsave: kvm_xsave,
    /// Extended control registers.
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    pub debug_regs: kvm_debugregs,
    /// Local APIC.
    pub lapic: kvm_lapic_state,
    /// Model-specific registers.
    pub msrs: Vec<kvm_msr_entry>,
    /// Pending exceptions, interrupts, NMIs.
    pub events: kvm_vcpu_events,
}

impl std::fmt::Debug for VcpuState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VcpuState")
            .field("index", &self.index)
            .field("rip", &format_args!("{:#x}", self.regs.rip))
            .finish_non_exhaustive()
    }
}

const TRIP: () = {
    // These structs are stored as raw bytes: a new size means a new format (docs/vmm.md).
    assert!(size_of::<kvm_cpuid_entry2>() == 40);
    assert!(size_of::<kvm_regs>() == 144);
    assert!(size_of::<kvm_sregs>() == 312);
    assert!(size_of::<kvm_xsave>() == 4096);
    assert!(size_of::<kvm_xcrs>() == 392);
    assert!(size_of::<kvm_debugregs>() == 128);
    assert!(size_of::<kvm_lapic_state>() == 1024);
    assert!(size_of::<kvm_msr_entry>() == 16);
    assert!(size_of::<kvm_vcpu_events>() == 64);
};

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

impl VcpuState {
    /// Reads a vCPU that is not running and has completed its last exit.
    pub fn save(fd: &VcpuFd, index: u8, msr_list: &MsrList) -> Result<Self, CpuError> {
        let () = TRIP;
        let kvm = |call| {
            move |source| CpuError::Kvm {
                call,
                index,
                source,
            }
        };
        // MP state first: reading it settles pending INIT and SIPI into the rest.
        let mp_state = fd.get_mp_state().map_err(kvm("KVM_GET_MP_STATE"))?;
        let cpuid = fd
            .get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm("KVM_GET_CPUID2"))?
            .as_slice()
            .to_vec();
        Ok(Self {
            index,
            cpuid,
            tsc_khz: fd.get_tsc_khz().map_err(kvm("KVM_GET_TSC_KHZ"))?,
            mp_state,
            regs: fd.get_regs().map_err(kvm("KVM_GET_REGS"))?,
            sregs: fd.get_sregs().map_err(kvm("KVM_GET_SREGS"))?,
            xsave: fd.get_xsave().map_err(kvm("KVM_GET_XSAVE"))?,
            xcrs: fd.get_xcrs().map_err(kvm("KVM_GET_XCRS"))?,
            debug_regs: fd.get_debug_regs().map_err(kvm("KVM_GET_DEBUGREGS"))?,
            lapic: fd.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?,
            msrs: save_msrs(fd, index, msr_list)?,
            events: fd.get_vcpu_events().map_err(kvm("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Writes the state into a fresh vCPU.
    pub fn restore(&self, fd: &VcpuFd) -> Result<(), CpuError> {
        let index = self.index;
        let kvm = |call| {
            move |source| CpuError::Restore {
                call,
                index,
                source,
            }
        };
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| CpuError::TooMany {
            what: "CPUID",
            index,
        })?;
        fd.set_cpuid2(&cpuid).map_err(kvm("KVM_SET_CPUID2"))?;
        let here = fd.get_tsc_khz().map_err(kvm("KVM_GET_TSC_KHZ"))?;
        // The host measures its own frequency anew at each boot: a quarter of a per mille is no difference.
        if here.abs_diff(self.tsc_khz) > self.tsc_khz / 4000 {
            fd.set_tsc_khz(self.tsc_khz)
                .map_err(kvm("KVM_SET_TSC_KHZ"))?;
        }
        fd.set_mp_state(self.mp_state)
            .map_err(kvm("KVM_SET_MP_STATE"))?;
        fd.set_regs(&self.regs).map_err(kvm("KVM_SET_REGS"))?;
        // APIC base is in SREGS and decides how SET_LAPIC reads its page (x2APIC or not).
        fd.set_sregs(&self.sregs).map_err(kvm("KVM_SET_SREGS"))?;
        // SAFETY: the kernel reads exactly size_of::<kvm_xsave>() bytes unless a guest was given dynamic XSAVE
        // features, which `cpuid` masks out and this process never asks permission for.
        unsafe { fd.set_xsave(&self.xsave) }.map_err(kvm("KVM_SET_XSAVE"))?;
        fd.set_xcrs(&self.xcrs).map_err(kvm("KVM_SET_XCRS"))?;
        fd.set_debug_regs(&self.debug_regs)
            .map_err(kvm("KVM_SET_DEBUGREGS"))?;
        fd.set_lapic(&self.lapic).map_err(kvm("KVM_SET_LAPIC"))?;
        set_msrs(fd, index, &self.msrs)?;
        fd.set_vcpu_events(&self.events)
            .map_err(kvm("KVM_SET_VCPU_EVENTS"))
    }
}

fn save_msrs(fd: &VcpuFd, index: u8, list: &MsrList) -> Result<Vec<kvm_msr_entry>, CpuError> {
    let mut all: Vec<kvm_msr_entry> = list
        .as_slice()
        .iter()
        .map(|&i| kvm_msr_entry {
            index: i,
            ..Default::default()
        })
        .collect();
    // The deadline is armed relative to the TSC: it goes back in after it.
    all.sort_by_key(|m| match m.index {
        MSR_TSC => 0,
        MSR_TSC_DEADLINE => 2,
        _ => 1,
    });
    let mut got = Vec::with_capacity(all.len());
    let mut rest = all.as_slice();
    while !rest.is_empty() {
        let mut msrs = Msrs::from_entries(rest.get(..256).unwrap_or(rest))
            .map_err(|_| CpuError::TooMany { what: "MSR", index })?;
        let n = fd.get_msrs(&mut msrs).map_err(|source| CpuError::Kvm {
            call: "KVM_GET_MSRS",
            index,
            source,
        })?;
        got.extend_from_slice(msrs.as_slice().get(..n).unwrap_or_default());
        // KVM stops at a register this vCPU does not have (its index list is the host's, not the guest's).
        let asked = msrs.as_slice().len();
        rest = rest
            .get(if n < asked { n + 1 } else { n }..)
            .unwrap_or_default();
    }
    Ok(got)
}

/// Writes model-specific registers, all or an error.
pub fn set_msrs(fd: &VcpuFd, index: u8, entries: &[kvm_msr_entry]) -> Result<(), CpuError> {
    for chunk in entries.chunks(256) {
        let msrs =
            Msrs::from_entries(chunk).map_err(|_| CpuError::TooMany { what: "MSR", index })?;
        let n = fd.set_msrs(&msrs).map_err(|source| CpuError::Kvm {
            call: "KVM_SET_MSRS",
            index,
            source,
        })?;
        if let Some(refused) = chunk.get(n) {
            return Err(CpuError::Msr {
                msr: refused.index,
                index,
            });
        }
    }
    Ok(())
}
