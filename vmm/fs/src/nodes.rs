//! The files the guest knows: each has a number, a descriptor that names it and opens nothing (`O_PATH`), and a count of
//! how often the guest was told of it.
//!
//! Numbers are never given twice. The same file has the same number for as long as the guest knows it. A guest may know
//! more files than the thread may have descriptors: of those that were not used lately the descriptors are closed, and
//! they are opened anew by folder and name, if it is still the same file that is found there.
//!
//! Not trusted: numbers and counts that the guest gives.

use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use crate::host::{Answer, Errno, Key, Stat, Time, open_at, stat, stat_at};
use crate::wire::ROOT;

/// The most files that a guest is told of.
const MOST_NODES: usize = 1 << 19;
/// The deepest folder that is found again by names.
const DEEPEST: usize = 2048;
/// What opens a name without using what it names.
const NAME_ONLY: i32 = libc::O_PATH | libc::O_NOFOLLOW;

/// Times and size of a file when the guest last opened it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) modified: Time,
    pub(crate) changed: Time,
    pub(crate) size: u64,
}

#[derive(Debug)]
struct Node {
    fd: Option<OwnedFd>,
    key: Key,
    born: Option<Time>,
    kind: u32,
    /// How often the guest was told of it.
    lookups: u64,
    /// Reasons to keep its descriptor: open files, and the request that is being served.
    pins: u32,
    /// Used since its descriptor was last looked at for closing.
    used: bool,
    /// Where it was found last.
    parent: u64,
    name: CString,
    seen: Option<Seen>,
}

#[derive(Debug)]
pub(crate) struct Nodes {
    by_id: HashMap<u64, Node>,
    by_key: HashMap<Key, u64>,
    next: u64,
    /// Nodes whose descriptors may be closed, the oldest first; among them such as are gone.
    closable: VecDeque<u64>,
    /// How many descriptors are open, and how many may be.
    open: usize,
    most_open: usize,
    /// Devices that were seen, the root's first.
    devices: Vec<u64>,
}

const STALE: Errno = Errno(libc::ESTALE);

impl Nodes {
    /// Begins with the root. At most `most_open` descriptors are kept.
    pub(crate) fn new(root: OwnedFd, most_open: usize) -> Answer<Self> {
        let stat = stat(root.as_raw_fd())?;
        let mut nodes = Nodes {
            by_id: HashMap::new(),
            by_key: HashMap::new(),
            next: ROOT + 1,
            closable: VecDeque::new(),
            open: 1,
            most_open,
            devices: Vec::new(),
        };
        nodes.insert(ROOT, root, &stat, ROOT, c"");
        Ok(nodes)
    }

    fn insert(&mut self, id: u64, fd: OwnedFd, stat: &Stat, parent: u64, name: &CStr) {
        let node = Node {
            fd: Some(fd),
            key: stat.key(),
            born: stat.born(),
            kind: stat.kind(),
            lookups: 1,
            pins: 0,
            used: true,
            parent,
            name: name.to_owned(),
            seen: None,
        };
        self.by_key.insert(node.key, id);
        self.by_id.insert(id, node);
    }

    fn get(&self, id: u64) -> Answer<&Node> {
        self.by_id.get(&id).ok_or(STALE)
    }

    /// The type of a node: type bits of a mode.
    pub(crate) fn kind(&self, id: u64) -> Answer<u32> {
        self.get(id).map(|node| node.kind)
    }

    /// The number that the guest sees a file by: that of the host's file system, with what tells several apart.
    pub(crate) fn shown(&mut self, stat: &Stat) -> u64 {
        self.shown_number(stat.key().device, stat.key().ino)
    }

    /// As above, of a device and a number on it.
    pub(crate) fn shown_number(&mut self, device: u64, ino: u64) -> u64 {
        const MOST_DEVICES: usize = 1 << 10;
        let at = self.devices.iter().position(|known| *known == device);
        let at = at.unwrap_or_else(|| {
            if self.devices.len() < MOST_DEVICES {
                self.devices.push(device);
            }
            self.devices.len() - 1
        });
        ino ^ (at as u64) << 48
    }

    /// Of the root.
    pub(crate) fn shown_root(&mut self) -> u64 {
        let key = self.by_id.get(&ROOT).map(|node| node.key);
        key.map_or(ROOT, |key| self.shown_number(key.device, key.ino))
    }

    /// The device that a node is on.
    pub(crate) fn device(&self, id: u64) -> Answer<u64> {
        self.get(id).map(|node| node.key.device)
    }

    /// A folder on each device of which the guest knows one.
    pub(crate) fn one_of_each_device(&self) -> Vec<u64> {
        let mut devices = Vec::new();
        let mut ids = Vec::new();
        for (id, node) in &self.by_id {
            if node.kind == libc::S_IFDIR && !devices.contains(&node.key.device) {
                devices.push(node.key.device);
                ids.push(*id);
            }
        }
        ids
    }

