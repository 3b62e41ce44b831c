//! A cpio archive ("newc") in memory: all that the kernel needs to reach the node's disk.

use std::collections::BTreeSet;

#[derive(Default)]
pub(crate) struct Initramfs {
    archive: Vec<u8>,
    folders: BTreeSet<String>,
    entries: u32,
}

const FILE: u32 = 0o100_000;
const FOLDER: u32 = 0o040_000;

impl Initramfs {
    /// Adds a file and the folders above it.
    pub(crate) fn file(&mut self, path: &str, permissions: u32, content: &[u8]) {
        let mut slashes: Vec<usize> = path.match_indices('/').map(|(at, _)| at).collect();
        slashes.retain(|at| *at > 0);
        for at in slashes {
            self.folder(&path[..at]);
        }
        self.entry(path, FILE | permissions, content);
    }

    pub(crate) fn folder(&mut self, path: &str) {
        if self.folders.insert(path.to_owned()) {
            self.entry(path, FOLDER | 0o755, &[]);
        }
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.archive
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let links = if mode & FOLDER != 0 { 2 } else { 1 };
        // inode, mode, owner, group, links, time, size, four device numbers, length of the name, checksum
        let fields = [
            u64::from(self.entries),
            u64::from(mode),
            0,
            0,
            links,
            0,
            content.len() as u64,
            0,
            0,
            0,
            0,
            path.len() as u64 + 1,
            0,
        ];
        self.archive.extend_from_slice(b"070701");
        for field in fields {
            self.archive
                .extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.archive.extend_from_slice(path.as_bytes());
        self.archive.push(0);
        self.pad();
        self.archive.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        while !self.archive.len().is_multiple_of(4) {
            self.archive.push(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn cpio_reads_it() {
        let mut initramfs = Initramfs::default();
        initramfs.file("init", 0o755, b"#!/bin/sh\n");
        initramfs.file("overlay/etc/motd", 0o644, b"hello");
        let mut cpio = match Command::new("cpio")
            .args(["-it", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
        {
            Ok(child) => child,
            Err(error) => panic!("cpio is needed (make setup installs it): {error}"),
        };
        cpio.stdin
            .take()
            .unwrap()
            .write_all(&initramfs.finish())
            .unwrap();
        let listing = String::from_utf8(cpio.wait_with_output().unwrap().stdout).unwrap();
        let names: Vec<_> = listing.lines().collect();
        assert_eq!(
            names,
            ["init", "overlay", "overlay/etc", "overlay/etc/motd"]
        );
    }
}
