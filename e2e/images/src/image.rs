//! Images: layers with a configuration, as blobs named by their SHA-256, and archives of them.

use std::io::Write;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{EntryType, Header};

use crate::{Compression, Error, Layer, Result};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CREATED: &str = "2025-01-01T00:00:00Z";

/// What points at a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// Media type of the blob.
    pub media_type: String,
    /// `sha256:` and 64 hexadecimal digits.
    pub digest: String,
    /// Length of the blob in bytes.
    pub size: u64,
}

impl Descriptor {
    fn json(&self) -> Value {
        json!({"mediaType": self.media_type, "digest": self.digest, "size": self.size})
    }
}

/// A blob with its descriptor.
#[derive(Debug, Clone)]
pub struct Blob {
    /// What points at it.
    pub descriptor: Descriptor,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

impl Blob {
    fn new(media_type: &str, bytes: Vec<u8>) -> Self {
        let descriptor = Descriptor {
            media_type: media_type.to_owned(),
            digest: digest(&bytes),
            size: bytes.len() as u64,
        };
        Blob { descriptor, bytes }
    }
}

/// An image: manifest, configuration and layers.
#[derive(Debug, Clone)]
pub struct Image {
    /// The manifest.
    pub manifest: Blob,
    /// The configuration.
    pub config: Blob,
    /// The layers, lowest first.
    pub layers: Vec<Blob>,
    /// Digest of each layer's tar before compression.
    pub diff_ids: Vec<String>,
}

impl Image {
    /// Names under which the layers' snapshots are kept: each stands for a layer and all below it.
    pub fn chain_ids(&self) -> Vec<String> {
        let mut chain: Vec<String> = Vec::with_capacity(self.diff_ids.len());
        for diff_id in &self.diff_ids {
            chain.push(match chain.last() {
                None => diff_id.clone(),
                Some(below) => digest(format!("{below} {diff_id}").as_bytes()),
            });
        }
        chain
    }

    /// All blobs, each before those that point at it.
    pub fn blobs(&self) -> impl Iterator<Item = &Blob> {
        self.layers.iter().chain([&self.config, &self.manifest])
    }

    /// Writes an OCI archive with this image under the name `reference`.
    pub fn write_archive(&self, reference: &str, out: impl Write) -> Result<()> {
        write_archive(&[(reference, self)], out)
    }
}

/// Writes one OCI archive (a tar of an OCI image layout) that holds all `images`.
pub fn write_archive(images: &[(&str, &Image)], out: impl Write) -> Result<()> {
    let failed = |source| Error::Write {
        what: "an OCI archive",
        source,
    };
    let manifests: Vec<Value> = images
        .iter()
        .map(|(reference, image)| {
            let mut entry = image.manifest.descriptor.json();
            let tag = reference.rsplit_once(':').map_or("latest", |(_, tag)| tag);
            entry["annotations"] = json!({
                "io.containerd.image.name": reference,
                "org.opencontainers.image.ref.name": tag,
            });
            entry["platform"] = json!({"architecture": architecture(), "os": "linux"});
            entry
        })
        .collect();
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests});
    let layout = json!({"imageLayoutVersion": "1.0.0"});
    let mut files: Vec<(String, Vec<u8>)> = vec![
        ("oci-layout".to_owned(), layout.to_string().into_bytes()),
        ("index.json".to_owned(), index.to_string().into_bytes()),
    ];
    let mut blobs: Vec<(String, Vec<u8>)> = images
        .iter()
        .flat_map(|(_, image)| image.blobs())
        .map(|blob| {
            (
                format!("blobs/{}", blob.descriptor.digest.replace(':', "/")),
                blob.bytes.clone(),
            )
        })
        .collect();
    blobs.sort();
    blobs.dedup();
    files.append(&mut blobs);
    let mut archive = tar::Builder::new(out);
    for (path, bytes) in files {
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o444);
        header.set_size(bytes.len() as u64);
        header.set_mtime(0);
        archive
            .append_data(&mut header, path, &bytes[..])
            .map_err(failed)?;
    }
    archive.finish().map_err(failed)
}

/// What a layer of an image is made from.
#[derive(Debug, Clone)]
enum Source {
    Built(Layer),
    Archive(Vec<u8>, Compression),
}

impl Source {
    /// The layer's tar, and how its blob is compressed.
    fn tar(self) -> Result<(Vec<u8>, Compression)> {
        match self {
            Source::Built(layer) => Ok((layer.to_tar()?, layer.compression())),
            Source::Archive(tar, compression) => Ok((tar, compression)),
        }
    }
}

/// An image being put together.
#[derive(Debug, Clone, Default)]
pub struct ImageBuilder {
    layers: Vec<Source>,
    entrypoint: Vec<String>,
    command: Vec<String>,
    environment: Vec<String>,
    user: String,
    workdir: String,
    stop_signal: String,
    labels: Vec<(String, String)>,
    volumes: Vec<String>,
}

impl ImageBuilder {
    /// An image without layers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a layer on top.
    pub fn layer(mut self, layer: Layer) -> Self {
        self.layers.push(Source::Built(layer));
        self
    }

    /// Puts a layer on top whose tar another program wrote.
    pub fn archive(mut self, tar: Vec<u8>, compression: Compression) -> Self {
        self.layers.push(Source::Archive(tar, compression));
        self
    }

    /// The program that always runs.
    pub fn entrypoint(mut self, words: &[&str]) -> Self {
        self.entrypoint = words.iter().map(ToString::to_string).collect();
        self
    }

    /// The arguments unless others are given.
    pub fn command(mut self, words: &[&str]) -> Self {
        self.command = words.iter().map(ToString::to_string).collect();
        self
    }

