//! From layers on disk to the tree in memory, with several threads: on a cold cache, listing waits for the
//! disk, and the more requests it has the better.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::mem::MaybeUninit;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::fs::FileType;

use super::error::ImageError;
use super::format::encode_device;
use super::merge::{Merger, Part, Shown};
use super::probe::{Prober, kind, sparse_runs};
use super::source::Layers;
use super::tree::{Content, Dirent, FileContent, Inode, InodeIndex, Tree, XattrSet};
use crate::lowers::{Lowers, Rules};

/// Reads the merged tree of `lowers`.
pub(crate) fn scan(lowers: &Lowers, layers: &Layers, threads: usize) -> Result<Tree, ImageError> {
    let mut buffer = directory_buffer();
    let mut prober = Prober::new(lowers.rules);
    let root = Merger {
        layers,
        prober: &mut prober,
        buffer: &mut buffer,
    }
    .root()?;
    let work = Work::new(Task {
        directory: 0,
        parts: root.parts.clone(),
    });
    let root = Listed {
        name: Arc::clone(&root.name),
        identity: None,
        child: Child::Directory(0),
        inode: Inode {
            nlink: 2,
            ..inode(root, Content::Directory(Vec::new()))
        },
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.max(1) {
            scope.spawn(|| work.run(lowers.rules, layers));
        }
        work.run(lowers.rules, layers);
    });
    let state = work
        .state
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    if let Some(error) = state.error {
        return Err(error);
    }
    Ok(assemble(
        root,
        state.directories,
        state.left_out + prober.left_out,
    ))
}

fn directory_buffer() -> Vec<MaybeUninit<u8>> {
    vec![MaybeUninit::uninit(); 64 * 1024]
}

/// A directory to be listed.
struct Task {
    directory: usize,
    parts: Vec<Part>,
}

/// An entry of a listed directory.
struct Listed {
    name: Arc<[u8]>,
    /// For what may have other names: device and inode number.
    identity: Option<(u64, u64)>,
    child: Child,
    inode: Inode,
}

enum Child {
    /// The directory's place among all.
    Directory(usize),
    Other,
}

struct Work {
    state: Mutex<State>,
    wake: Condvar,
}

struct State {
    queue: Vec<Task>,
    running: usize,
    /// By number; empty until listed.
    directories: Vec<Vec<Listed>>,
    /// Equal attribute sets are kept once.
    xattrs: HashMap<XattrSet, ()>,
    left_out: u64,
    error: Option<ImageError>,
}

