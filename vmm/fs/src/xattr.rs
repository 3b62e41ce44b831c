//! Extended attributes, of three kinds: users' own, capabilities of programs, and lists of who may access.
//!
//! The host's other attributes are not the guest's: `trusted` ones are as they are to a container that may not administer
//! the system, and of what security modules keep it sees nothing.

use std::ffi::CStr;

use crate::host::{Answer, Errno, Path, done, number};

/// The most bytes of a value, or of a list of names (linux/limits.h).
pub(crate) const MOST: usize = 64 << 10;

const CAPABILITY: &[u8] = b"security.capability";
pub(crate) const ACCESS_LIST: &[u8] = b"system.posix_acl_access";
const DEFAULT_LIST: &[u8] = b"system.posix_acl_default";

fn is_list(name: &[u8]) -> bool {
    name == ACCESS_LIST || name == DEFAULT_LIST
}

fn is_served(name: &[u8]) -> bool {
    name.starts_with(b"user.") || name == CAPABILITY || is_list(name)
}

/// Whether a name may be used, and what is answered if it may not.
fn check(name: &CStr, trusted: i32) -> Answer<()> {
    match name.to_bytes() {
        name if is_served(name) => Ok(()),
        name if name.starts_with(b"trusted.") => Err(Errno(trusted)),
        _ => Err(Errno(libc::EOPNOTSUPP)),
    }
}

pub(crate) fn set(path: &Path, name: &CStr, value: &[u8], flags: i32) -> Answer<()> {
    check(name, libc::EPERM)?;
    let path = path.as_c_str().as_ptr();
    // SAFETY: strings and a buffer that live through the call.
    done(unsafe {
        libc::setxattr(
            path,
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            flags,
        )
    })
}

/// Puts a value after what is in `out`, where there is room for `size` bytes. Gives the value's length, which is all that
/// is wanted if there is no room.
pub(crate) fn get(path: &Path, name: &CStr, out: &mut Vec<u8>, size: usize) -> Answer<usize> {
    check(name, libc::ENODATA)?;
    let start = out.len();
    out.resize(start + size.min(MOST), 0);
    let room = out.get_mut(start..).unwrap_or_default();
    // SAFETY: strings that live through the call, and a buffer of that length.
    let got = number(unsafe {
        let (path, name) = (path.as_c_str().as_ptr(), name.as_ptr());
        libc::getxattr(path, name, room.as_mut_ptr().cast(), room.len())
    } as libc::c_long);
    let got = got.map_err(|error| match error.0 {
        // The guest takes anything else for a reason to refuse access.
        libc::EOPNOTSUPP if is_list(name.to_bytes()) => Errno(libc::ENODATA),
        _ => error,
    })?;
    let got = usize::try_from(got).map_err(|_| Errno(libc::E2BIG))?;
    out.truncate(start + if size == 0 { 0 } else { got });
    Ok(got)
}

/// Puts the names of those that are served, each with a zero, after what is in `out`.
pub(crate) fn list(path: &Path, out: &mut Vec<u8>) -> Answer<()> {
    let mut names = vec![0u8; MOST];
    // SAFETY: a string that lives through the call, and a buffer of that length.
    let got = number(unsafe {
        let path = path.as_c_str().as_ptr();
        libc::listxattr(path, names.as_mut_ptr().cast(), names.len())
    } as libc::c_long)?;
    names.truncate(usize::try_from(got).map_err(|_| Errno(libc::E2BIG))?);
    for name in names.split_inclusive(|byte| *byte == 0) {
        if is_served(name.strip_suffix(b"\0").unwrap_or(name)) {
            out.extend_from_slice(name);
        }
    }
    Ok(())
}

pub(crate) fn remove(path: &Path, name: &CStr) -> Answer<()> {
    check(name, libc::EPERM)?;
    // SAFETY: strings that live through the call.
    done(unsafe { libc::removexattr(path.as_c_str().as_ptr(), name.as_ptr()) })
}
