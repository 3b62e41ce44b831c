//! Asks a running containerd for its version.
//!
//! Nothing on the command line or in the environment tells containerd 1.7 from 2.x, and only 2.x
//! takes an answer that promises Task v3. The Version service is served over gRPC; for this one
//! unary call without arguments a gRPC stack would be half of the binary, so the few HTTP/2 frames
//! (RFC 9113) are written here. The response's header block is never decoded: only DATA matters.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::socket::path_of;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const PATH: &str = "/containerd.services.version.v1.Version/Version";
const TIMEOUT: Duration = Duration::from_secs(2);
/// No version answer is anywhere near as long.
const LONGEST_FRAME: usize = 64 * 1024;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;

/// containerd did not tell its version.
#[derive(Debug, thiserror::Error)]
pub enum VersionError {
    /// The socket failed.
    #[error("talk to containerd at {address}")]
    Io {
        /// Its address.
        address: String,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// It answered something else.
    #[error("containerd at {address} gave no version ({reason})")]
    Protocol {
        /// Its address.
        address: String,
        /// What was wrong with the answer.
        reason: &'static str,
    },
}

/// The version string of the containerd at `address` (its gRPC socket), such as `1.7.24~ds1`.
pub fn containerd_version(address: &str) -> Result<String, VersionError> {
    let io = |source| VersionError::Io {
        address: address.to_owned(),
        source,
    };
    let protocol = |reason| VersionError::Protocol {
        address: address.to_owned(),
        reason,
    };
    let deadline = Instant::now() + TIMEOUT;
    let mut stream = UnixStream::connect(path_of(address)).map_err(io)?;
    stream.set_read_timeout(Some(TIMEOUT)).map_err(io)?;
    stream.set_write_timeout(Some(TIMEOUT)).map_err(io)?;
    stream.write_all(&request()).map_err(io)?;

    let mut body = Vec::new();
    loop {
        if Instant::now() > deadline {
            return Err(protocol("no answer in time"));
        }
        let frame = read_frame(&mut stream)
            .map_err(io)?
            .ok_or_else(|| protocol("frame too long"))?;
        match frame.kind {
            SETTINGS if frame.flags & ACK == 0 => {
                stream
                    .write_all(&encode_frame(SETTINGS, ACK, 0, &[]))
                    .map_err(io)?;
            }
            PING if frame.flags & ACK == 0 => {
                stream
                    .write_all(&encode_frame(PING, ACK, 0, &frame.payload))
                    .map_err(io)?;
            }
            DATA => body.extend_from_slice(&frame.payload),
            RST_STREAM | GOAWAY => return Err(protocol("the call was refused")),
            _ => {}
        }
        if matches!(frame.kind, DATA | HEADERS) && frame.flags & END_STREAM != 0 {
            break;
        }
    }
    parse_response(&body).ok_or_else(|| protocol("the response does not decode"))
}

/// The first number of a version string, with or without a leading `v`.
pub fn major_version(version: &str) -> Option<u32> {
    let digits = version.trim().trim_start_matches('v');
    let end = digits
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(digits.len());
    digits[..end].parse().ok()
}

fn request() -> Vec<u8> {
    // HPACK (RFC 7541), nothing indexed or compressed: `:method POST` and `:scheme http` come from
    // the static table, the rest are literals with a name from it or a new one.
    let mut block = vec![0x83, 0x86];
    let mut literal = |name: &[u8], value: &str| {
        block.extend_from_slice(name);
        block.push(u8::try_from(value.len()).unwrap_or(0));
        block.extend_from_slice(value.as_bytes());
    };
    literal(&[0x04], PATH);
    literal(&[0x01], "localhost");
    literal(&[0x0f, 0x10], "application/grpc");
    literal(b"\x00\x02te", "trailers");

    let mut out = PREFACE.to_vec();
    out.extend(encode_frame(SETTINGS, 0, 0, &[]));
    out.extend(encode_frame(HEADERS, END_HEADERS, 1, &block));
    // An empty gRPC message: not compressed, length 0.
    out.extend(encode_frame(DATA, END_STREAM, 1, &[0; 5]));
    out
}

struct Frame {
    kind: u8,
    flags: u8,
    payload: Vec<u8>,
}

fn encode_frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(0).to_be_bytes();
    let mut out = vec![length[1], length[2], length[3], kind, flags];
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
    out
}

