//! The way from localhost in the pod's network namespace to localhost in the guest.
//!
//! containerd forwards a port by entering the pod's namespace and connecting to the port on
//! localhost. There is nothing there: the pod's processes are in the guest. So the shim listens in
//! the namespace, catches connections to every port, and carries them over a stream of the agent's.

use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;

use kiln_agent_api::stream::{Header, Kind, TOKEN_LEN};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use super::{NetworkError, bpf, namespace};
use kiln_uvm::guest::{Agent, Guest};

/// Forwards connections until it is dropped.
#[derive(Debug)]
pub struct Forwarder {
    /// Detaches the program when it is closed.
    _link: OwnedFd,
    accepting: JoinHandle<()>,
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// A socket in the namespace that gets every connection made there.
pub fn catch(netns: &File) -> Result<(TcpListener, OwnedFd), NetworkError> {
    // A socket belongs to the namespace of the thread that made it.
    let listener = namespace::enter(netns, || {
        // One socket for both families; IPv4 alone where the kernel has no IPv6.
        TcpListener::bind("[::]:0")
            .or_else(|_| TcpListener::bind("127.0.0.1:0"))
            .map_err(NetworkError::Forward)
    })?;
    let link = bpf::catch_all(netns, &listener).map_err(NetworkError::Forward)?;
    listener
        .set_nonblocking(true)
        .map_err(NetworkError::Forward)?;
    Ok((listener, link))
}

impl Forwarder {
    /// Carries what the socket gets to the guest.
    pub fn start(listener: TcpListener, link: OwnedFd, guest: Agent) -> io::Result<Self> {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let accepting = tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((connection, _)) => {
                        tokio::spawn(carry(connection, guest.clone()));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a forwarded connection was lost");
                        // Out of descriptors, most likely: some must be closed first.
                        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    }
                }
            }
        });
        Ok(Self {
            _link: link,
            accepting,
        })
    }
}

async fn carry(mut connection: TcpStream, guest: Agent) {
    let port = match connection.local_addr() {
        Ok(address) => address.port(),
        Err(error) => {
            tracing::warn!(%error, "a forwarded connection has no address");
            return;
        }
    };
    let header = Header {
        kind: Kind::Tcp(port),
        token: [0; TOKEN_LEN],
        container_id: String::new(),
        exec_id: String::new(),
    };
    let mut stream = match guest.stream(&header).await {
        Ok(stream) => stream,
        Err(error) => {
            tracing::debug!(port, %error, "nothing to forward to");
            return;
        }
    };
    if let Err(error) = tokio::io::copy_bidirectional(&mut connection, &mut stream).await {
        tracing::debug!(port, %error, "a forwarded connection broke");
    }
}
