//! The host's way to an agent: through the Unix socket that the VMM offers for the guest's vsock.
//!
//! The VMM's socket speaks the handshake known from Firecracker: the host writes `CONNECT <port>\n`
//! and reads `OK <number>\n`, then the connection is the guest's. For an agent outside a VM
//! (`kiln-agent --listen unix:PATH`) there is no handshake; `PATH` is the service's socket and
//! `PATH.stream` the streams'.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use ttrpc::asynchronous::transport::Socket;

use crate::proto::AgentClient;
use crate::stream::{Header, HeaderError, Status};
use crate::{RPC_PORT, STREAM_PORT};

/// Longest answer to `CONNECT`: "OK " and a port.
const MAX_ANSWER: usize = 32;

/// How long a connection through the VMM may take before it counts as failed.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// Why the agent could not be reached.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// The VMM's socket can't be connected to.
    #[error("cannot connect to {path}; is the μVM's VMM running?")]
    Socket {
        /// The VMM's or agent's socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The connection ended in the middle of the handshake: nothing listens on the port.
    #[error("the guest refused vsock port {port}; is its agent running?")]
    Refused {
        /// The guest's port.
        port: u32,
    },
    /// The VMM answered something else than `OK <number>`.
    #[error("the VMM answered CONNECT {port} with {answer:?}")]
    Handshake {
        /// The guest's port.
        port: u32,
        /// The line it sent.
        answer: String,
    },
    /// The connection broke.
    #[error("the connection to vsock port {port} broke in its handshake")]
    Io {
        /// The guest's port.
        port: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Nobody answered in time.
    #[error("no answer from vsock port {port} within {CONNECT_TIMEOUT:?}")]
    Timeout {
        /// The guest's port.
        port: u32,
    },
    /// The ids of a stream cannot be sent.
    #[error("the stream's ids cannot be encoded")]
    Header(#[from] HeaderError),
    /// The agent refused a stream.
    #[error("the agent refused the stream")]
    Stream(#[source] Status),
}

/// Where an agent is reached.
#[derive(Debug, Clone)]
pub struct Vsock {
    path: PathBuf,
    handshake: bool,
}

impl Vsock {
    /// Through the VMM's Unix socket at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            handshake: true,
        }
    }

    /// An agent started with `--listen unix:PATH`.
    pub fn direct(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            handshake: false,
        }
    }

    /// The socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A connection to a port of the guest.
    ///
    /// # Errors
    /// If the VMM or the guest's port cannot be reached within [`CONNECT_TIMEOUT`].
    pub async fn connect(&self, port: u32) -> Result<UnixStream, ConnectError> {
        tokio::time::timeout(CONNECT_TIMEOUT, self.connect_patiently(port))
            .await
            .map_err(|_| ConnectError::Timeout { port })?
    }

    async fn connect_patiently(&self, port: u32) -> Result<UnixStream, ConnectError> {
        let path = match (self.handshake, port) {
            (false, STREAM_PORT) => direct_stream_path(&self.path),
            _ => self.path.clone(),
        };
        let mut stream = UnixStream::connect(&path)
            .await
            .map_err(|source| ConnectError::Socket { path, source })?;
        if self.handshake {
            handshake(&mut stream, port).await?;
        }
        Ok(stream)
    }

    /// A client of the agent's service. One is enough: calls on it run side by side.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn agent(&self) -> Result<AgentClient, ConnectError> {
        let stream = self.connect(RPC_PORT).await?;
        Ok(AgentClient::new(ttrpc::asynchronous::Client::new(
            Socket::new(stream),
        )))
    }

    /// A stdio stream or a TCP connection into the pod; returns when the agent has accepted it.
    ///
    /// # Errors
    /// As [`Self::connect`], or if the agent refuses the stream.
    pub async fn stream(&self, header: &Header) -> Result<UnixStream, ConnectError> {
        let io = |source| ConnectError::Io {
            port: STREAM_PORT,
            source,
        };
        let bytes = header.encode()?;
        let mut stream = self.connect(STREAM_PORT).await?;
        stream.write_all(&bytes).await.map_err(io)?;
        let status = tokio::time::timeout(CONNECT_TIMEOUT, stream.read_u8())
            .await
            .map_err(|_| ConnectError::Timeout { port: STREAM_PORT })?
            .map_err(io)?;
        match Status::from_byte(status) {
            Status::Accepted => Ok(stream),
            refused => Err(ConnectError::Stream(refused)),
        }
    }
}

/// The socket for streams of an agent that listens on a Unix socket.
#[must_use]
pub fn direct_stream_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".stream");
    PathBuf::from(name)
}

