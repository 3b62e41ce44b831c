//! One layer: a set of changes to a file system, written as a tar stream that depends on nothing
//! but those changes.

use std::collections::BTreeMap;
use std::io::Write;

use tar::{EntryType, Header};

use crate::{Error, Result};

/// All entries carry this modification time: 1 January 2025, so that it is visibly not "now" and
/// not the epoch either (some tools take 0 for "none").
pub(crate) const MTIME: u64 = 1_735_689_600;

/// How a layer's blob is compressed. Runtimes meet all three in the field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// A plain tar.
    None,
    /// gzip, what most registries serve.
    Gzip,
    /// zstd.
    Zstd,
}

impl Compression {
    /// The layer's media type.
    pub fn media_type(self) -> &'static str {
        match self {
            Compression::None => "application/vnd.oci.image.layer.v1.tar",
            Compression::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Compression::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }

    pub(crate) fn compress(self, tar: &[u8]) -> Result<Vec<u8>> {
        let failed = |source| Error::Write {
            what: "a compressed layer",
            source,
        };
        match self {
            Compression::None => Ok(tar.to_vec()),
            Compression::Gzip => {
                // No file name and no time in the header: flate2 writes zeroes by default.
                let mut encoder =
                    flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(tar).map_err(failed)?;
                encoder.finish().map_err(failed)
            }
            Compression::Zstd => zstd::encode_all(tar, 3).map_err(failed),
        }
    }
}

#[derive(Debug, Clone)]
enum Content {
    Directory,
    File(Vec<u8>),
    Symlink(String),
    Hardlink(String),
    Fifo,
}

#[derive(Debug, Clone)]
struct Entry {
    content: Content,
    mode: u32,
    owner: (u64, u64),
    xattrs: Vec<(String, Vec<u8>)>,
}

/// A layer being put together. Paths are relative to the root, such as `etc/passwd`; parent
/// directories that are not given are made, with mode 0755.
#[derive(Debug, Clone)]
pub struct Layer {
    entries: BTreeMap<String, Entry>,
    compression: Compression,
}

impl Default for Layer {
    fn default() -> Self {
        Layer {
            entries: BTreeMap::new(),
            compression: Compression::None,
        }
    }
}

impl Layer {
    /// An empty layer.
    pub fn new() -> Self {
        Self::default()
    }

    /// Compresses the layer's blob this way.
    pub fn compressed(mut self, compression: Compression) -> Self {
        self.compression = compression;
        self
    }

    pub(crate) fn compression(&self) -> Compression {
        self.compression
    }

    fn with(mut self, path: &str, content: Content, mode: u32) -> Self {
        let entry = Entry {
            content,
            mode,
            owner: (0, 0),
            xattrs: Vec::new(),
        };
        self.entries
            .insert(path.trim_end_matches('/').to_owned(), entry);
        self
    }

    /// A directory.
    pub fn dir(self, path: &str, mode: u32) -> Self {
        self.with(path, Content::Directory, mode)
    }

    /// A regular file.
    pub fn file(self, path: &str, content: impl Into<Vec<u8>>, mode: u32) -> Self {
        self.with(path, Content::File(content.into()), mode)
    }

