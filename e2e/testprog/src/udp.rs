//! Datagrams: a server that echoes and a client that asks.

use std::net::UdpSocket;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::text::say;

/// Answers each datagram with `TEXT from ADDRESS`; prints `listening PORT`.
pub(crate) fn serve(port: u16) -> Result<()> {
    let socket = UdpSocket::bind(("0.0.0.0", port))
        .with_context(|| format!("cannot listen on port {port}"))?;
    say(&format!(
        "listening {}",
        socket.local_addr().context("no address")?.port()
    ))?;
    let mut buffer = [0; 2048];
    loop {
        let (length, peer) = socket.recv_from(&mut buffer).context("cannot receive")?;
        let text = String::from_utf8_lossy(&buffer[..length]);
        let answer = format!("{text} from {}", peer.ip());
        socket
            .send_to(answer.as_bytes(), peer)
            .context("cannot answer")?;
    }
}

/// Sends `text` until an answer comes, ten times at most.
pub(crate) fn ask(address: &str, text: &str) -> Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0").context("cannot open a socket")?;
    socket
        .connect(address)
        .with_context(|| format!("cannot use {address}"))?;
    socket
        .set_read_timeout(Some(Duration::from_secs(1)))
        .context("cannot set a time limit")?;
    let mut buffer = [0; 2048];
    for _ in 0..10 {
        // A refusal that came for the last one shows here or there: the server may not be up yet.
        if socket.send(text.as_bytes()).is_err() {
            continue;
        }
        if let Ok(length) = socket.recv(&mut buffer) {
            return say(&String::from_utf8_lossy(&buffer[..length]));
        }
    }
    bail!("no answer from {address}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_there_is_an_error() {
        // The socket that had the port is closed again, so each datagram is refused at once.
        let free = UdpSocket::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        assert!(ask(&free.to_string(), "hello").is_err());
    }
}
