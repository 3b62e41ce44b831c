//! A thread in a mount namespace of its own, with an empty tmpfs in it and nothing else.
//!
//! Nobody else finds what is mounted there: no mount of the host's is kept busy or kept from removal by it, no table of mounts
//! grows with it, and it goes with the thread, however the process ends.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, unmount,
};
use rustix::process::{fchdir, pivot_root};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::mounts;

/// Room for mount points, no data. The root of a user namespace in the guest has to get through the directory.
const OPTIONS: [(&str, &str); 3] = [("mode", "0711"), ("size", "1m"), ("nr_inodes", "4096")];

type Order = Box<dyn FnOnce() + Send>;

/// The thread. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Apart {
    /// None when it is to end.
    orders: Option<Sender<Order>>,
    thread: Option<JoinHandle<()>>,
}

impl Apart {
    /// Starts it.
    pub(super) fn begin() -> io::Result<Self> {
        let (orders, received) = channel();
        let thread = Builder::new()
            .name("mounts".into())
            .spawn(|| obey(received))?;
        let apart = Self {
            orders: Some(orders),
            thread: Some(thread),
        };
        apart.run(enter)??;
        Ok(apart)
    }

    /// Runs something on it. `/` is the tmpfs there.
    pub(super) fn run<T: Send + 'static>(
        &self,
        what: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let (result, done) = channel();
        let order = Box::new(move || {
            // Who asked waits for it.
            let _ = result.send(what());
        });
        let ended = || io::Error::other("the thread for mounts has ended");
        let orders = self.orders.as_ref().ok_or_else(ended)?;
        orders.send(order).map_err(|_| ended())?;
        done.recv().map_err(|_| ended())
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // Its end is that of its mounts, which whoever ends it counts on.
            let _ = thread.join();
        }
    }
}

fn obey(orders: Receiver<Order>) {
    for order in orders {
        order();
    }
    // What would go with the namespace goes a moment later, and could keep the host's file systems busy for as long.
    let _ = unmount("/", UnmountFlags::DETACH);
}

/// Gives the calling thread its namespace.
fn enter() -> io::Result<()> {
    // SAFETY: the calling thread has no business with paths or mounts of the process but in what follows.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }?;
    // The copies of the host's mounts are about to be unmounted, which the host is not to follow.
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )?;
    let root = tmpfs()?;
    mounts::put(&root, File::open("/")?)?;
    fchdir(&root)?;
    // The old root is on top of the new one afterwards, and so what is unmounted.
    pivot_root(".", ".")?;
    Ok(unmount(".", UnmountFlags::DETACH)?)
}

fn tmpfs() -> io::Result<OwnedFd> {
    let system = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&system, "source", "kiln")?;
    for (key, value) in OPTIONS {
        fsconfig_set_string(&system, key, value)?;
    }
    fsconfig_create(&system)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(&system, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}
