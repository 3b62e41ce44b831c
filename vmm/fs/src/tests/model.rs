//! Random operations by two guests and the host on one folder, compared with a model of it kept in memory.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::PathBuf;

use super::guest::{Guest, op, raw};

const STEPS: usize = 6000;
/// Between comparisons of everything.
const SOME: usize = 200;

type Done<T> = Result<T, i32>;

#[derive(Debug, Clone)]
enum Content {
    File(Vec<u8>),
    Folder(BTreeMap<String, usize>),
    Link(String),
}

#[derive(Debug, Clone)]
struct Inode {
    content: Content,
    mode: u32,
    links: u32,
}

/// What is seen of one name: type and rights, content, and links to it.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    mode: u32,
    content: Vec<u8>,
    links: u32,
}

#[derive(Debug, Clone)]
enum Step {
    Create(u32),
    Folder(u32),
    Link(String),
    Write(usize, Vec<u8>),
    Cut(usize),
    Remove,
    RemoveFolder,
    Rename(Vec<String>, u32),
    HardLink(Vec<String>),
    Mode(u32),
}

struct Model {
    inodes: Vec<Inode>,
}

/// What the host tells apart and a walk by names does not.
fn same(error: i32) -> i32 {
    match error {
        libc::ENOTDIR => libc::ENOENT,
        // Of a folder that is not empty there are two.
        libc::EEXIST => libc::ENOTEMPTY,
        error => error,
    }
}

impl Model {
    fn folder(&mut self, at: usize) -> Done<&mut BTreeMap<String, usize>> {
        match &mut self.inodes[at].content {
            Content::Folder(names) => Ok(names),
            _ => Err(libc::ENOENT),
        }
    }

    /// The folder that a path's last name is in.
    fn parent(&mut self, path: &[String]) -> Done<usize> {
        let mut at = 0;
        for name in &path[..path.len() - 1] {
            at = *self.folder(at)?.get(name).ok_or(libc::ENOENT)?;
        }
        self.folder(at)?;
        Ok(at)
    }

    fn find(&mut self, path: &[String]) -> Done<(usize, Option<usize>)> {
        let parent = self.parent(path)?;
        let found = self.folder(parent)?.get(&path[path.len() - 1]).copied();
        Ok((parent, found))
    }

    fn add(&mut self, path: &[String], content: Content, mode: u32) -> Done<()> {
        let (parent, found) = self.find(path)?;
        if found.is_some() {
            return Err(libc::EEXIST);
        }
        let id = self.inodes.len();
        self.inodes.push(Inode {
            content,
            mode,
            links: 1,
        });
        self.folder(parent)?
            .insert(path[path.len() - 1].clone(), id);
        Ok(())
    }

    fn is_folder(&self, id: usize) -> bool {
        matches!(self.inodes[id].content, Content::Folder(_))
    }

    fn is_empty(&mut self, id: usize) -> bool {
        self.folder(id).is_ok_and(|names| names.is_empty())
    }

    fn file(&mut self, path: &[String]) -> Done<&mut Vec<u8>> {
        let id = self.find(path)?.1.ok_or(libc::ENOENT)?;
        match &mut self.inodes[id].content {
            Content::File(data) => Ok(data),
            Content::Folder(_) => Err(libc::EISDIR),
            Content::Link(_) => Err(libc::ELOOP),
        }
    }

    /// Whether one folder is, or lies in, another.
    fn lies_in(&self, id: usize, other: usize) -> bool {
        id == other
            || matches!(&self.inodes[other].content, Content::Folder(names)
                if names.values().any(|child| self.lies_in(id, *child)))
    }

