//! The header that opens a connection to [`STREAM_PORT`](crate::STREAM_PORT).
//!
//! One connection carries one stream. Its first bytes, from the host:
//!
//! | offset | size | what |
//! |---|---|---|
//! | 0 | 4 | `KST1` |
//! | 4 | 1 | kind: 0 stdin, 1 stdout, 2 stderr, 3 TCP connection to a port in the pod |
//! | 5 | 1 | length of the container id, *c* |
//! | 6 | 1 | length of the exec id, *e* |
//! | 7 | 1 | 0 |
//! | 8 | 2 | TCP port, little endian; 0 for the other kinds |
//! | 10 | 6 | 0 |
//! | 16 | 16 | token, as in the `Stdio` of the process |
//! | 32 | *c* | container id |
//! | 32 + *c* | *e* | exec id |
//!
//! The agent answers with one byte, [`Accepted`](Status::Accepted) or the reason of a refusal
//! followed by the end of the stream; then the stream's bytes flow. A host may send stdin without
//! waiting for the answer. The end of output is the end of the connection's data, after the last
//! byte; the end of input is the host's half-close. For TCP both directions flow.
//!
//! Nothing is dropped for being early: a process whose host has not connected yet fills its pipe
//! and waits. A connection that breaks leaves the stream open to be connected again.

use thiserror::Error;

/// The first four bytes of a header.
pub const MAGIC: [u8; 4] = *b"KST1";
/// Bytes of a header before the ids.
pub const FIXED_LEN: usize = 32;
/// Bytes of a token.
pub const TOKEN_LEN: usize = 16;

/// Which stream a connection carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Host to process.
    Stdin,
    /// Process to host; a terminal's whole output too.
    Stdout,
    /// Process to host.
    Stderr,
    /// Both ways, to a TCP port on the pod's localhost.
    Tcp(u16),
}

/// The agent's one-byte answer to a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[repr(u8)]
pub enum Status {
    /// The stream follows.
    #[error("accepted")]
    Accepted = 0,
    /// The header makes no sense to the agent.
    #[error("the agent does not understand the stream header; its version may differ")]
    BadHeader = 1,
    /// No such process, or it was started without this stream.
    #[error("the process is not there or was started without this stream")]
    NotFound = 2,
    /// The token is not the one the process was made with.
    #[error("the stream's token is not the process's")]
    BadToken = 3,
    /// Another connection carries this stream.
    #[error("the stream is connected already")]
    Busy = 4,
    /// Nothing listens on the TCP port, or it can't be reached.
    #[error("nothing answers on that TCP port in the pod")]
    Refused = 5,
    /// The identity gate is shut.
    #[error("the μVM has no identity yet (SetIdentity comes first)")]
    GateShut = 6,
}

impl Status {
    /// The status a byte stands for; an unknown one is a header not understood.
    #[must_use]
    pub fn from_byte(byte: u8) -> Self {
        match byte {
            0 => Self::Accepted,
            2 => Self::NotFound,
            3 => Self::BadToken,
            4 => Self::Busy,
            5 => Self::Refused,
            6 => Self::GateShut,
            _ => Self::BadHeader,
        }
    }
}

/// Which stream of which process, and the right to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The stream.
    pub kind: Kind,
    /// The process's token; zeros for TCP.
    pub token: [u8; TOKEN_LEN],
    /// The container; empty for a process in the guest itself, and for TCP.
    pub container_id: String,
    /// The exec, empty for the container's first process.
    pub exec_id: String,
}

/// Why bytes are no header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum HeaderError {
    /// Not a stream connection of this version.
    #[error("a stream header starts with KST1")]
    Magic,
    /// A kind that this version doesn't know.
    #[error("stream kind {0} is unknown")]
    Kind(u8),
    /// Bytes that must be zero are not.
    #[error("a reserved byte of the stream header is not 0")]
    Reserved,
    /// An id is not UTF-8.
    #[error("a container or exec id in the stream header is not UTF-8")]
    Id,
    /// An id doesn't fit.
    #[error("a container or exec id has more than 255 bytes")]
    TooLong,
}

/// The part of a header with a fixed size: enough to know how much follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fixed {
    kind: Kind,
    token: [u8; TOKEN_LEN],
    container_len: usize,
    exec_len: usize,
}

impl Fixed {
    /// Reads the first [`FIXED_LEN`] bytes.
    ///
    /// # Errors
    /// If they are no header of this version.
    pub fn parse(bytes: &[u8; FIXED_LEN]) -> Result<Self, HeaderError> {
        if bytes[..4] != MAGIC {
            return Err(HeaderError::Magic);
        }
        let port = u16::from_le_bytes([bytes[8], bytes[9]]);
        let kind = match bytes[4] {
            0 => Kind::Stdin,
            1 => Kind::Stdout,
            2 => Kind::Stderr,
            3 => Kind::Tcp(port),
            other => return Err(HeaderError::Kind(other)),
        };
        let port_allowed = matches!(kind, Kind::Tcp(_)) || port == 0;
        if bytes[7] != 0 || !port_allowed || bytes[10..16].iter().any(|&byte| byte != 0) {
            return Err(HeaderError::Reserved);
        }
        let mut token = [0; TOKEN_LEN];
        token.copy_from_slice(&bytes[16..]);
        Ok(Self {
            kind,
            token,
            container_len: usize::from(bytes[5]),
            exec_len: usize::from(bytes[6]),
        })
    }

