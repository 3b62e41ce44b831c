//! The directory that a pod shares with its μVM: a small tmpfs below which every volume is mounted,
//! and which the guest sees as one virtio-fs file system.
//!
//! The mounts are made in the host's mount namespace, where volumes live; what they resolve to later
//! (a configMap's new version, a nested mount that arrives) is what the guest sees then. They never
//! propagate outwards: taking the directory away must not unmount anything of the host's.
//!
//! **The directory is never removed recursively.** What is below it belongs to others; it is
//! unmounted, and then removed only if it is empty.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kiln_agent_api::GUEST_STATE_DIR;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::error::{Error, Result};

/// Room for the directory's own entries: mount points, no data.
const TMPFS_OPTIONS: &str = "mode=0700,size=1m,nr_inodes=4096";

/// Where the guest mounts the directory.
pub fn guest_mount_point() -> String {
    format!("{GUEST_STATE_DIR}/shared")
}

/// A volume as a container wants it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Volume {
    /// A file or directory of the host.
    pub source: PathBuf,
    /// Whether the guest may not write.
    pub read_only: bool,
    /// Whether mounts that are made below it on the host later are to be seen.
    pub follows_host: bool,
}

#[derive(Debug, Default)]
struct State {
    /// By volume: its name here, and how many containers use it.
    volumes: HashMap<Volume, (String, usize)>,
    /// Names are never used twice, so that nothing the guest remembers of one is wrong.
    next: u64,
    closed: bool,
}

/// A pod's directory.
#[derive(Debug)]
pub struct Share {
    dir: PathBuf,
    state: Mutex<State>,
}

fn failed(what: &str, path: &Path, error: impl Into<io::Error>) -> Error {
    Error::failed(format!("{what} {}", path.display()), error.into())
}

impl Share {
    /// Makes the directory, empty.
    pub fn create(dir: &Path) -> Result<Self> {
        // What an earlier attempt left.
        remove(dir).map_err(|e| failed("clear the pod's shared directory", dir, e))?;
        let mut private = fs::DirBuilder::new();
        private.recursive(true).mode(0o700);
        private
            .create(dir)
            .map_err(|e| failed("make the pod's shared directory", dir, e))?;
        mount(
            Some("kiln"),
            dir,
            Some("tmpfs"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
            Some(TMPFS_OPTIONS),
        )
        .map_err(|e| failed("mount a tmpfs on the pod's shared directory", dir, e))?;
        let share = Self {
            dir: dir.to_owned(),
            state: Mutex::default(),
        };
        propagate(dir, MsFlags::MS_PRIVATE)
            .map_err(|e| failed("make private the pod's shared directory", dir, e))?;
        Ok(share)
    }

    /// The directory, for the VMM.
    pub fn open(&self) -> Result<File> {
        File::open(&self.dir).map_err(|e| failed("open the pod's shared directory", &self.dir, e))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a volume visible to the guest and returns the path it has there. Every call is to be
    /// answered by one of [`release`](Self::release).
    pub fn add(&self, volume: &Volume) -> Result<String> {
        let mut state = self.lock();
        if state.closed {
            return Err(Error::Unavailable("the μVM has ended".into()));
        }
        if let Some((name, users)) = state.volumes.get_mut(volume) {
            *users += 1;
            return Ok(format!("{}/{name}", guest_mount_point()));
        }
        let name = state.next.to_string();
        state.next += 1;
        let target = self.dir.join(&name);
        place(volume, &target)?;
        let path = format!("{}/{name}", guest_mount_point());
        state.volumes.insert(volume.clone(), (name, 1));
        Ok(path)
    }

    /// A container needs the volume no longer.
    pub fn release(&self, volume: &Volume) {
        let mut state = self.lock();
        let Some((name, users)) = state.volumes.get_mut(volume) else {
            return;
        };
        *users -= 1;
        if *users > 0 {
            return;
        }
        let target = self.dir.join(&*name);
        state.volumes.remove(volume);
        // Detached: the VMM may have files of it open until the guest forgets them.
        if let Err(error) = umount2(&target, MntFlags::MNT_DETACH) {
            tracing::warn!(volume = %volume.source.display(), %error, "a volume stays mounted");
            return;
        }
        remove_mount_point(&target);
    }

    /// Takes everything away. Nothing can be added afterwards.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.volumes.clear();
        if let Err(error) = remove(&self.dir) {
            tracing::warn!(directory = %self.dir.display(), %error, "a shared directory stays");
        }
    }
}

/// Binds a volume to a mount point that is made for it.
fn place(volume: &Volume, target: &Path) -> Result<()> {
    let source = &volume.source;
    let metadata = fs::metadata(source).map_err(|e| failed("find the volume", source, e))?;
    let made = if metadata.is_dir() {
        fs::create_dir(target)
    } else {
        File::create_new(target).map(drop)
    };
    made.map_err(|e| failed("make a mount point for the volume", source, e))?;
    let bound = bind(volume, target);
    if bound.is_err() {
        // Best effort: the failure that counts is being reported.
        let _ = umount2(target, MntFlags::MNT_DETACH);
        remove_mount_point(target);
    }
    bound
}

fn bind(volume: &Volume, target: &Path) -> Result<()> {
    let source = volume.source.as_path();
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(source), target, None::<&str>, flags, None::<&str>)
        .map_err(|e| failed("bind the volume", source, e))?;
    // The copy is a peer of the original until this: unmounting it later would unmount what is
    // mounted below the original, on the host.
    let kind = if volume.follows_host {
        MsFlags::MS_SLAVE
    } else {
        MsFlags::MS_PRIVATE
    };
    propagate(target, kind | MsFlags::MS_REC)
        .map_err(|e| failed("cut off from the host the volume", source, e))?;
    if volume.read_only {
        set_read_only(target).map_err(|e| failed("make read-only the volume", source, e))?;
    }
    Ok(())
}