    fn rename(&mut self, from: &[String], to: &[String], flags: u32) -> Done<()> {
        let (old_parent, new_parent) = (self.parent(from)?, self.parent(to)?);
        let old = self.find(from)?.1;
        let new = self.find(to)?.1;
        let old = old.ok_or(libc::ENOENT)?;
        let exchange = flags == libc::RENAME_EXCHANGE;
        if exchange && new.is_none() {
            return Err(libc::ENOENT);
        }
        if flags == libc::RENAME_NOREPLACE && new.is_some() {
            return Err(libc::EEXIST);
        }
        if self.is_folder(old) && self.lies_in(new_parent, old) {
            return Err(libc::EINVAL);
        }
        let Some(new) = new else {
            self.folder(old_parent)?.remove(&from[from.len() - 1]);
            self.folder(new_parent)?
                .insert(to[to.len() - 1].clone(), old);
            return Ok(());
        };
        if self.is_folder(new) && self.lies_in(old_parent, new) {
            return Err(if exchange {
                libc::EINVAL
            } else {
                libc::ENOTEMPTY
            });
        }
        if old == new {
            return Ok(());
        }
        if exchange {
            self.folder(old_parent)?
                .insert(from[from.len() - 1].clone(), new);
            self.folder(new_parent)?
                .insert(to[to.len() - 1].clone(), old);
            return Ok(());
        }
        match (self.is_folder(old), self.is_folder(new)) {
            (true, false) => return Err(libc::ENOTDIR),
            (false, true) => return Err(libc::EISDIR),
            (true, true) if !self.is_empty(new) => return Err(libc::ENOTEMPTY),
            _ => {}
        }
        self.inodes[new].links -= 1;
        self.folder(old_parent)?.remove(&from[from.len() - 1]);
        self.folder(new_parent)?
            .insert(to[to.len() - 1].clone(), old);
        Ok(())
    }

    fn step(&mut self, path: &[String], step: &Step) -> Done<()> {
        let last = path[path.len() - 1].clone();
        match step {
            Step::Create(mode) => self.add(path, Content::File(Vec::new()), *mode),
            Step::Folder(mode) => self.add(path, Content::Folder(BTreeMap::new()), *mode),
            Step::Link(to) => self.add(path, Content::Link(to.clone()), 0o777),
            Step::Write(at, data) => {
                let file = self.file(path)?;
                file.resize(file.len().max(at + data.len()), 0);
                file[*at..at + data.len()].copy_from_slice(data);
                Ok(())
            }
            Step::Cut(len) => {
                self.file(path)?.resize(*len, 0);
                Ok(())
            }
            Step::Remove | Step::RemoveFolder => {
                let (parent, found) = self.find(path)?;
                let id = found.ok_or(libc::ENOENT)?;
                match (step, self.is_folder(id)) {
                    (Step::Remove, true) => return Err(libc::EISDIR),
                    (Step::RemoveFolder, false) => return Err(libc::ENOTDIR),
                    (_, true) if !self.is_empty(id) => return Err(libc::ENOTEMPTY),
                    _ => {}
                }
                self.inodes[id].links -= 1;
                self.folder(parent)?.remove(&last);
                Ok(())
            }
            Step::Rename(to, flags) => self.rename(path, to, *flags),
            Step::HardLink(to) => {
                let id = self.find(path)?.1.ok_or(libc::ENOENT)?;
                let (parent, found) = self.find(to)?;
                // The kernel looks at the new name first.
                if found.is_some() {
                    return Err(libc::EEXIST);
                }
                if self.is_folder(id) {
                    return Err(libc::EPERM);
                }
                self.inodes[id].links += 1;
                self.folder(parent)?.insert(to[to.len() - 1].clone(), id);
                Ok(())
            }
            Step::Mode(mode) => {
                let id = self.find(path)?.1.ok_or(libc::ENOENT)?;
                if matches!(self.inodes[id].content, Content::Link(_)) {
                    return Err(libc::EOPNOTSUPP);
                }
                self.inodes[id].mode = *mode;
                Ok(())
            }
        }
    }

    /// Everything, by path.
    fn all(&self) -> BTreeMap<String, Seen> {
        let mut all = BTreeMap::new();
        self.walk(0, "", &mut all);
        all
    }

