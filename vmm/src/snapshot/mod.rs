//! Snapshots: a state file and a memory file.
//!
//! The state file is a fixed header (`header`) that needs no codec, then one postcard-encoded
//! [`MachineState`]. The memory file is guest memory at its own offsets, sparse
//! where pages are zero (`memory`). Everything read here may be damaged or foreign and is refused by name.

mod header;
mod memory;
mod state;

use std::fs::File;
use std::io::{self, Read, Write};

use crate::cpu::Fingerprint;
use crate::memory::{MemoryError, MemoryShape};

pub use header::{FORMAT_VERSION, HEADER_LEN, Header, HeaderError};
pub use memory::{MemoryStats, write_memory};
pub use state::{ConfigState, DeviceEntry, HotplugState, KindState, MachineState, MemoryState};

/// Why a snapshot can't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The header.
    #[error("the state file is refused")]
    Header(#[from] HeaderError),
    /// The body.
    #[error("the state file's body does not decode: {0}; bake again")]
    Body(String),
    /// The state contradicts its header.
    #[error("the state file's {0} differs between header and body; bake again")]
    Contradiction(&'static str),
    /// The state describes memory that no machine has.
    #[error("the state file describes memory that can't be; bake again")]
    Memory(#[source] MemoryError),
    /// A file could not be read or written.
    #[error("{action} failed")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A file to write to has content.
    #[error("the {0} to be written is not empty; pass a new one")]
    NotEmpty(&'static str),
    /// The memory file has the wrong length.
    #[error("the memory file has {found} bytes, its state file says {expected}; bake again")]
    MemoryLength {
        /// Its length.
        found: u64,
        /// What the header says.
        expected: u64,
    },
}

/// Largest body that is believed: a state is a few hundred KiB with the most vCPUs and devices.
const MAX_BODY: u64 = 16 << 20;

/// What a snapshot says about itself, beside the machine's state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Labels {
    /// The kernel's version text.
    pub kernel: String,
    /// Whatever the baker wants to find again; kiln's store puts a digest here.
    pub digest: [u8; 32],
}

/// Encodes a state file.
pub fn encode(state: &MachineState, labels: &Labels) -> Result<Vec<u8>, SnapshotError> {
    let body = postcard::to_stdvec(state).map_err(|e| SnapshotError::Body(e.to_string()))?;
    let header = Header::describe(state, labels, &body);
    let mut file = header.to_bytes().to_vec();
    file.extend_from_slice(&body);
    Ok(file)
}

/// Decodes a state file and checks that it fits this build and this CPU. Runs before anything of the guest does.
pub fn decode(bytes: &[u8]) -> Result<(Header, MachineState), SnapshotError> {
    let (header, body) = Header::parse(bytes)?;
    header.check_host(&Fingerprint::of_this_cpu())?;
    let (state, rest) = postcard::take_from_bytes::<MachineState>(body)
        .map_err(|e| SnapshotError::Body(e.to_string()))?;
    if !rest.is_empty() {
        return Err(SnapshotError::Body(format!(
            "{} bytes too many",
            rest.len()
        )));
    }
    let shape = MemoryShape::from(state.config.memory);
    shape.check().map_err(SnapshotError::Memory)?;
    if (shape.ram, shape.hotplug, shape.file_len())
        != (header.ram, header.hotplug, header.memory_file)
    {
        return Err(SnapshotError::Contradiction("memory size"));
    }
    Ok((header, state))
}

/// Reads a whole state file from where it stands.
pub fn read_file(file: &mut File) -> Result<Vec<u8>, SnapshotError> {
    let io = |source| SnapshotError::Io {
        action: "reading the state file",
        source,
    };
    let len = file.metadata().map_err(io)?.len();
    let mut bytes = Vec::with_capacity(usize::try_from(len.min(MAX_BODY)).unwrap_or(0) + 1);
    file.take(MAX_BODY).read_to_end(&mut bytes).map_err(io)?;
    Ok(bytes)
}

/// Refuses a memory file that is not as long as its state says: pages past its end would kill the guest later.
pub fn check_memory_file(header: &Header, file: &File) -> Result<(), SnapshotError> {
    let io = |source| SnapshotError::Io {
        action: "looking at the memory file",
        source,
    };
    let found = file.metadata().map_err(io)?.len();
    if found == header.memory_file {
        Ok(())
    } else {
        Err(SnapshotError::MemoryLength {
            found,
            expected: header.memory_file,
        })
    }
}

/// Files are cut by who passes them: the VMM's threads may not.
fn check_empty(file: &File, what: &'static str) -> Result<(), SnapshotError> {
    let io = |source| SnapshotError::Io {
        action: "looking at a file to be written",
        source,
    };
    match file.metadata().map_err(io)?.len() {
        0 => Ok(()),
        _ => Err(SnapshotError::NotEmpty(what)),
    }
}

/// Writes a state file, which is empty before.
pub fn write_file(file: &mut File, bytes: &[u8]) -> Result<(), SnapshotError> {
    let io = |source| SnapshotError::Io {
        action: "writing the state file",
        source,
    };
    check_empty(file, "state file")?;
    file.write_all(bytes).map_err(io)?;
    file.sync_data().map_err(io)
}

#[cfg(test)]
mod tests;
