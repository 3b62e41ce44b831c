//! Container images as files: what `docker save`, `podman save` and `ctr image export` write, turned
//! into a root file system image in the store.
//!
//! An archive is not trusted: layers are unpacked without ever following a link out of their
//! directory, and each must have the digest that the image's configuration names.

mod archive;
mod unpack;

use std::fs::DirBuilder;
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use kiln_cache::{Lowers, image_of};
use kiln_store::{ImageKey, Images};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use archive::Archive;
use unpack::Tree;

/// What an image says about the processes in it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct Defaults {
    pub(crate) entrypoint: Option<Vec<String>>,
    pub(crate) cmd: Option<Vec<String>>,
    pub(crate) env: Option<Vec<String>>,
    pub(crate) working_dir: String,
    pub(crate) user: String,
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
pub(crate) struct Image {
    archive: Archive,
    /// Names of the layers in the archive, lowest first, with the digests of what is in them.
    layers: Vec<(String, String)>,
    pub(crate) defaults: Defaults,
}

impl Image {
    /// Opens the one image of an archive.
    pub(crate) fn open(path: &Path) -> Result<Image> {
        let archive = Archive::open(path)?;
        let (config, layers) = archive.image()?;
        let config: Config = serde_json::from_slice(&config).with_context(|| {
            format!("the image's configuration in {} is damaged", path.display())
        })?;
        ensure!(
            config.architecture.is_empty() || config.architecture == "amd64",
            "the image in {} is for {}, this machine is amd64: save the image of that platform",
            path.display(),
            config.architecture
        );
        let diff_ids = config.rootfs.diff_ids;
        ensure!(
            diff_ids.len() == layers.len(),
            "the image in {} names {} layers but holds {}: save it again",
            path.display(),
            diff_ids.len(),
            layers.len()
        );
        Ok(Image {
            archive,
            layers: layers.into_iter().zip(diff_ids).collect(),
            defaults: config.config.unwrap_or_default(),
        })
    }

    /// The root file system, from the store; it is made if that has none. Several at once would unpack the same layers:
    /// the first makes the image for all.
    pub(crate) fn root(&self, store: &Path) -> Result<kiln_store::Image> {
        let key = ImageKey::from_identity(self.layers.iter().map(|(_, digest)| digest));
        image_of(&Images::at(store), &key, |work| {
            let tree = work.join("unpacked");
            // A layer may hold programs that act for root: nobody else gets at them here.
            DirBuilder::new()
                .mode(0o700)
                .create(&tree)
                .with_context(|| format!("making {}", tree.display()))?;
            self.unpack(&tree)?;
            Ok(Lowers::plain(tree))
        })
    }

    fn unpack(&self, target: &Path) -> Result<()> {
        let tree = Tree::open(target)?;
        for (name, digest) in &self.layers {
            let mut hashing = Hashing::new(self.archive.layer(name)?);
            tree.apply(&mut hashing)
                .with_context(|| format!("layer {name} cannot be unpacked"))?;
            let found = hashing.finish()?;
            ensure!(
                found == *digest,
                "layer {name} is damaged: its content is {found}, not {digest}; save the image again"
            );
        }
        Ok(())
    }

    /// The content of a file as the topmost layer has it that has one.
    pub(crate) fn file(&self, wanted: &str) -> Result<Option<String>> {
        for (name, _) in self.layers.iter().rev() {
            let mut layer = tar::Archive::new(self.archive.layer(name)?);
            for entry in layer.entries()? {
                let mut entry = entry?;
                let path = entry.path()?;
                let path = path.strip_prefix("./").unwrap_or(&path);
                if path == Path::new(wanted) {
                    let mut text = String::new();
                    entry.by_ref().take(1 << 20).read_to_string(&mut text)?;
                    return Ok(Some(text));
                }
            }
        }
        Ok(None)
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

/// User and group of `USER[:GROUP]`, by the image's own files.
pub(crate) fn user(text: &str, image: &Image) -> Result<(u32, u32)> {
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
        image.file("etc/passwd")?.unwrap_or_default()
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
        (None, None) => {
            bail!("the image's /etc/passwd has no user {user:?}: give a number (-u UID)")
        }
    };
    let gid = match group {
        None => primary,
        Some(group) => match group.parse() {
            Ok(gid) => gid,
            Err(_) => group_number(&image.file("etc/group")?.unwrap_or_default(), group)
                .with_context(|| {
                    format!("the image's /etc/group has no group {group:?}: give a number")
                })?,
        },
    };
    Ok((uid, gid))
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
