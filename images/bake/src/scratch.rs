//! The disk that containers' writable layers lie on: an empty file system, made once and mounted in the baked guest.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use kiln_uvm::ext4::{self, FormatError};

/// How large the file system is: the most that a pod's containers can write, whatever else limits them.
pub(crate) const SIZE: u64 = 32 << 30;

/// No journal: what is on it lasts as long as the machine that has it mounted. No checksums and no copies of the
/// superblock: it is never read by another one. Nothing is initialized that the file's holes say already. Small groups:
/// without a journal, ext4 looks through all of a group for an inode that was not deleted of late, at each new file.
const OPTIONS: &[&str] = &[
    "-g",
    "8192",
    "-i",
    "32768",
    "-O",
    "^has_journal,^metadata_csum,^resize_inode,uninit_bg,sparse_super2",
    "-E",
    "num_backup_sb=0,lazy_itable_init=1,nodiscard",
    "-L",
    "kiln-scratch",
];

/// Why there is no scratch disk.
#[derive(Debug, thiserror::Error)]
pub enum ScratchError {
    /// The file cannot be made that long.
    #[error("cannot make {} {SIZE} bytes long", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It cannot be formatted.
    #[error("cannot make the disk of the writable layers")]
    Format(#[from] FormatError),
}

/// Formats `file`, which is empty and lies at `path`.
pub(crate) fn make(file: &File, path: &Path) -> Result<(), ScratchError> {
    file.set_len(SIZE).map_err(|source| ScratchError::Length {
        path: path.to_owned(),
        source,
    })?;
    Ok(ext4::format(path, OPTIONS)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn disk_is_large_and_takes_next_to_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("scratch");
        make(&File::create(&path).unwrap(), &path).unwrap();
        let meta = path.metadata().unwrap();
        assert_eq!(meta.len(), SIZE);
        assert!(meta.blocks() * 512 < 4 << 20, "{} blocks", meta.blocks());
    }
}
