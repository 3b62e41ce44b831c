//! The files of a baked μVM, open.

use std::fs::File;
use std::path::{Path, PathBuf};

use kiln_store::{Class, Kind, Lease};
use kiln_vmm_control::PageRun;

use crate::Error;

/// How the memory file is read when its guest is resumed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reading {
    /// These pages are mapped before the guest runs, as it touches them first.
    Ahead(Vec<PageRun>),
    /// Pages are read singly as the guest needs them, so that the page cache tells afterwards which ones it did.
    OneByOne,
}

/// The files of a baked μVM. With a lease, nobody removes them from the store meanwhile.
#[derive(Debug)]
pub struct Baked {
    /// What it was baked as.
    pub class: Class,
    pub(crate) state: File,
    pub(crate) memory: File,
    pub(crate) reading: Reading,
    /// The writable layers' disk as it was baked.
    pub(crate) scratch: File,
    pub(crate) scratch_bytes: u64,
    /// Images that are disks of the guest already, by their slots.
    pub(crate) disks: Vec<(u8, File)>,
    pub(crate) lease: Option<Lease>,
    /// The kernel's modules that the guest may load later.
    modules: Option<PathBuf>,
}

fn length(file: &File) -> Result<u64, Error> {
    let metadata = file.metadata();
    Ok(metadata
        .map_err(Error::system("look at a baked μVM"))?
        .len())
}

impl Baked {
    /// Opens what a lease holds.
    pub fn open(lease: Lease) -> Result<Baked, Error> {
        let open = |kind| lease.open(kind).map_err(Error::Baked);
        let (state, memory) = (open(Kind::State)?, open(Kind::Memory)?);
        let scratch = open(Kind::Scratch)?;
        let touched = lease.touched_first(&memory).map_err(Error::Baked)?;
        Ok(Baked {
            class: lease.manifest().about.class.clone(),
            state,
            memory,
            reading: Reading::Ahead(touched),
            scratch_bytes: length(&scratch)?,
            scratch,
            disks: Vec::new(),
            modules: lease.path(Kind::Modules).ok(),
            lease: Some(lease),
        })
    }

    /// Opens what lies in a directory and no store has yet, to find out which pages its guest needs.
    pub fn in_directory(directory: &Path, class: Class) -> Result<Baked, Error> {
        let open = |kind: Kind| {
            let path = directory.join(kind.name());
            File::open(&path).map_err(Error::file("open", &path))
        };
        let (state, memory) = (open(Kind::State)?, open(Kind::Memory)?);
        let scratch = open(Kind::Scratch)?;
        Ok(Baked {
            class,
            state,
            memory,
            reading: Reading::OneByOne,
            scratch_bytes: length(&scratch)?,
            scratch,
            disks: Vec::new(),
            lease: None,
            modules: None,
        })
    }

    /// With the images that were disks of a guest when it was saved. They are to have the content that they had then.
    pub fn with_disks(self, disks: Vec<(u8, File)>) -> Baked {
        Baked { disks, ..self }
    }

    /// The library of its kernel's modules, for the guest to see ([`crate::share::Share::offer_modules`]).
    pub fn modules(&self) -> Option<&Path> {
        self.modules.as_deref()
    }
}
