//! What a baked guest depends on of the processor: the one table that the state's header, manifests and whoever
//! chooses a μVM compare by.
//!
//! Read with the CPUID instruction itself, because that costs no system call; but under nested virtualisation each
//! leaf is an exit to the hypervisor, so a process asks once. Guests keep using every feature they once saw, so
//! anything but equality is refused.

use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

/// Leaves compared, with the bits of EAX, EBX, ECX, EDX that count.
const LEAVES: [(u32, u32, [u32; 4]); 8] = [
    // Vendor.
    (0, 0, [0, !0, !0, !0]),
    // Model and stepping; features without OSXSAVE (27), which follows CR4 of the host.
    (1, 0, [!0, 0, !(1 << 27), !0]),
    // Features without OSPKE (ECX 4), which follows CR4 too.
    (7, 0, [0, !0, !(1 << 4), !0]),
    (7, 1, [!0, 0, 0, !0]),
    // XSAVE components and the area's layout.
    (0xd, 0, [!0, 0, !0, !0]),
    (0xd, 1, [!0, 0, 0, 0]),
    (0x8000_0001, 0, [0, 0, !0, !0]),
    // Address widths.
    (0x8000_0008, 0, [!0, !0, 0, 0]),
];

/// Number of words in a fingerprint.
pub const WORDS: usize = LEAVES.len() * 4;

/// A processor's identity as far as a saved guest depends on it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Fingerprint(pub [u32; WORDS]);

impl Fingerprint {
    /// The processor this runs on.
    pub fn of_this_cpu() -> Self {
        static THIS: OnceLock<Fingerprint> = OnceLock::new();
        *THIS.get_or_init(Self::read)
    }

    fn read() -> Self {
        let max = __cpuid_count(0, 0).eax;
        let max_ext = __cpuid_count(0x8000_0000, 0).eax;
        let mut words = [0; WORDS];
        for ((leaf, sub, mask), out) in LEAVES.iter().zip(words.chunks_exact_mut(4)) {
            if *leaf > if *leaf >= 0x8000_0000 { max_ext } else { max } {
                continue;
            }
            let r = __cpuid_count(*leaf, *sub);
            for ((value, mask), out) in [r.eax, r.ebx, r.ecx, r.edx].into_iter().zip(mask).zip(out)
            {
                *out = value & mask;
            }
        }
        Self(words)
    }

    /// Names the first difference between this (saved) and `host`.
    pub fn difference(&self, host: &Self) -> Option<String> {
        let at = self.0.iter().zip(&host.0).position(|(a, b)| a != b)?;
        let (leaf, sub, _) = LEAVES.get(at / 4)?;
        let register = ["eax", "ebx", "ecx", "edx"].get(at % 4)?;
        let (saved, here) = (self.0.get(at)?, host.0.get(at)?);
        Some(format!(
            "cpuid leaf {leaf:#x}.{sub} {register}: {saved:#010x} in the snapshot, {here:#010x} here"
        ))
    }

    /// Such as `GenuineIntel`.
    pub fn vendor(&self) -> String {
        let [_, ebx, ecx, edx, ..] = self.0;
        let bytes: Vec<u8> = [ebx, edx, ecx]
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_ask_gives_the_same() {
        let here = Fingerprint::of_this_cpu();
        let there = std::thread::spawn(Fingerprint::read).join().unwrap();
        assert_eq!(here, there);
        assert_eq!(here.difference(&there), None);
        assert_eq!(here.vendor().len(), 12);
    }

    #[test]
    fn a_changed_feature_word_is_named() {
        let here = Fingerprint::of_this_cpu();
        let mut other = here;
        other.0[2 * 4 + 1] ^= 1 << 16;
        let named = other.difference(&here).unwrap();
        assert!(named.starts_with("cpuid leaf 0x7.0 ebx"), "{named}");
    }

    /// States and manifests in the field hold these words. Another table is a new version of both formats.
    #[test]
    fn table_is_pinned() {
        let sum = LEAVES.iter().fold(0u64, |sum, (leaf, sub, masks)| {
            let words = [*leaf, *sub].into_iter().chain(*masks);
            words.fold(sum, |sum, word| {
                sum.wrapping_mul(0x0000_0100_0000_01b3) ^ u64::from(word)
            })
        });
        assert_eq!(sum, PINNED);
    }
    const PINNED: u64 = 0x9dd2_ceae_8a86_c577;
}
