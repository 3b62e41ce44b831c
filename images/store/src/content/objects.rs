//! Objects: files named by their content, shared by all entries that need the same. Some are stored packed.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use super::{Content, WriteLock};
use crate::error::Context;
use crate::{Digest, Error};

impl Content {
    pub(crate) fn object_path(&self, digest: &Digest) -> PathBuf {
        let name = digest.to_string();
        self.root.join("objects").join(&name[..2]).join(name)
    }

    /// Bytes on disk of an object, flat files of packed ones aside; 0 of one that is missing.
    pub(crate) fn object_bytes(&self, digest: &Digest) -> Result<u64, Error> {
        let mut bytes = 0;
        for path in [self.object_path(digest), self.pack_path(digest)] {
            match fs::metadata(&path) {
                Ok(meta) => bytes += meta.blocks() * 512,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).context("reading", &path),
            }
        }
        Ok(bytes)
    }

    /// The names of all objects, packed or not, needed or not.
    pub(crate) fn objects(&self) -> Result<BTreeSet<Digest>, Error> {
        let mut objects = BTreeSet::new();
        for all in ["objects", "packs"].map(|name| self.root.join(name)) {
            for dir in fs::read_dir(&all).context("reading", &all)? {
                let dir = dir.context("reading", &all)?.path();
                for file in fs::read_dir(&dir).context("reading", &dir)? {
                    let name = file.context("reading", &dir)?.file_name();
                    objects.extend(name.to_str().and_then(|name| name.parse::<Digest>().ok()));
                }
            }
        }
        Ok(objects)
    }

    /// Removes the objects that nobody needs. Returns how many it was.
    pub(crate) fn sweep_objects(
        &self,
        needed: &BTreeSet<Digest>,
        _lock: &WriteLock,
    ) -> Result<u32, Error> {
        let mut removed = 0;
        for digest in self.objects()? {
            if !needed.contains(&digest) {
                self.remove_if_there(&self.object_path(&digest))?;
                self.remove_if_there(&self.pack_path(&digest))?;
                removed += 1;
            }
        }
        self.sweep_flat(&|object| needed.contains(object))?;
        Ok(removed)
    }
}