    fn walk(&self, at: usize, path: &str, all: &mut BTreeMap<String, Seen>) {
        let Content::Folder(names) = &self.inodes[at].content else {
            return;
        };
        for (name, id) in names {
            let inode = &self.inodes[*id];
            let path = format!("{path}/{name}");
            self.walk(*id, &path, all);
            let (kind, content) = match &inode.content {
                Content::File(data) => (libc::S_IFREG, data.clone()),
                Content::Folder(_) => (libc::S_IFDIR, Vec::new()),
                Content::Link(to) => (libc::S_IFLNK, to.clone().into_bytes()),
            };
            let links = if kind == libc::S_IFDIR {
                0
            } else {
                inode.links
            };
            let seen = Seen {
                mode: kind | inode.mode,
                content,
                links,
            };
            all.insert(path, seen);
        }
    }
}

/// Who does something.
trait Actor {
    fn step(&mut self, path: &[String], step: &Step) -> Done<()>;
    fn all(&mut self) -> BTreeMap<String, Seen>;
}

impl Guest {
    /// Walks to a folder by its names.
    fn walk(&mut self, names: &[String]) -> Done<u64> {
        let mut at = 1;
        for name in names {
            at = self.lookup(at, name)?.0;
        }
        Ok(at)
    }

    fn collect(&mut self, folder: u64, path: &str, all: &mut BTreeMap<String, Seen>) {
        for (name, _) in self.list(folder, 4096, true).unwrap() {
            if name == "." || name == ".." {
                continue;
            }
            let (node, found) = self.lookup(folder, &name).unwrap();
            let path = format!("{path}/{name}");
            let (mut content, mut links) = (Vec::new(), found.links);
            match found.mode & libc::S_IFMT {
                libc::S_IFDIR => {
                    self.collect(node, &path, all);
                    links = 0;
                }
                libc::S_IFLNK => content = self.ask(op::READLINK, node, &[]).unwrap(),
                _ => {
                    let (handle, _) = self.open(node, libc::O_RDONLY).unwrap();
                    content = self.read(node, handle, 0, 100_000).unwrap();
                    assert_eq!(content.len() as u64, found.size);
                    self.release(node, handle).unwrap();
                }
            }
            let seen = Seen {
                mode: found.mode,
                content,
                links,
            };
            all.insert(path, seen);
        }
    }
}

impl Actor for Guest {
    fn step(&mut self, path: &[String], step: &Step) -> Done<()> {
        let (last, folders) = path.split_last().unwrap();
        let last = last.as_str();
        let dir = self.walk(folders)?;
        match step {
            Step::Create(mode) => {
                let flags = libc::O_RDWR | libc::O_EXCL;
                let (node, handle) = self.create(dir, last, flags, *mode)?;
                self.release(node, handle).map(drop)
            }
            Step::Folder(mode) => self.ask(op::MKDIR, dir, &raw![*mode, 0u32, last]).map(drop),
            Step::Link(to) => self
                .ask(op::SYMLINK, dir, &raw![last, to.as_str()])
                .map(drop),
            Step::Write(at, data) => {
                let (node, _) = self.lookup(dir, last)?;
                let (handle, _) = self.open(node, libc::O_WRONLY)?;
                assert_eq!(
                    self.write(node, handle, *at as u64, data, 0, 0)?,
                    data.len() as u32
                );
                self.flush(node, handle, 1)?;
                self.release(node, handle).map(drop)
            }
            Step::Cut(len) => {
                let (node, _) = self.lookup(dir, last)?;
                self.setattr(node, 1 << 3, 0, (*len as u64, 0, 0, 0))
                    .map(drop)
            }
            Step::Remove => self.ask(op::UNLINK, dir, &raw![last]).map(drop),
            Step::RemoveFolder => self.ask(op::RMDIR, dir, &raw![last]).map(drop),
            Step::Rename(to, flags) => {
                let (new, folders) = to.split_last().unwrap();
                let to = self.walk(folders)?;
                let body = raw![to, *flags, 0u32, last, new.as_str()];
                self.ask(op::RENAME2, dir, &body).map(drop)
            }
            Step::HardLink(to) => {
                let (node, _) = self.lookup(dir, last)?;
                let (new, folders) = to.split_last().unwrap();
                let to = self.walk(folders)?;
                self.ask(op::LINK, to, &raw![node, new.as_str()]).map(drop)
            }
            Step::Mode(mode) => {
                let (node, _) = self.lookup(dir, last)?;
                self.setattr(node, 1, 0, (0, *mode, 0, 0)).map(drop)
            }
        }
    }

