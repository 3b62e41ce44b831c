//! virtio-fs (virtio 1.2 §5.11): a folder of the host, mounted by the guest.
//!
//! The device is baked without a server and unmounted: a FUSE session's state is open files of the host,
//! which no snapshot can hold, so a device with a session refuses to be saved. On resume it gets a
//! [`FsServer`], whose thread does the file system calls: they may take as long as the host's file
//! systems like, and they need rights that no other thread of the VMM has.

mod device;
mod lines;
mod server;

#[cfg(test)]
mod tests;

/// What the device is called in the log and in saved states.
const KIND: &str = "fs";

pub use device::{Fs, FsConfig};
pub use server::FsServer;
