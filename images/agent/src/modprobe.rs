//! Loading the kernel's modules when something needs them, from the library that the host shows.
//!
//! The kernel asks by running the agent as it would run `modprobe`: `-q -- NAME`.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use kiln_agent_api::GUEST_STATE_DIR;
use kiln_agent_api::modules::{Index, LIBRARY, Place};

use crate::sys;

/// The first of the arguments that the kernel calls with.
pub(crate) const QUIETLY: &str = "-q";
/// What `iptables` of the older kind asks the kernel for before it says its name: its own attempt to load it is one to run
/// a program that no container has.
const OLDER_FIREWALLS: [&str; 2] = ["ip_tables", "ip6_tables"];
/// No module comes near this.
const LARGEST: u64 = 64 << 20;

/// Does what the kernel called for. Nothing hears of an answer, so what fails is in the kernel's log.
pub(crate) fn serve(arguments: &[String]) -> bool {
    let Some(asked) = arguments.last().filter(|name| !name.starts_with('-')) else {
        return false;
    };
    match load(asked) {
        Ok(found) => found,
        Err(error) => {
            let text = format!("<4>kiln-agent: the kernel module for {asked:?}: {error}\n");
            // There is no other place to say it.
            let log = File::options().write(true).open("/dev/kmsg");
            drop(log.and_then(|mut log| log.write_all(text.as_bytes())));
            false
        }
    }
}

/// Loads what iptables needs of a container that may change the pod's network.
pub(crate) fn prepare_firewalls() {
    for name in OLDER_FIREWALLS {
        if let Err(error) = load(name) {
            tracing::warn!(%error, "iptables of the older kind will find no {name} in the guest's kernel");
        }
    }
}

/// Loads a module by its name or by what it does, with what it needs. Whether there is one.
fn load(asked: &str) -> io::Result<bool> {
    let path: PathBuf = [GUEST_STATE_DIR, "shared", LIBRARY].iter().collect();
    let library = match File::open(path) {
        Ok(library) => library,
        // A guest of a kernel without modules, or one that is being baked.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let index = Index::read(|buffer, at| library.read_exact_at(buffer, at))?;
    let places = index.find(asked);
    for place in &places {
        let loaded = Path::new("/sys/module").join(&place.name);
        // One that is part of the kernel has a folder there, too.
        if !loaded.exists() {
            insert(&library, place).map_err(|error| {
                io::Error::new(error.kind(), format!("{}: {error}", place.name))
            })?;
        }
    }
    Ok(!places.is_empty())
}

fn insert(library: &File, place: &Place) -> io::Result<()> {
    let length = usize::try_from(place.length.min(LARGEST)).map_err(io::Error::other)?;
    let mut content = vec![0; length];
    library.read_exact_at(&mut content, place.offset)?;
    // SAFETY: the name is a string with an end, and the call returns a new descriptor or an error.
    let memory = unsafe { libc::memfd_create(c"module".as_ptr(), libc::MFD_CLOEXEC) };
    if memory < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    let mut file = File::from(unsafe { OwnedFd::from_raw_fd(memory) });
    file.write_all(&content)?;
    let compressed = !content.starts_with(b"\x7fELF");
    match sys::load_module(file.as_fd(), "", compressed) {
        // Somebody else was quicker.
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        result => result,
    }
}
