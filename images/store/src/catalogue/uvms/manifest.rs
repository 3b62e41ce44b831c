//! What the store knows about a baked μVM: one small file per μVM, named by its own digest.
//!
//! The file is a header that needs no codec, and a `postcard` body. See `docs/store.md` for the
//! layout and for how to change it.

use std::fmt;

use kiln_packs::{MAX_PAGES, PAGE};
use kiln_vmm_saved::cpu::Fingerprint;
use serde::{Deserialize, Serialize};

use crate::Digest;
use crate::content::packed::Memory;

/// The manifest format this code writes.
pub const VERSION: u32 = 5;

const MAGIC: [u8; 8] = *b"kilnuvm\n";
const HEADER: usize = 16;

/// What a μVM is for: the size it was baked with and the most it can grow to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Class {
    /// vCPUs it was baked with.
    pub cpus: u32,
    /// vCPUs it can grow to.
    pub max_cpus: u32,
    /// MiB of memory it was baked with.
    pub memory_mib: u32,
    /// MiB of memory it can grow to.
    pub max_memory_mib: u32,
    /// Block devices that can be filled in without plugging anything.
    pub slots: u32,
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}-{} cpu, {}-{} MiB, {} slots",
            self.cpus, self.max_cpus, self.memory_mib, self.max_memory_mib, self.slots
        )
    }
}

/// The kernel a μVM runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kernel {
    /// As `uname -r` says.
    pub release: String,
    /// Digest of the kernel image.
    pub digest: Digest,
    /// Its command line.
    pub command_line: String,
}

/// The CPU a μVM was baked on. It resumes on equal ones only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// Such as `GenuineIntel`.
    pub vendor: String,
    /// Such as `AMD EPYC 7B13`.
    pub model: String,
    /// What the guest may depend on of it.
    pub features: Fingerprint,
}

/// What an object is to its μVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// CPU and device state, in the VMM's own format.
    State,
    /// Guest memory: flat and sparse when it is opened, ready to be mapped; stored as a pack.
    Memory,
    /// The pages a resumed guest touches first.
    WorkingSet,
    /// The disk of the containers' writable layers, as the guest had it mounted when it was saved.
    Scratch,
    /// The kernel's modules that the guest may load later. Equal for all μVMs of a kernel.
    Modules,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 5] = [
        Kind::State,
        Kind::Memory,
        Kind::WorkingSet,
        Kind::Scratch,
        Kind::Modules,
    ];

    /// Its name in messages and in staging directories.
    pub fn name(self) -> &'static str {
        match self {
            Kind::State => "state",
            Kind::Memory => "memory",
            Kind::WorkingSet => "working-set",
            Kind::Scratch => "scratch",
            Kind::Modules => "modules",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One object of a μVM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Object {
    /// What it is.
    pub kind: Kind,
    /// Digest of its content, and so its name in the store.
    pub digest: Digest,
    /// Its length, holes included.
    pub length: u64,
    /// Bytes of it in chunks that are not all zeros.
    pub data: u64,
}

impl Object {
    /// Whether the store keeps it packed.
    pub(crate) fn is_packed(&self) -> bool {
        is_packed(self.kind, self.length)
    }

    /// As a memory, which it is.
    pub(crate) fn memory(&self) -> Memory {
        Memory {
            object: self.digest,
            length: self.length,
        }
    }
}

/// A μVM whose memory another one's is stored as the difference to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    /// The μVM.
    pub uvm: Digest,
    /// Digest of its memory.
    pub memory: Digest,
    /// Length of its memory, holes included.
    pub length: u64,
}

impl Parent {
    /// Its memory.
    pub(crate) fn memory(&self) -> Memory {
        Memory {
            object: self.memory,
            length: self.length,
        }
    }
}

