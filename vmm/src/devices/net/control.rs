//! The control queue (virtio 1.2 §5.1.6.5): what the driver wants changed.

use crate::devices::chain::Chain;
use crate::devices::ring::Mem;

use super::tap::Offloads;

const CLASS_MAC: u8 = 1;
const MAC_ADDR_SET: u8 = 1;
const CLASS_MQ: u8 = 4;
const MQ_VQ_PAIRS_SET: u8 = 0;
const CLASS_GUEST_OFFLOADS: u8 = 5;
const GUEST_OFFLOADS_SET: u8 = 0;

const ACK_OK: u8 = 0;
const ACK_ERR: u8 = 1;

/// A command, as far as it can be understood without the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    /// The card's address from now on.
    Mac([u8; 6]),
    /// How many pairs the driver uses.
    Pairs(u16),
    /// What packets to the driver may look like.
    Offloads(Offloads),
}

/// Feature bits of the offloads, which the command uses for its mask too.
pub(super) const GUEST_CSUM: u64 = 1 << 1;
pub(super) const GUEST_TSO4: u64 = 1 << 7;
pub(super) const GUEST_TSO6: u64 = 1 << 8;

impl Offloads {
    /// From feature bits.
    pub(super) fn from_bits(bits: u64) -> Self {
        Offloads {
            checksum: bits & GUEST_CSUM != 0,
            tso4: bits & GUEST_TSO4 != 0,
            tso6: bits & GUEST_TSO6 != 0,
        }
    }
}

/// Reads a command. `None` for anything that is not on offer or misshapen.
pub(super) fn parse(mem: &Mem, chain: &Chain) -> Option<Command> {
    let mut head = [0; 2];
    chain.readable.read(mem, 0, &mut head).ok()?;
    let data_len = chain.readable.len() - 2;
    match (head, data_len) {
        ([CLASS_MAC, MAC_ADDR_SET], 6) => {
            let mut mac = [0; 6];
            chain.readable.read(mem, 2, &mut mac).ok()?;
            Some(Command::Mac(mac))
        }
        ([CLASS_MQ, MQ_VQ_PAIRS_SET], 2) => {
            let mut raw = [0; 2];
            chain.readable.read(mem, 2, &mut raw).ok()?;
            Some(Command::Pairs(u16::from_le_bytes(raw)))
        }
        ([CLASS_GUEST_OFFLOADS, GUEST_OFFLOADS_SET], 8) => {
            let mut raw = [0; 8];
            chain.readable.read(mem, 2, &mut raw).ok()?;
            let bits = u64::from_le_bytes(raw);
            let known = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6;
            (bits & !known == 0).then(|| Command::Offloads(Offloads::from_bits(bits)))
        }
        _ => None,
    }
}

/// Answers a command; gives the bytes written.
pub(super) fn acknowledge(mem: &Mem, chain: &Chain, done: bool) -> u32 {
    let ack = if done { ACK_OK } else { ACK_ERR };
    match chain.writable.write(mem, 0, &[ack]) {
        Ok(()) => 1,
        Err(_) => 0,
    }
}
