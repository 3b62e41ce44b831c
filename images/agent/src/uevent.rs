//! The kernel's announcements of devices, for those who wait for one.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

/// The multicast group of the kernel itself (2 is udev's).
const KERNEL_GROUP: u32 = 1;
/// No announcement is longer.
const MAX_MESSAGE: usize = 8 * 1024;

/// What the kernel logs. That an empty disk has got a size is announced to nobody, but logged.
const LOG: &str = "/dev/kmsg";

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

/// What a waiter is woken by: the kernel's announcements, and its log where there is one.
#[derive(Debug)]
struct Signals {
    events: Uevents,
    log: Option<File>,
}

impl Signals {
    /// Those from now on.
    fn listen() -> io::Result<Self> {
        let events = Uevents::listen()?;
        let log = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(LOG);
        // Outside of a VM there may be none, and no disks to wait for.
        let log = log.ok().map(at_its_end).transpose()?;
        Ok(Self { events, log })
    }

    /// Waits for one, any. False: the time is over.
    fn wait(&mut self, until: Instant) -> io::Result<bool> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            // Rounded up: less than a millisecond would be none, and this would spin where the driver has to run.
            let whole = Duration::from_millis(left.as_micros().div_ceil(1000) as u64);
            let timeout = PollTimeout::try_from(whole).unwrap_or(PollTimeout::MAX);
            let socket = self.events.socket.as_fd();
            let mut fds = vec![PollFd::new(socket, PollFlags::POLLIN)];
            let log = self.log.as_ref().map(AsFd::as_fd);
            fds.extend(log.map(|log| PollFd::new(log, PollFlags::POLLIN)));
            match poll(&mut fds, timeout) {
                Ok(0) if left.is_zero() => return Ok(false),
                Ok(0) | Err(nix::Error::EINTR) => {}
                Ok(_) => {
                    while receive(&self.events.socket)?.is_some() {}
                    self.log = self.log.take().map(at_its_end).transpose()?;
                    return Ok(true);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Behind all that has been logged.
fn at_its_end(mut log: File) -> io::Result<File> {
    log.seek(SeekFrom::End(0))?;
    Ok(log)
}

/// Waits until `done` says so, looking again whenever the kernel announces or logs something. Blocks the thread. False: it
/// did not within `limit`.
pub(crate) fn wait_until<E: From<io::Error>>(
    limit: Duration,
    mut done: impl FnMut() -> Result<bool, E>,
) -> Result<bool, E> {
    if done()? {
        return Ok(true);
    }
    let until = Instant::now() + limit;
    let mut signals = Signals::listen()?;
    loop {
        // After they are listened to: what happened in between is seen now.
        if done()? {
            return Ok(true);
        }
        if Instant::now() >= until {
            return Ok(false);
        }
        signals.wait(until)?;
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
    fn what_happens_as_the_time_runs_out_is_seen() {
        let mut looks = 0;
        let done = wait_until::<io::Error>(Duration::ZERO, || {
            looks += 1;
            Ok(looks > 1)
        });
        assert!(done.expect("wait"));
    }

    #[test]
    fn what_is_done_already_is_not_waited_for() {
        assert!(wait_until::<io::Error>(Duration::ZERO, || Ok(true)).expect("wait"));
    }
}
