//! Whether a μVM can be resumed on this host by this kiln, and the choice of one that can: the rule that the shim,
//! `kiln run` and `kiln bake` share.

use std::collections::BTreeMap;
use std::fs::File;

use kiln_vmm_saved::cpu::Fingerprint;

use super::index::Said;
use super::{Kind, Manifest, Uvms};
use crate::{Digest, Error, Store};

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

/// Requirements on a μVM that is to be resumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wanted {
    /// vCPUs it must be able to grow to.
    pub cpus: u32,
    /// Bytes of memory it must be able to grow to; none leaves what it was baked with.
    pub memory: Option<u64>,
    /// Whether it must have a disk for the containers' writable layers.
    pub scratch: bool,
}

impl Wanted {
    /// Whether a μVM meets them, leaving aside the host.
    pub fn fits(&self, manifest: &Manifest) -> bool {
        self.are_met_by(&Traits::of(manifest))
    }

    pub(super) fn are_met_by(&self, traits: &Traits) -> bool {
        let memory = u64::from(traits.most.memory_mib) << 20;
        self.cpus <= traits.most.cpus
            && self.memory.is_none_or(|wanted| wanted <= memory)
            && self.scratch <= traits.scratch
    }

    /// How far from this a μVM begins; less is better. One that begins smaller has to grow, which takes time, and one that
    /// begins larger stays larger.
    fn distance(&self, first: &Extent) -> impl Ord + use<> {
        let from = |wanted: u64, first: u64| (first > wanted, first.abs_diff(wanted));
        let memory = u64::from(first.memory_mib) << 20;
        (
            self.memory.map(|wanted| from(wanted, memory)),
            from(self.cpus.into(), first.cpus.into()),
        )
    }

    /// The one that is picked of those that resume on the host, in the order of [`in_order`].
    pub(super) fn nearest(&self, all: impl Iterator<Item = (Digest, Traits)>) -> Option<Digest> {
        let mut fitting = all.filter(|(_, traits)| self.are_met_by(traits)).peekable();
        let edition = fitting.peek()?.1.edition;
        fitting
            .take_while(|(_, traits)| traits.edition == edition)
            .min_by_key(|(_, traits)| self.distance(&traits.first))
            .map(|(id, _)| id)
    }
}

/// How large a μVM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) cpus: u32,
    pub(super) memory_mib: u32,
}

/// What a μVM is picked by, beside the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Traits {
    /// How it begins.
    pub(super) first: Extent,
    /// What it can grow to.
    pub(super) most: Extent,
    /// Whether it has a scratch disk.
    pub(super) scratch: bool,
    /// Equal if the same kernel and agent are in it.
    pub(super) edition: u32,
}

impl Traits {
    pub(super) fn of(manifest: &Manifest) -> Traits {
        let (class, kernel) = (&manifest.about.class, &manifest.about.kernel);
        let mut hasher = blake3::Hasher::new();
        hasher.update(kernel.digest.as_bytes());
        hasher.update(manifest.about.initramfs.as_bytes());
        hasher.update(kernel.release.as_bytes());
        hasher.update(kernel.command_line.as_bytes());
        let [a, b, c, d, ..] = *hasher.finalize().as_bytes();
        Traits {
            first: Extent {
                cpus: class.cpus,
                memory_mib: class.memory_mib,
            },
            most: Extent {
                cpus: class.max_cpus,
                memory_mib: class.max_memory_mib,
            },
            scratch: manifest.object(Kind::Scratch).is_some(),
            edition: u32::from_le_bytes([a, b, c, d]),
        }
    }
}

/// Puts μVMs, the newest of which comes first, into the order in which they are preferred: those of the newest edition come
/// first, so that a node whose kernel was mended does not go on with the old one because that was baked in a better size.
pub(super) fn in_order(uvms: &mut [(Digest, Traits)]) {
    let mut ranks = BTreeMap::new();
    for (age, (_, traits)) in uvms.iter().enumerate() {
        ranks.entry(traits.edition).or_insert(age);
    }
    uvms.sort_by_key(|(_, traits)| ranks.get(&traits.edition).copied());
}

impl Store {
    /// The μVM that meets `wanted`, that can be resumed on `host`, and whose objects are all there. Of several, those with
    /// the newest kernel and agent count, then the one that begins nearest to what is wanted, then the newest. Others
    /// never hide it; if there is none, the inner error says why for the newest one that comes near.
    pub fn pick(&self, host: &Host, wanted: &Wanted) -> Result<Result<Digest, Miss>, Error> {
        let uvms = self.uvms();
        let said = uvms.ask_index(host, wanted)?;
        if let Said::This(id) = said
            && uvms.is_what_it_seems(id, host, wanted)
        {
            return Ok(Ok(id));
        }
        uvms.pick_by_reading_all(host, wanted, said == Said::Nothing)
    }
}

impl Uvms {
    /// Whether the μVM that the index names is there and whole, and fits.
    fn is_what_it_seems(&self, id: Digest, host: &Host, wanted: &Wanted) -> bool {
        File::open(self.path(&id)).is_ok_and(|mut file| {
            self.read_manifest(id, &mut file).is_ok_and(|manifest| {
                wanted.fits(&manifest)
                    && manifest.resumes_here(host).is_ok()
                    && self.is_whole(&manifest)
            })
        })
    }

    fn pick_by_reading_all(
        &self,
        host: &Host,
        wanted: &Wanted,
        mend: bool,
    ) -> Result<Result<Digest, Miss>, Error> {
        let stamp = self.stamp()?;
        let all = self.list()?;
        let ids = all.iter().map(|entry| entry.id).collect();
        let (mut mismatch, mut older) = (None, None);
        let mut readable = Vec::new();
        let mut here = Vec::new();
        for entry in all {
            match entry.manifest {
                Ok(manifest) => {
                    if !manifest.is_saved() && self.is_whole(&manifest) {
                        match manifest.resumes_here(host) {
                            Ok(()) => here.push((entry.id, Traits::of(&manifest))),
                            Err(why) if wanted.fits(&manifest) => {
                                mismatch.get_or_insert(Miss::Mismatch { id: entry.id, why });
                            }
                            Err(_) => {}
                        }
                    }
                    readable.push((entry.id, manifest));
                }
                Err(Error::Older { .. }) => {
                    older.get_or_insert(Miss::Older(entry.id));
                }
                Err(_) => {}
            }
        }
        if mend {
            self.mend_index(stamp, &readable, &ids);
        }
        in_order(&mut here);
        let found = wanted.nearest(here.into_iter());
        Ok(found.ok_or_else(|| mismatch.or(older).unwrap_or(Miss::Size)))
    }

    /// All μVMs whose manifests this kiln can read, the newest first.
    pub(super) fn readable(&self) -> Result<Vec<(Digest, Manifest)>, Error> {
        let entries = self.list()?.into_iter();
        Ok(entries
            .filter_map(|entry| Some((entry.id, entry.manifest.ok()?)))
            .collect())
    }
}

#[cfg(test)]
mod tests;
