//! What goes into a bake, and the digest of all of it.

use kiln_store::{Class, Cpu, Digest, Kernel};

/// Raised when a bake of the same inputs gives something else than before, because the baker
/// itself changed: every μVM is then baked anew.
const BAKER: u32 = 3;

/// Everything a baked μVM depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    /// Size class.
    pub class: Class,
    /// Kernel and command line.
    pub kernel: Kernel,
    /// Digest of the initramfs, and so of the agent and the modules.
    pub initramfs: Digest,
    /// Digest of the VMM, whose state format and devices the μVM has.
    pub vmm: Digest,
    /// The CPU it is baked on.
    pub cpu: Cpu,
}

impl Recipe {
    /// Equal for bakes that give the same μVM, different for all others.
    pub fn digest(&self) -> Digest {
        let Recipe {
            class,
            kernel,
            initramfs,
            vmm,
            cpu,
        } = self;
        let Class {
            cpus,
            max_cpus,
            memory_mib,
            max_memory_mib,
            slots,
        } = class;
        let mut bytes = Vec::new();
        for number in [
            BAKER,
            *cpus,
            *max_cpus,
            *memory_mib,
            *max_memory_mib,
            *slots,
        ] {
            bytes.extend(number.to_le_bytes());
        }
        for text in [&kernel.release, &kernel.command_line, &cpu.vendor] {
            // With its length, so that text cannot move from one field to the next.
            bytes.extend((text.len() as u64).to_le_bytes());
            bytes.extend(text.as_bytes());
        }
        for digest in [&kernel.digest, initramfs, vmm] {
            bytes.extend(digest.as_bytes());
        }
        bytes.extend(cpu.features.0.into_iter().flat_map(u32::to_le_bytes));
        Digest::of_bytes(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_uvm::cpu::{Fingerprint, WORDS};

    fn recipe() -> Recipe {
        let digest = Digest::of_bytes(b"x");
        Recipe {
            class: Class {
                cpus: 1,
                max_cpus: 2,
                memory_mib: 3,
                max_memory_mib: 4,
                slots: 5,
            },
            kernel: Kernel {
                release: "6.12".into(),
                digest,
                command_line: "quiet".into(),
            },
            initramfs: digest,
            vmm: digest,
            cpu: Cpu {
                vendor: "v".into(),
                model: "m".into(),
                features: Fingerprint([7; WORDS]),
            },
        }
    }

    #[test]
    fn every_input_changes_the_digest() {
        let other = Digest::of_bytes(b"y");
        let changes: [fn(&mut Recipe, Digest); 12] = [
            |r, _| r.class.cpus += 1,
            |r, _| r.class.max_cpus += 1,
            |r, _| r.class.memory_mib += 1,
            |r, _| r.class.max_memory_mib += 1,
            |r, _| r.class.slots += 1,
            |r, _| r.kernel.release.push('x'),
            |r, _| r.kernel.command_line.push('x'),
            |r, d| r.kernel.digest = d,
            |r, d| r.initramfs = d,
            |r, d| r.vmm = d,
            |r, _| r.cpu.vendor.push('x'),
            |r, _| r.cpu.features.0[WORDS - 1] += 1,
        ];
        let mut seen = std::collections::BTreeSet::from([recipe().digest()]);
        for change in changes {
            let mut changed = recipe();
            change(&mut changed, other);
            assert!(seen.insert(changed.digest()), "{changed:?}");
        }
        let mut moved = recipe();
        moved.kernel.release.push('q');
        moved.kernel.command_line.remove(0);
        assert!(
            seen.insert(moved.digest()),
            "text that moved from one field to the next"
        );
    }

    #[test]
    fn marketing_name_of_the_cpu_does_not_matter() {
        let mut renamed = recipe();
        renamed.cpu.model = "another".into();
        assert_eq!(renamed.digest(), recipe().digest());
    }
}
