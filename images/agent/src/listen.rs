//! Who may talk to the agent, and over what.
//!
//! In a guest: the host, and nobody else, over vsock. Any process of the guest can open a vsock
//! connection to any port, so a connection whose other end is not the host is dropped unread.
//! Outside a VM: whoever may open the Unix socket.

use std::io;
use std::path::{Path, PathBuf};

use kiln_agent_api::client::direct_stream_path;
use kiln_agent_api::{READY_LINE, READY_PORT, RPC_PORT, STREAM_PORT};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

use crate::stdio::Connection;

/// Connections that wait to be taken care of.
const BACKLOG: usize = 16;

/// What the agent listens on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// vsock, for the host.
    Vsock,
    /// A Unix socket for calls; streams come to the one beside it.
    Unix(PathBuf),
}

/// Accepted connections.
pub(crate) type Connections = ReceiverStream<io::Result<Box<dyn Connection>>>;

impl Endpoint {
    /// Listens for calls.
    pub(crate) fn calls(&self) -> io::Result<Connections> {
        match self {
            Self::Vsock => vsock(RPC_PORT),
            Self::Unix(path) => unix(path),
        }
    }

    /// Listens for streams.
    pub(crate) fn streams(&self) -> io::Result<Connections> {
        match self {
            Self::Vsock => vsock(STREAM_PORT),
            Self::Unix(path) => unix(&direct_stream_path(path)),
        }
    }

    /// Tells the host, if it wants to know, that the agent is ready.
    pub(crate) async fn tell_ready(&self) {
        if *self != Self::Vsock {
            return;
        }
        // Only who bakes listens.
        if let Ok(mut stream) =
            VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, READY_PORT)).await
            && stream.write_all(READY_LINE).await.is_ok()
        {
            drop(AsyncWriteExt::shutdown(&mut stream).await);
        }
    }
}

fn vsock(port: u32) -> io::Result<Connections> {
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))?;
    let (sender, receiver) = mpsc::channel(BACKLOG);
    tokio::spawn(async move {
        loop {
            let accepted = std::future::poll_fn(|context| listener.poll_accept(context)).await;
            let connection: io::Result<Box<dyn Connection>> = match accepted {
                Ok((stream, peer)) if peer.cid() == VMADDR_CID_HOST => Ok(Box::new(stream)),
                Ok((_, peer)) => {
                    tracing::warn!(
                        cid = peer.cid(),
                        port,
                        "refused a connection that is not the host's"
                    );
                    continue;
                }
                Err(error) => Err(error),
            };
            if !pass_on(&sender, connection, port).await {
                return;
            }
        }
    });
    Ok(ReceiverStream::new(receiver))
}

fn unix(path: &Path) -> io::Result<Connections> {
    // One that a dead agent left.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    let (sender, receiver) = mpsc::channel(BACKLOG);
    tokio::spawn(async move {
        loop {
            let connection: io::Result<Box<dyn Connection>> = listener
                .accept()
                .await
                .map(|(stream, _)| Box::new(stream) as Box<dyn Connection>);
            if !pass_on(&sender, connection, 0).await {
                return;
            }
        }
    });
    Ok(ReceiverStream::new(receiver))
}

/// False: nobody takes connections any more.
async fn pass_on(
    sender: &mpsc::Sender<io::Result<Box<dyn Connection>>>,
    connection: io::Result<Box<dyn Connection>>,
    port: u32,
) -> bool {
    match connection {
        Ok(connection) => sender.send(Ok(connection)).await.is_ok(),
        Err(error) => {
            // A reset of the transport (the guest was resumed) ends connections, not the listener.
            // Should accepting fail again and again, the pause keeps the agent from spinning.
            tracing::warn!(%error, port, "accepting a connection failed");
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            !sender.is_closed()
        }
    }
}