    fn all(&mut self) -> BTreeMap<String, Seen> {
        let mut all = BTreeMap::new();
        self.collect(1, "", &mut all);
        all
    }
}

/// The host, directly.
struct Host(PathBuf);

impl Host {
    fn path(&self, names: &[String]) -> CString {
        CString::new(format!("{}/{}", self.0.display(), names.join("/"))).unwrap()
    }

    fn open(&self, path: &CString, flags: i32, mode: u32) -> Done<std::fs::File> {
        // SAFETY: a string that lives through the call.
        let fd = unsafe { libc::open(path.as_ptr(), flags | libc::O_NOFOLLOW, mode) };
        done(fd)?;
        // SAFETY: a new descriptor.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
    }

    fn collect(&self, dir: &std::path::Path, path: &str, all: &mut BTreeMap<String, Seen>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            let found = entry.metadata().unwrap();
            assert!(!entry.file_type().unwrap().is_socket());
            let path = format!("{path}/{}", entry.file_name().to_str().unwrap());
            let (mut content, mut links) = (Vec::new(), found.nlink() as u32);
            if found.is_dir() {
                self.collect(&entry.path(), &path, all);
                links = 0;
            } else if found.is_symlink() {
                let to = std::fs::read_link(entry.path()).unwrap();
                content = to.to_str().unwrap().as_bytes().to_vec();
            } else {
                content = std::fs::read(entry.path()).unwrap();
            }
            let seen = Seen {
                mode: found.mode(),
                content,
                links,
            };
            all.insert(path, seen);
        }
    }
}

fn done(result: i32) -> Done<()> {
    if result < 0 {
        return Err(std::io::Error::last_os_error().raw_os_error().unwrap());
    }
    Ok(())
}

impl Actor for Host {
    fn step(&mut self, names: &[String], step: &Step) -> Done<()> {
        let path = self.path(names);
        let here = libc::AT_FDCWD;
        // SAFETY: strings that live through the calls.
        unsafe {
            match step {
                Step::Create(mode) => {
                    let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL;
                    self.open(&path, flags, *mode).map(drop)
                }
                Step::Folder(mode) => done(libc::mkdir(path.as_ptr(), *mode)),
                Step::Link(to) => {
                    let to = CString::new(to.as_str()).unwrap();
                    done(libc::symlink(to.as_ptr(), path.as_ptr()))
                }
                Step::Write(at, data) => {
                    let file = self.open(&path, libc::O_WRONLY, 0)?;
                    file.write_all_at(data, *at as u64).unwrap();
                    Ok(())
                }
                Step::Cut(len) => {
                    let file = self.open(&path, libc::O_WRONLY, 0)?;
                    done(libc::ftruncate(file.as_raw_fd(), *len as i64))
                }
                Step::Remove => done(libc::unlink(path.as_ptr())),
                Step::RemoveFolder => done(libc::rmdir(path.as_ptr())),
                Step::Rename(to, flags) => {
                    let to = self.path(to);
                    done(libc::renameat2(
                        here,
                        path.as_ptr(),
                        here,
                        to.as_ptr(),
                        *flags,
                    ))
                }
                Step::HardLink(to) => {
                    let to = self.path(to);
                    done(libc::linkat(here, path.as_ptr(), here, to.as_ptr(), 0))
                }
                Step::Mode(mode) => {
                    let flags = libc::AT_SYMLINK_NOFOLLOW;
                    done(libc::fchmodat(here, path.as_ptr(), *mode, flags))
                }
            }
        }
    }