fn read_frame(stream: &mut impl Read) -> io::Result<Option<Frame>> {
    let mut head = [0u8; 9];
    stream.read_exact(&mut head)?;
    let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
    if length > LONGEST_FRAME {
        return Ok(None);
    }
    let mut payload = vec![0; length];
    stream.read_exact(&mut payload)?;
    Ok(Some(Frame {
        kind: head[3],
        flags: head[4],
        payload,
    }))
}

/// The `version` field (1) of a `VersionResponse` inside a gRPC message.
fn parse_response(body: &[u8]) -> Option<String> {
    let length: [u8; 4] = body.get(1..5)?.try_into().ok()?;
    let message = body.get(5..5 + usize::try_from(u32::from_be_bytes(length)).ok()?)?;
    let mut input = protobuf::CodedInputStream::from_bytes(message);
    while let Ok(Some(tag)) = input.read_raw_tag_or_eof() {
        if tag & 7 != 2 {
            return None;
        }
        let bytes = input.read_bytes().ok()?;
        if tag >> 3 == 1 {
            return String::from_utf8(bytes).ok();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::thread;

    #[test]
    fn major_numbers_of_versions_in_the_field() {
        assert_eq!(major_version("1.7.24~ds1"), Some(1));
        assert_eq!(major_version("v2.1.9"), Some(2));
        assert_eq!(major_version("2.4.0-beta.0"), Some(2));
        assert_eq!(major_version("unknown"), None);
    }

    #[test]
    fn asks_in_http2_and_reads_the_version_out_of_the_data_frame() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let (mut peer, _) = listener.accept().unwrap();
            let mut sent = vec![0; request().len()];
            peer.read_exact(&mut sent).unwrap();
            let message = b"\x0a\x06v2.1.9\x12\x03abc";
            let mut body = vec![0, 0, 0, 0, u8::try_from(message.len()).unwrap()];
            body.extend_from_slice(message);
            peer.write_all(&encode_frame(SETTINGS, 0, 0, &[0; 6]))
                .unwrap();
            peer.write_all(&encode_frame(PING, 0, 0, &[7; 8])).unwrap();
            peer.write_all(&encode_frame(HEADERS, END_HEADERS, 1, &[0x88]))
                .unwrap();
            peer.write_all(&encode_frame(DATA, 0, 1, &body)).unwrap();
            peer.write_all(&encode_frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0x88]))
                .unwrap();
            let mut acks = vec![0; 9 + 17];
            peer.read_exact(&mut acks).unwrap();
            (sent, acks)
        });
        let version = containerd_version(path.to_str().unwrap()).unwrap();
        let (sent, acks) = server.join().unwrap();
        assert_eq!(version, "v2.1.9");
        assert!(sent.starts_with(PREFACE));
        assert_eq!(acks[3..5], [SETTINGS, ACK]);
        assert_eq!(acks[12..14], [PING, ACK]);
    }

    #[test]
    fn a_refused_call_is_an_error_and_not_a_version() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let (mut peer, _) = listener.accept().unwrap();
            peer.write_all(&encode_frame(GOAWAY, 0, 0, &[0; 8]))
                .unwrap();
            let mut rest = Vec::new();
            // The client hangs up after the refusal; whether that is seen as an end or a reset
            // does not matter here.
            let _ = peer.read_to_end(&mut rest);
        });
        let error = containerd_version(path.to_str().unwrap()).unwrap_err();
        server.join().unwrap();
        assert!(matches!(error, VersionError::Protocol { .. }), "{error:?}");
    }

    #[test]
    fn nobody_listening_is_an_error_that_names_the_address() {
        let error = containerd_version("/nonexistent/c.sock").unwrap_err();
        assert!(error.to_string().contains("/nonexistent/c.sock"));
    }
}
