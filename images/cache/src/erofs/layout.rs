//! Where everything goes: the whole image is planned before its first byte is written, so its size is known
//! beforehand and its parts can be written in any order, by several threads.
//!
//! ```text
//! block 0 │ shared attributes │ group │ group │ blocks of a large file │ group │ ...
//!                               group = inodes with their tails │ data blocks of the same inodes
//! ```
//!
//! Directories come first, then everything else in the order of the directories, so that an inode, its neighbours
//! and their data lie close together.

use std::collections::HashMap;

use super::attributes::SharedXattrs;
use super::directory;
use super::error::ImageError;
use super::format::{
    BLOCK, BLOCK_BITS, BLOCK_LEN, COMPACT_LEN, DataLayout, EXTENDED_LEN, HOLE, SLOT,
};
use super::tree::{Content, FileContent, Inode, InodeIndex, Run, Tree};

/// A group is closed when it has this much.
const GROUP_LEN: u64 = 1024 * 1024;
/// Files with more data than this get segments of their own.
const LARGE_FILE: u64 = 512 * 1024;
/// The longest segment of a large file.
const FILE_SEGMENT: u64 = 4 * 1024 * 1024;
/// How many blocks with room left are remembered.
const OPEN_BLOCKS: usize = 16;
/// Bits of a sparse file's smallest chunk: 64 KiB.
const CHUNK_BITS: u8 = 16;
/// A sparse file's chunk table has at most so many entries, if larger chunks can do that.
const MOST_CHUNKS: u64 = 64 * 1024;
/// The chunk size in the inode has five bits, counted in blocks.
const MOST_CHUNK_BITS: u8 = BLOCK_BITS + 31;

/// Where an inode and its content are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    /// Of the inode, in bytes from the image's start.
    pub(crate) at: u64,
    pub(crate) extended: bool,
    pub(crate) layout: DataLayout,
    pub(crate) xattr_len: usize,
    /// Of the content, in bytes.
    pub(crate) size: u64,
    /// The first block of the content.
    pub(crate) block: u32,
}

impl Place {
    pub(crate) fn nid(&self) -> u64 {
        self.at / SLOT
    }

    pub(crate) fn inode_len(&self) -> usize {
        if self.extended {
            EXTENDED_LEN
        } else {
            COMPACT_LEN
        }
    }

    /// Bytes of content behind the inode.
    pub(crate) fn tail_len(&self) -> usize {
        match self.layout {
            DataLayout::Inline => (self.size % BLOCK) as usize,
            DataLayout::Plain | DataLayout::Chunked => 0,
        }
    }

    /// Whole blocks of content.
    pub(crate) fn blocks(&self) -> u64 {
        match self.layout {
            DataLayout::Inline => self.size / BLOCK,
            DataLayout::Plain => self.size.div_ceil(BLOCK),
            DataLayout::Chunked => 0,
        }
    }
}

/// A sparse file's chunks.
#[derive(Debug)]
pub(crate) struct Chunks {
    /// As the inode has it: the chunk size's bits beyond a block's.
    pub(crate) format: u32,
    /// Each chunk's first block, or [`HOLE`].
    pub(crate) table: Vec<u32>,
}

/// A contiguous part of the image.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) content: SegmentContent,
}

#[derive(Debug)]
pub(crate) enum SegmentContent {
    SharedXattrs,
    /// Inodes and the content of those that are not large.
    Group(Vec<InodeIndex>),
    /// Part of a large file, from this offset.
    File {
        inode: InodeIndex,
        from: u64,
    },
}

/// The planned image.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) places: Vec<Place>,
    pub(crate) chunks: HashMap<InodeIndex, Chunks>,
    pub(crate) shared: SharedXattrs,
    pub(crate) segments: Vec<Segment>,
    /// The modification time of compact inodes.
    pub(crate) epoch: (i64, u32),
    /// Blocks in all.
    pub(crate) blocks: u64,
    pub(crate) xattr_block: u32,
}

impl Layout {
    pub(crate) fn new(tree: &Tree) -> Result<Layout, ImageError> {
        let shared = SharedXattrs::collect(&tree.inodes);
        let epoch = most_common_mtime(&tree.inodes);
        let mut planner = Planner {
            tree,
            next_block: 1,
            segments: Vec::new(),
            places: Vec::with_capacity(tree.inodes.len()),
            chunks: HashMap::new(),
        };
        let xattr_block = planner.next_block;
        if !shared.area.is_empty() {
            planner.segment(shared.area.len() as u64, SegmentContent::SharedXattrs);
        }
        for inode in &tree.inodes {
            planner
                .places
                .push(shape(inode, epoch, shared.len_of(inode)));
        }
        planner.groups()?;
        planner.never_end_with_an_inode();
        let Planner {
            next_block,
            segments,
            places,
            chunks,
            ..
        } = planner;
        if next_block >= u64::from(HOLE) {
            return Err(ImageError::TooLarge { blocks: next_block });
        }
        Ok(Layout {
            places,
            chunks,
            shared,
            segments,
            epoch,
            blocks: next_block,
            xattr_block: block_number(xattr_block),
        })
    }
}

