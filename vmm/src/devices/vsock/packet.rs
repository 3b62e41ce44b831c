//! virtio-vsock packet headers (virtio 1.2 §5.10.6), read from and written to chains of any shape.

use crate::devices::chain::{Chain, ChainError};
use crate::devices::ring::Mem;

/// Bytes of a header.
pub(super) const HEADER_LEN: u64 = 44;
/// The host's address.
pub(super) const HOST_CID: u64 = 2;
/// The only socket type kiln speaks.
pub(super) const TYPE_STREAM: u16 = 1;
/// Neither side sends or takes more data in one packet.
pub(super) const MAX_DATA: u32 = 64 << 10;
/// Shutdown flag: the sender takes no more data.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// Shutdown flag: the sender sends no more data.
pub(super) const SHUTDOWN_SEND: u32 = 2;
/// The event that tells a guest that all its connections are gone.
pub(super) const EVENT_TRANSPORT_RESET: u32 = 0;

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
    /// Anything else.
    Unknown(u16),
}

impl Op {
    fn from_raw(raw: u16) -> Self {
        match raw {
            1 => Op::Request,
            2 => Op::Response,
            3 => Op::Reset,
            4 => Op::Shutdown,
            5 => Op::Data,
            6 => Op::CreditUpdate,
            7 => Op::CreditRequest,
            other => Op::Unknown(other),
        }
    }

    fn raw(self) -> u16 {
        match self {
            Op::Request => 1,
            Op::Response => 2,
            Op::Reset => 3,
            Op::Shutdown => 4,
            Op::Data => 5,
            Op::CreditUpdate => 6,
            Op::CreditRequest => 7,
            Op::Unknown(other) => other,
        }
    }
}

/// A packet's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: Op,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// Copies the header at the start of what the driver sent.
    pub(super) fn read(mem: &Mem, chain: &Chain) -> Result<Self, ChainError> {
        let mut raw = [0; HEADER_LEN as usize];
        chain.readable.read(mem, 0, &mut raw)?;
        Ok(Self::decode(&raw))
    }

    /// Puts the header at the start of what the driver reads.
    pub(super) fn write(&self, mem: &Mem, chain: &Chain) -> Result<(), ChainError> {
        chain.writable.write(mem, 0, &self.encode())
    }

    pub(super) fn decode(raw: &[u8; HEADER_LEN as usize]) -> Self {
        let mut at = 0;
        let mut take = |len: usize| {
            let value = raw
                .iter()
                .skip(at)
                .take(len)
                .rev()
                .fold(0, |all, b| all << 8 | u64::from(*b));
            at += len;
            value
        };
        // Each value is of as many bytes as were taken for it.
        Header {
            src_cid: take(8),
            dst_cid: take(8),
            src_port: take(4) as u32,
            dst_port: take(4) as u32,
            len: take(4) as u32,
            kind: take(2) as u16,
            op: Op::from_raw(take(2) as u16),
            flags: take(4) as u32,
            buf_alloc: take(4) as u32,
            fwd_cnt: take(4) as u32,
        }
    }

    pub(super) fn encode(&self) -> [u8; HEADER_LEN as usize] {
        let mut raw = [0; HEADER_LEN as usize];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            for (to, from) in raw.iter_mut().skip(at).zip(bytes) {
                *to = *from;
            }
            at += bytes.len();
        };
        put(&self.src_cid.to_le_bytes());
        put(&self.dst_cid.to_le_bytes());
        put(&self.src_port.to_le_bytes());
        put(&self.dst_port.to_le_bytes());
        put(&self.len.to_le_bytes());
        put(&self.kind.to_le_bytes());
        put(&self.op.raw().to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buf_alloc.to_le_bytes());
        put(&self.fwd_cnt.to_le_bytes());
        raw
    }

    /// The answer to a packet that nobody wants.
    pub(super) fn reset_for(&self) -> Header {
        Header {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            len: 0,
            kind: self.kind,
            op: Op::Reset,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_header_survives_decoding_and_encoding(raw: [u8; 44]) {
            prop_assert_eq!(Header::decode(&raw).encode(), raw);
        }
    }

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let raw: [u8; 44] = std::array::from_fn(|i| i as u8);
        let header = Header::decode(&raw);
        assert_eq!(header.src_cid, 0x0706_0504_0302_0100);
        assert_eq!(header.dst_port, 0x1716_1514);
        assert_eq!((header.kind, header.op), (0x1d1c, Op::Unknown(0x1f1e)));
        assert_eq!(header.fwd_cnt, 0x2b2a_2928);
    }
}
