//! A file server that speaks FUSE: it answers requests that lie in guest memory with the files of one folder of the host.
//!
//! A request is copied out of guest memory before anything about it is checked, and is served with as few calls of the
//! host's kernel as it takes; the data of files goes straight between the host's files and the guest's buffers.
//!
//! Trusted: the caller's description of memory, and the folder. Not trusted: the requests. Any number, name or length in
//! them may be wrong on purpose, and may ask for what a guest's kernel would never ask for.

mod credentials;
mod handles;
mod host;
mod locks;
mod nodes;
mod sandbox;
mod server;
mod view;
mod wire;
mod xattr;

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::time::Duration;

use thiserror::Error;

use host::Numbers;
pub use sandbox::{Left, SandboxError, keep_what_serving_needs};
pub use server::{Finished, Outcome, Server};
pub use view::{Span, View, ViewError};

/// How a folder is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The folder, as the serving thread sees it. It is opened at the start.
    pub root: String,
    /// The longest that the guest may go by what it knows of names and attributes. Volumes that change on the
    /// host (secrets, config maps) are seen to change after so long.
    pub timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            root: "/".to_owned(),
            timeout: Duration::from_secs(1),
        }
    }
}

/// Why the server could not be made, or could not handle a request.
#[derive(Debug, Error)]
pub enum ServerError {
    /// The folder could not be opened.
    #[error("can't serve the folder {root}")]
    Root {
        /// The folder.
        root: String,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// The thread could not be confined.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The request could not be put before the server.
    #[error(transparent)]
    View(#[from] ViewError),
    /// The request makes no sense to the server, and it has not answered.
    #[error("the request can't be handled: {0}")]
    Request(String),
}

/// A server that has no folder yet: made where there is a `/proc`, to serve where there is none.
#[derive(Debug)]
pub struct Prepared {
    options: Options,
    outside: OwnedFd,
}

impl Prepared {
    /// Remembers the root directory, in which there is a `/proc`.
    pub fn new(options: &Options) -> Result<Self, ServerError> {
        let outside = File::open("/").map_err(|source| ServerError::Root {
            root: "/".to_owned(),
            source,
        })?;
        Ok(Self {
            options: options.clone(),
            outside: outside.into(),
        })
    }

    /// Confines the calling thread to `folder`, to the server's descriptors and those in `keep`, and to the
    /// capabilities that serving takes, and serves the folder's root; [`Options::root`] is a path in it.
    pub fn enter(self, folder: OwnedFd, keep: &[RawFd]) -> Result<(Server, Left), ServerError> {
        let options = self.options;
        let make = |numbers| serve(numbers, &options);
        sandbox::enter(folder, self.outside, keep, make)
    }
}

fn serve(numbers: Numbers, options: &Options) -> Result<Server, ServerError> {
    let failed = |source| ServerError::Root {
        root: options.root.clone(),
        source,
    };
    let path = CString::new(options.root.as_str()).map_err(|e| failed(e.into()))?;
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    host::open_at(libc::AT_FDCWD, &path, flags, 0)
        .and_then(|root| Server::with(numbers, root, options.timeout))
        .map_err(|error| failed(io::Error::from_raw_os_error(error.0)))
}

impl Server {
    /// Serves a folder on the calling thread, which is not confined, but from then on has a root directory, a working
    /// directory and a mask of new files' modes of its own. There must be a `/proc`.
    pub fn new(options: &Options) -> Result<Self, ServerError> {
        let made = credentials::separate().and_then(|()| Numbers::of_process());
        let numbers = made.map_err(|error| ServerError::Root {
            root: options.root.clone(),
            source: io::Error::from_raw_os_error(error.0),
        })?;
        serve(numbers, options)
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Server")
    }
}

#[cfg(test)]
mod tests;
