//! OCI images for tests, made from files on this machine.
//!
//! Nothing is pulled: a test image is Debian's static busybox, the `testprog` program and a few
//! files that exercise what layers can do. The same input gives the same bytes, so digests are
//! stable and an image that containerd already has is recognised.
//!
//! [`Layer`] and [`ImageBuilder`] make any image, [`Image::write_archive`] writes it as an OCI
//! archive, [`catalog`] has the images that the end-to-end tests use, and `import` (a feature)
//! puts an image into a running containerd.
//!
//! [`suites`] has the images that Kubernetes' own test suites pull by name, and [`registry`]
//! writes them as the folder that a registry serves.

mod busybox;
pub mod catalog;
mod command;
mod debian;
mod image;
#[cfg(feature = "import")]
pub mod import;
mod layer;
mod once;
pub mod registry;
pub mod suites;

use std::path::PathBuf;

pub use image::{Blob, Descriptor, Image, ImageBuilder, write_archive};
pub use layer::{Compression, Layer};

/// Why an image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A path that a layer must not hold.
    #[error("{path:?} cannot be a path in a layer: give it relative, without `..`")]
    Path {
        /// The path as given.
        path: String,
    },
    /// Writing a layer or an archive failed.
    #[error("cannot write {what}")]
    Write {
        /// What was being written.
        what: &'static str,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A file of the host that an image is made from.
    #[error("cannot read {path}: {remedy}")]
    Input {
        /// The file.
        path: String,
        /// Where to get it from.
        remedy: &'static str,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A file or a folder of the host that is made on the way to an image.
    #[error("cannot {action} {}", path.display())]
    Host {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A program that could not be started.
    #[error("cannot run {program}: {remedy}")]
    Start {
        /// The program.
        program: String,
        /// What to do.
        remedy: &'static str,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A program that failed.
    #[error("{program} failed ({status}): {remedy}; it said last:\n{said}")]
    Failed {
        /// The program.
        program: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What to do.
        remedy: &'static str,
        /// Its last lines.
        said: String,
    },
    /// Debian's sources that this machine's configuration of packages does not lead to.
    #[error(
        "no Debian mirror is known here, from which busybox's source could come: run `apt-get update` \
         on a Debian machine, or put its {archive} into {}",
        folder.display()
    )]
    NoMirror {
        /// The archive that is wanted.
        archive: &'static str,
        /// Where it is looked for.
        folder: PathBuf,
    },
    /// The name of an image that says no tag.
    #[error("{name:?} is no name of an image here: HOST/REPOSITORY:TAG is wanted")]
    Name {
        /// The name as given.
        name: String,
    },
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
