//! What is built once and kept: disks and parts, each named by a hash of its recipe.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cleanup;

/// kiln's cache folder: `KILN_CACHE`, or the one in the user's cache.
pub(crate) fn folder() -> Result<PathBuf> {
    let set = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    set("KILN_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|folder| folder.join("kiln")))
        .or_else(|| set("HOME").map(|folder| folder.join(".cache/kiln")))
        .context("no folder for the cache: set KILN_CACHE or HOME")
}

/// As much of a hash as a name has.
pub(crate) fn short_hash(hasher: &blake3::Hasher) -> String {
    hasher.finalize().to_hex()[..HASH_LENGTH].to_owned()
}

const HASH_LENGTH: usize = 16;

/// A thing in the cache: `FOLDER/NAME-HASH` and, for a file, an ending.
#[derive(Debug)]
pub(crate) struct Entry<'a> {
    pub(crate) folder: PathBuf,
    pub(crate) name: &'a str,
    pub(crate) hash: String,
    pub(crate) ending: &'a str,
}

impl Entry<'_> {
    pub(crate) fn path(&self) -> PathBuf {
        self.folder
            .join(format!("{}-{}{}", self.name, self.hash, self.ending))
    }

    /// Makes sure that it is there: from the cache, or built now. `build` gets an empty folder and says what in it (or that
    /// it as a whole) is the result. Others who ask for the same thing meanwhile wait.
    pub(crate) fn prepare(&self, build: impl FnOnce(&Path) -> Result<PathBuf>) -> Result<()> {
        let finished = self.path();
        if finished.exists() {
            return Ok(());
        }
        fs::create_dir_all(&self.folder)
            .with_context(|| format!("creating {}", self.folder.display()))?;
        let lock = self.folder.join(format!("{}.lock", self.name));
        let lock = File::create(&lock).with_context(|| format!("creating {}", lock.display()))?;
        // SAFETY: flock only takes a descriptor, which is open.
        if unsafe { nix::libc::flock(lock.as_raw_fd(), nix::libc::LOCK_EX) } != 0 {
            return Err(std::io::Error::last_os_error()).context("waiting for another build");
        }
        self.remove_stale()?;
        if finished.exists() {
            return Ok(());
        }
        let work = self.folder.join(format!("{}-building", self.name));
        fs::create_dir_all(&work).with_context(|| format!("creating {}", work.display()))?;
        let work = cleanup::TemporaryFolder::new(work);
        let result = build(work.path())?;
        fs::rename(result, &finished).with_context(|| format!("renaming to {}", finished.display()))
    }

    /// What was half built (by builders that were killed: we hold the lock) and what older recipes made.
    fn remove_stale(&self) -> Result<()> {
        let current = self.path();
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            let ours = path
                .file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| self.owns(name));
            if ours && path != current {
                let removed = if path.is_dir() {
                    fs::remove_dir_all(&path)
                } else {
                    fs::remove_file(&path)
                };
                removed.with_context(|| format!("removing {}", path.display()))?;
            }
        }
        Ok(())
    }

    /// Whether this is the name of a build of the same thing. One thing's name may begin with another's.
    fn owns(&self, name: &str) -> bool {
        let Some(rest) = name
            .strip_prefix(self.name)
            .and_then(|rest| rest.strip_prefix('-'))
        else {
            return false;
        };
        rest == "building"
            || rest.strip_suffix(self.ending).is_some_and(|hash| {
                hash.len() == HASH_LENGTH && hash.bytes().all(|byte| byte.is_ascii_hexdigit())
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn stale_builds_of_the_same_thing_go_and_others_stay() {
        let folder = tempfile::tempdir().unwrap();
        for name in [
            "kubelet-building",
            "kubelet-1.35-building",
            "kubelet-1.35-00112233445566ff",
        ] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        for name in ["kubelet-0011223344556677.erofs", "kubelet.log"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let entry = Entry {
            folder: folder.path().to_owned(),
            name: "kubelet",
            hash: "8899aabbccddeeff".to_owned(),
            ending: ".erofs",
        };
        entry
            .prepare(|work| {
                assert_eq!(fs::read_dir(work)?.count(), 0, "the folder is empty");
                fs::write(work.join("result"), "new")?;
                Ok(work.join("result"))
            })
            .unwrap();
        assert_eq!(
            names(folder.path()),
            [
                "kubelet-1.35-00112233445566ff",
                "kubelet-1.35-building",
                "kubelet-8899aabbccddeeff.erofs",
                "kubelet.lock",
                "kubelet.log",
            ]
        );
        assert_eq!(fs::read_to_string(entry.path()).unwrap(), "new");
    }

    #[test]
    fn a_build_that_fails_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let entry = Entry {
            folder: folder.path().to_owned(),
            name: "sid",
            hash: "8899aabbccddeeff".to_owned(),
            ending: "",
        };
        let error = entry
            .prepare(|work| {
                fs::write(work.join("half"), "")?;
                anyhow::bail!("the mirror is away")
            })
            .unwrap_err();
        assert_eq!(error.to_string(), "the mirror is away");
        assert_eq!(names(folder.path()), ["sid.lock"]);
    }

    #[test]
    fn what_is_there_is_not_built_again() {
        let folder = tempfile::tempdir().unwrap();
        let entry = Entry {
            folder: folder.path().to_owned(),
            name: "sid",
            hash: "8899aabbccddeeff".to_owned(),
            ending: "",
        };
        fs::create_dir(entry.path()).unwrap();
        entry
            .prepare(|_| anyhow::bail!("it was built once more"))
            .unwrap();
    }
}
