//! One directory of the merged tree: what overlayfs would list in it.
//!
//! Owns overlayfs' rules: the topmost layer's entry wins, directories merge until one is opaque or
//! something else lies in between, whiteouts hide, redirects lead elsewhere.

use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{FileType, RawDir};
use rustix::io::Errno;

use super::error::ImageError;
use super::probe::{Probe, Prober, is_whiteout, kind};
use super::source::{Layers, SourceDir};

/// One layer's share of a merged directory.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    pub(crate) dir: Arc<SourceDir>,
    xattr_whiteouts: bool,
}

/// Something that shows in the merged tree.
#[derive(Debug)]
pub(crate) struct Shown {
    pub(crate) name: Arc<[u8]>,
    pub(crate) probe: Probe,
    /// Where it was found.
    pub(crate) dir: Arc<SourceDir>,
    /// For a directory: the layers that have a share in it, top first.
    pub(crate) parts: Vec<Part>,
}

/// What a name stands for so far, from the top down.
enum Slot {
    Hidden,
    Closed(Shown),
    /// A directory to which lower layers may still add.
    Open(Shown),
}

pub(crate) struct Merger<'a> {
    pub(crate) layers: &'a Layers,
    pub(crate) prober: &'a mut Prober,
    /// Memory for reading directories.
    pub(crate) buffer: &'a mut [MaybeUninit<u8>],
}