/// The inode's form and its content's layout; no place yet.
fn shape(inode: &Inode, epoch: (i64, u32), xattr_len: usize) -> Place {
    let size = match &inode.content {
        Content::Directory(entries) => directory::len(entries),
        Content::File(file) => file.size,
        Content::Symlink(target) => target.len() as u64,
        _ => 0,
    };
    let compact = (inode.mtime, inode.mtime_nsec) == epoch
        && inode.uid <= u32::from(u16::MAX)
        && inode.gid <= u32::from(u16::MAX)
        && inode.nlink <= u32::from(u16::MAX)
        && size <= u64::from(u32::MAX);
    let mut place = Place {
        at: 0,
        extended: !compact,
        layout: DataLayout::Plain,
        xattr_len,
        size,
        block: 0,
    };
    let before_tail = place.inode_len() + xattr_len;
    let tail = (size % BLOCK) as usize;
    if let Content::File(FileContent { runs: Some(_), .. }) = &inode.content {
        place.layout = DataLayout::Chunked;
    } else if tail > 0 && before_tail + tail <= BLOCK_LEN {
        place.layout = DataLayout::Inline;
    }
    place
}

struct Planner<'a> {
    tree: &'a Tree,
    next_block: u64,
    segments: Vec<Segment>,
    places: Vec<Place>,
    chunks: HashMap<InodeIndex, Chunks>,
}

impl Planner<'_> {
    /// Appends a segment of `len` bytes and says which block it starts with.
    fn segment(&mut self, len: u64, content: SegmentContent) -> u64 {
        let block = self.next_block;
        self.segments.push(Segment {
            offset: block * BLOCK,
            len,
            content,
        });
        self.next_block += len / BLOCK;
        block
    }

    fn groups(&mut self) -> Result<(), ImageError> {
        let mut group = Group::default();
        for inode in 0..self.tree.inodes.len() {
            let place = &mut self.places[inode];
            let mut behind = place.xattr_len + place.tail_len();
            let large = place.layout == DataLayout::Chunked || place.blocks() * BLOCK > LARGE_FILE;
            if let Content::File(FileContent {
                size,
                runs: Some(runs),
                ..
            }) = &self.tree.inodes[inode].content
            {
                let chunks = Chunks::plan(*size, runs);
                behind = place.xattr_len.next_multiple_of(4) + 4 * chunks.table.len();
                self.chunks.insert(inode, chunks);
            }
            // Relative to the group for now.
            place.at = group.packer.place(place.inode_len() + behind);
            group.inodes.push(inode);
            let is_file = matches!(self.tree.inodes[inode].content, Content::File(_));
            if large && is_file {
                group.large.push(inode);
            } else {
                place.block = block_number(group.data_blocks);
                group.data_blocks += place.blocks();
            }
            if (group.packer.blocks() + group.data_blocks) * BLOCK >= GROUP_LEN {
                self.close(std::mem::take(&mut group))?;
            }
        }
        self.close(group)
    }

    /// `fsck.erofs` reads the header of attributes behind every inode, even of those that have none.
    fn never_end_with_an_inode(&mut self) {
        let end = self.next_block * BLOCK;
        let ends_it = |place: &Place| place.at + place.inode_len() as u64 == end;
        if self.places.iter().any(ends_it) {
            self.segment(BLOCK, SegmentContent::Group(Vec::new()));
        }
    }

    /// Gives a group its place in the image, and its large files theirs behind it.
    fn close(&mut self, group: Group) -> Result<(), ImageError> {
        if group.inodes.is_empty() {
            return Ok(());
        }
        let metadata = group.packer.blocks();
        let first = self.next_block;
        for inode in &group.inodes {
            let place = &mut self.places[*inode];
            place.at += first * BLOCK;
            place.block = match place.blocks() {
                0 => 0,
                _ => block_number(first + metadata + u64::from(place.block)),
            };
        }
        let len = (metadata + group.data_blocks) * BLOCK;
        self.segment(len, SegmentContent::Group(group.inodes));
        for inode in group.large {
            match self.chunks.remove(&inode) {
                None => {
                    let place = self.places[inode];
                    let block = self.file(inode, 0, place.blocks() * BLOCK);
                    self.places[inode].block = block_number(block);
                }
                Some(mut chunks) => {
                    chunks.assign(self.places[inode].size, |from, len| {
                        self.file(inode, from, len)
                    });
                    self.chunks.insert(inode, chunks);
                }
            }
        }
        if self.next_block >= u64::from(HOLE) {
            return Err(ImageError::TooLarge {
                blocks: self.next_block,
            });
        }
        Ok(())
    }

    /// Segments for `len` bytes of a file, whole blocks; says which block they start with.
    fn file(&mut self, inode: InodeIndex, from: u64, len: u64) -> u64 {
        let first = self.next_block;
        let mut done = 0;
        while done < len {
            let part = (len - done).min(FILE_SEGMENT);
            let from = from + done;
            self.segment(part, SegmentContent::File { inode, from });
            done += part;
        }
        first
    }
}