    /// How many bytes of ids follow.
    #[must_use]
    pub fn ids_len(&self) -> usize {
        self.container_len + self.exec_len
    }

    /// The whole header, from the bytes that follow.
    ///
    /// # Errors
    /// If `ids` has another length than [`Self::ids_len`] or is not UTF-8.
    pub fn with_ids(self, ids: &[u8]) -> Result<Header, HeaderError> {
        if ids.len() != self.ids_len() {
            return Err(HeaderError::Id);
        }
        let (container, exec) = ids.split_at(self.container_len);
        let text = |bytes: &[u8]| {
            std::str::from_utf8(bytes)
                .map(str::to_owned)
                .map_err(|_| HeaderError::Id)
        };
        Ok(Header {
            kind: self.kind,
            token: self.token,
            container_id: text(container)?,
            exec_id: text(exec)?,
        })
    }
}

impl Header {
    /// The bytes to open a connection with.
    ///
    /// # Errors
    /// If an id has more than 255 bytes.
    pub fn encode(&self) -> Result<Vec<u8>, HeaderError> {
        let length = |id: &str| u8::try_from(id.len()).map_err(|_| HeaderError::TooLong);
        let (kind, port) = match self.kind {
            Kind::Stdin => (0, 0),
            Kind::Stdout => (1, 0),
            Kind::Stderr => (2, 0),
            Kind::Tcp(port) => (3, port),
        };
        let mut bytes =
            Vec::with_capacity(FIXED_LEN + self.container_id.len() + self.exec_id.len());
        bytes.extend(MAGIC);
        bytes.extend([kind, length(&self.container_id)?, length(&self.exec_id)?, 0]);
        bytes.extend(port.to_le_bytes());
        bytes.extend([0; 6]);
        bytes.extend(self.token);
        bytes.extend(self.container_id.as_bytes());
        bytes.extend(self.exec_id.as_bytes());
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: Kind) -> Header {
        Header {
            kind,
            token: [7; TOKEN_LEN],
            container_id: "c1".into(),
            exec_id: "é".into(),
        }
    }

    fn decode(bytes: &[u8]) -> Result<Header, HeaderError> {
        let fixed = Fixed::parse(bytes[..FIXED_LEN].try_into().expect("long enough"))?;
        fixed.with_ids(&bytes[FIXED_LEN..])
    }

    #[test]
    fn what_is_encoded_is_read_back() {
        for kind in [
            Kind::Stdin,
            Kind::Stdout,
            Kind::Stderr,
            Kind::Tcp(65_535),
            Kind::Tcp(0),
        ] {
            let bytes = header(kind).encode().expect("short ids");
            assert_eq!(decode(&bytes), Ok(header(kind)));
        }
    }

    #[test]
    fn the_layout_is_the_documented_one() {
        let bytes = header(Kind::Tcp(0x1234)).encode().expect("short ids");
        assert_eq!(bytes[..16], *b"KST1\x03\x02\x02\0\x34\x12\0\0\0\0\0\0");
        assert_eq!(bytes[16..32], [7; 16]);
        assert_eq!(&bytes[32..], "c1é".as_bytes());
    }

    #[test]
    fn nonsense_is_refused() {
        let good = header(Kind::Stdout).encode().expect("short ids");
        let with = |at: usize, byte: u8| {
            let mut bad = good.clone();
            bad[at] = byte;
            decode(&bad)
        };
        assert_eq!(with(3, b'2'), Err(HeaderError::Magic));
        assert_eq!(with(4, 4), Err(HeaderError::Kind(4)));
        assert_eq!(with(7, 1), Err(HeaderError::Reserved));
        assert_eq!(
            with(8, 1),
            Err(HeaderError::Reserved),
            "only TCP has a port"
        );
        assert_eq!(with(15, 1), Err(HeaderError::Reserved));
        assert_eq!(with(5, 3), Err(HeaderError::Id), "more announced than sent");
        assert_eq!(with(35, 0xff), Err(HeaderError::Id), "not UTF-8");
    }

    #[test]
    fn an_id_of_256_bytes_is_refused() {
        let long = Header {
            container_id: "x".repeat(256),
            ..header(Kind::Stdin)
        };
        assert_eq!(long.encode(), Err(HeaderError::TooLong));
    }

    #[test]
    fn every_status_survives_its_byte() {
        for byte in 0..=6 {
            assert_eq!(Status::from_byte(byte) as u8, byte);
        }
        assert_eq!(Status::from_byte(99), Status::BadHeader);
    }
}
