//! The pods of a node, by what their shims keep below `/run`.

use std::path::{Path, PathBuf};
use std::{fs, io};

/// What is kiln's below `/run`, and root's alone, unless the configuration says otherwise.
pub const STATE: &str = "/run/kiln";
/// The socket in a pod's directory that tells what its μVM is and takes.
pub const INSPECT: &str = "inspect.sock";
/// The file in a pod's directory that says where the time of its start went.
pub const TRACE: &str = "trace.json";

/// So much of an id is enough.
const SHORTEST: usize = 4;

/// The directory of all pods' directories, `NAMESPACE/POD`.
pub fn directory(state: &Path) -> PathBuf {
    state.join("pods")
}

/// A pod cannot be found.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// The name is the beginning of several ids.
    #[error("{count} pods have an id that begins with {name}: give more of it")]
    Ambiguous {
        /// How many.
        count: usize,
        /// What was asked for.
        name: String,
    },
    /// A directory can't be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// The directory of the pod with this id, or the first digits of it.
pub fn find(state: &Path, name: &str) -> Result<Option<PathBuf>, FindError> {
    let mut found = Vec::new();
    for namespace in list(&directory(state))? {
        for pod in list(&namespace)? {
            let id = pod.file_name().unwrap_or_default().to_string_lossy();
            if *id == *name {
                return Ok(Some(pod));
            }
            if name.len() >= SHORTEST && id.starts_with(name) {
                found.push(pod);
            }
        }
    }
    match found.len() {
        0 | 1 => Ok(found.pop()),
        count => Err(FindError::Ambiguous {
            count,
            name: name.to_owned(),
        }),
    }
}

fn list(dir: &Path) -> Result<Vec<PathBuf>, FindError> {
    let failed = |source| FindError::Read {
        path: dir.to_owned(),
        source,
    };
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(failed)?,
    };
    let mut paths = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed)?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            paths.push(entry.path());
        }
    }
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_found_by_id_or_its_beginning() {
        let state = tempfile::tempdir().unwrap();
        assert!(find(state.path(), "abcd").unwrap().is_none());
        for id in ["abcdef", "abcd99", "xyz"] {
            fs::create_dir_all(directory(state.path()).join("k8s.io").join(id)).unwrap();
        }
        let id = |name| {
            let found = find(state.path(), name).unwrap()?;
            Some(found.file_name()?.to_string_lossy().into_owned())
        };
        assert_eq!(id("abcde").as_deref(), Some("abcdef"));
        assert_eq!(id("xyz").as_deref(), Some("xyz"));
        assert_eq!(id("xy"), None);
        let error = find(state.path(), "abcd").unwrap_err().to_string();
        assert!(error.contains("2 pods"), "{error}");
    }
}
