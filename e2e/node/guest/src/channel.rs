//! The command channel between the host and the node VM: frames over one virtio-serial port.
//!
//! One command runs at a time. Both ends trust each other: the node belongs to whoever started it.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// The name of the virtio-serial port, as QEMU is told and as the node looks it up.
pub const PORT_NAME: &str = "kiln.node";

/// A frame's payload never exceeds this, so that a stream cannot hold the channel for long.
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// What a command needs to start.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Command {
    pub argv: Vec<String>,
    pub env: BTreeMap<String, String>,
    /// Size of the caller's terminal; the command gets a terminal of its own if it is set.
    pub terminal: Option<TerminalSize>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct TerminalSize {
    pub rows: u16,
    pub columns: u16,
}

#[derive(Debug)]
pub enum Frame {
    /// Node to host, once: the node is up. Empty, or what went wrong while it came up.
    Ready(String),
    /// Host to node.
    Run(Command),
    Stdin(Vec<u8>),
    StdinEnd,
    Resize(TerminalSize),
    Signal(i32),
    /// Node to host.
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
    /// The command ended; a signal is reported as a shell does, 128 + its number.
    Exit(i32),
}

impl Frame {
    pub fn write_to(&self, out: &mut impl Write) -> io::Result<()> {
        let json = |value: serde_json::Result<Vec<u8>>| value.map_err(io::Error::other);
        let (kind, payload) = match self {
            Frame::Ready(text) => (b'r', text.as_bytes().to_vec()),
            Frame::Run(command) => (b'c', json(serde_json::to_vec(command))?),
            Frame::Stdin(data) => (b'i', data.clone()),
            Frame::StdinEnd => (b'e', Vec::new()),
            Frame::Resize(size) => (b'z', json(serde_json::to_vec(size))?),
            Frame::Signal(number) => (b's', number.to_le_bytes().to_vec()),
            Frame::Stdout(data) => (b'o', data.clone()),
            Frame::Stderr(data) => (b'x', data.clone()),
            Frame::Exit(code) => (b'q', code.to_le_bytes().to_vec()),
        };
        let length = u32::try_from(payload.len()).map_err(io::Error::other)?;
        let mut frame = Vec::with_capacity(5 + payload.len());
        frame.push(kind);
        frame.extend_from_slice(&length.to_le_bytes());
        frame.extend_from_slice(&payload);
        out.write_all(&frame)?;
        out.flush()
    }

    pub fn read_from(input: &mut impl Read) -> io::Result<Frame> {
        let mut header = [0; 5];
        input.read_exact(&mut header)?;
        let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
        let limit = if header[0] == b'c' {
            16 * MAX_PAYLOAD
        } else {
            MAX_PAYLOAD
        };
        if length > limit {
            return Err(bad(format!(
                "a frame of {length} bytes; at most {limit} are allowed"
            )));
        }
        let mut payload = vec![0; length];
        input.read_exact(&mut payload)?;
        let number = |payload: &[u8]| {
            payload
                .try_into()
                .map(i32::from_le_bytes)
                .map_err(|_| bad("a number of a wrong size"))
        };
        Ok(match header[0] {
            b'r' => Frame::Ready(String::from_utf8_lossy(&payload).into_owned()),
            b'c' => Frame::Run(serde_json::from_slice(&payload).map_err(bad)?),
            b'i' => Frame::Stdin(payload),
            b'e' => Frame::StdinEnd,
            b'z' => Frame::Resize(serde_json::from_slice(&payload).map_err(bad)?),
            b's' => Frame::Signal(number(&payload)?),
            b'o' => Frame::Stdout(payload),
            b'x' => Frame::Stderr(payload),
            b'q' => Frame::Exit(number(&payload)?),
            other => return Err(bad(format!("unknown frame kind {other:#04x}"))),
        })
    }
}

fn bad(error: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("node channel: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_the_channel() {
        let command = Command {
            argv: vec!["sh".into(), "-c".into(), "exit 3".into()],
            env: BTreeMap::from([("A".into(), "b".into())]),
            terminal: Some(TerminalSize {
                rows: 24,
                columns: 80,
            }),
        };
        let mut wire = Vec::new();
        Frame::Run(command).write_to(&mut wire).unwrap();
        Frame::Stdout(vec![0, 255, 10]).write_to(&mut wire).unwrap();
        Frame::Exit(-1).write_to(&mut wire).unwrap();

        let mut wire = wire.as_slice();
        match Frame::read_from(&mut wire).unwrap() {
            Frame::Run(command) => {
                assert_eq!(command.argv[2], "exit 3");
                assert_eq!(command.env["A"], "b");
                assert_eq!(command.terminal.unwrap().columns, 80);
            }
            other => panic!("{other:?}"),
        }
        assert!(
            matches!(Frame::read_from(&mut wire).unwrap(), Frame::Stdout(d) if d == [0, 255, 10])
        );
        assert!(matches!(
            Frame::read_from(&mut wire).unwrap(),
            Frame::Exit(-1)
        ));
        assert!(
            Frame::read_from(&mut wire).is_err(),
            "the end of the stream is an error"
        );
    }

    #[test]
    fn an_oversized_or_unknown_frame_is_refused() {
        let mut oversized = vec![b'o'];
        oversized.extend_from_slice(&u32::MAX.to_le_bytes());
        assert!(Frame::read_from(&mut oversized.as_slice()).is_err());
        assert!(Frame::read_from(&mut [b'?', 0, 0, 0, 0].as_slice()).is_err());
    }
}
