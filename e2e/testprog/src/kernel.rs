//! What a kernel has only when somebody asks for it.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use anyhow::{Context, Result};

use crate::text::say;

/// Opens a socket of a protocol that no kernel has from the beginning.
pub(crate) fn sctp() -> Result<()> {
    // SAFETY: numbers only.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_SCTP) };
    if socket < 0 {
        return Err(io::Error::last_os_error()).context("cannot open an SCTP socket");
    }
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    drop(unsafe { OwnedFd::from_raw_fd(socket) });
    say("opened")
}