    /// The descriptor of a node. Good until the next call that opens one, unless the node is pinned.
    pub(crate) fn fd(&mut self, id: u64) -> Answer<RawFd> {
        self.fd_and_room(id, 0)
    }

    /// As above, and room for so many more.
    fn fd_and_room(&mut self, id: u64, room: usize) -> Answer<RawFd> {
        let node = self.by_id.get_mut(&id).ok_or(STALE)?;
        node.used = true;
        let fd = node.fd.as_ref().map(AsRawFd::as_raw_fd);
        match fd {
            Some(fd) if room == 0 => Ok(fd),
            Some(fd) => {
                self.make_room(room, id)?;
                Ok(fd)
            }
            None => self.find_again(id, room),
        }
    }

    /// Opens a node whose descriptor was closed, by way of the folders it lies in.
    fn find_again(&mut self, id: u64, room: usize) -> Answer<RawFd> {
        let mut way = vec![id];
        let mut at = id;
        let mut dir = loop {
            at = self.get(at)?.parent;
            if let Some(fd) = &self.get(at)?.fd {
                break fd.as_raw_fd();
            }
            // A guest may make a circle of what it does not look up anew.
            if way.len() >= DEEPEST {
                return Err(STALE);
            }
            way.push(at);
        };
        self.make_room(way.len() + room, at)?;
        for id in way.into_iter().rev() {
            let node = self.by_id.get_mut(&id).ok_or(STALE)?;
            let fd = open_at(dir, &node.name, NAME_ONLY, 0).map_err(|error| match error.0 {
                libc::EMFILE | libc::ENFILE => error,
                _ => STALE,
            })?;
            let found = stat(fd.as_raw_fd())?;
            let same = (found.key(), found.born(), found.kind());
            if same != (node.key, node.born, node.kind) {
                return Err(STALE);
            }
            dir = fd.as_raw_fd();
            node.fd = Some(fd);
            node.used = true;
            self.open += 1;
            self.closable.push_back(id);
        }
        Ok(dir)
    }

    /// Descriptors of two nodes, both good until the next call.
    pub(crate) fn two(&mut self, one: u64, other: u64) -> Answer<(RawFd, RawFd)> {
        let first = self.fd(one)?;
        self.pin(one);
        let second = self.fd(other);
        self.unpin(one);
        Ok((first, second?))
    }

    /// Keeps a node's descriptor open.
    pub(crate) fn pin(&mut self, id: u64) {
        if let Some(node) = self.by_id.get_mut(&id) {
            node.pins += 1;
        }
    }

    pub(crate) fn unpin(&mut self, id: u64) {
        if let Some(node) = self.by_id.get_mut(&id) {
            node.pins = node.pins.saturating_sub(1);
        }
    }

    /// Closes descriptors until there is room for `count` more; not that of `keep`.
    fn make_room(&mut self, count: usize, keep: u64) -> Answer<()> {
        // Each is looked at twice: the first time may only find out that it was used.
        let mut looks = 2 * self.closable.len();
        while self.open + count > self.most_open {
            if looks == 0 {
                return Err(Errno(libc::ENFILE));
            }
            looks -= 1;
            self.close_one(keep);
        }
        // Without an entry for each node that is gone.
        if self.closable.len() > 2 * self.open + 64 {
            let by_id = &self.by_id;
            let is_open = |id: &u64| by_id.get(id).is_some_and(|node| node.fd.is_some());
            self.closable.retain(is_open);
        }
        Ok(())
    }

    /// Looks at the oldest descriptor, and closes it if it was not used since the last look.
    fn close_one(&mut self, keep: u64) {
        let Some(id) = self.closable.pop_front() else {
            return;
        };
        let Some(node) = self.by_id.get_mut(&id).filter(|node| node.fd.is_some()) else {
            return;
        };
        // What has no time of birth can't be told from a later file of the same number.
        if node.used || node.pins > 0 || id == keep || node.born.is_none() {
            node.used = false;
            self.closable.push_back(id);
        } else {
            node.fd = None;
            self.open -= 1;
        }
    }

    /// Closes some descriptors of nodes, for others that the thread has none left for.
    pub(crate) fn give_way(&mut self) -> bool {
        const SOME: usize = 64;
        let before = self.open;
        for _ in 0..2 * self.closable.len() {
            self.close_one(ROOT);
            if before - self.open >= SOME {
                break;
            }
        }
        self.open < before
    }

