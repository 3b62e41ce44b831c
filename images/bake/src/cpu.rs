//! The CPU this machine has, as far as a baked guest depends on it.

use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::fs;
use std::path::Path;

use kiln_store::{Cpu, Digest};

/// Leaves whose registers tell what a guest may have been promised: features, the layout of the
/// extended state, and address widths. Bits that follow the host's own settings are masked.
const LEAVES: [(u32, u32, [u32; 4]); 6] = [
    // OSXSAVE (ECX 27) follows CR4; EBX holds the number of the CPU that is asked.
    (1, 0, [!0, 0, !(1 << 27), !0]),
    // OSPKE (ECX 4) follows CR4.
    (7, 0, [!0, !0, !(1 << 4), !0]),
    // EBX depends on what is turned on right now.
    (0xd, 0, [!0, 0, !0, !0]),
    (0xd, 1, [!0, 0, !0, !0]),
    (0x8000_0001, 0, [0, 0, !0, !0]),
    (0x8000_0008, 0, [!0, !0, 0, 0]),
];

/// The CPU that this runs on.
pub fn this(root: &Path) -> Cpu {
    let basic = __cpuid(0);
    let extended = __cpuid(0x8000_0000).eax;
    let vendor: Vec<u8> = [basic.ebx, basic.edx, basic.ecx]
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .collect();
    let mut words = vendor.clone();
    for (leaf, sub, masks) in LEAVES {
        let highest = if leaf >= 0x8000_0000 {
            extended
        } else {
            basic.eax
        };
        let found = if leaf <= highest {
            Some(__cpuid_count(leaf, sub))
        } else {
            None
        };
        let registers = found.map_or([0; 4], |r| [r.eax, r.ebx, r.ecx, r.edx]);
        for (register, mask) in registers.into_iter().zip(masks) {
            words.extend((register & mask).to_le_bytes());
        }
    }
    Cpu {
        vendor: String::from_utf8_lossy(&vendor).into_owned(),
        model: model(&fs::read_to_string(root.join("proc/cpuinfo")).unwrap_or_default()),
        features: Digest::of_bytes(&words),
    }
}

fn model(cpuinfo: &str) -> String {
    cpuinfo
        .lines()
        .find_map(|line| {
            line.strip_prefix("model name")?
                .trim_start()
                .strip_prefix(':')
        })
        .map_or("unknown", str::trim)
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_cpu_has_the_same_features_wherever_it_is_asked() {
        let here = this(Path::new("/"));
        let there = std::thread::spawn(|| this(Path::new("/"))).join().unwrap();
        assert_eq!(here, there);
        assert!(!here.vendor.is_empty());
    }

    #[test]
    fn model_is_the_first_processors() {
        assert_eq!(
            model("processor : 0\nmodel name\t: AMD EPYC\nmodel name\t: x\n"),
            "AMD EPYC"
        );
        assert_eq!(model(""), "unknown");
    }
}
