//! The kernel's announcements of devices, for those who wait for one.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

/// The multicast group of the kernel itself (2 is udev's).
const KERNEL_GROUP: u32 = 1;
/// No announcement is longer.
const MAX_MESSAGE: usize = 8 * 1024;

/// How soon a waiter looks without an announcement; each time it waits twice as long, but never longer than the second.
const FIRST_LOOK: Duration = Duration::from_millis(1);
const LAST_LOOK: Duration = Duration::from_millis(64);

/// Announcements from the moment this is made.
#[derive(Debug)]
pub(crate) struct Uevents {
    socket: OwnedFd,
}

impl Uevents {
    /// Starts listening.
    pub(crate) fn listen() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkKObjectUEvent,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_GROUP))?;
        Ok(Self { socket })
    }

    /// The socket, to wait for it elsewhere.
    pub(crate) fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// Waits for an announcement, any. False: the time is over.
    fn wait(&self, until: Instant) -> io::Result<bool> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            // Rounded up: less than a millisecond would be none, and this would spin where the driver has to run.
            let whole = Duration::from_millis(left.as_micros().div_ceil(1000) as u64);
            let timeout = PollTimeout::try_from(whole).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, timeout) {
                Ok(0) if left.is_zero() => return Ok(false),
                Ok(0) | Err(nix::Error::EINTR) => {}
                Ok(_) => {
                    while self.next()?.is_some() {}
                    return Ok(true);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The next announcement that has arrived.
    fn next(&self) -> io::Result<Option<Vec<u8>>> {
        receive(&self.socket)
    }
}

/// The next announcement on a socket of [`Uevents`], if one has arrived.
pub(crate) fn receive(socket: &OwnedFd) -> io::Result<Option<Vec<u8>>> {
    let mut message = vec![0; MAX_MESSAGE];
    match recv(socket.as_raw_fd(), &mut message, MsgFlags::empty()) {
        Ok(length) => {
            message.truncate(length);
            Ok(Some(message))
        }
        Err(nix::Error::EAGAIN) => Ok(None),
        // Some were lost for want of room: the waiter looks for itself anyway.
        Err(nix::Error::ENOBUFS) => Ok(Some(Vec::new())),
        Err(error) => Err(error.into()),
    }
}

/// Whether a message says `key=value`.
pub(crate) fn says(message: &[u8], pair: &str) -> bool {
    message
        .split(|&byte| byte == 0)
        .any(|field| field == pair.as_bytes())
}

/// Waits until `done` says so, looking again at every announcement, and now and then without one: that an empty disk
/// has got a size, the kernel announces to nobody. Blocks the thread. False: it did not within `limit`.
pub(crate) fn wait_until<E: From<io::Error>>(
    limit: Duration,
    mut done: impl FnMut() -> Result<bool, E>,
) -> Result<bool, E> {
    if done()? {
        return Ok(true);
    }
    let until = Instant::now() + limit;
    let events = Uevents::listen()?;
    let mut unasked = FIRST_LOOK;
    loop {
        // After the socket is there: what happened in between is seen now.
        if done()? {
            return Ok(true);
        }
        let now = Instant::now();
        if now >= until {
            return Ok(false);
        }
        if !events.wait(until.min(now + unasked))? {
            unasked = LAST_LOOK.min(unasked * 2);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_is_found_whole() {
        let message = b"change@/devices/x\0ACTION=change\0NEW_VMGENID=1\0";
        assert!(says(message, "NEW_VMGENID=1"));
        assert!(!says(message, "NEW_VMGENID="));
        assert!(!says(message, "VMGENID=1"));
    }

    #[test]
    fn waiting_ends_in_time() {
        let start = Instant::now();
        let done = wait_until::<io::Error>(Duration::from_millis(30), || Ok(false));
        assert!(!done.expect("wait"));
        assert!(start.elapsed() >= Duration::from_millis(30));
    }

    #[test]
    fn what_nobody_announces_is_seen_all_the_same() {
        let mut looks = 0;
        let done = wait_until::<io::Error>(Duration::from_secs(60), || {
            looks += 1;
            Ok(looks > 5)
        });
        assert!(done.expect("wait"));
    }

    #[test]
    fn what_is_done_already_is_not_waited_for() {
        assert!(wait_until::<io::Error>(Duration::ZERO, || Ok(true)).expect("wait"));
    }
}
