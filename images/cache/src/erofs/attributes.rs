//! Which extended attributes are kept once for many inodes, and how each inode refers to them.

use std::collections::{BTreeMap, HashMap};

use super::format::{BLOCK_LEN, RawXattr, encode_xattrs, xattrs_len};
use super::tree::{Inode, XattrSet};

/// An attribute goes to the shared area if so many inodes have it...
const LEAST_USERS: u32 = 3;
/// ...and it is small enough to be worth looking for.
const LARGEST_SHARED: usize = 1024;
/// The root lies behind the shared area, and its number has 16 bits of 32 bytes each: 2 MiB.
const LARGEST_AREA: usize = 1024 * 1024;
/// The count of references has eight bits.
const MOST_REFERENCES: usize = u8::MAX as usize;

/// The image's shared attributes.
#[derive(Debug, Default)]
pub(crate) struct SharedXattrs {
    ids: HashMap<RawXattr, u32>,
    /// The shared area, whole blocks.
    pub(crate) area: Vec<u8>,
}

impl SharedXattrs {
    pub(crate) fn collect(inodes: &[Inode]) -> SharedXattrs {
        // Sets are shared in memory, so that counting sets first is cheap.
        let mut sets: HashMap<&XattrSet, u32> = HashMap::new();
        for set in inodes.iter().filter_map(|inode| inode.xattrs.as_ref()) {
            *sets.entry(set).or_default() += 1;
        }
        let mut users: BTreeMap<&RawXattr, u32> = BTreeMap::new();
        for (set, count) in sets {
            for xattr in set.iter() {
                *users.entry(xattr).or_default() += count;
            }
        }
        let mut shared = SharedXattrs::default();
        for (xattr, count) in users {
            if count < LEAST_USERS || xattr.len() > LARGEST_SHARED {
                continue;
            }
            let used = shared.area.len() % BLOCK_LEN;
            if used + xattr.len() > BLOCK_LEN {
                shared.pad();
            }
            let at = shared.area.len();
            // What does not fit stays with its inodes.
            let Ok(id) = u32::try_from(at / 4) else { break };
            if at + xattr.len() > LARGEST_AREA {
                break;
            }
            shared.area.resize(at + xattr.len(), 0);
            xattr.encode(&mut shared.area[at..]);
            shared.ids.insert(xattr.clone(), id);
        }
        shared.pad();
        shared
    }

    fn pad(&mut self) {
        let len = self.area.len().next_multiple_of(BLOCK_LEN);
        self.area.resize(len, 0);
    }

    /// References and own attributes of a set.
    fn split<'a>(&self, set: &'a XattrSet) -> (Vec<u32>, Vec<&'a RawXattr>) {
        let mut references = Vec::new();
        let mut own = Vec::new();
        for xattr in set.iter() {
            match self.ids.get(xattr) {
                Some(id) if references.len() < MOST_REFERENCES => references.push(*id),
                _ => own.push(xattr),
            }
        }
        (references, own)
    }

    /// Bytes that an inode's attributes take behind it.
    pub(crate) fn len_of(&self, inode: &Inode) -> usize {
        inode.xattrs.as_ref().map_or(0, |set| {
            let (references, own) = self.split(set);
            xattrs_len(references.len(), own.iter().map(|x| x.len()).sum())
        })
    }

    pub(crate) fn encode(&self, inode: &Inode, out: &mut [u8]) {
        if let Some(set) = &inode.xattrs {
            let (references, own) = self.split(set);
            encode_xattrs(&references, own.into_iter(), out);
        }
    }
}
