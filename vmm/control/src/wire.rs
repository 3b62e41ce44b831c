//! Frames on a Unix stream socket: a 32-bit little-endian length, then a postcard message. Descriptors are
//! attached to the first byte.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest message that is believed.
const MAX_FRAME: u32 = 1 << 20;
/// Most descriptors in a frame.
pub const MAX_FDS: usize = 64;

/// Room for the control message; `u64`s for its alignment.
type ControlBuffer = [u64; 40];
const _: () = assert!(size_of::<ControlBuffer>() >= 16 + MAX_FDS * size_of::<RawFd>());

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Sends one message with descriptors.
pub fn send<T: Serialize>(
    mut socket: &UnixStream,
    message: &T,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let body = postcard::to_stdvec(message).map_err(io::Error::other)?;
    let len = u32::try_from(body.len()).map_err(|_| invalid("the message is too long"))?;
    if len > MAX_FRAME || fds.len() > MAX_FDS {
        return Err(invalid(
            "the message is too long or has too many descriptors",
        ));
    }
    let mut frame = len.to_le_bytes().to_vec();
    frame.extend_from_slice(&body);
    let sent = send_with_fds(socket, &frame, fds)?;
    socket.write_all(frame.get(sent..).unwrap_or_default())
}

fn send_with_fds(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let payload = size_of_val(raw.as_slice());
    let mut control: ControlBuffer = [0; 40];
    let mut iov = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: all-zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    if !raw.is_empty() {
        header.msg_control = control.as_mut_ptr().cast();
        // SAFETY: plain arithmetic on a length of at most MAX_FDS descriptors.
        header.msg_controllen = unsafe { libc::CMSG_SPACE(payload as u32) } as usize;
        // SAFETY: the control buffer is large enough (asserted above for MAX_FDS) and aligned, so the first
        // header exists and has room for `payload` bytes of data.
        unsafe {
            let cmsg = libc::CMSG_FIRSTHDR(&raw const header);
            (*cmsg).cmsg_level = libc::SOL_SOCKET;
            (*cmsg).cmsg_type = libc::SCM_RIGHTS;
            (*cmsg).cmsg_len = libc::CMSG_LEN(payload as u32) as usize;
            std::ptr::copy_nonoverlapping(
                raw.as_ptr().cast::<u8>(),
                libc::CMSG_DATA(cmsg),
                payload,
            );
        }
    }
    loop {
        // SAFETY: the header points to live buffers of the lengths it says.
        let n = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_NOSIGNAL) };
        if let Ok(n) = usize::try_from(n) {
            return Ok(n);
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
}

/// Receives one message with at most so many descriptors; `None` when the other end has closed. Of a message with
/// more, the kernel makes no descriptors of this process beyond them, and it is refused.
pub fn receive<T: DeserializeOwned>(
    mut socket: &UnixStream,
    most_fds: usize,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut len = [0; 4];
    let (n, fds) = receive_with_fds(socket, &mut len, most_fds)?;
    if n == 0 {
        return Ok(None);
    }
    socket.read_exact(len.get_mut(n..).unwrap_or_default())?;
    let len = u32::from_le_bytes(len);
    if len > MAX_FRAME {
        return Err(invalid("the message is too long"));
    }
    let mut body = vec![0; len as usize];
    socket.read_exact(&mut body)?;
    let message = postcard::from_bytes(&body).map_err(io::Error::other)?;
    Ok(Some((message, fds)))
}

fn receive_with_fds(
    socket: &UnixStream,
    bytes: &mut [u8],
    most: usize,
) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut control: ControlBuffer = [0; 40];
    let mut iov = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: all-zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    if let most @ 1.. = most.min(MAX_FDS) {
        header.msg_control = control.as_mut_ptr().cast();
        let payload = most * size_of::<RawFd>();
        // SAFETY: plain arithmetic on a length of at most MAX_FDS descriptors. Not CMSG_SPACE, whose padding has room
        // for one more.
        header.msg_controllen = unsafe { libc::CMSG_LEN(payload as u32) } as usize;
    }
    let n = loop {
        // SAFETY: the header points to live buffers of the lengths it says.
        let n =
            unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
        if let Ok(n) = usize::try_from(n) {
            break n;
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    };
    let mut fds = Vec::new();
    // SAFETY: the kernel filled in the control buffer and its length; the macros walk only inside it, and each
    // descriptor in an SCM_RIGHTS message is new and ours alone.
    unsafe {
        let mut cmsg = libc::CMSG_FIRSTHDR(&raw const header);
        while !cmsg.is_null() {
            if (*cmsg).cmsg_level == libc::SOL_SOCKET && (*cmsg).cmsg_type == libc::SCM_RIGHTS {
                let len = (*cmsg).cmsg_len - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(cmsg).cast::<RawFd>();
                for i in 0..len / size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(i).read_unaligned()));
                }
            }
            cmsg = libc::CMSG_NXTHDR(&raw const header, cmsg);
        }
    }
    if header.msg_flags & libc::MSG_CTRUNC != 0 {
        return Err(invalid("more descriptors than a frame may have"));
    }
    Ok((n, fds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn descriptors_arrive_with_their_message() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut r, w) = io::pipe().unwrap();
        send(&a, &"hello".to_owned(), &[w.as_fd(), w.as_fd()]).unwrap();
        send(&a, &"bye".to_owned(), &[]).unwrap();
        drop(w);
        let (text, fds): (String, _) = receive(&b, 2).unwrap().unwrap();
        assert_eq!((text.as_str(), fds.len()), ("hello", 2));
        std::fs::File::from(fds.into_iter().next().unwrap())
            .write_all(b"x")
            .unwrap();
        let mut got = Vec::new();
        r.read_to_end(&mut got).unwrap();
        assert_eq!(got, b"x");
        assert_eq!(receive::<String>(&b, 2).unwrap().unwrap().0, "bye");
        drop(a);
        assert!(receive::<String>(&b, 2).unwrap().is_none());
    }

    #[test]
    fn more_descriptors_than_are_wanted_are_refused_and_closed() {
        for (sent, most) in [(1, 0), (2, 1), (MAX_FDS, 3), (MAX_FDS, MAX_FDS - 1)] {
            let (a, b) = UnixStream::pair().unwrap();
            let (mut r, w) = io::pipe().unwrap();
            send(&a, &"hello".to_owned(), &vec![w.as_fd(); sent]).unwrap();
            drop(w);
            let error = receive::<String>(&b, most).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{sent}, {most}");
            // Only without a writer left does the pipe end.
            assert_eq!(r.read(&mut [0]).unwrap(), 0, "{sent}, {most}");
        }
    }

    #[test]
    fn a_length_that_cannot_be_is_refused() {
        let (mut a, b) = UnixStream::pair().unwrap();
        a.write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert!(receive::<String>(&b, 0).is_err());
    }
}
