//! Images as the folder that a registry serves: Docker's, which Debian packages as `docker-registry`, keeps its blobs and
//! links to them in files. So it serves images that nobody pushed, from a read-only disk too.

use std::fs;
use std::path::Path;

use crate::once::host;
use crate::{Error, Image, Result};

/// Where the registry listens on the node.
pub const ADDRESS: &str = "127.0.0.1:5000";
/// The folder below containerd's `config_path` that [`hosts`] belongs in, as `hosts.toml`: for every registry's name.
pub const HOSTS_FOLDER: &str = "_default";

/// containerd's `hosts.toml` that has images of whatever registry pulled from ours.
pub fn hosts() -> String {
    format!("[host.\"http://{ADDRESS}\"]\n  capabilities = [\"pull\", \"resolve\"]\n")
}

/// The registry's own configuration: it serves the folder `storage` and writes nothing.
pub fn configuration(storage: &str) -> String {
    format!(
        "\
version: 0.1
log:
  level: warn
  accesslog:
    disabled: true
storage:
  filesystem:
    rootdirectory: {storage}
  maintenance:
    uploadpurging:
      enabled: false
    readonly:
      enabled: true
http:
  addr: {ADDRESS}
"
    )
}

/// An image under all its names, such as `registry.k8s.io/pause:3.10`. Names that differ in the registry only are one
/// image's.
#[derive(Debug, Clone)]
pub struct Named {
    /// The names.
    pub names: Vec<String>,
    /// The image.
    pub image: Image,
}

/// Repository and tag: what of a name a registry is asked for.
fn repository(name: &str) -> Result<(&str, &str)> {
    name.split_once('/')
        .and_then(|(_, rest)| rest.rsplit_once(':'))
        .filter(|(repository, tag)| {
            !tag.contains('/')
                && !repository
                    .split('/')
                    .any(|part| matches!(part, "" | "." | ".."))
        })
        .ok_or_else(|| Error::Name {
            name: name.to_owned(),
        })
}

/// Writes what the registry serves as `folder`.
pub fn write<'a>(images: impl IntoIterator<Item = &'a Named>, folder: &Path) -> Result<()> {
    let root = folder.join("docker/registry/v2");
    for Named { names, image } in images {
        for blob in image.blobs() {
            let hash = hash(&blob.descriptor.digest);
            let path = root.join(format!("blobs/sha256/{}/{hash}/data", &hash[..2]));
            put(&path, &blob.bytes)?;
        }
        let manifest = &image.manifest.descriptor.digest;
        for name in names {
            let (repository, tag) = repository(name)?;
            let repository = root.join("repositories").join(repository);
            let link = |folder: &str, digest: &str| {
                let path = format!("{folder}/sha256/{}/link", hash(digest));
                put(&repository.join(path), digest.as_bytes())
            };
            for blob in image.layers.iter().chain([&image.config]) {
                link("_layers", &blob.descriptor.digest)?;
            }
            link("_manifests/revisions", manifest)?;
            let tag = format!("_manifests/tags/{tag}");
            link(&format!("{tag}/index"), manifest)?;
            put(
                &repository.join(format!("{tag}/current/link")),
                manifest.as_bytes(),
            )?;
        }
    }
    Ok(())
}

/// The hexadecimal digits of a digest.
fn hash(digest: &str) -> &str {
    digest.strip_prefix("sha256:").unwrap_or(digest)
}

fn put(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Some(parent) = path.parent() {
        host("make the folder", parent, fs::create_dir_all(parent))?;
    }
    host("write", path, fs::write(path, bytes))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::{ImageBuilder, Layer};

    fn image(content: &str) -> Image {
        let layer = Layer::new().file("file", content, 0o644);
        ImageBuilder::new().layer(layer).build().unwrap()
    }

    fn named(names: &[&str], content: &str) -> Named {
        Named {
            names: names.iter().map(ToString::to_string).collect(),
            image: image(content),
        }
    }

    /// What the registry answers to `GET /v2/REPOSITORY/manifests/TAG` and to the digests in it.
    fn served(root: &Path, repository: &str, tag: &str) -> Vec<Vec<u8>> {
        let root = root.join("docker/registry/v2");
        let repository = root.join("repositories").join(repository);
        let blob = |link: PathBuf| {
            let digest = fs::read_to_string(&link).unwrap();
            let hash = digest.strip_prefix("sha256:").unwrap();
            assert!(link.ends_with(format!("{hash}/link")) || link.ends_with("current/link"));
            fs::read(root.join(format!("blobs/sha256/{}/{hash}/data", &hash[..2]))).unwrap()
        };
        let manifest = blob(repository.join(format!("_manifests/tags/{tag}/current/link")));
        let read: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
        let mut answers = vec![manifest];
        for part in read["layers"]
            .as_array()
            .unwrap()
            .iter()
            .chain([&read["config"]])
        {
            let hash = part["digest"].as_str().unwrap().replace(':', "/");
            answers.push(blob(repository.join(format!("_layers/{hash}/link"))));
        }
        answers
    }

    #[test]
    fn every_name_leads_to_its_images_blobs() {
        let folder = tempfile::tempdir().unwrap();
        let images = [
            named(
                &["one.test/a/b:1", "two.test/a/b:1", "one.test/a/b:2"],
                "first",
            ),
            named(&["one.test/a/b:3", "one.test/c:latest"], "second"),
        ];
        write(&images, folder.path()).unwrap();
        for (repository, tag, which) in [
            ("a/b", "1", 0),
            ("a/b", "2", 0),
            ("a/b", "3", 1),
            ("c", "latest", 1),
        ] {
            let Image {
                manifest,
                config,
                layers,
                ..
            } = &images[which].image;
            let expected = [&manifest.bytes, &layers[0].bytes, &config.bytes];
            assert_eq!(
                served(folder.path(), repository, tag),
                expected.map(Clone::clone),
                "{repository}:{tag}"
            );
        }
    }

    #[test]
    fn a_name_that_has_no_tag_or_leads_elsewhere_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        for name in [
            "pause",
            "pause:1",
            "host:5000/pause",
            "host/../pause:1",
            "host//pause:1",
            "host/:1",
        ] {
            let error = write(&[named(&[name], "")], folder.path()).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}
