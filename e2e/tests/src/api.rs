//! The connection to containerd.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use containerd_client::Client;
use tonic::metadata::MetadataValue;
use tonic::{Request, Status};

/// CRI's namespace in containerd.
pub const CRI_NAMESPACE: &str = "k8s.io";
/// The namespace of containers that tests make without CRI.
pub const PLAIN_NAMESPACE: &str = "kiln-e2e";
/// The snapshotter that both use unless a test says otherwise.
pub const SNAPSHOTTER: &str = "overlayfs";
/// No single call may take longer, not even on an emulated machine under load.
pub const CALL_LIMIT: Duration = Duration::from_secs(120);

/// Where containerd listens: `KILN_CONTAINERD_SOCKET` or its usual place.
pub fn socket() -> PathBuf {
    std::env::var_os("KILN_CONTAINERD_SOCKET")
        .map_or_else(|| "/run/containerd/containerd.sock".into(), PathBuf::from)
}

/// Connects to containerd.
pub async fn connect() -> Result<Client> {
    let path = socket();
    Client::from_path(&path).await.with_context(|| {
        format!(
            "no containerd answers at {}: start it, or set KILN_CONTAINERD_SOCKET",
            path.display()
        )
    })
}

/// A request to containerd's own API, in `namespace`.
pub fn request<T>(namespace: &str, message: T) -> Result<Request<T>, Status> {
    let mut request = Request::new(message);
    let namespace = MetadataValue::try_from(namespace)
        .map_err(|_| Status::invalid_argument("no name for a namespace"))?;
    request
        .metadata_mut()
        .insert("containerd-namespace", namespace);
    request.set_timeout(CALL_LIMIT);
    Ok(request)
}
