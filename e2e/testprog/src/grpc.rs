//! A server of gRPC's health checks, as the kubelet's probes ask for them: just enough of HTTP/2 to answer any request with
//! whether a file is there.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::http;

/// What a client begins with (RFC 9113, 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const FRAME_HEADER: usize = 9;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// `HealthCheckResponse.status` (`grpc.health.v1`).
const SERVING: u8 = 1;
const NOT_SERVING: u8 = 2;

/// Answers health checks on a port: healthy is who has the file.
pub(crate) fn serve(port: u16, file: &Path) -> Result<()> {
    let file = file.to_owned();
    http::listen(port, move |connection| answer(connection, &file))
}

/// A frame of a connection.
struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    body: Vec<u8>,
}

impl Frame {
    /// The next one; none when the client has ended.
    fn read(mut input: impl Read) -> Result<Option<Self>> {
        let mut header = [0; FRAME_HEADER];
        if input.read_exact(&mut header).is_err() {
            return Ok(None);
        }
        let [a, b, c, kind, flags, stream @ ..] = header;
        let mut body = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        input
            .read_exact(&mut body)
            .context("a frame without its end")?;
        Ok(Some(Self {
            kind,
            flags,
            stream: u32::from_be_bytes(stream),
            body,
        }))
    }

    fn bytes(&self) -> Vec<u8> {
        let length = u32::try_from(self.body.len()).unwrap_or(u32::MAX);
        let mut bytes = length.to_be_bytes()[1..].to_vec();
        bytes.extend([self.kind, self.flags]);
        bytes.extend(self.stream.to_be_bytes());
        bytes.extend(&self.body);
        bytes
    }
}

/// A field of a header that no table is to keep (RFC 7541, 6.2.2); both texts are short.
fn field(name: &str, value: &str) -> Vec<u8> {
    let mut field = vec![0];
    for text in [name, value] {
        field.extend(u8::try_from(text.len()));
        field.extend(text.as_bytes());
    }
    field
}

/// The three frames of an answer.
fn health(stream: u32, status: u8) -> Vec<u8> {
    // Entry 8 of the static table is `:status: 200`.
    let mut head = vec![0x88];
    head.extend(field("content-type", "application/grpc"));
    let frame = |kind, flags, body| {
        Frame {
            kind,
            flags,
            stream,
            body,
        }
        .bytes()
    };
    [
        frame(HEADERS, END_HEADERS, head),
        // Not compressed, two bytes, and these: field 1 is a number.
        frame(DATA, 0, vec![0, 0, 0, 0, 2, 0x08, status]),
        frame(HEADERS, END_HEADERS | END_STREAM, field("grpc-status", "0")),
    ]
    .concat()
}

fn answer(connection: &TcpStream, file: &Path) -> Result<()> {
    let (mut input, mut out) = (connection, connection);
    let mut preface = [0; PREFACE.len()];
    input.read_exact(&mut preface).context("no preface")?;
    ensure!(preface == *PREFACE, "a client of something else");
    let reply = |kind, flags, body| Frame {
        kind,
        flags,
        stream: 0,
        body,
    };
    out.write_all(&reply(SETTINGS, 0, Vec::new()).bytes())?;
    while let Some(frame) = Frame::read(input)? {
        let answer = match frame.kind {
            SETTINGS if frame.flags & ACK == 0 => reply(SETTINGS, ACK, Vec::new()).bytes(),
            PING if frame.flags & ACK == 0 => reply(PING, ACK, frame.body).bytes(),
            // A request ends with its only message.
            DATA if frame.flags & END_STREAM != 0 => {
                let status = if file.exists() { SERVING } else { NOT_SERVING };
                health(frame.stream, status)
            }
            _ => continue,
        };
        out.write_all(&answer)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_as_they_are_written() {
        let bytes = health(5, SERVING);
        let mut input = bytes.as_slice();
        let mut kinds = Vec::new();
        while let Some(frame) = Frame::read(&mut input).unwrap() {
            assert_eq!(frame.stream, 5);
            kinds.push((frame.kind, frame.flags, frame.body.len()));
        }
        assert_eq!(kinds, [(1, 4, 32), (0, 0, 7), (1, 5, 15)]);
    }

    #[test]
    fn cut_frame_is_an_error_and_the_end_is_none() {
        let bytes = health(1, SERVING);
        assert!(Frame::read(&bytes[..20]).is_err());
        assert!(Frame::read(&bytes[..0]).unwrap().is_none());
    }
}