/// Whether the store keeps an object of this kind and length packed: memory, unless a pack can't hold it.
pub(super) fn is_packed(kind: Kind, length: u64) -> bool {
    const LONGEST: u64 = MAX_PAGES as u64 * PAGE as u64;
    kind == Kind::Memory && length.is_multiple_of(PAGE as u64) && (1..=LONGEST).contains(&length)
}

/// What the baker says of a μVM when it enters it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Digest of everything that went in. Two bakes of one recipe give equal μVMs, for all that
    /// matters.
    pub recipe: Digest,
    /// When it was baked, in seconds since 1970.
    pub baked_at: u64,
    /// The version of kiln that baked it.
    pub kiln_version: String,
    /// Its size class.
    pub class: Class,
    /// Its kernel.
    pub kernel: Kernel,
    /// Digest of its initial file system.
    pub initramfs: Digest,
    /// The version of the agent in it.
    pub agent_version: String,
    /// The version of the agent's protocol that it speaks.
    pub protocol: u32,
    /// The CPU it was baked on.
    pub cpu: Cpu,
    /// KiB of memory the guest had in use when it was baked.
    pub guest_used_kib: u64,
    /// What was saved with a container in it; none of what was baked.
    pub saved: Option<Saved>,
}

/// What is known of a μVM that was saved while a container ran in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// What people call it.
    pub name: String,
    /// The baked μVM that it was resumed from.
    pub bake: Digest,
    /// Images that are disks of the guest, in the order of their slots. It can't be resumed without them.
    pub disks: Vec<SavedDisk>,
    /// What whoever saved it has to know to go on with it: JSON of its own.
    pub container: String,
}

/// An image that is a disk of a saved guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedDisk {
    /// The VMM's number for it.
    pub slot: u8,
    /// The image's name among the images of the store.
    pub image: String,
    /// The digest of its content. Another content under that name is another disk.
    pub content: Digest,
}

/// A baked μVM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// What the baker said of it.
    #[serde(flatten)]
    pub about: Description,
    /// What its memory's pack refers to. Without these it cannot be rebuilt.
    pub parents: Vec<Parent>,
    /// What it consists of.
    pub objects: Vec<Object>,
}

/// The manifest as it is on disk: `postcard` cannot flatten.
#[derive(Serialize, Deserialize)]
struct Stored {
    about: Description,
    parents: Vec<Parent>,
    objects: Vec<Object>,
}

/// Why bytes are not a manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// The first bytes are something else.
    #[error("not a manifest: it does not begin with the magic bytes")]
    Magic,
    /// Written by a kiln this one knows nothing of.
    #[error("manifest format {0} is not {VERSION}, the one this kiln reads")]
    Version(u32),
    /// Shorter or longer than the header says.
    #[error("the header promises {promised} bytes of body, there are {found}")]
    Length {
        /// Bytes the header promises.
        promised: u32,
        /// Bytes there are.
        found: usize,
    },
    /// The body makes no sense.
    #[error("the body cannot be decoded: {0}")]
    Body(String),
}

impl Manifest {
    /// The object of a kind, if the μVM has one.
    pub fn object(&self, kind: Kind) -> Option<&Object> {
        self.objects.iter().find(|object| object.kind == kind)
    }

    /// Whether it was saved with a container in it: then it is resumed by its name only, and no collection removes it
    /// that does not remove everything.
    pub fn is_saved(&self) -> bool {
        self.about.saved.is_some()
    }

    /// The manifest as the store keeps it.
    pub fn encode(&self) -> Result<Vec<u8>, ManifestError> {
        let stored = Stored {
            about: self.about.clone(),
            parents: self.parents.clone(),
            objects: self.objects.clone(),
        };
        let body =
            postcard::to_stdvec(&stored).map_err(|error| ManifestError::Body(error.to_string()))?;
        let length = u32::try_from(body.len())
            .map_err(|_| ManifestError::Body("longer than 4 GiB".into()))?;
        let mut bytes = Vec::with_capacity(HEADER + body.len());
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(body);
        Ok(bytes)
    }