impl Work {
    fn new(root: Task) -> Work {
        Work {
            state: Mutex::new(State {
                queue: vec![root],
                running: 0,
                directories: vec![Vec::new()],
                xattrs: HashMap::new(),
                left_out: 0,
                error: None,
            }),
            wake: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lists directories until there are none left, here or in another thread.
    fn run(&self, rules: Rules, layers: &Layers) {
        let mut buffer = directory_buffer();
        let mut prober = Prober::new(rules);
        while let Some(task) = self.next() {
            let shown = Merger {
                layers,
                prober: &mut prober,
                buffer: &mut buffer,
            }
            .merge(&task.parts)
            .and_then(|shown| read_contents(layers, shown));
            self.finish(task.directory, shown);
        }
        self.lock().left_out += prober.left_out;
    }

    fn next(&self) -> Option<Task> {
        let mut state = self.lock();
        loop {
            if state.error.is_some() {
                return None;
            }
            if let Some(task) = state.queue.pop() {
                state.running += 1;
                return Some(task);
            }
            if state.running == 0 {
                return None;
            }
            state = self
                .wake
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn finish(&self, directory: usize, result: Result<Vec<(Shown, Content)>, ImageError>) {
        let mut state = self.lock();
        state.running -= 1;
        match result {
            Ok(shown) => {
                let listed = shown
                    .into_iter()
                    .map(|(shown, content)| state.list(shown, content))
                    .collect();
                state.directories[directory] = listed;
            }
            Err(error) => {
                state.error.get_or_insert(error);
            }
        }
        drop(state);
        self.wake.notify_all();
    }
}

impl State {
    fn list(&mut self, mut shown: Shown, content: Content) -> Listed {
        let child = if let Content::Directory(_) = content {
            let directory = self.directories.len();
            self.directories.push(Vec::new());
            self.queue.push(Task {
                directory,
                parts: std::mem::take(&mut shown.parts),
            });
            Child::Directory(directory)
        } else {
            Child::Other
        };
        let stat = &shown.probe.stat;
        let linked = matches!(child, Child::Other) && stat.st_nlink > 1;
        let identity = linked.then_some((stat.st_dev, stat.st_ino));
        let name = Arc::clone(&shown.name);
        let mut inode = inode(shown, content);
        if let Some(set) = inode.xattrs.take() {
            inode.xattrs = Some(match self.xattrs.entry(set) {
                Entry::Occupied(known) => Arc::clone(known.key()),
                Entry::Vacant(new) => {
                    let set = Arc::clone(new.key());
                    new.insert(());
                    set
                }
            });
        }
        Listed {
            name,
            identity,
            child,
            inode,
        }
    }
}

/// What an inode has besides its fields: link targets, device numbers, where data is.
fn read_contents(layers: &Layers, shown: Vec<Shown>) -> Result<Vec<(Shown, Content)>, ImageError> {
    let mut open: Option<(Arc<super::source::SourceDir>, std::os::fd::OwnedFd)> = None;
    shown
        .into_iter()
        .map(|shown| {
            let stat = &shown.probe.stat;
            let content = match kind(stat) {
                FileType::Directory => Content::Directory(Vec::new()),
                FileType::CharacterDevice => Content::CharDevice(device(stat.st_rdev)),
                FileType::BlockDevice => Content::BlockDevice(device(stat.st_rdev)),
                FileType::Fifo => Content::Fifo,
                FileType::Socket => Content::Socket,
                FileType::RegularFile | FileType::Symlink | FileType::Unknown => {
                    let failed = |e: std::io::Error| layers.read_error(&shown.dir, &shown.name, e);
                    let fd = match &open {
                        Some((dir, fd)) if Arc::ptr_eq(dir, &shown.dir) => fd,
                        _ => {
                            let fd = layers.open_dir(&shown.dir).map_err(|e| failed(e.into()))?;
                            &open.insert((Arc::clone(&shown.dir), fd)).1
                        }
                    };
                    if kind(stat) == FileType::Symlink {
                        let target = rustix::fs::readlinkat(fd, &shown.name[..], Vec::new())
                            .map_err(|e| failed(e.into()))?;
                        Content::Symlink(target.into_bytes().into())
                    } else {
                        Content::File(FileContent {
                            size: stat.st_size.unsigned_abs(),
                            dir: Arc::clone(&shown.dir),
                            name: Arc::clone(&shown.name),
                            runs: sparse_runs(fd, &shown.name, stat).map_err(failed)?,
                        })
                    }
                }
            };
            Ok((shown, content))
        })
        .collect()
}

fn device(rdev: u64) -> u32 {
    encode_device(rustix::fs::major(rdev), rustix::fs::minor(rdev))
}

fn inode(shown: Shown, content: Content) -> Inode {
    let Shown { probe, .. } = shown;
    let stat = probe.stat;
    Inode {
        // Type and permissions: 16 bits.
        mode: (stat.st_mode & 0xffff) as u16,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: stat.st_mtime,
        mtime_nsec: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
        nlink: 1,
        xattrs: (!probe.xattrs.is_empty()).then(|| probe.xattrs.into()),
        content,
    }
}

/// Numbers the inodes, directories first, and joins the names of hard links.
fn assemble(root: Listed, mut directories: Vec<Vec<Listed>>, xattrs_left_out: u64) -> Tree {
    let order = depth_first(&directories);
    let mut numbers: Vec<InodeIndex> = vec![0; directories.len()];
    for (number, directory) in order.iter().enumerate() {
        numbers[*directory] = number;
    }
    let mut inodes: Vec<Option<Inode>> = Vec::new();
    inodes.resize_with(directories.len(), || None);
    let mut parents: Vec<InodeIndex> = vec![0; directories.len()];
    let mut links: HashMap<(u64, u64), InodeIndex> = HashMap::new();
    inodes[0] = Some(root.inode);
    for (number, directory) in order.into_iter().enumerate() {
        let listed = std::mem::take(&mut directories[directory]);
        let mut entries = Vec::with_capacity(listed.len() + 2);
        for (name, inode) in [(&b"."[..], number), (b"..", parents[number])] {
            entries.push(Dirent {
                name: Arc::from(name),
                inode,
            });
        }
        let mut subdirectories = 0;
        for Listed {
            name,
            identity,
            child,
            inode,
        } in listed
        {
            let place = match child {
                Child::Directory(directory) => {
                    subdirectories += 1;
                    let child = numbers[directory];
                    parents[child] = number;
                    inodes[child] = Some(inode);
                    child
                }
                Child::Other => match identity.map(|identity| links.entry(identity)) {
                    Some(Entry::Occupied(known)) => {
                        let known = *known.get();
                        if let Some(inode) = &mut inodes[known] {
                            inode.nlink += 1;
                        }
                        known
                    }
                    new => {
                        let place = inodes.len();
                        inodes.push(Some(inode));
                        if let Some(Entry::Vacant(new)) = new {
                            new.insert(place);
                        }
                        place
                    }
                },
            };
            entries.push(Dirent { name, inode: place });
        }
        entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        if let Some(inode) = &mut inodes[number] {
            inode.nlink = 2 + subdirectories;
            inode.content = Content::Directory(entries);
        }
    }
    Tree {
        // Every place was filled by its directory's parent, which came before it.
        inodes: inodes.into_iter().flatten().collect(),
        xattrs_left_out,
    }
}

/// The directories, parents before their children, neighbours close together.
fn depth_first(directories: &[Vec<Listed>]) -> Vec<usize> {
    let mut order = Vec::with_capacity(directories.len());
    let mut stack = vec![0];
    while let Some(directory) = stack.pop() {
        order.push(directory);
        for listed in directories[directory].iter().rev() {
            if let Child::Directory(child) = listed.child {
                stack.push(child);
            }
        }
    }
    order
}
