//! The file an image comes in: a tar with the layout of OCI or of Docker.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

/// No manifest or configuration comes near this.
const LARGEST_DOCUMENT: u64 = 16 << 20;
/// Indexes in indexes: an image's platforms are one level, an archive's images another.
const DEEPEST_INDEX: usize = 4;

#[derive(Debug)]
pub(crate) struct Archive {
    path: PathBuf,
    entries: BTreeMap<String, Place>,
}

#[derive(Debug, Clone)]
enum Place {
    File {
        at: u64,
        length: u64,
    },
    /// Docker once wrote layers that it has twice as links.
    Link(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

#[derive(Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    #[serde(default)]
    platform: Option<Platform>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Deserialize)]
struct Platform {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
}

impl Descriptor {
    fn is_index(&self) -> bool {
        self.media_type.ends_with("image.index.v1+json")
            || self.media_type.ends_with("manifest.list.v2+json")
    }

    fn suits(&self) -> bool {
        self.platform
            .as_ref()
            .is_none_or(|p| p.architecture == "amd64" && p.os == "linux")
    }

    fn name(&self) -> &str {
        let keys = [
            "io.containerd.image.name",
            "org.opencontainers.image.ref.name",
        ];
        keys.iter()
            .find_map(|key| self.annotations.get(*key))
            .unwrap_or(&self.digest)
    }
}

/// A path in an archive as it is looked up: without `./` and `..`.
fn normal(path: &Path) -> String {
    let mut parts: Vec<String> = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(part) => parts.push(part.to_string_lossy().into_owned()),
            Component::ParentDir => drop(parts.pop()),
            _ => {}
        }
    }
    parts.join("/")
}

fn blob(digest: &str) -> String {
    format!("blobs/{}", digest.replacen(':', "/", 1))
}

impl Archive {
    pub(crate) fn open(path: &Path) -> Result<Archive> {
        let shown = path.display();
        let mut file =
            File::open(path).with_context(|| format!("cannot open the image {shown}"))?;
        ensure!(
            file.metadata()?.is_file(),
            "{shown} is no image archive: give a file such as `docker save` writes"
        );
        let mut start = [0; 2];
        if file.read_exact(&mut start).is_ok() && start == [0x1f, 0x8b] {
            bail!("{shown} is compressed as a whole: unpack it first (gunzip)");
        }
        file.seek(SeekFrom::Start(0))?;
        let mut entries = BTreeMap::new();
        let damaged = || format!("{shown} is no tar archive, or it is cut off");
        let mut tar = tar::Archive::new(file);
        for entry in tar.entries_with_seek().with_context(damaged)? {
            let entry = entry.with_context(damaged)?;
            let name = entry.path().with_context(damaged)?.into_owned();
            let kind = entry.header().entry_type();
            let place = if kind.is_symlink() || kind.is_hard_link() {
                let link = entry.link_name().with_context(damaged)?;
                let link = link.unwrap_or_default();
                // A hard link names a path of the archive, a symbolic one a path from where it is.
                let base = if kind.is_symlink() {
                    name.parent().unwrap_or(Path::new(""))
                } else {
                    Path::new("")
                };
                Place::Link(normal(&base.join(link)))
            } else if kind.is_file() {
                Place::File {
                    at: entry.raw_file_position(),
                    length: entry.size(),
                }
            } else {
                continue;
            };
            entries.insert(normal(&name), place);
        }
        Ok(Archive {
            path: path.to_owned(),
            entries,
        })
    }

    /// The image's configuration, and the names of its layers, lowest first.
    pub(crate) fn image(&self) -> Result<(Vec<u8>, Vec<String>)> {
        if self.entries.contains_key("manifest.json") {
            return self.docker();
        }
        if self.entries.contains_key("index.json") {
            let index = self.document("index.json")?;
            return self.oci(&index, 0);
        }
        bail!(
            "{} holds no image: it has neither manifest.json nor index.json; write it with `docker \
             save`, `podman save` or `ctr image export`",
            self.path.display()
        )
    }

    fn docker(&self) -> Result<(Vec<u8>, Vec<String>)> {
        let mut images: Vec<DockerImage> = serde_json::from_slice(&self.document("manifest.json")?)
            .context("manifest.json is damaged")?;
        let Some(image) = images.pop() else {
            bail!("{} holds no image", self.path.display());
        };
        if !images.is_empty() {
            images.push(image);
            let names = images
                .iter()
                .map(|image| image.repo_tags.clone().unwrap_or_default().join(" "));
            return Err(self.too_many(&names.collect::<Vec<_>>()));
        }
        let layers = image.layers.iter().map(|name| normal(Path::new(name)));
        Ok((
            self.document(&normal(Path::new(&image.config)))?,
            layers.collect(),
        ))
    }

    fn oci(&self, index: &[u8], depth: usize) -> Result<(Vec<u8>, Vec<String>)> {
        ensure!(depth < DEEPEST_INDEX, "the image's indexes name each other");
        let index: Index = serde_json::from_slice(index).context("the image's index is damaged")?;
        let mut suitable: Vec<&Descriptor> =
            index.manifests.iter().filter(|one| one.suits()).collect();
        // An archive need not hold the other platforms, and may hold signatures without one.
        suitable.retain(|one| self.entries.contains_key(&blob(&one.digest)));
        suitable.dedup_by(|a, b| a.digest == b.digest);
        let [one] = suitable.as_slice() else {
            if suitable.is_empty() {
                bail!("{} holds no image for linux/amd64", self.path.display());
            }
            let names: Vec<String> = suitable.iter().map(|one| one.name().to_owned()).collect();
            return Err(self.too_many(&names));
        };
        let document = self.document(&blob(&one.digest))?;
        if one.is_index() {
            return self.oci(&document, depth + 1);
        }
        let manifest: Manifest =
            serde_json::from_slice(&document).context("the image's manifest is damaged")?;
        let layers = manifest.layers.iter().map(|layer| blob(&layer.digest));
        Ok((
            self.document(&blob(&manifest.config.digest))?,
            layers.collect(),
        ))
    }

    fn too_many(&self, names: &[String]) -> anyhow::Error {
        anyhow::anyhow!(
            "{} holds {} images ({}): save the wanted one alone",
            self.path.display(),
            names.len(),
            names.join(", ")
        )
    }

    fn part(&self, name: &str) -> Result<io::Take<File>> {
        let missing = || {
            format!(
                "{} has no {name}: save the image again",
                self.path.display()
            )
        };
        let mut place = self.entries.get(name).with_context(missing)?;
        if let Place::Link(target) = place {
            place = self.entries.get(target).with_context(missing)?;
        }
        let Place::File { at, length } = place else {
            bail!(missing());
        };
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(*at))?;
        Ok(file.take(*length))
    }

    fn document(&self, name: &str) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut part = self.part(name)?.take(LARGEST_DOCUMENT);
        part.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// A layer's tar, unpacked.
    pub(crate) fn layer(&self, name: &str) -> Result<Box<dyn Read>> {
        let mut start = Vec::new();
        self.part(name)?.take(4).read_to_end(&mut start)?;
        let part = BufReader::with_capacity(1 << 20, self.part(name)?);
        Ok(match start.as_slice() {
            [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(part)),
            [0x28, 0xb5, 0x2f, 0xfd] => Box::new(zstd::Decoder::with_buffer(part)?),
            _ => Box::new(part),
        })
    }
}