    /// A symbolic link.
    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.with(path, Content::Symlink(target.to_owned()), 0o777)
    }

    /// A hard link to another path of this layer.
    pub fn hardlink(self, path: &str, target: &str) -> Self {
        self.with(path, Content::Hardlink(target.to_owned()), 0o644)
    }

    /// A named pipe.
    pub fn fifo(self, path: &str, mode: u32) -> Self {
        self.with(path, Content::Fifo, mode)
    }

    /// Removes a path of the layers below.
    pub fn whiteout(self, path: &str) -> Self {
        let name = match path.rsplit_once('/') {
            Some((parent, name)) => format!("{parent}/.wh.{name}"),
            None => format!(".wh.{path}"),
        };
        self.with(&name, Content::File(Vec::new()), 0o644)
    }

    /// A directory that hides everything the layers below have in it.
    pub fn opaque(self, path: &str, mode: u32) -> Self {
        let marker = format!("{}/.wh..wh..opq", path.trim_end_matches('/'));
        self.dir(path, mode)
            .with(&marker, Content::File(Vec::new()), 0o644)
    }

    /// Sets the owner of an entry that was added before.
    pub fn owned_by(mut self, path: &str, uid: u64, gid: u64) -> Self {
        if let Some(entry) = self.entries.get_mut(path) {
            entry.owner = (uid, gid);
        }
        self
    }

    /// Sets an extended attribute of an entry that was added before.
    pub fn xattr(mut self, path: &str, name: &str, value: impl Into<Vec<u8>>) -> Self {
        if let Some(entry) = self.entries.get_mut(path) {
            entry.xattrs.push((name.to_owned(), value.into()));
        }
        self
    }

    /// The layer as a tar stream: directories before what is in them, hard links after their targets.
    pub fn to_tar(&self) -> Result<Vec<u8>> {
        let failed = |source| Error::Write {
            what: "a layer",
            source,
        };
        let parent_entry = Entry {
            content: Content::Directory,
            mode: 0o755,
            owner: (0, 0),
            xattrs: Vec::new(),
        };
        // By reference: what a layer holds can be a hundred megabytes.
        let mut all: BTreeMap<&str, &Entry> = BTreeMap::new();
        for (path, entry) in &self.entries {
            check(path)?;
            all.insert(path, entry);
            let mut parent = path.as_str();
            while let Some((above, _)) = parent.rsplit_once('/') {
                all.entry(above).or_insert(&parent_entry);
                parent = above;
            }
        }
        let mut tar = tar::Builder::new(Vec::new());
        let is_hardlink = |entry: &Entry| matches!(entry.content, Content::Hardlink(_));
        let (links, others): (Vec<_>, Vec<_>) =
            all.iter().partition(|(_, entry)| is_hardlink(entry));
        for (path, entry) in others {
            append(&mut tar, path, entry).map_err(failed)?;
        }
        for (path, link) in links {
            // A link is the file that it leads to: whoever unpacks it sets mode and owner of both.
            let target = match &link.content {
                Content::Hardlink(target) => all.get(target.as_str()).copied(),
                _ => None,
            };
            let target = target.unwrap_or(link);
            let entry = Entry {
                content: link.content.clone(),
                mode: target.mode,
                owner: target.owner,
                xattrs: Vec::new(),
            };
            append(&mut tar, path, &entry).map_err(failed)?;
        }
        tar.into_inner().map_err(failed)
    }
}

fn check(path: &str) -> Result<()> {
    let bad = path.is_empty()
        || path.starts_with('/')
        || path.split('/').any(|part| matches!(part, "" | "." | ".."));
    if bad {
        Err(Error::Path {
            path: path.to_owned(),
        })
    } else {
        Ok(())
    }
}