    /// Finds a name in a folder: the node, which the guest is now told of once more, and what is known of it.
    pub(crate) fn look_up(&mut self, parent: u64, name: &CStr) -> Answer<(u64, Stat)> {
        let stat = stat_at(self.fd(parent)?, name)?;
        // Most that are looked up are known already, and need not be opened to be found out.
        if let Some(id) = self.known(&stat) {
            self.told(id, parent, name);
            return Ok((id, stat));
        }
        let dir = self.fd_and_room(parent, 1)?;
        let fd = match open_at(dir, name, NAME_ONLY, 0) {
            Err(Errno(libc::EMFILE)) if self.give_way() => {
                let dir = self.fd(parent)?;
                open_at(dir, name, NAME_ONLY, 0)?
            }
            other => other?,
        };
        // Another file may have taken the name since.
        let stat = crate::host::stat(fd.as_raw_fd())?;
        let id = self.enter(fd, &stat, parent, name)?;
        Ok((id, stat))
    }

    /// The node that a file is. While its descriptor is open, no other file can have the numbers.
    fn known(&self, stat: &Stat) -> Option<u64> {
        let id = self.by_key.get(&stat.key()).copied()?;
        self.by_id.get(&id)?.fd.is_some().then_some(id)
    }

    /// Counts that the guest is told of a node once more, by a name that it has now.
    fn told(&mut self, id: u64, parent: u64, name: &CStr) {
        let Some(node) = self.by_id.get_mut(&id) else {
            return;
        };
        node.lookups = node.lookups.saturating_add(1);
        node.used = true;
        if id != ROOT && (node.parent != parent || node.name.as_c_str() != name) {
            node.parent = parent;
            node.name = name.to_owned();
        }
    }

    /// Counts a file that the guest is about to be told of. `fd` names it.
    pub(crate) fn enter(
        &mut self,
        fd: OwnedFd,
        stat: &Stat,
        parent: u64,
        name: &CStr,
    ) -> Answer<u64> {
        if let Some(id) = self.known(stat) {
            self.told(id, parent, name);
            return Ok(id);
        }
        // One whose descriptor was closed may be gone, and its numbers be those of a new file.
        if let Some(id) = self.by_key.get(&stat.key()).copied()
            && let Some(node) = self.by_id.get_mut(&id)
            && (node.born, node.kind) == (stat.born(), stat.kind())
        {
            node.fd = Some(fd);
            self.open += 1;
            self.closable.push_back(id);
            self.told(id, parent, name);
            return Ok(id);
        }
        if self.by_id.len() >= MOST_NODES {
            return Err(Errno(libc::ENFILE));
        }
        // One is opened before it is known to be a new one.
        self.make_room(1, parent)?;
        let id = self.next;
        self.next += 1;
        self.insert(id, fd, stat, parent, name);
        self.open += 1;
        self.closable.push_back(id);
        Ok(id)
    }

    /// A name has come to stand for what another stood for.
    pub(crate) fn renamed(&mut self, parent: u64, name: &CStr) {
        // If it is gone again, it is found to be when it is looked for.
        let found = self.fd(parent).and_then(|dir| stat_at(dir, name));
        if let Ok(stat) = found
            && let Some(id) = self.by_key.get(&stat.key())
            && *id != ROOT
            && let Some(node) = self.by_id.get_mut(id)
        {
            node.parent = parent;
            node.name = name.to_owned();
        }
    }

    /// The guest has forgotten what it was told so many times.
    pub(crate) fn forget(&mut self, id: u64, count: u64) {
        let Some(node) = self.by_id.get_mut(&id).filter(|_| id != ROOT) else {
            return;
        };
        node.lookups = node.lookups.saturating_sub(count);
        if node.lookups > 0 {
            return;
        }
        if let Some(node) = self.by_id.remove(&id) {
            self.open -= usize::from(node.fd.is_some());
            if self.by_key.get(&node.key) == Some(&id) {
                self.by_key.remove(&node.key);
            }
        }
    }

    /// Forgets all but the root.
    pub(crate) fn clear(&mut self) {
        self.by_id.retain(|id, _| *id == ROOT);
        self.by_key.retain(|_, id| *id == ROOT);
        self.closable.clear();
        self.open = 1;
        if let Some(root) = self.by_id.get_mut(&ROOT) {
            root.pins = 0;
        }
    }

    pub(crate) fn seen(&self, id: u64) -> Option<Seen> {
        self.by_id.get(&id).and_then(|node| node.seen)
    }

    pub(crate) fn set_seen(&mut self, id: u64, seen: Option<Seen>) {
        if let Some(node) = self.by_id.get_mut(&id) {
            node.seen = seen;
        }
    }

    #[cfg(test)]
    pub(crate) fn keep_open(&mut self, most: usize) {
        self.most_open = most;
    }

    #[cfg(test)]
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.by_id.len(), self.open)
    }
}
