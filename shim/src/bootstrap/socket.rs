//! The shim's socket: one per pod, at an address that every container of the pod computes alike.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Where sockets lie unless containerd says otherwise; short, because a socket's path may not be
/// longer than about 104 bytes.
const DEFAULT_SOCKET_DIR: &str = "/run/containerd/s";

/// The socket could not be made.
#[derive(Debug, thiserror::Error)]
#[error("{action} {path}")]
pub struct SocketError {
    action: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// What `start` found at the pod's address.
#[derive(Debug)]
pub enum ShimSocket {
    /// Nobody was there; this listener is bound now.
    New(UnixListener),
    /// A shim of this pod is listening.
    Running,
}

/// The address of the shim that serves `group` (the sandbox's id, or the task's own).
pub fn address_for(socket_dir: Option<&str>, grpc: &str, namespace: &str, group: &str) -> String {
    let name: PathBuf = [grpc, namespace, group].iter().collect();
    let digest = Sha256::digest(name.as_os_str().as_encoded_bytes());
    let hex: String = digest.iter().map(|b| format!("{b:02x}")).collect();
    format!(
        "unix://{}/{hex}",
        socket_dir
            .unwrap_or(DEFAULT_SOCKET_DIR)
            .trim_end_matches('/')
    )
}

/// The file behind a `unix://` address.
pub fn path_of(address: &str) -> &Path {
    Path::new(address.strip_prefix("unix://").unwrap_or(address))
}

/// Whether somebody accepts connections at the address.
pub fn is_alive(address: &str) -> bool {
    UnixStream::connect(path_of(address)).is_ok()
}

/// Removes the socket's file; one that is gone already is fine.
pub fn remove(address: &str) -> io::Result<()> {
    match fs::remove_file(path_of(address)) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Binds the address, or finds the shim that has it. A file whose shim is dead is replaced.
pub fn bind_or_find(address: &str) -> Result<ShimSocket, SocketError> {
    let path = path_of(address);
    let failed = |action, source| SocketError {
        action,
        path: path.to_owned(),
        source,
    };
    if let Some(dir) = path.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|e| failed("make the directory of", e))?;
    }
    let listener = match UnixListener::bind(path) {
        Ok(listener) => listener,
        Err(e) if e.kind() == ErrorKind::AddrInUse => {
            if is_alive(address) {
                return Ok(ShimSocket::Running);
            }
            remove(address).map_err(|e| failed("remove the stale socket", e))?;
            UnixListener::bind(path).map_err(|e| failed("bind", e))?
        }
        Err(e) => return Err(failed("bind", e)),
    };
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
        .map_err(|e| failed("restrict access to", e))?;
    Ok(ShimSocket::New(listener))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_is_what_containerds_own_helper_computes() {
        // sha256("/run/containerd/containerd.sock/k8s.io/abc")
        assert_eq!(
            address_for(None, "/run/containerd/containerd.sock", "k8s.io", "abc"),
            "unix:///run/containerd/s/\
             a99a1752d3a0fadfb1f869026f16760475df03a572e20f4ccea9e6c1e5470b72"
        );
    }

    #[test]
    fn address_fits_a_socket_path() {
        let address = address_for(None, "/run/containerd/containerd.sock", "k8s.io", "abc");
        assert!(path_of(&address).as_os_str().len() < 104);
    }

    #[test]
    fn second_start_of_a_pod_finds_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let address = format!("unix://{}/s/x", dir.path().display());
        let first = bind_or_find(&address).unwrap();
        assert!(matches!(first, ShimSocket::New(_)));
        assert!(matches!(
            bind_or_find(&address).unwrap(),
            ShimSocket::Running
        ));
    }

    #[test]
    fn socket_of_a_dead_shim_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let address = format!("unix://{}/x", dir.path().display());
        drop(bind_or_find(&address).unwrap());
        assert!(path_of(&address).exists());
        assert!(matches!(
            bind_or_find(&address).unwrap(),
            ShimSocket::New(_)
        ));
    }

    #[test]
    fn socket_is_for_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let address = format!("unix://{}/x", dir.path().display());
        let _socket = bind_or_find(&address).unwrap();
        let mode = fs::metadata(path_of(&address))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