fn append(tar: &mut tar::Builder<Vec<u8>>, path: &str, entry: &Entry) -> std::io::Result<()> {
    if !entry.xattrs.is_empty() {
        let names: Vec<String> = entry
            .xattrs
            .iter()
            .map(|(name, _)| format!("SCHILY.xattr.{name}"))
            .collect();
        let pairs = names.iter().zip(&entry.xattrs);
        tar.append_pax_extensions(pairs.map(|(name, (_, value))| (name.as_str(), &value[..])))?;
    }
    let mut header = Header::new_gnu();
    header.set_mode(entry.mode);
    header.set_uid(entry.owner.0);
    header.set_gid(entry.owner.1);
    header.set_mtime(MTIME);
    header.set_size(0);
    match &entry.content {
        Content::Directory => {
            header.set_entry_type(EntryType::Directory);
            tar.append_data(&mut header, format!("{path}/"), std::io::empty())
        }
        Content::File(bytes) => {
            header.set_entry_type(EntryType::Regular);
            header.set_size(bytes.len() as u64);
            tar.append_data(&mut header, path, &bytes[..])
        }
        Content::Symlink(target) => {
            header.set_entry_type(EntryType::Symlink);
            tar.append_link(&mut header, path, target)
        }
        Content::Hardlink(target) => {
            header.set_entry_type(EntryType::Link);
            tar.append_link(&mut header, path, target)
        }
        Content::Fifo => {
            header.set_entry_type(EntryType::Fifo);
            tar.append_data(&mut header, path, std::io::empty())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use proptest::prelude::*;

    use super::*;

    fn names(tar: &[u8]) -> Vec<String> {
        tar::Archive::new(tar)
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().path().unwrap().display().to_string())
            .collect()
    }

    #[test]
    fn parents_come_first_and_hard_links_last() {
        let layer = Layer::new()
            .hardlink("a/link", "z/file")
            .file("z/file", "x", 0o600)
            .symlink("b", "z");
        assert_eq!(
            names(&layer.to_tar().unwrap()),
            ["a/", "b", "z/", "z/file", "a/link"]
        );
    }

    #[test]
    fn a_hard_link_has_mode_and_owner_of_the_file_that_it_leads_to() {
        let layer = Layer::new()
            .file("bin/program", "x", 0o755)
            .owned_by("bin/program", 1000, 2000)
            .hardlink("bin/alias", "bin/program");
        let tar = layer.to_tar().unwrap();
        let mut archive = tar::Archive::new(&tar[..]);
        let link = archive
            .entries()
            .unwrap()
            .map(Result::unwrap)
            .last()
            .unwrap();
        assert_eq!(link.path().unwrap().to_str(), Some("bin/alias"));
        let header = link.header();
        assert_eq!(header.mode().unwrap(), 0o755);
        assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (1000, 2000));
    }

    #[test]
    fn whiteouts_have_the_names_that_the_image_specification_gives_them() {
        let layer = Layer::new()
            .whiteout("etc/gone")
            .whiteout("top")
            .opaque("opt/dir", 0o755);
        assert_eq!(
            names(&layer.to_tar().unwrap()),
            [
                ".wh.top",
                "etc/",
                "etc/.wh.gone",
                "opt/",
                "opt/dir/",
                "opt/dir/.wh..wh..opq"
            ]
        );
    }

    #[test]
    fn owner_mode_long_name_and_attribute_survive() {
        let long = format!("long/{}/file", "n".repeat(180));
        let layer = Layer::new()
            .file(&long, "content", 0o4750)
            .owned_by(&long, 1000, 2000)
            .xattr(&long, "user.kiln", "yes");
        let tar = layer.to_tar().unwrap();
        let mut archive = tar::Archive::new(&tar[..]);
        let mut entry = archive
            .entries()
            .unwrap()
            .map(Result::unwrap)
            .nth(2)
            .unwrap();
        assert_eq!(entry.path().unwrap().to_str().unwrap(), long);
        let attributes: Vec<_> = entry
            .pax_extensions()
            .unwrap()
            .unwrap()
            .map(|extension| extension.unwrap().key().unwrap().to_owned())
            .collect();
        assert_eq!(attributes, ["SCHILY.xattr.user.kiln"]);
        assert_eq!(entry.header().uid().unwrap(), 1000);
        assert_eq!(entry.header().gid().unwrap(), 2000);
        assert_eq!(entry.header().mode().unwrap(), 0o4750);
        let mut content = String::new();
        entry.read_to_string(&mut content).unwrap();
        assert_eq!(content, "content");
    }

    #[test]
    fn a_path_out_of_the_layer_is_refused() {
        for path in ["/etc/passwd", "../x", "a/../b", "", "a//b", "./a"] {
            assert!(
                Layer::new().file(path, "", 0o644).to_tar().is_err(),
                "{path:?}"
            );
        }
    }

    #[test]
    fn every_compression_gives_the_tar_back() {
        let tar = Layer::new()
            .file("f", vec![7; 100_000], 0o644)
            .to_tar()
            .unwrap();
        let gzip = Compression::Gzip.compress(&tar).unwrap();
        let mut back = Vec::new();
        flate2::read::GzDecoder::new(&gzip[..])
            .read_to_end(&mut back)
            .unwrap();
        assert_eq!(back, tar);
        let zstd = Compression::Zstd.compress(&tar).unwrap();
        assert_eq!(zstd::decode_all(&zstd[..]).unwrap(), tar);
        assert_eq!(Compression::None.compress(&tar).unwrap(), tar);
    }

    proptest! {
        #[test]
        fn the_order_of_building_does_not_matter(
            files in proptest::collection::btree_map("[a-d]{1,3}/[a-d]{1,8}", any::<Vec<u8>>(), 0..12),
        ) {
            let forward = files.iter().fold(Layer::new(), |layer, (path, content)| {
                layer.file(path, content.clone(), 0o644)
            });
            let backward = files.iter().rev().fold(Layer::new(), |layer, (path, content)| {
                layer.file(path, content.clone(), 0o644)
            });
            prop_assert_eq!(forward.to_tar().unwrap(), backward.to_tar().unwrap());
        }
    }
}
