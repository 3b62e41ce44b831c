//! Container images as files: what `docker save`, `podman save` and `ctr image export` write, turned
//! into a root file system image in the store.
//!
//! [`Image`] is one that has been opened: its defaults, its root file system, the users it knows.
//!
//! An archive is not trusted: layers are unpacked without ever following a link out of their
//! directory, and each must have the digest that the image's configuration names.

#![forbid(unsafe_code)]

mod error;
mod layout;
mod unpack;

use std::fs::DirBuilder;
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use kiln_cache::{Lowers, image_of};
use kiln_store::{ImageKey, Images};
use serde::Deserialize;
use sha2::{Digest, Sha256};

pub use error::Error;

use layout::Archive;
use unpack::Tree;

/// What an image says about the processes in it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Defaults {
    /// The program and its first arguments.
    pub entrypoint: Option<Vec<String>>,
    /// Arguments behind the entry point, or the whole command if there is none.
    pub cmd: Option<Vec<String>>,
    /// Variables, as `NAME=value`.
    pub env: Option<Vec<String>>,
    /// The directory that the command starts in; empty for the root.
    pub working_dir: String,
    /// The user that the command runs as, for [`Image::user`].
    pub user: String,
}

/// The configuration of an image; only what is needed of it.
#[derive(Debug, Deserialize)]
struct Config {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    config: Option<Defaults>,
    rootfs: RootFs,
}

#[derive(Debug, Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

/// An image in an archive.
#[derive(Debug)]
pub struct Image {
    archive: Archive,
    /// Names of the layers in the archive, lowest first, with the digests of what is in them.
    layers: Vec<(String, String)>,
    defaults: Defaults,
}

impl Image {
    /// Opens the one image of an archive. Its layers are not read yet.
    pub fn open(path: &Path) -> Result<Image, Error> {
        let archive = Archive::open(path)?;
        let (config, layers) = archive.image()?;
        let config: Config = serde_json::from_slice(&config)
            .map_err(Error::document("the image's configuration", path))?;
        if !config.architecture.is_empty() && config.architecture != "amd64" {
            return Err(Error::Architecture {
                path: path.to_owned(),
                architecture: config.architecture,
            });
        }
        let diff_ids = config.rootfs.diff_ids;
        if diff_ids.len() != layers.len() {
            return Err(Error::LayerCount {
                path: path.to_owned(),
                named: diff_ids.len(),
                held: layers.len(),
            });
        }
        Ok(Image {
            archive,
            layers: layers.into_iter().zip(diff_ids).collect(),
            defaults: config.config.unwrap_or_default(),
        })
    }

    /// What the image says about the processes in it.
    pub fn defaults(&self) -> &Defaults {
        &self.defaults
    }

    /// The root file system, from the store; it is made if that has none. Several at once would unpack the same layers:
    /// the first makes the image for all.
    pub fn root(&self, store: &Path) -> Result<kiln_store::Image, Error> {
        let key = ImageKey::from_identity(self.layers.iter().map(|(_, digest)| digest));
        image_of(&Images::at(store), &key, |work| {
            let tree = work.join("unpacked");
            // A layer may hold programs that act for root: nobody else gets at them here.
            DirBuilder::new()
                .mode(0o700)
                .create(&tree)
                .map_err(Error::file("make", &tree))?;
            self.unpack(&tree)?;
            Ok(Lowers::plain(tree))
        })
    }

    fn unpack(&self, target: &Path) -> Result<(), Error> {
        let tree = Tree::open(target)?;
        for (name, digest) in &self.layers {
            let mut hashing = Hashing::new(self.archive.layer(name)?);
            tree.apply(name, &mut hashing)?;
            let found = hashing.finish().map_err(Error::layer(name))?;
            if found != *digest {
                return Err(Error::Damaged {
                    layer: name.clone(),
                    found,
                    wanted: digest.clone(),
                });
            }
        }
        Ok(())
    }

    /// The content of a file, a text of at most 1 MiB, as the topmost layer has it that has one.
    pub fn file(&self, wanted: &str) -> Result<Option<String>, Error> {
        for (name, _) in self.layers.iter().rev() {
            let mut layer = tar::Archive::new(self.archive.layer(name)?);
            for entry in layer.entries().map_err(Error::layer(name))? {
                let mut entry = entry.map_err(Error::layer(name))?;
                let path = entry.path().map_err(Error::layer(name))?;
                let path = path.strip_prefix("./").unwrap_or(&path);
                if path == Path::new(wanted) {
                    let mut text = String::new();
                    let read = entry.by_ref().take(1 << 20).read_to_string(&mut text);
                    read.map_err(|source| Error::Text {
                        layer: name.clone(),
                        file: wanted.to_owned(),
                        source,
                    })?;
                    return Ok(Some(text));
                }
            }
        }
        Ok(None)
    }

    /// User and group of `USER[:GROUP]`, by the image's own files; root's if the text is empty.
    pub fn user(&self, text: &str) -> Result<(u32, u32), Error> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        if user.is_empty() {
            return Ok((0, 0));
        }
        let numeric = user.parse::<u32>().ok();
        let needs_passwd = numeric.is_none() || group.is_none();
        let passwd = if needs_passwd {
            self.file("etc/passwd")?.unwrap_or_default()
        } else {
            String::new()
        };
        let known = passwd.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            let [name, _, uid, gid, ..] = fields.as_slice() else {
                return None;
            };
            let (uid, gid) = (uid.parse().ok()?, gid.parse().ok()?);
            (*name == user || numeric == Some(uid)).then_some((uid, gid))
        });
        let (uid, primary) = match (known, numeric) {
            (Some(known), _) => known,
            (None, Some(uid)) => (uid, 0),
            (None, None) => return Err(Error::NoUser(user.to_owned())),
        };
        let gid = match group {
            None => primary,
            Some(group) => match group.parse() {
                Ok(gid) => gid,
                Err(_) => group_number(&self.file("etc/group")?.unwrap_or_default(), group)
                    .ok_or_else(|| Error::NoGroup(group.to_owned()))?,
            },
        };
        Ok((uid, gid))
    }
}

/// Digests what is read through it.
struct Hashing<R> {
    inner: R,
    hasher: Sha256,
}

impl<R: Read> Hashing<R> {
    fn new(inner: R) -> Self {
        Hashing {
            inner,
            hasher: Sha256::new(),
        }
    }

    /// The digest of all there is to read.
    fn finish(mut self) -> io::Result<String> {
        io::copy(&mut self, &mut io::sink())?;
        let hex: String = self
            .hasher
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        Ok(format!("sha256:{hex}"))
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..length]);
        Ok(length)
    }
}

fn group_number(file: &str, group: &str) -> Option<u32> {
    file.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(group))
            .then(|| fields.nth(1)?.parse().ok())
            .flatten()
    })
}

#[cfg(test)]
mod tests;