    /// An environment variable.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push(format!("{name}={value}"));
        self
    }

    /// The user (and group), as numbers or names of the image's own `/etc/passwd`.
    pub fn user(mut self, user: &str) -> Self {
        user.clone_into(&mut self.user);
        self
    }

    /// The working directory.
    pub fn workdir(mut self, path: &str) -> Self {
        path.clone_into(&mut self.workdir);
        self
    }

    /// The signal that asks a container to stop.
    pub fn stop_signal(mut self, signal: &str) -> Self {
        signal.clone_into(&mut self.stop_signal);
        self
    }

    /// A label.
    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.labels.push((name.to_owned(), value.to_owned()));
        self
    }

    /// A path for which the runtime makes a volume.
    pub fn volume(mut self, path: &str) -> Self {
        self.volumes.push(path.to_owned());
        self
    }

    /// Makes the blobs.
    pub fn build(mut self) -> Result<Image> {
        let sources = std::mem::take(&mut self.layers);
        let mut layers = Vec::with_capacity(sources.len());
        let mut diff_ids = Vec::with_capacity(sources.len());
        for source in sources {
            let (tar, compression) = source.tar()?;
            diff_ids.push(digest(&tar));
            layers.push(Blob::new(
                compression.media_type(),
                compression.compress(&tar)?,
            ));
        }
        let config = Blob::new(CONFIG, self.config(&diff_ids).to_string().into_bytes());
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config.descriptor.json(),
            "layers": layers.iter().map(|layer| layer.descriptor.json()).collect::<Vec<_>>(),
        });
        let manifest = Blob::new(MANIFEST, manifest.to_string().into_bytes());
        Ok(Image {
            manifest,
            config,
            layers,
            diff_ids,
        })
    }

    fn config(&self, diff_ids: &[String]) -> Value {
        let mut run = json!({});
        let mut set = |name: &str, value: Value, given: bool| {
            if given {
                run[name] = value;
            }
        };
        set(
            "Entrypoint",
            json!(self.entrypoint),
            !self.entrypoint.is_empty(),
        );
        set("Cmd", json!(self.command), !self.command.is_empty());
        set("Env", json!(self.environment), !self.environment.is_empty());
        set("User", json!(self.user), !self.user.is_empty());
        set("WorkingDir", json!(self.workdir), !self.workdir.is_empty());
        set(
            "StopSignal",
            json!(self.stop_signal),
            !self.stop_signal.is_empty(),
        );
        let labels = self
            .labels
            .iter()
            .map(|(name, value)| (name.clone(), json!(value)));
        set(
            "Labels",
            Value::Object(labels.collect()),
            !self.labels.is_empty(),
        );
        let volumes = self.volumes.iter().map(|path| (path.clone(), json!({})));
        set(
            "Volumes",
            Value::Object(volumes.collect()),
            !self.volumes.is_empty(),
        );
        let history: Vec<Value> = (0..diff_ids.len())
            .map(|index| json!({"created": CREATED, "created_by": format!("layer {index}")}))
            .collect();
        json!({
            "created": CREATED,
            "architecture": architecture(),
            "os": "linux",
            "config": run,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": history,
        })
    }
}

/// This machine's architecture by its OCI name.
pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A short name for these parts together, which another list of parts does not get.
pub(crate) fn fingerprint<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hex(&hasher.finalize()[..8])
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read;

    use super::*;
    use crate::Compression;

    fn two_layers() -> Image {
        ImageBuilder::new()
            .layer(Layer::new().file("etc/a", "below", 0o644))
            .layer(
                Layer::new()
                    .file("etc/a", "above", 0o644)
                    .compressed(Compression::Gzip),
            )
            .command(&["/bin/a"])
            .env("A", "1")
            .build()
            .unwrap()
    }

    #[test]
    fn the_same_files_give_the_same_digest() {
        let (first, second) = (two_layers(), two_layers());
        assert_eq!(first.manifest.descriptor, second.manifest.descriptor);
    }

    #[test]
    fn chain_ids_follow_the_image_specification() {
        let image = two_layers();
        let chain = image.chain_ids();
        assert_eq!(chain[0], image.diff_ids[0]);
        let expected = digest(format!("{} {}", image.diff_ids[0], image.diff_ids[1]).as_bytes());
        assert_eq!(chain[1], expected);
        // The compressed blob has another digest than its content.
        assert_ne!(image.layers[1].descriptor.digest, image.diff_ids[1]);
    }

    #[test]
    fn what_was_not_given_is_not_in_the_configuration() {
        let config: Value = serde_json::from_slice(&two_layers().config.bytes).unwrap();
        assert_eq!(config["config"], json!({"Cmd": ["/bin/a"], "Env": ["A=1"]}));
    }

    #[test]
    fn an_archive_holds_each_blob_once_under_its_own_digest() {
        let image = two_layers();
        let mut archive = Vec::new();
        write_archive(
            &[("kiln.test/a:1", &image), ("kiln.test/b:2", &image)],
            &mut archive,
        )
        .unwrap();
        let mut files = BTreeMap::new();
        for entry in tar::Archive::new(&archive[..]).entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().display().to_string();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            assert!(files.insert(path.clone(), bytes).is_none(), "{path} twice");
        }
        assert_eq!(files.len(), 2 + 2 + 2);
        for (path, bytes) in &files {
            if let Some(hash) = path.strip_prefix("blobs/sha256/") {
                assert_eq!(digest(bytes), format!("sha256:{hash}"));
            }
        }
        let index: Value = serde_json::from_slice(&files["index.json"]).unwrap();
        let names: Vec<&Value> = index["manifests"]
            .as_array()
            .unwrap()
            .iter()
            .map(|entry| &entry["annotations"]["io.containerd.image.name"])
            .collect();
        assert_eq!(names, ["kiln.test/a:1", "kiln.test/b:2"]);
    }
}
