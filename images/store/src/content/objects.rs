//! Objects: files named by their content, shared by all entries that need the same.

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

    /// Bytes on disk of an object; 0 of one that is missing.
    pub(crate) fn object_bytes(&self, digest: &Digest) -> Result<u64, Error> {
        let path = self.object_path(digest);
        match fs::metadata(&path) {
            Ok(meta) => Ok(meta.blocks() * 512),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(error).context("reading", &path),
        }
    }

    /// The names of all objects, needed or not.
    pub(crate) fn objects(&self) -> Result<Vec<Digest>, Error> {
        let all = self.root.join("objects");
        let mut objects = Vec::new();
        for dir in fs::read_dir(&all).context("reading", &all)? {
            let dir = dir.context("reading", &all)?.path();
            for file in fs::read_dir(&dir).context("reading", &dir)? {
                let name = file.context("reading", &dir)?.file_name();
                objects.extend(name.to_str().and_then(|name| name.parse::<Digest>().ok()));
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
                let path = self.object_path(&digest);
                self.disk.remove_file(&path).context("removing", &path)?;
                removed += 1;
            }
        }
        Ok(removed)
    }
}
