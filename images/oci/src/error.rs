//! Errors of reading an image and of making its root file system.

use std::io;
use std::path::{Path, PathBuf};

use kiln_cache::CacheError;

/// Why an image, or something in it, cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or directory of the host cannot be had.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was to be done.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// A directory or a device is given as an archive.
    #[error("{} is no image archive: give a file such as `docker save` writes", .0.display())]
    NotAFile(PathBuf),
    /// The archive itself is compressed, so that nothing in it can be looked up.
    #[error("{} is compressed as a whole: unpack it first (gunzip)", .0.display())]
    Compressed(PathBuf),
    /// The archive is no tar that can be read to its end.
    #[error("{} is no tar archive, or it is cut off: save the image again", path.display())]
    NotATar {
        /// The archive.
        path: PathBuf,
        /// The reader's reason.
        #[source]
        source: io::Error,
    },
    /// The tar has the layout of no image.
    #[error(
        "{} holds no image: it has neither manifest.json nor index.json; write it with `docker save`, `podman \
         save` or `ctr image export`",
        .0.display()
    )]
    NoImage(PathBuf),
    /// The archive's list of images is empty.
    #[error("{} holds no image: its manifest.json names none; save the image again", .0.display())]
    Empty(PathBuf),
    /// Which image is meant cannot be told.
    #[error(
        "{} holds {} images ({}): save the wanted one alone",
        path.display(),
        names.len(),
        names.join(", ")
    )]
    ManyImages {
        /// The archive.
        path: PathBuf,
        /// Names of the images in it.
        names: Vec<String>,
    },
    /// The archive holds images, but none for this platform.
    #[error("{} holds no image for linux/amd64: save the image of that platform", .0.display())]
    NoPlatform(PathBuf),
    /// The image's own configuration names another architecture.
    #[error(
        "the image in {} is for {architecture}, this machine is amd64: save the image of that platform",
        path.display()
    )]
    Architecture {
        /// The archive.
        path: PathBuf,
        /// The image's architecture.
        architecture: String,
    },
    /// Indexes lie in each other more deeply than any that a tool writes.
    #[error("the image's indexes in {} name each other: save the image again", .0.display())]
    DeepIndex(PathBuf),
    /// A document of the image is not what it should be.
    #[error("{document} in {} is damaged: save the image again", path.display())]
    Document {
        /// The archive.
        path: PathBuf,
        /// Which document.
        document: &'static str,
        /// The parser's reason.
        #[source]
        source: serde_json::Error,
    },
    /// The configuration and the manifest speak of different images.
    #[error(
        "the image in {} names {named} layers but holds {held}: save it again",
        path.display()
    )]
    LayerCount {
        /// The archive.
        path: PathBuf,
        /// Layers in the image's configuration.
        named: usize,
        /// Layers in its manifest.
        held: usize,
    },
    /// Something that the image names is not in the archive.
    #[error("{} has no {part}: save the image again", path.display())]
    Missing {
        /// The archive.
        path: PathBuf,
        /// Its name in the archive.
        part: String,
    },
    /// A layer's archive cannot be read to its end.
    #[error("cannot read layer {layer}; save the image again")]
    Layer {
        /// The layer's name in the archive.
        layer: String,
        /// The reader's reason.
        #[source]
        source: io::Error,
    },
    /// A layer's content is not what the image's configuration says.
    #[error("layer {layer} is damaged: its content is {found}, not {wanted}; save the image again")]
    Damaged {
        /// The layer's name in the archive.
        layer: String,
        /// Digest of its content.
        found: String,
        /// Digest in the image's configuration.
        wanted: String,
    },
    /// A file in a layer cannot be read as a text.
    #[error("cannot read {file} of layer {layer}")]
    Text {
        /// The layer's name in the archive.
        layer: String,
        /// The file's path in the image.
        file: String,
        /// The reader's reason.
        #[source]
        source: io::Error,
    },
    /// An entry of a layer cannot be read, or the system does not make what it says.
    #[error("layer {layer} cannot be unpacked: cannot make {}", path.display())]
    Entry {
        /// The layer's name in the archive.
        layer: String,
        /// The entry's path in the image.
        path: PathBuf,
        /// The system's or the reader's reason.
        #[source]
        source: io::Error,
    },
    /// An entry of a layer makes no sense.
    #[error("layer {layer} cannot be unpacked: {} is {what}; build the image again", path.display())]
    Malformed {
        /// The layer's name in the archive.
        layer: String,
        /// The entry's path in the image.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// An entry of a layer has, or links to, a path that climbs out of the image.
    #[error("layer {layer} cannot be unpacked: {} leaves the image; build the image again", path.display())]
    Leaves {
        /// The layer's name in the archive.
        layer: String,
        /// The path that climbs.
        path: PathBuf,
    },
    /// A hard link names a file that neither its layer nor those below have.
    #[error(
        "layer {layer} cannot be unpacked: {} links to {}, which is not there; build the image again",
        path.display(),
        target.display()
    )]
    Dangling {
        /// The layer's name in the archive.
        layer: String,
        /// The link.
        path: PathBuf,
        /// The file that it names.
        target: PathBuf,
    },
    /// The image has no user of this name.
    #[error("the image's /etc/passwd has no user {0:?}: give a number (-u UID)")]
    NoUser(String),
    /// The image has no group of this name.
    #[error("the image's /etc/group has no group {0:?}: give a number (-u UID:GID)")]
    NoGroup(String),
    /// The store has no root file system of the image, and none could be made.
    #[error(transparent)]
    Root(#[from] CacheError),
}

impl Error {
    /// A file or directory of the host that cannot be had.
    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::File {
            action,
            path: path.to_owned(),
            source,
        }
    }

    /// A layer whose archive cannot be read.
    pub(crate) fn layer(layer: &str) -> impl Fn(io::Error) -> Error {
        move |source| Error::Layer {
            layer: layer.to_owned(),
            source,
        }
    }

    /// A document that is not what it should be.
    pub(crate) fn document(
        document: &'static str,
        path: &Path,
    ) -> impl FnOnce(serde_json::Error) -> Error {
        move |source| Error::Document {
            path: path.to_owned(),
            document,
            source,
        }
    }
}
