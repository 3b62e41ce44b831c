//! How much containers have written to their root file systems.
//!
//! Of all together the file system itself knows it. A container's own share takes a look at each of its files, so it is
//! only asked for where there are several containers.

use std::collections::{HashSet, VecDeque};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kiln_agent_api::{GUEST_LAYERS, proto};

use crate::error::{Action, AgentError};
use crate::scratch;

/// What `st_blocks` counts.
const BLOCK: u64 = 512;

/// Answers the host. Blocks the thread.
pub(crate) fn answer(
    request: &proto::WrittenRequest,
) -> Result<proto::WrittenResponse, AgentError> {
    let total_bytes = scratch::written().action("measure the containers' writable layers")?;
    let containers = request.container_ids.iter().map(|id| proto::WrittenBy {
        container_id: id.clone(),
        bytes: upper(id).map_or(0, |dir| below(&dir)),
        ..Default::default()
    });
    Ok(proto::WrittenResponse {
        total_bytes,
        containers: containers.collect(),
        ..Default::default()
    })
}

/// A container's writable layer, if the id is a file's name.
fn upper(id: &str) -> Option<PathBuf> {
    let name = Path::new(id).file_name()?;
    (name == id).then(|| Path::new(GUEST_LAYERS).join(name).join("upper"))
}

/// Bytes that the files below a folder take, each counted once. The container goes on meanwhile: what is gone by the time it
/// is looked at counts nothing.
fn below(dir: &Path) -> u64 {
    let mut bytes = 0;
    let mut seen = HashSet::new();
    let mut left = VecDeque::from([dir.to_owned()]);
    while let Some(dir) = left.pop_front() {
        let Ok(entries) = fs::read_dir(&dir) else {
            continue;
        };
        for entry in entries.flatten() {
            let Ok(found) = entry.metadata() else {
                continue;
            };
            let again = !found.is_dir() && found.nlink() > 1 && !seen.insert(found.ino());
            if !again {
                bytes += found.blocks() * BLOCK;
            }
            if found.is_dir() {
                left.push_back(entry.path());
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn every_file_counts_once_wherever_it_is_and_nothing_outside() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("in"), dir.path().join("out"));
        fs::create_dir_all(inside.join("a/b")).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("big"), vec![1; 4 << 20]).unwrap();
        let before = below(&inside);
        fs::write(inside.join("a/b/file"), vec![1; 1 << 20]).unwrap();
        fs::hard_link(inside.join("a/b/file"), inside.join("a/again")).unwrap();
        symlink(&outside, inside.join("link")).unwrap();
        let grown = below(&inside) - before;
        assert!((1 << 20..1 << 21).contains(&grown), "{grown}");
        fs::remove_file(inside.join("a/b/file")).unwrap();
        fs::remove_file(inside.join("a/again")).unwrap();
        assert!(below(&inside) < before + (64 << 10));
        assert_eq!(below(&dir.path().join("none")), 0);
    }

    #[test]
    fn only_a_name_is_a_container() {
        assert_eq!(
            upper("c1").unwrap(),
            Path::new(GUEST_LAYERS).join("c1/upper")
        );
        for wrong in ["", "..", "a/b", "/etc", "a/.."] {
            assert_eq!(upper(wrong), None, "{wrong:?}");
        }
    }
}