#[derive(Default)]
struct Group {
    packer: Packer,
    inodes: Vec<InodeIndex>,
    large: Vec<InodeIndex>,
    data_blocks: u64,
}

/// Packs inodes with what is behind them into blocks. What fits in a block never crosses one: the kernel
/// demands it of tails, and it saves it work for the rest.
#[derive(Default)]
struct Packer {
    blocks: u64,
    /// Blocks with room: number and bytes used.
    open: Vec<(u64, usize)>,
}

impl Packer {
    fn blocks(&self) -> u64 {
        self.blocks
    }

    /// A place for `len` bytes.
    fn place(&mut self, len: usize) -> u64 {
        let len = len.next_multiple_of(SLOT as usize);
        if let Some(index) = self
            .open
            .iter()
            .position(|(_, used)| used + len <= BLOCK_LEN)
        {
            let (block, used) = &mut self.open[index];
            let at = *block * BLOCK + *used as u64;
            *used += len;
            if *used == BLOCK_LEN {
                self.open.remove(index);
            }
            return at;
        }
        let block = self.blocks;
        self.blocks += (len as u64).div_ceil(BLOCK);
        let used = len % BLOCK_LEN;
        if used != 0 {
            if self.open.len() == OPEN_BLOCKS {
                self.open.remove(0);
            }
            self.open.push((self.blocks - 1, used));
        }
        block * BLOCK
    }
}

impl Chunks {
    /// Chooses the chunk size and marks the chunks that have data; their blocks come later.
    fn plan(size: u64, runs: &[Run]) -> Chunks {
        let mut bits = CHUNK_BITS;
        while bits < MOST_CHUNK_BITS && size.div_ceil(1 << bits) > MOST_CHUNKS {
            bits += 1;
        }
        let count = size.div_ceil(1 << bits);
        // At most `MOST_CHUNKS`, but for sizes beyond what any file system holds.
        let mut table = vec![HOLE; usize::try_from(count).unwrap_or(usize::MAX)];
        for run in runs.iter().filter(|run| run.start < run.end) {
            for chunk in run.start >> bits..=(run.end - 1) >> bits {
                if let Some(entry) = table.get_mut(chunk as usize) {
                    *entry = 0;
                }
            }
        }
        Chunks {
            format: u32::from(bits - BLOCK_BITS),
            table,
        }
    }

    /// Gives neighbouring chunks neighbouring blocks. `place` finds room for bytes from an offset on.
    fn assign(&mut self, size: u64, mut place: impl FnMut(u64, u64) -> u64) {
        let chunk = BLOCK << self.format;
        let mut index = 0;
        while index < self.table.len() {
            if self.table[index] == HOLE {
                index += 1;
                continue;
            }
            let run = self.table[index..]
                .iter()
                .take_while(|entry| **entry != HOLE)
                .count();
            let from = index as u64 * chunk;
            let end = (from + run as u64 * chunk).min(size.next_multiple_of(BLOCK));
            let first = place(from, end - from);
            for (i, entry) in self.table[index..index + run].iter_mut().enumerate() {
                *entry = block_number(first + i as u64 * (chunk / BLOCK));
            }
            index += run;
        }
    }
}

/// Block numbers beyond 32 bits end in [`ImageError::TooLarge`] before anything is written.
fn block_number(block: u64) -> u32 {
    u32::try_from(block).unwrap_or(HOLE)
}

/// Inodes that share the image's most common time need no time of their own, and are half as long.
fn most_common_mtime(inodes: &[Inode]) -> (i64, u32) {
    let mut counts: HashMap<(i64, u32), u64> = HashMap::new();
    for inode in inodes {
        *counts.entry((inode.mtime, inode.mtime_nsec)).or_default() += 1;
    }
    counts
        .into_iter()
        .max_by_key(|(time, count)| (*count, *time))
        .map_or((0, 0), |(time, _)| time)
}