    /// Reads what [`Manifest::encode`] wrote. Whether the bytes are the ones that were written is
    /// for the caller to know: their digest is the μVM's name.
    pub fn decode(bytes: &[u8]) -> Result<Manifest, ManifestError> {
        let Some((header, body)) = bytes.split_first_chunk::<HEADER>() else {
            return Err(ManifestError::Magic);
        };
        let word = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        if header[..8] != MAGIC {
            return Err(ManifestError::Magic);
        }
        if word(8) != VERSION {
            return Err(ManifestError::Version(word(8)));
        }
        if word(12) as usize != body.len() {
            return Err(ManifestError::Length {
                promised: word(12),
                found: body.len(),
            });
        }
        let (stored, rest) = postcard::take_from_bytes::<Stored>(body)
            .map_err(|error| ManifestError::Body(error.to_string()))?;
        if !rest.is_empty() {
            return Err(ManifestError::Body(format!(
                "{} bytes are left over",
                rest.len()
            )));
        }
        Ok(Manifest {
            about: stored.about,
            parents: stored.parents,
            objects: stored.objects,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::description;
    use proptest::prelude::*;

    fn manifest() -> Manifest {
        let object = |kind, text: &[u8]| Object {
            kind,
            digest: Digest::of_bytes(text),
            length: 7,
            data: 7,
        };
        Manifest {
            about: description("recipe"),
            parents: vec![Parent {
                uvm: Digest::of_bytes(b"u"),
                memory: Digest::of_bytes(b"p"),
                length: 8192,
            }],
            objects: vec![object(Kind::State, b"s"), object(Kind::Memory, b"m")],
        }
    }

    #[test]
    fn manifest_survives_the_disk_form_and_json() {
        let manifest = manifest();
        assert_eq!(
            Manifest::decode(&manifest.encode().unwrap()),
            Ok(manifest.clone())
        );
        let json = serde_json::to_string(&manifest).unwrap();
        assert_eq!(serde_json::from_str::<Manifest>(&json).unwrap(), manifest);
    }

    /// A golden file: manifests in the field look like this. See docs/store.md before changing it.
    #[test]
    fn disk_form_is_pinned() {
        let bytes = manifest().encode().unwrap();
        assert_eq!(Digest::of_bytes(&bytes).to_string(), PINNED);
    }
    const PINNED: &str = "10dc7c82c28979b7ad8d61274b58014ed36cc4545c05a9a95d0658b48e612991";

    #[test]
    fn foreign_newer_cut_and_padded_files_are_told_apart() {
        let good = manifest().encode().unwrap();
        let mut foreign = good.clone();
        foreign[0] = b'K';
        assert_eq!(Manifest::decode(&foreign), Err(ManifestError::Magic));
        assert_eq!(Manifest::decode(&good[..10]), Err(ManifestError::Magic));
        let mut newer = good.clone();
        newer[8] = 6;
        assert_eq!(Manifest::decode(&newer), Err(ManifestError::Version(6)));
        let cut = Manifest::decode(&good[..good.len() - 1]);
        assert!(matches!(cut, Err(ManifestError::Length { .. })));
        let mut padded = good.clone();
        padded.push(0);
        assert!(matches!(
            Manifest::decode(&padded),
            Err(ManifestError::Length { .. })
        ));
        let body = (padded.len() - HEADER) as u32;
        padded[12..16].copy_from_slice(&body.to_le_bytes());
        assert!(matches!(
            Manifest::decode(&padded),
            Err(ManifestError::Body(_))
        ));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Manifest::decode(&bytes);
            let mut framed = MAGIC.to_vec();
            framed.extend(VERSION.to_le_bytes());
            framed.extend((bytes.len() as u32).to_le_bytes());
            framed.extend(&bytes);
            let _ = Manifest::decode(&framed);
        }
    }
}
