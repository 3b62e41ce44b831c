//! Where a running μVM is found: a directory with its socket, its console and what is known of it.
//!
//! Whoever runs the μVM holds a lock in it. A directory whose lock is free was left by a process
//! that was killed; the next command that comes by removes it.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use kiln_node::pods;
use kiln_store::{lock, private};
use serde::{Deserialize, Serialize};

/// All of them.
pub(crate) const PLACES: &str = "/run/kiln/run";
/// How long another command is waited for.
const WAIT: Duration = Duration::from_secs(30);
/// A Unix socket's path has at most 107 bytes.
const LONGEST_NAME: usize = 64;

/// What is known of a running μVM.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Facts {
    pub(crate) name: String,
    /// Of the process that runs it.
    pub(crate) pid: u32,
    /// Of its VMM.
    pub(crate) vmm: u32,
    /// The baked μVM it was resumed from.
    pub(crate) uvm: String,
    pub(crate) image: PathBuf,
    pub(crate) command: Vec<String>,
    /// Seconds since 1970.
    pub(crate) started: u64,
    pub(crate) cpus: u32,
    pub(crate) memory: u64,
    /// The container's process, as the runtime specification has it: what `exec` starts from.
    pub(crate) process: serde_json::Value,
}

/// The directory of a μVM that this process runs. It goes with it.
#[derive(Debug)]
pub(crate) struct Place {
    dir: PathBuf,
    _lock: File,
}

/// Whether something can be called so.
pub(crate) fn check(name: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    ensure!(
        !name.is_empty()
            && name.len() <= LONGEST_NAME
            && name.chars().all(good)
            && !name.starts_with('.'),
        "{name:?} is no name: use up to {LONGEST_NAME} letters, digits, '-', '_' and '.'"
    );
    Ok(())
}

impl Place {
    /// Makes one among all of the node's.
    pub(crate) fn make_here(name: &str) -> Result<Place> {
        private::directory(Path::new(pods::STATE))?;
        Place::make(Path::new(PLACES), name)
    }

    /// Makes one.
    fn make(root: &Path, name: &str) -> Result<Place> {
        check(name)?;
        private::directory(root)?;
        // Made, locked and moved to its name under one lock, so that nobody takes it for a leftover.
        let turn = private::create(&root.join(".lock"))
            .with_context(|| format!("making a lock in {}", root.display()))?;
        lock::exclusive(&turn, WAIT).context("waiting for other kiln commands")?;
        sweep(root)?;
        let dir = root.join(name);
        match DirBuilder::new().mode(0o700).create(&dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                bail!("{name} is running already: choose another name (--name), or see `kiln ps`")
            }
            other => other.with_context(|| format!("making {}", dir.display()))?,
        }
        let path = dir.join("lock");
        let held = private::create(&path).with_context(|| format!("making {}", path.display()))?;
        lock::exclusive(&held, WAIT)?;
        Ok(Place { dir, _lock: held })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Says what runs here.
    pub(crate) fn tell(&self, facts: &Facts) -> Result<()> {
        let path = self.path("facts");
        private::replace(&path, &serde_json::to_vec(facts)?)
            .with_context(|| format!("writing {}", path.display()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // What stays is removed by the next command.
        drop(fs::remove_dir_all(&self.dir));
    }
}

/// Removes what killed processes left.
fn sweep(root: &Path) -> Result<()> {
    for entry in fs::read_dir(root).with_context(|| format!("reading {}", root.display()))? {
        let dir = entry?.path();
        if dir.is_dir() && !is_held(&dir) {
            match fs::remove_dir_all(&dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("removing {}", dir.display()));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

fn is_held(dir: &Path) -> bool {
    match File::open(dir.join("lock")) {
        Ok(file) => matches!(file.try_lock(), Err(TryLockError::WouldBlock)),
        Err(_) => false,
    }
}

/// What runs, by name.
pub(crate) fn all(root: &Path) -> Result<Vec<Facts>> {
    let entries = match fs::read_dir(root) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.with_context(|| format!("reading {}", root.display()))?,
    };
    let mut all = Vec::new();
    for entry in entries {
        let dir = entry?.path();
        // One that is being made or removed has no facts.
        if is_held(&dir)
            && let Ok(bytes) = fs::read(dir.join("facts"))
        {
            all.push(serde_json::from_slice(&bytes).context("the facts are damaged")?);
        }
    }
    all.sort_by(|a: &Facts, b: &Facts| a.name.cmp(&b.name));
    Ok(all)
}

/// The μVM of a name, and a file in its directory.
pub(crate) fn find(root: &Path, name: &str, file: &str) -> Result<(Facts, PathBuf)> {
    check(name)?;
    let facts = all(root)?.into_iter().find(|facts| facts.name == name);
    let facts = facts.with_context(|| format!("nothing runs by the name {name}: see `kiln ps`"))?;
    Ok((facts, root.join(name).join(file)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(name: &str) -> Facts {
        Facts {
            name: name.into(),
            pid: 1,
            vmm: 2,
            uvm: "abc".into(),
            image: "/x.tar".into(),
            command: vec!["sh".into()],
            started: 0,
            cpus: 1,
            memory: 1,
            process: serde_json::json!({"cwd": "/"}),
        }
    }

    #[test]
    fn what_runs_is_listed_and_goes_with_who_runs_it() {
        let root = tempfile::tempdir().unwrap();
        let place = Place::make(root.path(), "web").unwrap();
        assert!(all(root.path()).unwrap().is_empty());
        place.tell(&facts("web")).unwrap();
        let (found, socket) = find(root.path(), "web", "vsock").unwrap();
        assert_eq!((found.pid, socket), (1, root.path().join("web/vsock")));
        assert!(Place::make(root.path(), "web").is_err());
        drop(place);
        assert!(all(root.path()).unwrap().is_empty());
        let error = find(root.path(), "web", "vsock").unwrap_err().to_string();
        assert!(error.contains("kiln ps"), "{error}");
    }

    #[test]
    fn leftovers_of_the_killed_are_swept_up() {
        let root = tempfile::tempdir().unwrap();
        let left = root.path().join("left");
        fs::create_dir(&left).unwrap();
        fs::write(
            left.join("facts"),
            serde_json::to_vec(&facts("left")).unwrap(),
        )
        .unwrap();
        fs::write(left.join("lock"), "").unwrap();
        assert!(all(root.path()).unwrap().is_empty());
        let place = Place::make(root.path(), "other").unwrap();
        assert!(!left.exists());
        drop(place);
    }

    #[test]
    fn names_cannot_leave_the_directory() {
        let root = tempfile::tempdir().unwrap();
        for name in ["", "..", "a/b", ".x", &"x".repeat(65), "a b"] {
            assert!(Place::make(root.path(), name).is_err(), "{name:?}");
        }
    }
}
