//! The state file's header: fixed places, little-endian, readable with `od`.
//!
//! ```text
//!   0  magic "KILNUVM\0"          40  base RAM, bytes            64  kiln version, 32 bytes of text
//!   8  format version, u32        48  hot-plug window, bytes     96  kernel version, 128 bytes of text
//!  12  header length, u32         56  memory file, bytes        224  digest, 32 bytes
//!  16  architecture, u32                                        256  CPU fingerprint, 32 words
//!  20  flags, u32 (0)                                           384  TSC frequency, kHz, u32
//!  24  body length, u64                                         388  zero
//!  32  body CRC-32, u32
//!  36  header CRC-32, u32, over the header with this field zero
//! ```
//!
//! Magic, format version and header length stay where they are in every format to come.

use kiln_vmm_control::cpu::WORDS;

use super::{Labels, MachineState};
use crate::cpu::Fingerprint;
use crate::memory::MemoryShape;

/// Goes up with every change of the layout of header, body or the guest's address map.
pub const FORMAT_VERSION: u32 = 2;
/// Length of the header.
pub const HEADER_LEN: usize = 512;

const MAGIC: [u8; 8] = *b"KILNUVM\0";
const ARCH_X86_64: u32 = 1;

const TRIP: () = {
    // The header's layout is the contract all versions share.
    assert!(HEADER_LEN == 512 && WORDS == 32);
    assert!(256 + WORDS * 4 == 384);
};

/// Why a header is refused. Each names the field.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum HeaderError {
    /// Too short.
    #[error("length: {0} bytes are too few for a header of {HEADER_LEN}")]
    Short(usize),
    /// Not a state file.
    #[error("magic: this is not a kiln state file")]
    Magic,
    /// Another format.
    #[error(
        "format version: {found}, this build reads {FORMAT_VERSION} (baked by kiln {kiln}); bake again"
    )]
    Version {
        /// What it says.
        found: u32,
        /// Who wrote it.
        kiln: String,
    },
    /// A field that belongs to what is behind it differs from that.
    #[error("{field}: {found}, expected {expected}; bake again")]
    Damaged {
        /// The field.
        field: &'static str,
        /// What it says.
        found: u64,
        /// What it must say.
        expected: u64,
    },
    /// A field, undamaged, says what this build does not know.
    #[error("{field}: {found}, this build reads {expected}; bake again")]
    Unknown {
        /// The field.
        field: &'static str,
        /// What it says.
        found: u64,
        /// What this build knows.
        expected: u64,
    },
    /// Another processor.
    #[error("CPU fingerprint: {0}; bake on this kind of host")]
    Cpu(String),
}

