//! CRI's streams (exec, attach, port-forward) as kubectl uses them: CRI answers with an address on
//! the node, and the streams run over a web socket from there.
//!
//! Each message begins with a byte that names its channel: for exec and attach 0 is stdin, 1
//! stdout, 2 stderr, 3 the final status (JSON), 4 the terminal's size; for port-forward 0 is the
//! data and 1 the error, and the first message on each carries the port's number.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures_util::{SinkExt, StreamExt};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;

/// How long a stream may be silent while something is expected of it.
const STEP: Duration = Duration::from_secs(30);
/// How long a first answer may take before it is asked for once more, and how often it is.
const KNOCK: (Duration, u32) = (Duration::from_secs(2), 15);
/// What kubelet's streaming server has spoken since long before any containerd of today.
const PROTOCOL: &str = "v4.channel.k8s.io";

/// An open stream.
pub struct Stream {
    socket: WebSocketStream<TcpStream>,
    /// What came so far, by channel.
    channels: [Vec<u8>; 4],
    closed: bool,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Stream")
            .field("channels", &self.channels)
            .finish_non_exhaustive()
    }
}

impl Stream {
    /// Opens the address that CRI's `exec`, `attach` or `port_forward` answered with.
    pub async fn open(url: &str) -> Result<Self> {
        let rest = url
            .strip_prefix("http://")
            .with_context(|| format!("{url} is not http"))?;
        let host = rest.split('/').next().unwrap_or(rest);
        let mut request = format!("ws://{rest}").into_client_request()?;
        request
            .headers_mut()
            .insert("Sec-WebSocket-Protocol", HeaderValue::from_static(PROTOCOL));
        let connection = TcpStream::connect(host)
            .await
            .with_context(|| format!("cannot connect to CRI's streaming server at {host}"))?;
        let (socket, _) = tokio_tungstenite::client_async(request, connection)
            .await
            .with_context(|| format!("{url} does not become a web socket"))?;
        Ok(Stream {
            socket,
            channels: Default::default(),
            closed: false,
        })
    }

    /// Sends to a channel.
    pub async fn send(&mut self, channel: u8, bytes: &[u8]) -> Result<()> {
        let mut message = vec![channel];
        message.extend_from_slice(bytes);
        let sending = self.socket.send(Message::Binary(message.into()));
        tokio::time::timeout(STEP, sending)
            .await
            .context("the stream takes nothing")??;
        Ok(())
    }

    /// Tells the terminal's size.
    pub async fn resize(&mut self, width: u16, height: u16) -> Result<()> {
        let size = serde_json::json!({"Width": width, "Height": height}).to_string();
        self.send(4, size.as_bytes()).await
    }

    /// Takes the next message; `false` at the end of the stream.
    async fn next(&mut self) -> Result<bool> {
        if self.closed {
            return Ok(false);
        }
        let next = tokio::time::timeout(STEP, self.socket.next());
        match next.await.context("the stream is silent")? {
            None | Some(Ok(Message::Close(_))) => self.closed = true,
            // The server may just hang up once everything is said.
            Some(Err(_)) if !self.channels[3].is_empty() => self.closed = true,
            Some(Err(error)) => return Err(error).context("the stream broke"),
            Some(Ok(Message::Binary(message))) => {
                let Some((channel, bytes)) = message.split_first() else {
                    return Ok(true);
                };
                match self.channels.get_mut(usize::from(*channel)) {
                    Some(seen) => seen.extend_from_slice(bytes),
                    None => bail!("a message on channel {channel}"),
                }
            }
            Some(Ok(_)) => {}
        }
        Ok(!self.closed)
    }

    /// What came on a channel so far.
    pub fn seen(&self, channel: usize) -> &[u8] {
        self.channels.get(channel).map_or(&[], Vec::as_slice)
    }

    /// What came on a channel so far, as text.
    pub fn text(&self, channel: usize) -> String {
        String::from_utf8_lossy(self.seen(channel)).into_owned()
    }

    /// Waits until the channel has this text in it.
    pub async fn wait_for(&mut self, channel: usize, text: &str) -> Result<()> {
        while !self.text(channel).contains(text) {
            if !self.next().await? {
                bail!(
                    "the stream ended without {text:?}; there was {:?}",
                    self.text(channel)
                );
            }
        }
        Ok(())
    }

    /// Sends input again and again until the channel has this text. An attached client's input reaches the process before
    /// containerd has added the client to those who get its output: what answers the first is lost now and then.
    pub async fn knock(&mut self, input: &[u8], channel: usize, text: &str) -> Result<()> {
        let (patience, times) = KNOCK;
        for _ in 0..times {
            self.send(0, input).await?;
            if let Ok(answered) = tokio::time::timeout(patience, self.wait_for(channel, text)).await
            {
                return answered;
            }
        }
        bail!("no {text:?} on channel {channel} after {times} times {input:?}")
    }

    /// Waits until the channel has at least so many bytes.
    pub async fn wait_for_bytes(&mut self, channel: usize, count: usize) -> Result<()> {
        while self.seen(channel).len() < count {
            if !self.next().await? {
                bail!(
                    "the stream ended after {} of {count} bytes",
                    self.seen(channel).len()
                );
            }
        }
        Ok(())
    }

    /// Waits for the end of an exec: its exit code.
    pub async fn exit_code(&mut self) -> Result<i64> {
        while self.next().await? {}
        let status: Value = serde_json::from_slice(self.seen(3))
            .with_context(|| format!("no status but {:?}", self.text(3)))?;
        exit_code(&status)
    }
}

/// The exit code in the status that ends an exec.
fn exit_code(status: &Value) -> Result<i64> {
    if status["status"] == "Success" {
        return Ok(0);
    }
    let causes = status["details"]["causes"].as_array();
    causes
        .into_iter()
        .flatten()
        .find(|cause| cause["reason"] == "ExitCode")
        .and_then(|cause| cause["message"].as_str()?.parse().ok())
        .with_context(|| format!("no exit code in {status}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_final_status_has_the_exit_code() {
        let failed = serde_json::json!({
            "metadata": {}, "status": "Failure", "reason": "NonZeroExitCode",
            "details": {"causes": [{"reason": "ExitCode", "message": "7"}]},
        });
        assert_eq!(exit_code(&failed).unwrap(), 7);
        assert_eq!(
            exit_code(&serde_json::json!({"status": "Success"})).unwrap(),
            0
        );
        assert!(exit_code(&serde_json::json!({"status": "Failure"})).is_err());
    }
}
