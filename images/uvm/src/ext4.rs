//! Empty ext4 file systems.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// There is no mke2fs.
    #[error("mke2fs, which makes file systems, cannot be run: install e2fsprogs")]
    Missing(#[source] io::Error),
    /// It failed.
    #[error("mke2fs could not format {}: {said}", path.display())]
    Failed {
        /// The file.
        path: PathBuf,
        /// What it said.
        said: String,
    },
}

/// Makes one of all of the file at `path`, whose content is holes, as `options` of mke2fs say.
pub fn format(path: &Path, options: &[&str]) -> Result<(), FormatError> {
    let output = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-b", "4096", "-m", "0"])
        .args(options)
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .map_err(FormatError::Missing)?;
    if output.status.success() {
        return Ok(());
    }
    Err(FormatError::Failed {
        path: path.to_owned(),
        said: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_says_what_mke2fs_said() {
        let folder = tempfile::tempdir().unwrap();
        let error = format(&folder.path().join("none/disk"), &[]).unwrap_err();
        assert!(
            matches!(&error, FormatError::Failed { said, .. } if said.contains("none")),
            "{error}"
        );
    }
}
