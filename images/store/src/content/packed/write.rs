//! Making packs.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use kiln_packs::{Copies, Options, Parent, Writer, first_difference};

use super::{Memory, OpenPack};
use crate::content::digest::Scan;
use crate::content::staging::StagingDir;
use crate::error::Context;
use crate::{Digest, Error};

/// How a pack is made.
#[derive(Debug, Default)]
pub(crate) struct Packing<'a> {
    /// Pages that are needed first.
    pub(crate) first: &'a [u32],
    /// What the pack refers to.
    pub(crate) parents: &'a [(Memory, &'a File)],
    /// Whether the pages that are needed first can be had without the parents.
    pub(crate) starts_alone: bool,
}

impl StagingDir {
    /// Makes the pack of a file of it that was finished. It is on the disk afterwards, and what it gives was compared with
    /// the file. The file itself need not be on the disk.
    pub(crate) fn pack(
        &self,
        name: &str,
        (memory, scan): &(File, Scan),
        packing: &Packing<'_>,
    ) -> Result<(), Error> {
        let (disk, path) = (self.disk(), self.pack_of(name));
        self.content().remove_if_there(&path)?;
        let pack = self.make(&path)?;
        let copies = match packing.starts_alone {
            true => Copies::All,
            false => Copies::None,
        };
        let mut writer = Writer::new(memory)
            .working_set(packing.first)
            .options(Options {
                copies,
                ..Options::default()
            });
        for (parent, memory) in packing.parents {
            let id = *parent.object.as_bytes();
            writer = writer.parent(Parent {
                id,
                memory: *memory,
            });
        }
        disk.fill(&pack, &mut |out| {
            writer.write(out).map(drop).map_err(io::Error::other)
        })
        .context("packing", &self.path.join(name))?;
        disk.sync_file(&path).context("syncing", &path)?;
        disk.seal(&path).context("sealing", &path)?;
        check_pack(pack, memory, &scan.digest, packing.parents)
    }

    fn make(&self, path: &Path) -> Result<File, Error> {
        self.disk().write_new(path, b"").context("making", path)?;
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .context("opening", path)
    }

    /// Where the pack of a file of it is.
    pub(crate) fn pack_of(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.pack"))
    }
}

/// Reads a pack as those will who resume from it, and compares what it gives with the memory.
fn check_pack(
    pack: File,
    memory: &File,
    object: &Digest,
    parents: &[(Memory, &File)],
) -> Result<(), Error> {
    let bad = |source| Error::BadPack {
        object: *object,
        source,
    };
    let pack = OpenPack::open(*object, pack).map_err(|error| bad(io::Error::other(error)))?;
    let parents: Vec<&dyn kiln_packs::Content> =
        parents.iter().map(|(_, file)| *file as _).collect();
    let compared = first_difference(&pack.pack, &pack.file, &parents, &[], memory);
    match compared.map_err(|error| bad(io::Error::other(error)))? {
        None => Ok(()),
        Some(page) => Err(bad(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("page {page} differs"),
        ))),
    }
}
