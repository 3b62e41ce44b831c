//! Moving bytes between a Unix socket and guest memory, never waiting.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use crate::devices::chain::Segments;
use crate::devices::ring::Mem;

/// Vectors of one system call; what is beyond goes with the next.
const MAX_IOVECS: usize = 64;

/// Receives into guest memory. `Ok(0)` is the end of the stream.
pub(super) fn receive(stream: &UnixStream, mem: &Mem, to: &Segments) -> io::Result<usize> {
    let mut iovecs = vectors(mem, to)?;
    let mut message = message(&mut iovecs);
    // SAFETY: the vectors point into guest memory, mapped as long as `mem` is borrowed; the kernel may
    // write there at any time, since nobody holds references into guest memory.
    let result = unsafe { libc::recvmsg(stream.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    count(result)
}

/// Sends from guest memory.
pub(super) fn send(stream: &UnixStream, mem: &Mem, from: &Segments) -> io::Result<usize> {
    let mut iovecs = vectors(mem, from)?;
    let message = message(&mut iovecs);
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: as above; the kernel only reads.
    let result = unsafe { libc::sendmsg(stream.as_raw_fd(), &raw const message, flags) };
    count(result)
}

/// Sends host bytes.
pub(super) fn send_bytes(stream: &UnixStream, bytes: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: pointer and length are those of a slice.
    let result = unsafe {
        libc::send(
            stream.as_raw_fd(),
            bytes.as_ptr().cast(),
            bytes.len(),
            flags,
        )
    };
    count(result)
}

/// Reads the first line if it is there, with its newline, and leaves what follows in the socket.
/// `Ok(None)` means: not yet. A line longer than `buffer` or a stream that ends early is an error.
pub(super) fn take_line<'a>(
    stream: &UnixStream,
    buffer: &'a mut [u8],
) -> io::Result<Option<&'a [u8]>> {
    let peeked = match receive_bytes(stream, buffer, libc::MSG_PEEK) {
        Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(n) => n,
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
        Err(e) => return Err(e),
    };
    let line = buffer.get(..peeked).unwrap_or_default();
    match line.iter().position(|b| *b == b'\n') {
        Some(end) => {
            let line = buffer.get_mut(..=end).unwrap_or_default();
            let taken = receive_bytes(stream, line, 0)?;
            Ok(buffer.get(..taken))
        }
        None if peeked == buffer.len() => Err(io::ErrorKind::InvalidData.into()),
        None => Ok(None),
    }
}

fn receive_bytes(stream: &UnixStream, to: &mut [u8], flags: i32) -> io::Result<usize> {
    let flags = flags | libc::MSG_DONTWAIT;
    // SAFETY: pointer and length are those of a slice we hold exclusively.
    let result = unsafe { libc::recv(stream.as_raw_fd(), to.as_mut_ptr().cast(), to.len(), flags) };
    count(result)
}

fn vectors(mem: &Mem, segments: &Segments) -> io::Result<Vec<libc::iovec>> {
    let mut iovecs = Vec::with_capacity(4);
    segments
        .iovecs(mem, &mut iovecs)
        .map_err(io::Error::other)?;
    iovecs.truncate(MAX_IOVECS);
    Ok(iovecs)
}

fn message(iovecs: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all zeroes is a valid `msghdr`: no name, no vectors, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_mut_ptr();
    message.msg_iovlen = iovecs.len();
    message
}

fn count(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
