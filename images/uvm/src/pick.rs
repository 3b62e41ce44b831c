//! Which μVM of the store is resumed.

use std::path::{Path, PathBuf};

use kiln_agent_api::PROTOCOL_VERSION;
use kiln_store::{Host, Lease, Miss, Store, Wanted};

use crate::size::Size;

/// Why there is no μVM to resume.
#[derive(Debug, thiserror::Error)]
pub enum PickError {
    /// The store cannot be read.
    #[error("there is no μVM to resume; {}", bake(*size))]
    Store {
        /// The size that was wanted.
        size: Size,
        /// Why not.
        #[source]
        source: kiln_store::Error,
    },
    /// None in it will do.
    #[error("no μVM in {} will do: {miss}; {}", store.display(), bake(*size))]
    None {
        /// The store's directory.
        store: PathBuf,
        /// The size that was wanted.
        size: Size,
        /// What is wrong with those there are.
        miss: Miss,
    },
}

/// The remedy.
fn bake(size: Size) -> String {
    format!("bake one that can grow to {size}: kiln bake")
}

/// Takes a lease on a μVM that runs on this host and can grow to this size.
pub fn lease(store: &Path, size: Size) -> Result<Lease, PickError> {
    let failed = |source| PickError::Store { size, source };
    let opened = Store::open(store).map_err(failed)?;
    let wanted = Wanted {
        cpus: size.cpus,
        memory: Some(size.memory),
        scratch: true,
    };
    let found = opened
        .pick(&Host::this(PROTOCOL_VERSION), &wanted)
        .map_err(failed)?;
    let id = found.map_err(|miss| PickError::None {
        store: store.to_owned(),
        size,
        miss,
    })?;
    opened.lease(id).map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use kiln_store::testing::description;
    use kiln_store::{Class, Description, Digest, Kind};
    use kiln_vmm_control::cpu::Fingerprint;

    use super::*;
    use crate::size::MIB;

    fn class() -> Class {
        Class {
            cpus: 1,
            max_cpus: 4,
            memory_mib: 128,
            max_memory_mib: 1024,
            slots: 8,
        }
    }

    fn size(cpus: u32, mib: u64) -> Size {
        Size {
            cpus,
            memory: mib * MIB,
        }
    }

    fn refused(store: &Path, size: Size) -> String {
        crate::Error::from(lease(store, size).unwrap_err()).to_string()
    }

    /// Enters a μVM of [`class`] that was baked here, but for what `change` does to it.
    fn bake(store: &Store, name: &str, change: impl FnOnce(&mut Description)) -> Digest {
        let staging = store.begin(0).unwrap();
        for kind in [Kind::State, Kind::Memory, Kind::Scratch] {
            let mut file = staging.create(kind).unwrap();
            file.write_all(name.as_bytes()).unwrap();
        }
        let mut about = description(name);
        about.baked_at = 1;
        about.class = class();
        about.protocol = PROTOCOL_VERSION;
        about.cpu.features = Fingerprint::of_this_cpu();
        change(&mut about);
        staging.commit(about).unwrap()
    }

    fn foreign_cpu(about: &mut Description) {
        about.baked_at = 3;
        about.cpu.features.0[9] ^= 1 << 16;
    }

    fn old_protocol(about: &mut Description) {
        about.baked_at = 2;
        about.protocol = PROTOCOL_VERSION - 1;
    }

    #[test]
    fn without_a_store_and_with_an_empty_one_the_error_names_the_command_that_bakes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        for _ in 0..2 {
            let text = refused(&path, size(2, 320));
            for part in ["kiln bake", "2 vCPUs and 320 MiB"] {
                assert!(text.contains(part), "{part} is not in: {text}");
            }
            Store::open_or_create(&path).unwrap();
        }
    }

    #[test]
    fn newer_uvms_of_another_cpu_and_protocol_do_not_hide_one_that_fits() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_create(dir.path().join("store")).unwrap();
        let good = bake(&store, "good", |_| {});
        bake(&store, "protocol", old_protocol);
        bake(&store, "cpu", foreign_cpu);
        assert_eq!(lease(store.root(), size(4, 1024)).unwrap().id(), good);
        assert!(lease(store.root(), size(5, 1024)).is_err());
        assert!(lease(store.root(), size(4, 1025)).is_err());
    }

    #[test]
    fn what_keeps_the_only_uvm_from_being_resumed_is_said() {
        let old = PROTOCOL_VERSION - 1;
        let protocols =
            format!("its agent speaks protocol {old}, this kiln speaks {PROTOCOL_VERSION}");
        for (change, reason) in [
            (
                foreign_cpu as fn(&mut Description),
                "another CPU (cpuid leaf 0x7.0 ebx",
            ),
            (old_protocol, &protocols),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::open_or_create(dir.path().join("store")).unwrap();
            let id = bake(&store, "x", change);
            let text = refused(store.root(), size(1, 64));
            for part in [reason, id.short().as_str(), "kiln bake"] {
                assert!(text.contains(part), "{part} is not in: {text}");
            }
        }
    }
}
