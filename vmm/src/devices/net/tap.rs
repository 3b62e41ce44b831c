//! What packets go to and come from.

use std::fmt::Debug;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use thiserror::Error;

/// Length of the header in front of every packet (`virtio_net_hdr_v1`).
pub(super) const VNET_HEADER_LEN: usize = 12;

const TUNSETOFFLOAD: libc::c_ulong = iow(208);
const TUNGETIFF: libc::c_ulong = ior(210);
const TUNSETVNETHDRSZ: libc::c_ulong = iow(216);
const TUNSETQUEUE: libc::c_ulong = iow(217);

/// `_IOW('T', number, int)`; unsigned and int have the same size.
const fn iow(number: libc::c_ulong) -> libc::c_ulong {
    1 << 30
        | (size_of::<libc::c_int>() as libc::c_ulong) << 16
        | (b'T' as libc::c_ulong) << 8
        | number
}

/// `_IOR('T', number, unsigned int)`.
const fn ior(number: libc::c_ulong) -> libc::c_ulong {
    2 << 30
        | (size_of::<libc::c_uint>() as libc::c_ulong) << 16
        | (b'T' as libc::c_ulong) << 8
        | number
}

const _: () = assert!(TUNSETOFFLOAD == 0x4004_54d0 && TUNGETIFF == 0x8004_54d2);
const _: () = assert!(TUNSETVNETHDRSZ == 0x4004_54d8 && TUNSETQUEUE == 0x4004_54d9);

/// What the guest can be given that a plain Ethernet frame is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    /// Frames whose checksum is not filled in yet.
    pub checksum: bool,
    /// TCP over IPv4 in frames that are to be cut up.
    pub tso4: bool,
    /// TCP over IPv6 in frames that are to be cut up.
    pub tso6: bool,
}

impl Offloads {
    fn tun_flags(self) -> libc::c_ulong {
        // TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6; the latter two mean nothing without the first.
        if !self.checksum {
            return 0;
        }
        1 | if self.tso4 { 2 } else { 0 } | if self.tso6 { 4 } else { 0 }
    }
}

/// One queue pair's end on the host. Packets have a [`VNET_HEADER_LEN`] header in front.
pub trait NetBackend: Send + Debug {
    /// For the event loop; edge-triggered.
    fn fd(&self) -> RawFd;

    /// Receives one packet into guest memory, without waiting. What does not fit is lost.
    ///
    /// # Safety
    ///
    /// The vectors must point to memory that is mapped and may be written to at any time.
    unsafe fn receive(&self, iovecs: &[libc::iovec]) -> io::Result<usize>;

    /// Sends one packet from guest memory, without waiting.
    ///
    /// # Safety
    ///
    /// The vectors must point to mapped memory.
    unsafe fn send(&self, iovecs: &[libc::iovec]) -> io::Result<usize>;

    /// Sets what packets to the guest may look like.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;

    /// Takes part in spreading incoming packets, or not. Only called with more than one queue.
    fn set_enabled(&self, enabled: bool) -> io::Result<()>;
}

/// Why a descriptor can't be a network queue.
#[derive(Debug, Error)]
pub enum TapError {
    /// A system call on it failed.
    #[error("can't {action} on the tap descriptor")]
    Call {
        /// What was tried.
        action: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// It is a tap, but not one we can use.
    #[error("interface {name} is not a tap with IFF_VNET_HDR and IFF_NO_PI; create it with these")]
    Flags {
        /// Name of the interface.
        name: String,
    },
}

/// A queue of a tap interface.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
}

/// The kernel's `struct ifreq`, as far as it is used here.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; 22],
}

const _: () = assert!(size_of::<InterfaceRequest>() == size_of::<libc::ifreq>());

impl InterfaceRequest {
    fn new() -> Self {
        InterfaceRequest {
            name: [0; libc::IFNAMSIZ],
            flags: 0,
            rest: [0; 22],
        }
    }
}

impl Tap {
    /// Takes over an open queue of a tap interface, after looking whether it is one.
    pub fn new(fd: OwnedFd) -> Result<Self, TapError> {
        let call = |action, source| TapError::Call { action, source };
        let mut interface = InterfaceRequest::new();
        // SAFETY: TUNGETIFF writes one `ifreq`, and the pointer is to a local of its size.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETIFF, &raw mut interface) };
        check(result).map_err(|e| call("read the interface's flags", e))?;
        let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if i32::from(interface.flags) & wanted != wanted {
            let name = interface.name.split(|b| *b == 0).next().unwrap_or_default();
            return Err(TapError::Flags {
                name: String::from_utf8_lossy(name).into_owned(),
            });
        }
        let size: libc::c_int = VNET_HEADER_LEN as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int, and the pointer is to a local of that type.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) };
        check(result).map_err(|e| call("set the header's size", e))?;
        // SAFETY: F_GETFL and F_SETFL pass integers only.
        let result = unsafe {
            let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
            libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)
        };
        check(result).map_err(|e| call("set non-blocking", e))?;
        Ok(Tap { fd })
    }
}

impl NetBackend for Tap {
    fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    unsafe fn receive(&self, iovecs: &[libc::iovec]) -> io::Result<usize> {
        // At most `MAX_IOVECS`, which is the kernel's limit.
        // SAFETY: the caller vouches for what the vectors point to.
        count(unsafe { libc::readv(self.fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int) })
    }

    unsafe fn send(&self, iovecs: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: the caller vouches for what the vectors point to.
        count(unsafe { libc::writev(self.fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int) })
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        check(unsafe { libc::ioctl(self.fd(), TUNSETOFFLOAD, offloads.tun_flags()) })
    }

    fn set_enabled(&self, enabled: bool) -> io::Result<()> {
        let mut interface = InterfaceRequest::new();
        let flag = if enabled {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        interface.flags = flag as libc::c_short;
        // SAFETY: TUNSETQUEUE reads one `ifreq`, and the pointer is to a local of its size.
        match check(unsafe { libc::ioctl(self.fd(), TUNSETQUEUE, &raw const interface) }) {
            // As it was already.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            result => result,
        }
    }
}

pub(super) fn count(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