async fn handshake(stream: &mut UnixStream, port: u32) -> Result<(), ConnectError> {
    let io = |source| ConnectError::Io { port, source };
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .await
        .map_err(io)?;
    // Byte by byte: what follows the line belongs to the guest's stream.
    let mut answer = Vec::with_capacity(MAX_ANSWER);
    loop {
        match stream.read_u8().await {
            Ok(b'\n') => break,
            Ok(byte) => answer.push(byte),
            Err(error) if answer.is_empty() && is_hangup(&error) => {
                return Err(ConnectError::Refused { port });
            }
            Err(error) => return Err(io(error)),
        }
        if answer.len() > MAX_ANSWER {
            break;
        }
    }
    let number = answer
        .strip_prefix(b"OK ")
        .and_then(|rest| std::str::from_utf8(rest).ok());
    match number.map(str::parse::<u32>) {
        Some(Ok(_)) => Ok(()),
        _ => {
            let answer = String::from_utf8_lossy(&answer).into_owned();
            Err(ConnectError::Handshake { port, answer })
        }
    }
}

fn is_hangup(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;
    use crate::stream::{FIXED_LEN, Fixed, Kind, TOKEN_LEN};

    /// A VMM's socket that answers one connection with `answer`, then hands it to `rest`.
    async fn vmm<F, R>(answer: &'static [u8], rest: F) -> (tempfile::TempDir, Vsock)
    where
        F: FnOnce(UnixStream, String) -> R + Send + 'static,
        R: Future<Output = ()> + Send,
    {
        let dir = tempfile::tempdir().expect("temporary folder");
        let path = dir.path().join("v.sock");
        let listener = UnixListener::bind(&path).expect("bind");
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("accept");
            let mut line = String::new();
            while !line.ends_with('\n') {
                line.push(char::from(stream.read_u8().await.expect("CONNECT line")));
            }
            stream.write_all(answer).await.expect("answer");
            rest(stream, line).await;
        });
        (dir, Vsock::new(path))
    }

    #[tokio::test]
    async fn bytes_right_behind_the_answer_belong_to_the_stream() {
        let (_dir, vsock) = vmm(b"OK 1073741824\nhello", |_, line| async move {
            assert_eq!(line, "CONNECT 1025\n");
        })
        .await;
        let mut stream = vsock.connect(STREAM_PORT).await.expect("connect");
        let mut text = String::new();
        stream.read_to_string(&mut text).await.expect("read");
        assert_eq!(text, "hello");
    }

    #[tokio::test]
    async fn a_hangup_means_that_nothing_listens() {
        let (_dir, vsock) = vmm(b"", |stream, _| async move { drop(stream) }).await;
        let error = vsock.connect(7).await.expect_err("refused");
        assert!(
            matches!(error, ConnectError::Refused { port: 7 }),
            "{error:?}"
        );
    }

    #[tokio::test]
    async fn another_answer_is_shown() {
        let (_dir, vsock) = vmm(b"NO\n", |_, _| async {}).await;
        let error = vsock.connect(7).await.expect_err("refused");
        assert_eq!(error.to_string(), r#"the VMM answered CONNECT 7 with "NO""#);
    }

    #[tokio::test]
    async fn an_endless_answer_is_cut_short() {
        let (_dir, vsock) = vmm(&[b'x'; 4096], |_, _| async {}).await;
        let error = vsock.connect(7).await.expect_err("refused");
        assert!(matches!(error, ConnectError::Handshake { .. }), "{error:?}");
    }

    #[tokio::test]
    async fn a_stream_opens_with_its_header_and_a_refusal_has_a_reason() {
        let header = Header {
            kind: Kind::Stderr,
            token: [1; TOKEN_LEN],
            container_id: "pod".into(),
            exec_id: "e1".into(),
        };
        let expected = header.clone();
        let (_dir, vsock) = vmm(b"OK 1\n", |mut stream, _| async move {
            let mut fixed = [0; FIXED_LEN];
            stream.read_exact(&mut fixed).await.expect("fixed part");
            let fixed = Fixed::parse(&fixed).expect("header");
            let mut ids = vec![0; fixed.ids_len()];
            stream.read_exact(&mut ids).await.expect("ids");
            assert_eq!(fixed.with_ids(&ids), Ok(expected));
            stream.write_u8(Status::Busy as u8).await.expect("status");
        })
        .await;
        let error = vsock.stream(&header).await.expect_err("refused");
        assert!(
            matches!(error, ConnectError::Stream(Status::Busy)),
            "{error:?}"
        );
    }

    #[tokio::test]
    async fn no_socket_names_the_path() {
        let error = Vsock::new("/nonexistent/v.sock")
            .agent()
            .await
            .map(|_| ())
            .expect_err("none");
        assert!(error.to_string().contains("/nonexistent/v.sock"), "{error}");
    }
}
