//! What the node's files and mounts are, in enough detail that no change goes unseen.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// Files up to this long are read. Any change to a longer one shows in the time of its last change, which nobody can set.
const READ: u64 = 1 << 20;

/// The node at one moment.
#[derive(Debug, PartialEq, Eq)]
pub struct Inventory {
    files: BTreeMap<PathBuf, String>,
    mounts: BTreeMap<String, String>,
}

impl Inventory {
    /// Of everything below these directories, and of all mounts whose place does not begin with one of `but`.
    pub fn take(roots: &[&Path], but: &[&str]) -> Result<Self> {
        let mut files = BTreeMap::new();
        for root in roots {
            add(root, &mut files)?;
        }
        let table = fs::read_to_string("/proc/self/mountinfo").context("cannot read the mounts")?;
        let mounts = table.lines().filter_map(|line| {
            let place = line.split(' ').nth(4)?;
            // Numbers of mounts are given anew; what is mounted there is in the rest.
            let what = line.splitn(4, ' ').nth(3)?;
            let ours = but.iter().any(|prefix| place.starts_with(prefix));
            (!ours).then(|| (place.to_owned(), what.to_owned()))
        });
        Ok(Self {
            files,
            mounts: mounts.collect(),
        })
    }

    /// In words, everything that is otherwise in `later`.
    pub fn changes(&self, later: &Self) -> Vec<String> {
        let mut changes = Vec::new();
        compare("file", &self.files, &later.files, &mut changes);
        compare("mount", &self.mounts, &later.mounts, &mut changes);
        changes
    }
}

fn compare<K: Ord + std::fmt::Debug>(
    kind: &str,
    before: &BTreeMap<K, String>,
    after: &BTreeMap<K, String>,
    changes: &mut Vec<String>,
) {
    for (key, was) in before {
        match after.get(key) {
            None => changes.push(format!("{kind} {key:?} is gone ({was})")),
            Some(is) if is != was => changes.push(format!("{kind} {key:?} was {was}, is {is}")),
            Some(_) => {}
        }
    }
    for (key, is) in after.iter().filter(|(key, _)| !before.contains_key(key)) {
        changes.push(format!("{kind} {key:?} is new ({is})"));
    }
}

/// What is gone by the time it is looked at was being removed.
fn add(path: &Path, files: &mut BTreeMap<PathBuf, String>) -> Result<()> {
    let Ok(found) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    let mut facts = format!(
        "mode {:o}, owner {}:{}, {} bytes, changed {}.{:09}",
        found.mode(),
        found.uid(),
        found.gid(),
        if found.is_dir() { 0 } else { found.len() },
        found.ctime(),
        found.ctime_nsec(),
    );
    for (name, value) in attributes(path) {
        facts += &format!(", {name}={value:?}");
    }
    if found.is_symlink() {
        facts += &format!(", to {}", fs::read_link(path)?.display());
    } else if found.is_file() && found.len() <= READ {
        facts += &format!(", {}", digest(path)?);
    }
    files.insert(path.to_owned(), facts);
    if found.is_dir() {
        for entry in fs::read_dir(path).with_context(|| format!("{}", path.display()))? {
            add(&entry?.path(), files)?;
        }
    }
    Ok(())
}

fn digest(path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    fs::File::open(path)
        .and_then(|mut file| file.read_to_end(&mut bytes))
        .with_context(|| format!("{}", path.display()))?;
    let sum = Sha256::digest(&bytes);
    Ok(sum.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Extended attributes; none where there can be none.
fn attributes(path: &Path) -> Vec<(String, Vec<u8>)> {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else {
        return Vec::new();
    };
    let mut names = vec![0u8; 4096];
    // SAFETY: a NUL-terminated path, and a buffer of the length that is said.
    let length = unsafe { libc::llistxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    names.truncate(usize::try_from(length).unwrap_or(0));
    let names = names
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty());
    names
        .map(|name| {
            let mut value = vec![0u8; 4096];
            let mut bytes = name.to_vec();
            bytes.push(0);
            // SAFETY: two NUL-terminated strings, and a buffer of the length that is said.
            let length = unsafe {
                libc::lgetxattr(
                    path.as_ptr(),
                    bytes.as_ptr().cast(),
                    value.as_mut_ptr().cast(),
                    value.len(),
                )
            };
            value.truncate(usize::try_from(length).unwrap_or(0));
            (String::from_utf8_lossy(name).into_owned(), value)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_change_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        for name in ["same", "content", "mode", "gone", "kind"] {
            fs::write(path.join(name), "x").unwrap();
        }
        let take = || Inventory::take(&[path], &[]).unwrap();
        let before = take();
        assert_eq!(before.changes(&take()), Vec::<String>::new());
        std::thread::sleep(std::time::Duration::from_millis(20));
        fs::write(path.join("content"), "y").unwrap();
        fs::set_permissions(
            path.join("mode"),
            std::os::unix::fs::PermissionsExt::from_mode(0o4755),
        )
        .unwrap();
        fs::remove_file(path.join("gone")).unwrap();
        fs::remove_file(path.join("kind")).unwrap();
        fs::create_dir(path.join("kind")).unwrap();
        fs::write(path.join("new"), "").unwrap();
        let changes = before.changes(&take());
        for name in ["content", "mode", "gone", "kind", "new"] {
            let named = |change: &String| change.contains(&format!("/{name}\""));
            assert!(changes.iter().any(named), "{name} in {changes:?}");
        }
        assert!(!changes.iter().any(|change| change.contains("/same\"")));
    }
}
