//! The CPUID a guest sees: what KVM supports, without what cannot be saved, plus topology.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use crate::layout::MAX_CPUS;

/// KVM paravirtual features the guest does without. Asynchronous page faults (bits 4, 10, 14) leave
/// tokens in flight that a snapshot would have to carry.
const KVM_FEATURES_OFF: u32 = 1 << 4 | 1 << 10 | 1 << 14;
const KVM_FEATURES: u32 = 0x4000_0001;

/// CPUID entries for the vCPU with this index, which is also its APIC id.
pub fn for_vcpu(supported: &CpuId, index: u8) -> CpuId {
    let mut cpuid = supported.clone();
    for e in cpuid.as_mut_slice() {
        adjust(e, index);
    }
    cpuid
}

fn adjust(e: &mut kvm_cpuid_entry2, index: u8) {
    let id = u32::from(index);
    match e.function {
        1 => {
            // Initial APIC id and the number of ids; CLFLUSH size stays.
            e.ebx = (e.ebx & 0x0000_ffff) | (u32::from(MAX_CPUS) << 16) | (id << 24);
            // Out: VMX (no nesting). In: the hypervisor bit, x2APIC and the TSC deadline timer, which
            // KVM_GET_SUPPORTED_CPUID leaves to us because they need the in-kernel local APIC.
            e.ecx &= !(1 << 5);
            e.ecx |= 1 << 31 | 1 << 24 | 1 << 21;
            // HTT: the id count above is valid.
            e.edx |= 1 << 28;
        }
        4 => {
            // One thread a core, every core its own cache: nothing to share is ever wrong.
            e.eax &= 0x0000_3fff;
            e.eax |= u32::from(MAX_CPUS - 1) << 26;
        }
        // AMX: its tile state would make the saved XSAVE area larger than the legacy 4 KiB.
        7 if e.index == 0 => e.edx &= !(1 << 22 | 1 << 24 | 1 << 25),
        0xb | 0x1f => {
            e.edx = id;
            match e.index {
                0 => {
                    e.eax = 0;
                    e.ebx = 1;
                    e.ecx = 1 << 8;
                }
                1 => {
                    e.eax = u32::from(MAX_CPUS).trailing_zeros();
                    e.ebx = u32::from(MAX_CPUS);
                    e.ecx = 1 | 2 << 8;
                }
                _ => {
                    e.eax = 0;
                    e.ebx = 0;
                    e.ecx = e.index;
                }
            }
        }
        0xd => match e.index {
            0 => e.eax &= !(1 << 17 | 1 << 18),
            17 | 18 => {
                e.eax = 0;
                e.ebx = 0;
                e.ecx = 0;
                e.edx = 0;
            }
            _ => {}
        },
        // Performance counters: their state is the host's business, and the guest's watchdog would use one.
        0xa => {
            e.eax = 0;
            e.ebx = 0;
            e.ecx = 0;
            e.edx = 0;
        }
        KVM_FEATURES => e.eax &= !KVM_FEATURES_OFF,
        0x8000_0001 => e.ecx &= !(1 << 2),
        0x8000_0008 => e.ecx = (e.ecx & !0xf0ff) | (6 << 12) | u32::from(MAX_CPUS - 1),
        0x8000_000a => {
            e.eax = 0;
            e.ebx = 0;
            e.edx = 0;
        }
        0x8000_001d => e.eax &= 0x0000_3fff,
        0x8000_001e => {
            e.eax = id;
            e.ebx = id;
            e.ecx = 0;
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, ones: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: ones,
            ebx: ones,
            ecx: ones,
            edx: ones,
            ..Default::default()
        }
    }

    #[test]
    fn guest_sees_no_nesting_and_its_own_apic_id() {
        let all = [entry(1, 0, !0), entry(0x8000_0001, 0, !0), entry(0xb, 0, 0)];
        let supported = CpuId::from_entries(&all).unwrap();
        let got = for_vcpu(&supported, 3);
        let got = got.as_slice();
        assert_eq!(got[0].ecx & (1 << 5), 0, "VMX");
        assert_eq!(got[0].ebx >> 24, 3);
        assert_eq!(got[1].ecx & (1 << 2), 0, "SVM");
        assert_eq!(got[2].edx, 3);
    }

    #[test]
    fn async_page_faults_are_off() {
        let supported = CpuId::from_entries(&[entry(KVM_FEATURES, 0, !0)]).unwrap();
        assert_eq!(for_vcpu(&supported, 0).as_slice()[0].eax, !KVM_FEATURES_OFF);
    }
}
