//! Whether a μVM can be resumed on this host by this kiln, and the choice of one that can: the rule that the shim,
//! `kiln run` and `kiln bake` share.

use std::fs;

use kiln_vmm_control::cpu::Fingerprint;

use crate::{Digest, Error, Manifest, Store};

/// What a μVM has to agree with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host {
    /// The processor.
    pub cpu: Fingerprint,
    /// The version of the agent's protocol that this kiln speaks.
    pub protocol: u32,
}

impl Host {
    /// The host this runs on.
    pub fn this(protocol: u32) -> Host {
        Host {
            cpu: Fingerprint::of_this_cpu(),
            protocol,
        }
    }
}

/// Why a μVM can't be resumed here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// Its guest may use what this processor does not have.
    #[error("it was baked on another CPU ({0})")]
    Cpu(String),
    /// Its agent would be misunderstood.
    #[error("its agent speaks protocol {baked}, this kiln speaks {here}")]
    Protocol {
        /// The agent's.
        baked: u32,
        /// Ours.
        here: u32,
    },
}

/// Why no μVM was picked: what is wrong with the one that comes nearest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Miss {
    /// It is what is wanted but for this.
    #[error("μVM {} does not fit: {why}", id.short())]
    Mismatch {
        /// The μVM.
        id: Digest,
        /// What is wrong.
        why: Mismatch,
    },
    /// What it is can't be read any more.
    #[error("μVM {} was baked by an older kiln", .0.short())]
    Older(Digest),
    /// There is none, or none that can grow to what is wanted.
    #[error("none of its μVMs can grow to that size")]
    Size,
}

impl Manifest {
    /// Whether this μVM can be resumed on `host`.
    pub fn resumes_here(&self, host: &Host) -> Result<(), Mismatch> {
        if self.about.protocol != host.protocol {
            return Err(Mismatch::Protocol {
                baked: self.about.protocol,
                here: host.protocol,
            });
        }
        match self.about.cpu.features.difference(&host.cpu) {
            None => Ok(()),
            Some(what) => Err(Mismatch::Cpu(what)),
        }
    }
}

impl Store {
    /// The newest μVM that `wanted` accepts, that can be resumed on `host`, and whose objects are all there. Others
    /// never hide it; if there is none, the inner error says why for the one that comes nearest.
    pub fn pick(
        &self,
        host: &Host,
        wanted: impl Fn(&Manifest) -> bool,
    ) -> Result<Result<Digest, Miss>, Error> {
        let (mut mismatch, mut older) = (None, None);
        for entry in self.list()? {
            match entry.manifest {
                Ok(manifest) if wanted(&manifest) && self.is_whole(&manifest) => {
                    let Err(why) = manifest.resumes_here(host) else {
                        return Ok(Ok(entry.id));
                    };
                    mismatch.get_or_insert(Miss::Mismatch { id: entry.id, why });
                }
                Err(Error::Older { .. }) => {
                    older.get_or_insert(Miss::Older(entry.id));
                }
                _ => {}
            }
        }
        Ok(Err(mismatch.or(older).unwrap_or(Miss::Size)))
    }

    /// Whether all objects of a μVM are there, and as long as they should be.
    pub(crate) fn is_whole(&self, manifest: &Manifest) -> bool {
        manifest.objects.iter().all(|object| {
            fs::metadata(self.object_path(&object.digest))
                .is_ok_and(|meta| meta.len() == object.length)
        })
    }
}

#[cfg(test)]
mod tests;