fn propagate(target: &Path, flags: MsFlags) -> nix::Result<()> {
    let nothing = None::<&str>;
    mount(nothing, target, nothing, flags, nothing)
}

/// Makes a mount and all below it read-only, whatever its other flags are.
fn set_read_only(target: &Path) -> io::Result<()> {
    let path = CString::new(target.as_os_str().as_bytes())?;
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: path and attributes live through the call, and the size is the structure's.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Only ever an empty directory or an empty file.
fn remove_mount_point(target: &Path) {
    let empty_file = fs::symlink_metadata(target).is_ok_and(|m| m.is_file() && m.len() == 0);
    let result = if empty_file {
        fs::remove_file(target)
    } else {
        fs::remove_dir(target)
    };
    if let Err(error) = result {
        tracing::warn!(path = %target.display(), %error, "a mount point stays");
    }
}

/// Unmounts a pod's directory with all that is mounted below it, and removes it. Fine if there is
/// none.
pub fn remove(dir: &Path) -> io::Result<()> {
    loop {
        match umount2(dir, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // Not a mount point (any more).
            Err(nix::Error::EINVAL) => break,
            Err(nix::Error::ENOENT) => return Ok(()),
            // Who may not unmount can't have mounted either.
            Err(nix::Error::EPERM) => break,
            Err(error) => return Err(error.into()),
        }
    }
    match fs::remove_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => {
            if let Some(parent) = dir.parent() {
                // Fails while another pod has its directory there, as it should.
                let _ = fs::remove_dir(parent);
            }
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    use nix::sched::{CloneFlags, unshare};

    /// Runs a test in a mount namespace of its own, in which everything is shared as systemd has it.
    fn isolated(test: impl FnOnce(&Path) + Send) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        thread::scope(|scope| {
            scope.spawn(move || {
                if unshare(CloneFlags::CLONE_NEWNS).is_err()
                    || propagate(Path::new("/"), MsFlags::MS_PRIVATE | MsFlags::MS_REC).is_err()
                {
                    eprintln!("skipped: no mount namespaces here (needs root)");
                    return;
                }
                mount(
                    Some("t"),
                    path,
                    Some("tmpfs"),
                    MsFlags::empty(),
                    None::<&str>,
                )
                .unwrap();
                propagate(path, MsFlags::MS_SHARED).unwrap();
                test(path);
            });
        });
    }

    fn volume(source: &Path) -> Volume {
        Volume {
            source: source.to_owned(),
            read_only: false,
            follows_host: true,
        }
    }

    fn on_host(share: &Path, guest: &str) -> PathBuf {
        share.join(
            guest
                .strip_prefix(&guest_mount_point())
                .unwrap()
                .trim_start_matches('/'),
        )
    }

    #[test]
    fn volumes_are_shared_and_the_hosts_files_survive_the_end() {
        isolated(|root| {
            let (data, dir) = (root.join("data"), root.join("share/ns/pod"));
            fs::create_dir(&data).unwrap();
            fs::write(data.join("precious"), "x").unwrap();
            let share = Share::create(&dir).unwrap();
            let path = on_host(&dir, &share.add(&volume(&data)).unwrap());
            assert_eq!(fs::read(path.join("precious")).unwrap(), b"x");
            fs::write(path.join("new"), "y").unwrap();
            share.close();
            assert!(!dir.exists() && !root.join("share/ns").exists());
            assert_eq!(fs::read(data.join("precious")).unwrap(), b"x");
            assert_eq!(fs::read(data.join("new")).unwrap(), b"y");
            assert!(share.add(&volume(&data)).is_err());
        });
    }

    #[test]
    fn mounts_of_the_host_arrive_and_are_never_taken_along() {
        isolated(|root| {
            let data = root.join("data");
            fs::create_dir_all(data.join("sub")).unwrap();
            let dir = root.join("share/ns/pod");
            let share = Share::create(&dir).unwrap();
            let path = on_host(&dir, &share.add(&volume(&data)).unwrap());
            mount(
                Some("t"),
                &data.join("sub"),
                Some("tmpfs"),
                MsFlags::empty(),
                None::<&str>,
            )
            .unwrap();
            fs::write(data.join("sub/late"), "z").unwrap();
            assert_eq!(fs::read(path.join("sub/late")).unwrap(), b"z");
            share.release(&volume(&data));
            share.close();
            assert_eq!(fs::read(data.join("sub/late")).unwrap(), b"z");
        });
    }

    #[test]
    fn one_mount_serves_all_containers_until_the_last_releases_it() {
        isolated(|root| {
            let file = root.join("hosts");
            fs::write(&file, "h").unwrap();
            let dir = root.join("share/ns/pod");
            let share = Share::create(&dir).unwrap();
            let first = share.add(&volume(&file)).unwrap();
            assert_eq!(share.add(&volume(&file)).unwrap(), first);
            let path = on_host(&dir, &first);
            share.release(&volume(&file));
            assert_eq!(fs::read(&path).unwrap(), b"h");
            share.release(&volume(&file));
            assert!(!path.exists());
            // A name that the guest may remember is not used for something else.
            assert_ne!(share.add(&volume(&file)).unwrap(), first);
            share.close();
            assert_eq!(fs::read(&file).unwrap(), b"h");
        });
    }

    #[test]
    fn read_only_is_kept_on_the_host_too() {
        isolated(|root| {
            let data = root.join("data");
            fs::create_dir(&data).unwrap();
            let dir = root.join("share/ns/pod");
            let share = Share::create(&dir).unwrap();
            let read_only = Volume {
                read_only: true,
                ..volume(&data)
            };
            let path = on_host(&dir, &share.add(&read_only).unwrap());
            assert!(fs::write(path.join("x"), "").is_err());
            let path = on_host(&dir, &share.add(&volume(&data)).unwrap());
            fs::write(path.join("x"), "").unwrap();
            share.close();
        });
    }

    #[test]
    fn missing_volume_is_named_and_leaves_nothing() {
        isolated(|root| {
            let dir = root.join("share/ns/pod");
            let share = Share::create(&dir).unwrap();
            let error = share
                .add(&volume(Path::new("/no/such/volume")))
                .unwrap_err();
            assert!(error.chain().contains("/no/such/volume"), "{error:?}");
            assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
            share.close();
        });
    }

    #[test]
    fn a_directory_with_something_in_it_is_never_removed() {
        let dir = tempfile::tempdir().unwrap();
        let pod = dir.path().join("pod");
        fs::create_dir(&pod).unwrap();
        fs::write(pod.join("precious"), "x").unwrap();
        assert!(remove(&pod).is_err());
        assert!(pod.join("precious").exists());
    }
}
