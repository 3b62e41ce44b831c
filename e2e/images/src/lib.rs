//! OCI images for tests, made from files on this machine.
//!
//! Nothing is pulled: a test image is Debian's static busybox, the `testprog` program and a few
//! files that exercise what layers can do. The same input gives the same bytes, so digests are
//! stable and an image that containerd already has is recognised.
//!
//! [`Layer`] and [`ImageBuilder`] make any image, [`Image::write_archive`] writes it as an OCI
//! archive, [`catalog`] has the images that the end-to-end tests use, and `import` (a feature)
//! puts an image into a running containerd.

pub mod catalog;
mod image;
#[cfg(feature = "import")]
pub mod import;
mod layer;

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
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
