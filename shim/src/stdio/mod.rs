//! Standard streams: FIFOs and files on containerd's side, byte streams from the μVM on the other.
//!
//! Bytes are never dropped: a reader that stops reading fills its FIFO, then the stream's window,
//! then the guest's pipe, and so stops the writer. Opening follows what containerd's own shims do,
//! because its clients rely on it:
//!
//! - output FIFOs are opened for writing, waiting for the reader, so that a process which ends at
//!   once does not write into a FIFO nobody has opened; a reading end of our own is held besides,
//!   so that a containerd that restarts does not break the pipe;
//! - the input FIFO is held open for writing by us until `CloseIO`, so that a client that detaches
//!   does not end the process's input.

mod copy;
mod open;

pub use copy::{Input, Outputs};
pub use open::{StdioError, open_input, open_output};

/// What containerd asked a process's streams to be connected to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StdioPaths {
    /// Input: a FIFO, or empty.
    pub stdin: String,
    /// Output: a FIFO, a file or a URI, or empty.
    pub stdout: String,
    /// Errors, likewise; empty with a terminal.
    pub stderr: String,
    /// The process gets a terminal.
    pub terminal: bool,
}
