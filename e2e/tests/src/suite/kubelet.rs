//! A pod's folder as the kubelet has it.

use std::path::PathBuf;

use anyhow::Result;
use kiln_e2e::{Pod, PodSpec, Test};

/// The folder of one pod.
pub(super) struct Folder {
    uid: String,
    path: PathBuf,
}

impl Folder {
    pub(super) fn make(test: &Test) -> Result<Self> {
        let uid = "5ab5f8b5".to_owned();
        let path = test.scratch().join("pods").join(&uid);
        std::fs::create_dir_all(&path)?;
        Ok(Self { uid, path })
    }

    /// Runs the pod.
    pub(super) async fn pod(&self, test: &Test) -> Result<Pod> {
        test.run_pod(&PodSpec::new().uid(&self.uid)).await
    }

    /// The directory of a volume.
    pub(super) fn directory(&self, kind: &str, name: &str) -> Result<PathBuf> {
        let path = self.path.join("volumes").join(kind).join(name);
        std::fs::create_dir_all(&path)?;
        Ok(path)
    }

    /// Where parts of a volume are bound.
    pub(super) fn parts(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join("volume-subpaths").join(name);
        std::fs::create_dir_all(&path)?;
        Ok(path)
    }
}
