//! The file an image comes in: a tar with the layout of OCI or of Docker.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use crate::Error;

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
    pub(crate) fn open(path: &Path) -> Result<Archive, Error> {
        let cannot_open = || Error::file("open the image", path);
        let mut file = File::open(path).map_err(cannot_open())?;
        if !file.metadata().map_err(cannot_open())?.is_file() {
            return Err(Error::NotAFile(path.to_owned()));
        }
        let mut start = [0; 2];
        if file.read_exact(&mut start).is_ok() && start == [0x1f, 0x8b] {
            return Err(Error::Compressed(path.to_owned()));
        }
        file.seek(SeekFrom::Start(0)).map_err(cannot_open())?;
        let mut entries = BTreeMap::new();
        let no_tar = |source| Error::NotATar {
            path: path.to_owned(),
            source,
        };
        let mut tar = tar::Archive::new(file);
        for entry in tar.entries_with_seek().map_err(no_tar)? {
            let entry = entry.map_err(no_tar)?;
            let name = entry.path().map_err(no_tar)?.into_owned();
            let kind = entry.header().entry_type();
            let place = if kind.is_symlink() || kind.is_hard_link() {
                let link = entry.link_name().map_err(no_tar)?;
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
    pub(crate) fn image(&self) -> Result<(Vec<u8>, Vec<String>), Error> {
        if self.entries.contains_key("manifest.json") {
            return self.docker();
        }
        if self.entries.contains_key("index.json") {
            let index = self.document("index.json")?;
            return self.oci(&index, 0);
        }
        Err(Error::NoImage(self.path.clone()))
    }

    fn docker(&self) -> Result<(Vec<u8>, Vec<String>), Error> {
        let mut images: Vec<DockerImage> = serde_json::from_slice(&self.document("manifest.json")?)
            .map_err(Error::document("manifest.json", &self.path))?;
        let Some(image) = images.pop() else {
            return Err(Error::Empty(self.path.clone()));
        };
        if !images.is_empty() {
            images.push(image);
            let names = images
                .iter()
                .map(|image| image.repo_tags.clone().unwrap_or_default().join(" "));
            return Err(self.many_images(names.collect()));
        }
        let layers = image.layers.iter().map(|name| normal(Path::new(name)));
        Ok((
            self.document(&normal(Path::new(&image.config)))?,
            layers.collect(),
        ))
    }

    fn oci(&self, index: &[u8], depth: usize) -> Result<(Vec<u8>, Vec<String>), Error> {
        if depth >= DEEPEST_INDEX {
            return Err(Error::DeepIndex(self.path.clone()));
        }
        let index: Index = serde_json::from_slice(index)
            .map_err(Error::document("the image's index", &self.path))?;
        let mut suitable: Vec<&Descriptor> =
            index.manifests.iter().filter(|one| one.suits()).collect();
        // An archive need not hold the other platforms, and may hold signatures without one.
        suitable.retain(|one| self.entries.contains_key(&blob(&one.digest)));
        suitable.dedup_by(|a, b| a.digest == b.digest);
        let [one] = suitable.as_slice() else {
            if suitable.is_empty() {
                return Err(Error::NoPlatform(self.path.clone()));
            }
            let names = suitable.iter().map(|one| one.name().to_owned());
            return Err(self.many_images(names.collect()));
        };
        let document = self.document(&blob(&one.digest))?;
        if one.is_index() {
            return self.oci(&document, depth + 1);
        }
        let manifest: Manifest = serde_json::from_slice(&document)
            .map_err(Error::document("the image's manifest", &self.path))?;
        let layers = manifest.layers.iter().map(|layer| blob(&layer.digest));
        Ok((
            self.document(&blob(&manifest.config.digest))?,
            layers.collect(),
        ))
    }

    fn many_images(&self, names: Vec<String>) -> Error {
        Error::ManyImages {
            path: self.path.clone(),
            names,
        }
    }

    fn part(&self, name: &str) -> Result<io::Take<File>, Error> {
        let missing = || Error::Missing {
            path: self.path.clone(),
            part: name.to_owned(),
        };
        let mut place = self.entries.get(name).ok_or_else(missing)?;
        if let Place::Link(target) = place {
            place = self.entries.get(target).ok_or_else(missing)?;
        }
        let Place::File { at, length } = place else {
            return Err(missing());
        };
        let mut file = File::open(&self.path).map_err(Error::file("open the image", &self.path))?;
        file.seek(SeekFrom::Start(*at))
            .map_err(Error::file("read the image", &self.path))?;
        Ok(file.take(*length))
    }

    fn document(&self, name: &str) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        let mut part = self.part(name)?.take(LARGEST_DOCUMENT);
        part.read_to_end(&mut bytes)
            .map_err(Error::file("read the image", &self.path))?;
        Ok(bytes)
    }

    /// A layer's tar, unpacked.
    pub(crate) fn layer(&self, name: &str) -> Result<Box<dyn Read>, Error> {
        let mut start = Vec::new();
        let mut part = self.part(name)?.take(4);
        part.read_to_end(&mut start).map_err(Error::layer(name))?;
        let part = BufReader::with_capacity(1 << 20, self.part(name)?);
        Ok(match start.as_slice() {
            [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(part)),
            [0x28, 0xb5, 0x2f, 0xfd] => {
                Box::new(zstd::Decoder::with_buffer(part).map_err(Error::layer(name))?)
            }
            _ => Box::new(part),
        })
    }
}
