//! The seam between the store and the disk: every change the store makes goes through here, so
//! that tests can let each one fail.

use std::fmt::Debug;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

/// Changes to the disk.
pub(crate) trait Disk: Debug + Send + Sync {
    /// Makes a directory that only its owner may enter. One that exists is an error.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Makes a file with this content. One that exists is an error.
    fn write_new(&self, path: &Path, content: &[u8]) -> io::Result<()>;
    /// Lets `write` give a file its content.
    fn fill(&self, file: &File, write: &mut dyn FnMut(&File) -> io::Result<()>) -> io::Result<()>;
    /// Waits until a file's content is on the disk.
    fn sync_file(&self, path: &Path) -> io::Result<()>;
    /// Waits until a directory's entries are on the disk.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Gives a file another name, which it takes from whoever has it.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Removes an empty directory.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
    /// Gives back the disk blocks of a part of a file, which then reads as zeros.
    fn punch_hole(&self, file: &File, offset: u64, length: u64) -> io::Result<()>;
    /// Gives a file this length, and disk blocks for all of it where the file system can.
    fn reserve(&self, file: &File, length: u64) -> io::Result<()>;
    /// Makes a file read-only, for its owner only.
    fn seal(&self, path: &Path) -> io::Result<()>;
}

/// The real disk.
#[derive(Debug)]
pub(crate) struct RealDisk;

impl Disk for RealDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::DirBuilder::new().mode(0o700).create(path)
    }

    fn write_new(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        file.write_all(content)
    }

    fn fill(&self, file: &File, write: &mut dyn FnMut(&File) -> io::Result<()>) -> io::Result<()> {
        write(file)
    }

    fn sync_file(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }

    fn punch_hole(&self, file: &File, offset: u64, length: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(file, flags, offset, length) {
            // Room is all that is lost on a file system without holes.
            Ok(()) | Err(Errno::OPNOTSUPP) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn reserve(&self, file: &File, length: u64) -> io::Result<()> {
        loop {
            match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, length) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP) => return file.set_len(length),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn seal(&self, path: &Path) -> io::Result<()> {
        fs::set_permissions(path, fs::Permissions::from_mode(0o400))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
    use std::sync::{Arc, Mutex};

    use super::*;

    /// Lets the N-th change to the disk fail: only that one, as a full disk would, or that and all
    /// that follow, as if the program had been killed there.
    #[derive(Debug)]
    pub(crate) struct FaultyDisk {
        pub(crate) countdown: AtomicU32,
        fatal: bool,
        pub(crate) struck: AtomicBool,
        pub(crate) log: Mutex<Vec<(&'static str, PathBuf)>>,
        hook: Mutex<Option<Hook>>,
    }

    /// What else happens at a step.
    struct Hook(Box<Happens>);

    type Happens = dyn FnMut(&'static str, &Path) + Send;

    impl Debug for Hook {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("Hook").finish_non_exhaustive()
        }
    }

    impl FaultyDisk {
        pub(crate) fn new(fail_at: u32, fatal: bool) -> Arc<FaultyDisk> {
            Arc::new(FaultyDisk {
                countdown: AtomicU32::new(fail_at),
                fatal,
                struck: AtomicBool::new(false),
                log: Mutex::new(Vec::new()),
                hook: Mutex::new(None),
            })
        }

        /// A good disk. Before each change, `happens` is told of it.
        pub(crate) fn watched(
            happens: impl FnMut(&'static str, &Path) + Send + 'static,
        ) -> Arc<FaultyDisk> {
            let disk = FaultyDisk::new(0, false);
            *disk.hook.lock().unwrap() = Some(Hook(Box::new(happens)));
            disk
        }

        fn step(&self, name: &'static str, path: &Path) -> io::Result<()> {
            let left = self.countdown.load(Ordering::Relaxed);
            let dead = self.fatal && self.struck.load(Ordering::Relaxed);
            if left == 1 || dead {
                self.struck.store(true, Ordering::Relaxed);
                self.countdown.store(0, Ordering::Relaxed);
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            self.countdown
                .store(left.saturating_sub(1), Ordering::Relaxed);
            self.log.lock().unwrap().push((name, path.to_owned()));
            if let Some(Hook(happens)) = &mut *self.hook.lock().unwrap() {
                happens(name, path);
            }
            Ok(())
        }
    }

    impl Disk for FaultyDisk {
        fn create_dir(&self, path: &Path) -> io::Result<()> {
            self.step("create_dir", path)?;
            RealDisk.create_dir(path)
        }
        fn write_new(&self, path: &Path, content: &[u8]) -> io::Result<()> {
            if let Err(error) = self.step("write_new", path) {
                // A write that fails half-way leaves half a file.
                RealDisk.write_new(path, &content[..content.len() / 2])?;
                return Err(error);
            }
            RealDisk.write_new(path, content)
        }
        fn fill(
            &self,
            file: &File,
            write: &mut dyn FnMut(&File) -> io::Result<()>,
        ) -> io::Result<()> {
            if let Err(error) = self.step("fill", Path::new("")) {
                RealDisk.fill(file, write)?;
                file.set_len(file.metadata()?.len() / 2)?;
                return Err(error);
            }
            RealDisk.fill(file, write)
        }
        fn sync_file(&self, path: &Path) -> io::Result<()> {
            self.step("sync_file", path)?;
            RealDisk.sync_file(path)
        }
        fn sync_dir(&self, path: &Path) -> io::Result<()> {
            self.step("sync_dir", path)?;
            RealDisk.sync_dir(path)
        }
        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            self.step("rename from", from)?;
            self.log.lock().unwrap().push(("rename to", to.to_owned()));
            RealDisk.rename(from, to)
        }
        fn remove_file(&self, path: &Path) -> io::Result<()> {
            self.step("remove_file", path)?;
            RealDisk.remove_file(path)
        }
        fn remove_dir(&self, path: &Path) -> io::Result<()> {
            self.step("remove_dir", path)?;
            RealDisk.remove_dir(path)
        }
        fn punch_hole(&self, file: &File, offset: u64, length: u64) -> io::Result<()> {
            self.step("punch_hole", Path::new(""))?;
            RealDisk.punch_hole(file, offset, length)
        }
        fn reserve(&self, file: &File, length: u64) -> io::Result<()> {
            self.step("reserve", Path::new(""))?;
            RealDisk.reserve(file, length)
        }
        fn seal(&self, path: &Path) -> io::Result<()> {
            self.step("seal", path)?;
            RealDisk.seal(path)
        }
    }
}
