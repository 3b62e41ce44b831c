//! Taps.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use kiln_uvm::launch::Tap;

use super::NetworkError;

/// Length of the header before every frame, as virtio 1 has it (virtio 1.2 §5.1.6).
const VNET_HEADER: libc::c_int = 12;

// linux/if_tun.h: _IOW('T', number, int). A wrong number would set something else on the tap.
const fn tun_ioctl(number: libc::c_ulong) -> libc::c_ulong {
    (1 << 30) | (4 << 16) | ((b'T' as libc::c_ulong) << 8) | number
}
const TUNSETIFF: libc::c_ulong = tun_ioctl(202);
const TUNSETVNETHDRSZ: libc::c_ulong = tun_ioctl(216);
const _: () = assert!(TUNSETIFF == 0x4004_54ca && TUNSETVNETHDRSZ == 0x4004_54d8);

/// Makes a tap in the calling thread's network namespace. It exists as long as its descriptor.
pub(super) fn create(name: &str, mac: [u8; 6]) -> Result<Tap, NetworkError> {
    let failed = |source| NetworkError::Tap {
        name: name.to_owned(),
        source,
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .map_err(failed)?;
    set_interface(&file, name).map_err(failed)?;
    // SAFETY: the ioctl reads one int from the pointer.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ as _, &VNET_HEADER) };
    if result < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    Ok(Tap {
        mac,
        fd: file.into(),
    })
}

fn set_interface(file: &File, name: &str) -> io::Result<()> {
    // SAFETY: all of ifreq's fields are plain data, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the name is too long",
        ));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(io::Error::other)?;
    // SAFETY: the ioctl reads and writes the ifreq, which lives through the call.
    if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF as _, &mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
