//! Looking at one thing in a layer: its inode, its extended attributes, and what overlayfs noted
//! about it there.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, SeekFrom, Stat};
use rustix::io::Errno;

use super::format::RawXattr;
use super::source::{SourceDir, open_file};
use super::tree::Run;
use crate::lowers::Rules;

/// Files with fewer missing bytes than this are not worth a chunk table.
const LEAST_HOLE: u64 = 256 * 1024;

/// A thing in a layer.
#[derive(Debug)]
pub(crate) struct Probe {
    pub(crate) stat: Stat,
    /// Sorted; empty for a whiteout.
    pub(crate) xattrs: Vec<RawXattr>,
    pub(crate) marks: Marks,
}

/// overlayfs' own attributes, which no one above it sees.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    /// `y`: nothing below shows. `x`: whiteouts in here may be attributes.
    pub(crate) opaque: Option<u8>,
    /// Where this directory's lower part lies.
    pub(crate) redirect: Option<Vec<u8>>,
    pub(crate) whiteout: bool,
    pub(crate) metacopy: bool,
}

impl Marks {
    pub(crate) fn is_opaque(&self) -> bool {
        self.opaque == Some(b'y')
    }

    pub(crate) fn has_xattr_whiteouts(&self) -> bool {
        self.opaque == Some(b'x')
    }
}

/// An open directory of a layer, and memory for reading attributes.
#[derive(Debug)]
pub(crate) struct Prober {
    rules: Rules,
    names: Vec<u8>,
    value: Vec<u8>,
    path: Vec<u8>,
    /// Attributes EROFS has no place for.
    pub(crate) left_out: u64,
}

impl Prober {
    pub(crate) fn new(rules: Rules) -> Prober {
        Prober {
            rules,
            names: vec![0; 4096],
            value: vec![0; 4096],
            path: Vec::new(),
            left_out: 0,
        }
    }

    /// Looks at `name` in `dir`; `.` is the directory itself.
    pub(crate) fn probe(&mut self, dir: &OwnedFd, name: &[u8]) -> rustix::io::Result<Probe> {
        let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let mut probe = Probe {
            stat,
            xattrs: Vec::new(),
            marks: Marks::default(),
        };
        if self.rules != Rules::Plain && is_whiteout_device(&stat) {
            probe.marks.whiteout = true;
        } else {
            self.read_xattrs(dir.as_fd(), name, &mut probe)?;
        }
        Ok(probe)
    }

    fn read_xattrs(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &[u8],
        probe: &mut Probe,
    ) -> rustix::io::Result<()> {
        // No system call lists the attributes of a symbolic link relative to a descriptor.
        self.path.clear();
        self.path.extend_from_slice(b"/proc/self/fd/");
        self.path
            .extend_from_slice(dir.as_raw_fd().to_string().as_bytes());
        self.path.push(b'/');
        self.path.extend_from_slice(name);

        let listed = loop {
            match rustix::fs::llistxattr(&self.path[..], &mut self.names[..]) {
                Ok(len) => break len,
                Err(Errno::NOTSUP) => return Ok(()),
                Err(Errno::RANGE) => grow(&mut self.names)?,
                Err(e) => return Err(e),
            }
        };
        if listed == 0 {
            return Ok(());
        }
        let names = self.names[..listed].to_vec();
        for full in names.split(|b| *b == 0).filter(|n| !n.is_empty()) {
            let len = loop {
                match rustix::fs::lgetxattr(&self.path[..], full, &mut self.value[..]) {
                    Ok(len) => break Some(len),
                    Err(Errno::RANGE) => grow(&mut self.value)?,
                    // Listed, but not for us, or gone again.
                    Err(Errno::NODATA | Errno::NOTSUP) => break None,
                    Err(e) => return Err(e),
                }
            };
            if let Some(len) = len {
                let value = std::mem::take(&mut self.value);
                self.sort_in(full, &value[..len], probe);
                self.value = value;
            }
        }
        probe.xattrs.sort_unstable();
        Ok(())
    }

    /// Puts an attribute where it belongs: with the visible ones, or with overlayfs' own.
    fn sort_in(&mut self, name: &[u8], value: &[u8], probe: &mut Probe) {
        let own = self
            .rules
            .overlay_prefix()
            .and_then(|prefix| name.strip_prefix(prefix));
        match own {
            // The escaped form, for an overlay inside an overlay. It stays escaped, because the
            // image is itself the lower layer of an overlay in the guest.
            Some(own) if own.starts_with(b"overlay.") => {}
            Some(own) => {
                let marks = &mut probe.marks;
                match own {
                    b"opaque" => marks.opaque = value.first().copied(),
                    b"redirect" => marks.redirect = Some(value.to_vec()),
                    b"whiteout" => marks.whiteout = true,
                    b"metacopy" => marks.metacopy = true,
                    _ => {}
                }
                return;
            }
            None => {}
        }
        match RawXattr::new(name, value) {
            Some(xattr) => probe.xattrs.push(xattr),
            None => self.left_out += 1,
        }
    }
}

fn grow(buffer: &mut Vec<u8>) -> rustix::io::Result<()> {
    // The kernel's limits for a list and for a value are both 64 KiB.
    if buffer.len() > 65536 {
        return Err(Errno::RANGE);
    }
    buffer.resize(buffer.len() * 4 + 1, 0);
    Ok(())
}

pub(crate) fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

fn is_whiteout_device(stat: &Stat) -> bool {
    kind(stat) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Whether the thing hides what lies below it and shows nothing itself.
pub(crate) fn is_whiteout(probe: &Probe, in_xattr_whiteout_dir: bool) -> bool {
    match kind(&probe.stat) {
        FileType::CharacterDevice => probe.marks.whiteout,
        FileType::RegularFile => {
            in_xattr_whiteout_dir && probe.marks.whiteout && probe.stat.st_size == 0
        }
        _ => false,
    }
}

/// The parts of a file that hold data, if its holes are worth keeping.
pub(crate) fn sparse_runs(dir: &OwnedFd, name: &[u8], stat: &Stat) -> io::Result<Option<Vec<Run>>> {
    let size = stat.st_size.unsigned_abs();
    let stored = stat.st_blocks.unsigned_abs() * 512;
    if stored.saturating_add(LEAST_HOLE) > size {
        return Ok(None);
    }
    let file = open_file(dir.as_fd(), name)?;
    let mut runs = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(&file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            // A file system that does not say where its holes are.
            Err(Errno::INVAL) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let end = rustix::fs::seek(&file, SeekFrom::Hole(start))?.min(size);
        if start >= size {
            break;
        }
        runs.push(Run { start, end });
        at = end;
    }
    let data: u64 = runs.iter().map(|run| run.end - run.start).sum();
    Ok((data + LEAST_HOLE <= size).then_some(runs))
}

impl Probe {
    /// Refuses what no image can show.
    pub(crate) fn check_readable(
        &self,
        layers: &super::source::Layers,
        dir: &SourceDir,
        name: &[u8],
    ) -> Result<(), super::error::ImageError> {
        let len: usize = super::format::xattrs_len(0, self.xattrs.iter().map(RawXattr::len).sum());
        if len > super::format::XATTR_MAX_LEN {
            return Err(super::error::ImageError::XattrsTooLarge {
                path: layers.path(dir, name),
                len,
            });
        }
        if self.marks.metacopy && kind(&self.stat) == FileType::RegularFile {
            return Err(super::error::ImageError::Metacopy {
                path: layers.path(dir, name),
            });
        }
        Ok(())
    }
}
