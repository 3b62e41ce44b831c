//! The store of a node: baked μVMs, and images of containers' root file systems, in one directory of plain files.
//!
//! The store has two halves. *Content* is files: how they come in whole, who holds them, how much room they take and
//! which of them go. It knows no kinds. A *catalogue* lists the entries of one kind: a μVM is a manifest that names
//! objects by their content, an image is a file under the key of the layers that it was made of.
//!
//! Readers need no daemon: a shim picks a μVM by the catalogue's index, holds it by a [`Lease`], and maps its memory.
//! Writers (`kiln bake`, `kiln gc`, a shim that makes an image) take turns by a lock file. A writer that is interrupted by a
//! kill, a full disk or a power cut leaves a store in which every entry is whole or known to be doubtful.
//!
//! This crate trusts the store's directory to be writable by root alone, and nothing that is in it
//! to be undamaged: `verify` finds out. `docs/store.md` has the layout.

#![deny(missing_docs)]

mod catalogue;
mod content;
mod error;
pub mod private;
#[cfg(any(test, feature = "test-utils"))]
pub mod testing;

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use catalogue::images::{Image, ImageEntry, ImageKey, Images, Making, SegmentDigest, Turn};
pub use catalogue::uvms::{
    Basis, Class, Cpu, Description, Entry, Holding, Host, Kernel, Kind, Lease, Manifest,
    ManifestError, Mismatch, Miss, Object, Parent, Saved, SavedDisk, Staging, Storage, VERSION,
    Wanted, WorkingSet,
};
pub use content::collect::{Collected, Named, Policy, Removed, Why};
pub use content::digest::{CHUNK, Digest, NotADigest, Scan, of_file};
pub use content::lock;
pub use content::room::{DEFAULT_BUDGET, DEFAULT_FLAT_BUDGET, Usage};
pub use content::verify::{Damage, Verified};
pub use error::Error;

use catalogue::uvms::Uvms;
use content::catalogue::Catalogue;
use content::disk::{Disk, RealDisk};
use content::{Content, WRITER_WAIT};

/// Where the store lies unless someone says otherwise.
pub const DEFAULT_ROOT: &str = "/var/lib/kiln/store";

/// A store. Its own methods are those of all entries and of μVMs; [`Store::images`] has the images'.
#[derive(Debug, Clone)]
pub struct Store {
    content: Content,
}

impl Store {
    /// Opens the store at `root`, and makes one there if there is none.
    pub fn open_or_create(root: impl Into<PathBuf>) -> Result<Store, Error> {
        Store::create_with(root.into(), Arc::new(RealDisk))
    }

    /// Opens the store at `root`. Nothing is written.
    pub fn open(root: impl Into<PathBuf>) -> Result<Store, Error> {
        let content = Content::at(root.into(), Arc::new(RealDisk));
        content.check_format()?;
        Ok(Store { content })
    }

    pub(crate) fn create_with(root: PathBuf, disk: Arc<dyn Disk>) -> Result<Store, Error> {
        let content = Content::at(root, disk);
        match content.check_format() {
            Err(Error::NoStore(_)) => content.create(&catalogue::DIRECTORIES)?,
            other => other?,
        }
        Ok(Store { content })
    }

    /// The store's directory.
    pub fn root(&self) -> &Path {
        &self.content.root
    }

    /// The images of containers' root file systems.
    pub fn images(&self) -> Images {
        Images::of(self.content.clone())
    }

    fn uvms(&self) -> Uvms {
        Uvms::of(self.content.clone())
    }

    /// All catalogues. A new kind of entry is a line here.
    fn catalogues(&self) -> [Box<dyn Catalogue>; 2] {
        [Box::new(self.uvms()), Box::new(self.images())]
    }

    /// How much room the store takes, and may take.
    pub fn usage(&self) -> Result<Usage, Error> {
        self.content.usage()
    }

    /// Sets the most bytes the store may take on disk; `None` lifts the limit. What is there
    /// stays: see [`Store::collect`].
    pub fn set_budget(&self, budget: Option<u64>) -> Result<(), Error> {
        let lock = self.content.write_lock(WRITER_WAIT)?;
        self.content.set_budget(budget, &lock)
    }

    /// Sets the most bytes that flat files may take on disk; `None` lifts the limit. Packed memory that is in flat files
    /// need not be rebuilt before it is used. What is there stays until the next one is made.
    pub fn set_flat_budget(&self, budget: Option<u64>) -> Result<(), Error> {
        let lock = self.content.write_lock(WRITER_WAIT)?;
        self.content.set_flat_budget(budget, &lock)
    }

    /// Bytes on disk of an object as it is stored: of its pack, if it is packed.
    pub fn stored_bytes(&self, object: &Object) -> Result<u64, Error> {
        self.content.object_bytes(&object.digest)
    }

    /// Removes entries by `policy`, objects that no entry needs, and the leftovers of interrupted writers.
    pub fn collect(&self, policy: Policy) -> Result<Collected, Error> {
        content::collect::collect(&self.content, &self.catalogues(), policy)
    }

    /// Reads the named entries, or all if none is named, and reports damage.
    pub fn verify(&self, only: &[Digest]) -> Result<Verified, Error> {
        content::verify::verify(&self.content, &self.catalogues(), only)
    }

    /// Removes a μVM or an image, unless it is pinned or in use.
    pub fn remove(&self, id: Digest) -> Result<(), Error> {
        content::collect::remove(&self.content, &self.catalogues(), id)
    }

    /// The entry that a person means: by the name it was saved by, by its digest, or by the first digits of it (4 at
    /// least), or `latest` for the newest μVM.
    pub fn resolve(&self, name: &str) -> Result<Digest, Error> {
        let not_found = || Error::NotFound(name.to_owned());
        if name == "latest" {
            return self.uvms().latest()?.ok_or_else(not_found);
        }
        let mut matches = self.uvms().called(name)?;
        if matches.is_empty() && name.len() >= 4 {
            for catalogue in self.catalogues() {
                let ids = catalogue.ids()?.into_iter();
                matches.extend(ids.filter(|id| id.to_string().starts_with(name)));
            }
        }
        match matches.as_slice() {
            [] => Err(not_found()),
            [only] => Ok(*only),
            _ => Err(Error::Ambiguous {
                name: name.to_owned(),
                matches,
            }),
        }
    }
}