/// The header's fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Length of the body.
    pub body_len: u64,
    /// CRC-32 of the body.
    pub body_crc: u32,
    /// Base RAM in bytes.
    pub ram: u64,
    /// Hot-plug window in bytes.
    pub hotplug: u64,
    /// Length of the memory file.
    pub memory_file: u64,
    /// The kiln that wrote it.
    pub kiln: String,
    /// The kernel's version text.
    pub kernel: String,
    /// The baker's digest.
    pub digest: [u8; 32],
    /// The processor it was saved on.
    pub cpu: Fingerprint,
    /// Its TSC frequency.
    pub tsc_khz: u32,
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    for (cell, b) in bytes.iter_mut().skip(at).zip(value) {
        *cell = *b;
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    for (cell, b) in out.iter_mut().zip(bytes.iter().skip(at)) {
        *cell = *b;
    }
    out
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

fn text_at<const N: usize>(bytes: &[u8], at: usize) -> String {
    let raw: [u8; N] = array(bytes, at);
    let end = raw.iter().position(|b| *b == 0).unwrap_or(N);
    String::from_utf8_lossy(raw.get(..end).unwrap_or_default()).into_owned()
}

/// Cuts text to what fits a field with its closing zero.
fn text_field(text: &str, len: usize) -> &[u8] {
    text.as_bytes().get(..len - 1).unwrap_or(text.as_bytes())
}

impl Header {
    /// The header of a state about to be written.
    pub(super) fn describe(state: &MachineState, labels: &Labels, body: &[u8]) -> Self {
        let shape = MemoryShape::from(state.config.memory);
        Self {
            body_len: body.len() as u64,
            body_crc: crc32fast::hash(body),
            ram: shape.ram,
            hotplug: shape.hotplug,
            memory_file: shape.file_len(),
            kiln: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: labels.kernel.clone(),
            digest: labels.digest,
            cpu: Fingerprint::of_this_cpu(),
            tsc_khz: state.vcpus.first().map_or(0, |v| v.tsc_khz),
        }
    }

    /// The header as bytes.
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let () = TRIP;
        let mut b = [0; HEADER_LEN];
        put(&mut b, 0, &MAGIC);
        put(&mut b, 8, &FORMAT_VERSION.to_le_bytes());
        put(&mut b, 12, &(HEADER_LEN as u32).to_le_bytes());
        put(&mut b, 16, &ARCH_X86_64.to_le_bytes());
        put(&mut b, 24, &self.body_len.to_le_bytes());
        put(&mut b, 32, &self.body_crc.to_le_bytes());
        put(&mut b, 40, &self.ram.to_le_bytes());
        put(&mut b, 48, &self.hotplug.to_le_bytes());
        put(&mut b, 56, &self.memory_file.to_le_bytes());
        put(&mut b, 64, text_field(&self.kiln, 32));
        put(&mut b, 96, text_field(&self.kernel, 128));
        put(&mut b, 224, &self.digest);
        for (i, word) in self.cpu.0.iter().enumerate() {
            put(&mut b, 256 + 4 * i, &word.to_le_bytes());
        }
        put(&mut b, 384, &self.tsc_khz.to_le_bytes());
        let crc = crc32fast::hash(&b);
        put(&mut b, 36, &crc.to_le_bytes());
        b
    }

    /// Reads a header and returns it with the body behind it.
    pub fn parse(bytes: &[u8]) -> Result<(Self, &[u8]), HeaderError> {
        let Some((head, body)) = bytes.split_at_checked(HEADER_LEN) else {
            return Err(HeaderError::Short(bytes.len()));
        };
        if array::<8>(head, 0) != MAGIC {
            return Err(HeaderError::Magic);
        }
        let kiln = text_at::<32>(head, 64);
        let found = u32_at(head, 8);
        if found != FORMAT_VERSION {
            return Err(HeaderError::Version { found, kiln });
        }
        let mut blank = array::<HEADER_LEN>(head, 0);
        put(&mut blank, 36, &[0; 4]);
        let whole = |field, found: u64, expected: u64| match found == expected {
            true => Ok(()),
            false => Err(HeaderError::Damaged {
                field,
                found,
                expected,
            }),
        };
        let known = |field, at, expected: u32| match u32_at(head, at) {
            found if found == expected => Ok(()),
            found => Err(HeaderError::Unknown {
                field,
                found: found.into(),
                expected: expected.into(),
            }),
        };
        whole(
            "header checksum",
            u64::from(u32_at(head, 36)),
            u64::from(crc32fast::hash(&blank)),
        )?;
        known("header length", 12, HEADER_LEN as u32)?;
        known("architecture", 16, ARCH_X86_64)?;
        known("flags", 20, 0)?;
        let mut cpu = [0; WORDS];
        for (i, word) in cpu.iter_mut().enumerate() {
            *word = u32_at(head, 256 + 4 * i);
        }
        let header = Self {
            body_len: u64_at(head, 24),
            body_crc: u32_at(head, 32),
            ram: u64_at(head, 40),
            hotplug: u64_at(head, 48),
            memory_file: u64_at(head, 56),
            kiln,
            kernel: text_at::<128>(head, 96),
            digest: array(head, 224),
            cpu: Fingerprint(cpu),
            tsc_khz: u32_at(head, 384),
        };
        whole("body length", body.len() as u64, header.body_len)?;
        whole(
            "body checksum",
            u64::from(crc32fast::hash(body)),
            u64::from(header.body_crc),
        )?;
        Ok((header, body))
    }

    /// Refuses a state that was saved on another kind of processor.
    pub fn check_host(&self, host: &Fingerprint) -> Result<(), HeaderError> {
        match self.cpu.difference(host) {
            None => Ok(()),
            Some(what) => Err(HeaderError::Cpu(what)),
        }
    }
}