impl Merger<'_> {
    /// The root: the topmost layer's directory, merged with those below.
    pub(crate) fn root(&mut self) -> Result<Shown, ImageError> {
        let mut root: Option<Shown> = None;
        for layer in 0..self.layers.count() {
            let dir = Arc::new(SourceDir {
                layer,
                path: Box::default(),
            });
            let fd = self.open(&dir)?;
            let probe = self.probe(&fd, &dir, b".")?;
            // Whether a layer's own root is opaque, overlayfs does not ask.
            let part = Part {
                dir: Arc::clone(&dir),
                xattr_whiteouts: probe.marks.has_xattr_whiteouts(),
            };
            match &mut root {
                Some(root) => root.parts.push(part),
                None => {
                    probe.check_readable(self.layers, &dir, b"")?;
                    root = Some(Shown {
                        name: Arc::from(&b""[..]),
                        probe,
                        dir,
                        parts: vec![part],
                    });
                }
            }
        }
        root.ok_or(ImageError::NoLayers)
    }

    /// What `parts` show together, sorted by name.
    pub(crate) fn merge(&mut self, parts: &[Part]) -> Result<Vec<Shown>, ImageError> {
        if let [part] = parts {
            return self.single(part);
        }
        let mut slots: BTreeMap<Arc<[u8]>, Slot> = BTreeMap::new();
        for (index, part) in parts.iter().enumerate() {
            let fd = self.open(&part.dir)?;
            for name in self.names(&fd, &part.dir)? {
                if matches!(slots.get(&name), Some(Slot::Hidden | Slot::Closed(_))) {
                    continue;
                }
                let probe = self.probe(&fd, &part.dir, &name)?;
                let slot = match slots.remove(&name) {
                    Some(Slot::Open(above)) => self.add_below(above, &probe, parts, index)?,
                    _ => self.first(&name, probe, parts, index)?,
                };
                slots.insert(name, slot);
            }
        }
        Ok(slots
            .into_values()
            .filter_map(|slot| match slot {
                Slot::Hidden => None,
                Slot::Closed(shown) | Slot::Open(shown) => Some(shown),
            })
            .collect())
    }

    /// A directory with a share in one layer only: the usual case, and so without a map.
    fn single(&mut self, part: &Part) -> Result<Vec<Shown>, ImageError> {
        let parts = std::slice::from_ref(part);
        let fd = self.open(&part.dir)?;
        let mut all = Vec::new();
        for name in self.names(&fd, &part.dir)? {
            let probe = self.probe(&fd, &part.dir, &name)?;
            if let Slot::Closed(shown) | Slot::Open(shown) = self.first(&name, probe, parts, 0)? {
                all.push(shown);
            }
        }
        all.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// The topmost thing of a name.
    fn first(
        &mut self,
        name: &Arc<[u8]>,
        probe: Probe,
        parts: &[Part],
        index: usize,
    ) -> Result<Slot, ImageError> {
        let part = &parts[index];
        if is_whiteout(&probe, part.xattr_whiteouts) {
            return Ok(Slot::Hidden);
        }
        probe.check_readable(self.layers, &part.dir, name)?;
        let mut shown = Shown {
            name: Arc::clone(name),
            dir: Arc::clone(&part.dir),
            parts: Vec::new(),
            probe,
        };
        if kind(&shown.probe.stat) != FileType::Directory {
            return Ok(Slot::Closed(shown));
        }
        let redirect = shown.probe.marks.redirect.take();
        let opaque = shown.probe.marks.is_opaque();
        shown.parts.push(Part {
            dir: Arc::new(part.dir.join(name)),
            xattr_whiteouts: shown.probe.marks.has_xattr_whiteouts(),
        });
        self.continue_below(shown, opaque, redirect.as_deref(), parts, index)
    }

    /// A lower layer's thing under an open directory.
    fn add_below(
        &mut self,
        mut above: Shown,
        probe: &Probe,
        parts: &[Part],
        index: usize,
    ) -> Result<Slot, ImageError> {
        let part = &parts[index];
        if kind(&probe.stat) != FileType::Directory {
            return Ok(Slot::Closed(above));
        }
        above.parts.push(Part {
            dir: Arc::new(part.dir.join(&above.name)),
            xattr_whiteouts: probe.marks.has_xattr_whiteouts(),
        });
        let redirect = probe.marks.redirect.as_deref();
        self.continue_below(above, probe.marks.is_opaque(), redirect, parts, index)
    }

    fn continue_below(
        &mut self,
        mut shown: Shown,
        opaque: bool,
        redirect: Option<&[u8]>,
        parts: &[Part],
        index: usize,
    ) -> Result<Slot, ImageError> {
        if opaque {
            return Ok(Slot::Closed(shown));
        }
        match redirect {
            None => Ok(Slot::Open(shown)),
            Some(redirect) => {
                self.follow(&mut shown, redirect, parts, index)?;
                Ok(Slot::Closed(shown))
            }
        }
    }

    /// Collects the lower shares of a directory that was renamed: from here on they have another
    /// name, or another path.
    fn follow(
        &mut self,
        shown: &mut Shown,
        redirect: &[u8],
        parts: &[Part],
        index: usize,
    ) -> Result<(), ImageError> {
        let mut target = self.target(None, redirect, shown)?;
        let mut above = parts[index].dir.layer;
        loop {
            let (base, path) = match &target {
                Target::Sibling(name) => match parts.iter().find(|p| p.dir.layer > above) {
                    Some(part) => (part.clone(), name.clone()),
                    None => return Ok(()),
                },
                Target::Absolute(path) if above + 1 < self.layers.count() => {
                    let dir = Arc::new(SourceDir {
                        layer: above + 1,
                        path: Box::default(),
                    });
                    let xattr_whiteouts = false;
                    (
                        Part {
                            dir,
                            xattr_whiteouts,
                        },
                        path.clone(),
                    )
                }
                Target::Absolute(_) => return Ok(()),
            };
            above = base.dir.layer;
            match self.lookup(base, &path)? {
                Lookup::Absent => {}
                Lookup::Stop => return Ok(()),
                Lookup::Found {
                    part,
                    last,
                    redirect,
                } => {
                    shown.parts.push(part);
                    if last {
                        return Ok(());
                    }
                    if let Some(redirect) = redirect {
                        target = self.target(Some(target), &redirect, shown)?;
                    }
                }
            }
        }
    }

    fn target(
        &self,
        current: Option<Target>,
        redirect: &[u8],
        shown: &Shown,
    ) -> Result<Target, ImageError> {
        let wrong = || ImageError::Redirect {
            path: self.layers.path(&shown.dir, &shown.name),
            redirect: String::from_utf8_lossy(redirect).into_owned(),
        };
        let plain = |name: &[u8]| !name.is_empty() && name != b"." && name != b"..";
        if let Some(path) = redirect.strip_prefix(b"/") {
            if !path.split(|b| *b == b'/').all(plain) {
                return Err(wrong());
            }
            return Ok(Target::Absolute(path.to_vec()));
        }
        if redirect.contains(&b'/') || !plain(redirect) {
            return Err(wrong());
        }
        Ok(match current {
            Some(Target::Absolute(mut path)) => {
                path.truncate(path.iter().rposition(|b| *b == b'/').map_or(0, |at| at + 1));
                path.extend_from_slice(redirect);
                Target::Absolute(path)
            }
            _ => Target::Sibling(redirect.to_vec()),
        })
    }

    /// Finds the directory `path` of one layer.
    fn lookup(&mut self, base: Part, path: &[u8]) -> Result<Lookup, ImageError> {
        let mut part = base;
        let mut last = false;
        let mut redirect = None;
        for name in path.split(|b| *b == b'/') {
            let fd = self.open(&part.dir)?;
            let probe = match self.prober.probe(&fd, name) {
                Ok(probe) => probe,
                Err(Errno::NOENT) => return Ok(Lookup::Absent),
                Err(e) => return Err(self.layers.read_error(&part.dir, name, e)),
            };
            if kind(&probe.stat) != FileType::Directory {
                return Ok(Lookup::Stop);
            }
            last |= probe.marks.is_opaque();
            part = Part {
                dir: Arc::new(part.dir.join(name)),
                xattr_whiteouts: probe.marks.has_xattr_whiteouts(),
            };
            redirect = probe.marks.redirect;
        }
        Ok(Lookup::Found {
            part,
            last,
            redirect,
        })
    }

    fn open(&self, dir: &SourceDir) -> Result<OwnedFd, ImageError> {
        self.layers
            .open_dir(dir)
            .map_err(|e| self.layers.read_error(dir, b"", e))
    }

    fn probe(&mut self, fd: &OwnedFd, dir: &SourceDir, name: &[u8]) -> Result<Probe, ImageError> {
        self.prober
            .probe(fd, name)
            .map_err(|e| self.layers.read_error(dir, name, e))
    }

    fn names(&mut self, fd: &OwnedFd, dir: &SourceDir) -> Result<Vec<Arc<[u8]>>, ImageError> {
        let mut names = Vec::new();
        let mut entries = RawDir::new(fd, self.buffer);
        while let Some(entry) = entries.next() {
            let entry = entry.map_err(|e| self.layers.read_error(dir, b"", e))?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(Arc::from(name));
            }
        }
        Ok(names)
    }
}

/// Where a renamed directory's lower shares lie.
enum Target {
    /// Beside the directory, under this name.
    Sibling(Vec<u8>),
    /// At this path of each lower layer.
    Absolute(Vec<u8>),
}

enum Lookup {
    Absent,
    /// Something that ends the search: a whiteout or anything but a directory.
    Stop,
    Found {
        part: Part,
        /// Nothing further down has a share.
        last: bool,
        redirect: Option<Vec<u8>>,
    },
}
