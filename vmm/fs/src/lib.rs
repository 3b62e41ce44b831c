//! A FUSE server over requests that lie in host memory: the one place where `fuse-backend-rs`, with the
//! older `vm-memory` and `virtio-queue` it insists on, meets the rest of the VMM.
//!
//! The server wants descriptor chains in guest memory. It gets both from a [`View`]: the host's own
//! mapping of guest memory under host addresses, and beside it a descriptor table that only we can
//! write. A request is put into that table from descriptors that were copied and checked before, so the
//! guest can't change them under the server's hands. What the buffers contain stays the guest's choice.
//!
//! Trusted: the caller's description of memory. Not trusted: the requests.

mod init;
mod sandbox;
mod view;

use std::fs::File;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use fuse_backend_rs::api::filesystem::FileSystem;
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use thiserror::Error;

pub use sandbox::{Left, SandboxError, keep_what_serving_needs};
pub use view::{Span, View, ViewError};

/// How a folder is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The folder, as the serving thread sees it. It is opened at the start, and again when the guest mounts
    /// and unmounts.
    pub root: String,
    /// How long the guest may go by what it knows of names and attributes. Volumes that change on the
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

/// A file server for one folder.
///
/// It opens files with the rights of the thread it runs on, and takes on the user and group of a request
/// where it creates something: the thread needs the capabilities for that.
pub struct Server {
    fs: Arc<PassthroughFs>,
    server: fuse_backend_rs::api::server::Server<Arc<PassthroughFs>>,
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
        let make = || {
            let fs = passthrough(&self.options)?;
            let numbers = fs.keep_fds().first().copied().unwrap_or(-1);
            Ok::<_, ServerError>((fs, numbers))
        };
        let (fs, left) = sandbox::enter(folder, self.outside, keep, make)?;
        Ok((serve(fs)?, left))
    }
}

fn passthrough(options: &Options) -> Result<PassthroughFs, ServerError> {
    let config = Config {
        root_dir: options.root.clone(),
        entry_timeout: options.timeout,
        attr_timeout: options.timeout,
        cache_policy: CachePolicy::Auto,
        // Makes the server check names itself; it also opens the root at each mount.
        do_import: true,
        ..Config::default()
    };
    PassthroughFs::new(config).map_err(|source| ServerError::Root {
        root: options.root.clone(),
        source,
    })
}

fn serve(fs: PassthroughFs) -> Result<Server, ServerError> {
    let fs = Arc::new(fs);
    fs.import().map_err(|source| ServerError::Root {
        root: "/".to_owned(),
        source,
    })?;
    let server = fuse_backend_rs::api::server::Server::new(fs.clone());
    Ok(Server { fs, server })
}

impl Server {
    /// Serves a folder on a thread that is not confined. Needs `/proc` now, and not any more later.
    pub fn new(options: &Options) -> Result<Self, ServerError> {
        serve(passthrough(options)?).map_err(|e| match e {
            ServerError::Root { source, .. } => ServerError::Root {
                root: options.root.clone(),
                source,
            },
            e => e,
        })
    }

    /// Handles one request. Gives the number of bytes written to `writable`.
    pub fn handle(
        &self,
        view: &mut View,
        readable: &[Span],
        writable: &[Span],
    ) -> Result<usize, ServerError> {
        let (memory, chain) = view.chain(readable, writable)?;
        let failed = |e: &dyn std::fmt::Display| ServerError::Request(e.to_string());
        let reader =
            Reader::from_descriptor_chain(memory, chain.clone()).map_err(|e| failed(&e))?;
        let writer = VirtioFsWriter::new(memory, chain).map_err(|e| failed(&e))?;
        let written = self
            .server
            .handle_message(reader, Writer::VirtioFs(writer), None, None)
            .map_err(|e| failed(&e))?;
        // `None`: it was some other request.
        let _ = init::complete(memory, readable, writable, written);
        Ok(written)
    }

    /// Closes everything the guest has open, as if it had unmounted.
    pub fn forget_all(&self) {
        self.fs.destroy();
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Server")
    }
}

#[cfg(test)]
mod tests;
