//! Starting μVMs.
//!
//! The first half is here: which μVM of the store a pod gets. The second half, resuming it in a
//! `kiln-vmm` of the pod's own, needs the VMM's control API, which does not exist yet; until then
//! every launch is refused, and says so.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use kiln_store::{Class, Lease, Store};

use super::{Launcher, PodSetup, Uvm};
use crate::config::Config;
use crate::error::{Error, Result, chain};
use crate::size::{MIB, Size};

/// Launches μVMs from the store.
#[derive(Debug)]
pub struct StoreLauncher {
    store: PathBuf,
}

impl StoreLauncher {
    /// Uses the store that the configuration names.
    pub fn new(config: &Config) -> Self {
        Self {
            store: config.store.clone(),
        }
    }

    /// Takes a lease on a μVM that can be grown to this size.
    fn pick(&self, size: Size) -> Result<Lease> {
        let bake = || {
            format!(
                "bake one that can grow to {} vCPUs and {} MiB: kiln bake",
                size.cpus,
                size.memory.div_ceil(MIB)
            )
        };
        let store = Store::open(&self.store).map_err(|e| {
            Error::FailedPrecondition(format!(
                "there is no μVM to resume ({}); {}",
                chain(&e),
                bake()
            ))
        })?;
        let found = store
            .find(|manifest| fits(&manifest.about.class, size))
            .map_err(|e| Error::failed("look through the μVM store", e))?;
        let Some(id) = found else {
            return Err(Error::FailedPrecondition(format!(
                "no μVM in {} fits this pod; {}",
                self.store.display(),
                bake()
            )));
        };
        store
            .lease(id)
            .map_err(|e| Error::failed("hold a μVM of the store", e))
    }
}

/// Whether a μVM of this class can become this big.
fn fits(class: &Class, size: Size) -> bool {
    size.cpus <= class.max_cpus && size.memory.div_ceil(MIB) <= u64::from(class.max_memory_mib)
}

#[async_trait]
impl Launcher for StoreLauncher {
    async fn launch(&self, setup: &PodSetup) -> Result<Arc<dyn Uvm>> {
        let lease = self.pick(setup.size)?;
        Err(Error::Unimplemented(format!(
            "μVM {} fits pod {}, but this version of kiln can't resume it: kiln-vmm has no \
             control API yet",
            lease.id().short(),
            setup.id
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn a_class_fits_what_it_can_grow_to() {
        assert!(fits(&class(), size(4, 1024)));
        assert!(!fits(&class(), size(5, 1024)));
        assert!(!fits(&class(), size(4, 1025)));
    }

    #[test]
    fn without_a_store_the_error_names_the_command_that_bakes() {
        let dir = tempfile::tempdir().unwrap();
        let launcher = StoreLauncher {
            store: dir.path().join("none"),
        };
        let error = launcher.pick(size(2, 320)).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("kiln bake") && text.contains("320 MiB"),
            "{text}"
        );
    }

    #[test]
    fn empty_store_is_a_failed_precondition() {
        let dir = tempfile::tempdir().unwrap();
        let store = dir.path().join("store");
        Store::open_or_create(&store).unwrap();
        let error = StoreLauncher { store }.pick(size(1, 64)).unwrap_err();
        assert!(matches!(error, Error::FailedPrecondition(_)), "{error:?}");
    }
}
