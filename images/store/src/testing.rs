//! What tests enter into a store.

use kiln_vmm_saved::cpu::Fingerprint;

use crate::{Class, Cpu, Description, Digest, Kernel};

/// A μVM of another CPU, for tests to change what they are about. The recipe makes it one of its own.
pub fn description(recipe: &str) -> Description {
    Description {
        recipe: Digest::of_bytes(recipe.as_bytes()),
        baked_at: 1_763_700_000,
        kiln_version: "0.1.0".into(),
        class: Class {
            cpus: 1,
            max_cpus: 32,
            memory_mib: 256,
            max_memory_mib: 16384,
            slots: 8,
        },
        kernel: Kernel {
            release: "6.12.95+deb12-cloud-amd64".into(),
            digest: Digest::of_bytes(b"kernel"),
            command_line: "quiet".into(),
        },
        initramfs: Digest::of_bytes(b"initramfs"),
        agent_version: "0.1.0".into(),
        protocol: 1,
        cpu: Cpu {
            vendor: "AuthenticAMD".into(),
            model: "QEMU TCG".into(),
            features: Fingerprint(std::array::from_fn(|word| word as u32 * 0x0101_0101)),
        },
        guest_used_kib: 20_000,
        saved: None,
    }
}