    fn all(&mut self) -> BTreeMap<String, Seen> {
        let mut all = BTreeMap::new();
        self.collect(&self.0.clone(), "", &mut all);
        all
    }
}

/// Numbers that look random, and are the same for the same seed.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % end
    }

    fn path(&mut self) -> Vec<String> {
        let depth = self.below(3);
        let mut path: Vec<_> = (0..depth).map(|_| format!("d{}", self.below(3))).collect();
        path.push(format!("{}{}", ["d", "f"][self.below(2)], self.below(4)));
        path
    }

    fn step(&mut self) -> Step {
        let mode = 0o600 | self.below(0o200) as u32;
        match self.below(14) {
            0 | 1 => Step::Create(mode),
            2 | 3 => Step::Folder(0o700 | mode),
            4 => Step::Link(format!("nowhere/{}", self.below(100))),
            5 | 6 => {
                let data = (0..=self.below(3000)).map(|_| self.0 as u8).collect();
                Step::Write(self.below(5000), data)
            }
            7 => Step::Cut(self.below(6000)),
            8 => Step::Remove,
            9 => Step::RemoveFolder,
            10 | 11 => {
                let flags = [0, libc::RENAME_NOREPLACE, libc::RENAME_EXCHANGE];
                Step::Rename(self.path(), flags[self.below(3)])
            }
            12 => Step::HardLink(self.path()),
            _ => Step::Mode(0o600 | mode),
        }
    }
}

/// That of the environment, or another each time.
pub(super) fn seed() -> u64 {
    let seed = match std::env::var("SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            now.unwrap().as_nanos() as u64 | 1
        }
    };
    println!("SEED={seed}");
    seed
}

#[test]
fn guests_and_host_see_the_folder_that_all_of_them_made() {
    let seed = seed();
    let dir = tempfile::tempdir().unwrap();
    let mut one = Guest::new(dir.path());
    let mut other = Guest::new(dir.path());
    // One that has to close descriptors and open them anew all the time.
    other.server.keep_open(24);
    let mut host = Host(dir.path().to_owned());
    // SAFETY: a number; the mask is this thread's own since it serves.
    unsafe { libc::umask(0) };
    let mut random = Random(seed);
    let mut model = Model {
        inodes: vec![Inode {
            content: Content::Folder(BTreeMap::new()),
            mode: 0o700,
            links: 1,
        }],
    };
    let mut succeeded = 0;
    for n in 0..STEPS {
        let (path, step) = (random.path(), random.step());
        let who = random.below(3);
        let actor: &mut dyn Actor = match who {
            0 => &mut one,
            1 => &mut other,
            _ => &mut host,
        };
        let expected = model.step(&path, &step);
        // SAFETY: as above.
        unsafe { libc::umask(0) };
        let got = actor.step(&path, &step);
        let shown = (got.map_err(same), expected.map_err(same));
        assert_eq!(
            shown.0, shown.1,
            "SEED={seed}, step {n}: {who} {path:?} {step:?}"
        );
        succeeded += usize::from(got.is_ok());
        if n % SOME == SOME - 1 {
            let expected = model.all();
            let actors: [&mut dyn Actor; 3] = [&mut one, &mut other, &mut host];
            for (who, actor) in actors.into_iter().enumerate() {
                assert_eq!(actor.all(), expected, "SEED={seed}, step {n}: {who}");
            }
            // As if it had unmounted: it knows nothing any more.
            assert!(one.server.forget_all().is_empty());
        }
    }
    assert!(succeeded > STEPS / 10, "{succeeded}");
    assert!(other.server.known().1 <= 24);
}
