//! Writes cpio archives in the "newc" form, the one the kernel unpacks as its first file system
//! (`Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! The same entries give the same bytes: no clock, no owner, no order of a directory gets in.

/// An archive in the making.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

const TRAILER: &str = "TRAILER!!!";
const S_IFREG: u32 = 0o100_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFCHR: u32 = 0o020_000;

impl Archive {
    /// An archive without entries.
    pub fn new() -> Archive {
        Archive::default()
    }

    /// Adds a directory. Paths have no leading slash; parents come before what is in them.
    pub fn dir(&mut self, path: &str, mode: u32) {
        self.entry(path, S_IFDIR | mode, &[], (0, 0));
    }

    /// Adds a file.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entry(path, S_IFREG | mode, content, (0, 0));
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        self.entry(path, S_IFLNK | 0o777, target.as_bytes(), (0, 0));
    }

    /// Adds a character device.
    pub fn char_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) {
        self.entry(path, S_IFCHR | mode, &[], (major, minor));
    }

    /// The finished archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.header(TRAILER, 0, 0, 0, (0, 0));
        // Bootloaders like whole sectors; the kernel skips the zeros.
        self.pad(512);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8], device: (u32, u32)) {
        debug_assert!(!path.starts_with('/'), "{path}");
        self.entries += 1;
        let inode = self.entries;
        // The form has 32 bits for a size; nothing that is put into an initramfs comes near.
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        self.header(path, inode, mode, size, device);
        self.bytes.extend_from_slice(content);
        self.pad(4);
    }

    fn header(&mut self, path: &str, inode: u32, mode: u32, size: u32, device: (u32, u32)) {
        let links = if mode & S_IFDIR != 0 && mode & S_IFREG != S_IFREG {
            2
        } else {
            1
        };
        let name = u32::try_from(path.len() + 1).unwrap_or(u32::MAX);
        let fields = [
            inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name, 0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad(4);
    }

    fn pad(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    fn sample() -> Vec<u8> {
        let mut archive = Archive::new();
        archive.dir("etc", 0o755);
        archive.file("etc/a", 0o644, b"content");
        archive.file("etc/empty", 0o600, b"");
        archive.link("init", "etc/a");
        archive.finish()
    }

    #[test]
    fn header_has_the_fields_where_the_kernel_reads_them() {
        let bytes = sample();
        let field = |at: usize| {
            u32::from_str_radix(std::str::from_utf8(&bytes[at..at + 8]).unwrap(), 16).unwrap()
        };
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(field(6), 1, "inode");
        assert_eq!(field(14), 0o040_755, "mode");
        assert_eq!(field(38), 2, "links");
        assert_eq!(field(94), 4, "length of the name, with its end");
        assert_eq!(&bytes[110..114], b"etc\0");
        assert_eq!(bytes.len() % 512, 0);
    }

    #[test]
    fn same_entries_give_the_same_bytes() {
        assert_eq!(sample(), sample());
    }

    /// An independent reader agrees, where there is one.
    #[test]
    fn cpio_unpacks_what_was_packed() {
        let dir = tempfile::tempdir().unwrap();
        let spawned = Command::new("cpio")
            .args(["-i", "--quiet", "--no-absolute-filenames"])
            .current_dir(dir.path())
            .stdin(Stdio::piped())
            .spawn();
        let Ok(mut child) = spawned else {
            eprintln!("skipped: there is no cpio on this machine");
            return;
        };
        child.stdin.take().unwrap().write_all(&sample()).unwrap();
        assert!(child.wait().unwrap().success());
        assert_eq!(std::fs::read(dir.path().join("etc/a")).unwrap(), b"content");
        assert_eq!(std::fs::read(dir.path().join("init")).unwrap(), b"content");
        assert_eq!(
            std::fs::metadata(dir.path().join("etc/empty"))
                .unwrap()
                .len(),
            0
        );
    }
}
