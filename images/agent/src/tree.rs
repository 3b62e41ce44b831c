//! Files that change together, as the kubelet has them on the node: who opens one finds all others of the same version, and who
//! watches is told of the next.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use kiln_agent_api::proto;

use crate::storage::{Result, StorageError, file_error, make_folder};

/// Links to the folder of the version that counts.
const DATA: &str = "..data";
/// What is not whole yet.
const DRAFT: &str = "..new";

/// Makes `top` a folder with these files, or changes it to. Blocks the thread.
pub(crate) fn put(top: &Path, tree: &proto::Tree) -> Result<()> {
    // Two containers that begin at once have the same volumes.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let version = name(&tree.version)?;
    let mut keep = BTreeSet::from([OsStr::new(DATA), version]);
    for link in &tree.links {
        keep.insert(name(&link.name)?);
    }
    make_folder(top, 0o755)?;
    let failed = |source| file_error("write", top, source);
    let folder = top.join(version);
    if !folder.is_dir() {
        write(&top.join(DRAFT), tree)?;
        fs::rename(top.join(DRAFT), &folder).map_err(failed)?;
    }
    link(top, DATA.as_ref(), version).map_err(failed)?;
    for wanted in &tree.links {
        link(top, wanted.name.as_ref(), wanted.target.as_ref()).map_err(failed)?;
    }
    for entry in fs::read_dir(top).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if !keep.contains(entry.file_name().as_os_str()) {
            remove(&entry.path()).map_err(failed)?;
        }
    }
    give(top, &tree.top).map_err(failed)
}

/// One name, which leads nowhere else.
fn name(text: &str) -> Result<&OsStr> {
    let mut components = Path::new(text).components();
    match (components.next(), components.next()) {
        (Some(Component::Normal(name)), None) if text != DRAFT => Ok(name),
        _ => Err(StorageError::Path(text.to_owned())),
    }
}

fn write(draft: &Path, tree: &proto::Tree) -> Result<()> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| file_error("write", &path, source)
    };
    remove(draft).map_err(failed(draft))?;
    fs::create_dir(draft).map_err(failed(draft))?;
    for entry in &tree.entries {
        let path = below(draft, &entry.path)?;
        let made = match entry.folder {
            true => fs::create_dir(&path),
            false => fs::write(&path, &entry.data),
        };
        made.and_then(|()| give(&path, &entry.owned))
            .map_err(failed(&path))?;
    }
    give(draft, &tree.owned).map_err(failed(draft))
}

fn below(draft: &Path, text: &str) -> Result<PathBuf> {
    let path = Path::new(text);
    let plain = |part: Component<'_>| matches!(part, Component::Normal(_));
    if text.is_empty() || !path.components().all(plain) {
        return Err(StorageError::Path(text.to_owned()));
    }
    Ok(draft.join(path))
}

fn give(path: &Path, owned: &proto::Owned) -> io::Result<()> {
    chown(path, Some(owned.uid), Some(owned.gid))?;
    fs::set_permissions(path, Permissions::from_mode(owned.mode))
}

/// Makes a link, in one step.
fn link(top: &Path, name: &OsStr, target: &OsStr) -> io::Result<()> {
    let path = top.join(name);
    if fs::read_link(&path).is_ok_and(|found| found == target) {
        return Ok(());
    }
    let draft = top.join(DRAFT);
    remove(&draft)?;
    symlink(target, &draft)?;
    fs::rename(&draft, &path)
}

fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn owned(mode: u32) -> protobuf::MessageField<proto::Owned> {
        let owned = proto::Owned {
            mode,
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
            ..Default::default()
        };
        Some(owned).into()
    }

    fn tree(version: &str, files: &[(&str, &str)]) -> proto::Tree {
        let mut tree = proto::Tree {
            top: owned(0o2777),
            version: version.into(),
            owned: owned(0o755),
            ..Default::default()
        };
        for (path, text) in files {
            if let Some((folder, _)) = path.split_once('/') {
                tree.entries.push(proto::TreeEntry {
                    path: folder.into(),
                    owned: owned(0o755),
                    folder: true,
                    ..Default::default()
                });
            }
            tree.entries.push(proto::TreeEntry {
                path: (*path).into(),
                owned: owned(0o640),
                data: text.as_bytes().to_vec(),
                ..Default::default()
            });
            let name = path.split('/').next().unwrap_or_default();
            tree.links.push(proto::TreeLink {
                name: name.into(),
                target: format!("..data/{name}"),
                ..Default::default()
            });
        }
        tree
    }

    fn names(top: &Path) -> Vec<String> {
        let entries = fs::read_dir(top).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn next_version_takes_the_place_of_the_last() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("volume");
        put(&top, &tree("..1", &[("a", "one"), ("deep/b", "two")])).unwrap();
        assert_eq!(names(&top), ["..1", "..data", "a", "deep"]);
        assert_eq!(fs::read_to_string(top.join("a")).unwrap(), "one");
        assert_eq!(fs::read_to_string(top.join("deep/b")).unwrap(), "two");
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
        assert_eq!((mode(&top), mode(&top.join("a"))), (0o2777, 0o640));
        let before = fs::metadata(top.join("a")).unwrap().ino();
        put(&top, &tree("..1", &[("a", "one"), ("deep/b", "two")])).unwrap();
        assert_eq!(fs::metadata(top.join("a")).unwrap().ino(), before);
        put(&top, &tree("..2", &[("a", "three"), ("c", "four")])).unwrap();
        assert_eq!(names(&top), ["..2", "..data", "a", "c"]);
        assert_eq!(fs::read_to_string(top.join("a")).unwrap(), "three");
        // What a killed agent left.
        fs::create_dir(top.join(DRAFT)).unwrap();
        put(&top, &tree("..3", &[])).unwrap();
        assert_eq!(names(&top), ["..3", "..data"]);
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("volume");
        for version in ["", "..", "a/b", "/a", DRAFT] {
            assert!(put(&top, &tree(version, &[])).is_err(), "{version}");
        }
        let mut wrong = tree("..1", &[("a", "")]);
        wrong.entries[0].path = "../a".into();
        assert!(put(&top, &wrong).is_err());
        let mut wrong = tree("..1", &[("a", "")]);
        wrong.links[0].name = "../a".into();
        assert!(put(&top, &wrong).is_err());
        assert!(!dir.path().join("a").exists());
    }
}
