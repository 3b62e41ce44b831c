//! Writing a planned image: several threads take segments, fill them, hash them and write them, in whatever
//! order they come. Memory is bounded by a segment per thread.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kiln_store::SegmentDigest;
use rustix::io::Errno;

use super::directory;
use super::error::ImageError;
use super::format::{BLOCK, BLOCK_LEN, DataLayout, RawInode, SLOT, Superblock, put32};
use super::layout::{Layout, Place, Segment, SegmentContent};
use super::source::{Layers, SourceDir, open_file};
use super::tree::{Content, FileContent, Inode, InodeIndex, Tree};

/// A large file is read, hashed and written in pieces that stay in a core's cache.
const PIECE: usize = 256 * 1024;

pub(crate) struct Writer<'a> {
    pub(crate) tree: &'a Tree,
    pub(crate) layout: &'a Layout,
    pub(crate) layers: &'a Layers,
    pub(crate) out: &'a OwnedFd,
}

impl Writer<'_> {
    /// Writes the whole image; what is returned covers it from its first byte to its last.
    pub(crate) fn write(&self, threads: usize) -> Result<Vec<SegmentDigest>, ImageError> {
        let segments = &self.layout.segments;
        let next = AtomicUsize::new(0);
        let stop = AtomicBool::new(false);
        let failed = Mutex::new(None);
        let digests = Mutex::new(vec![[0; 32]; segments.len()]);
        let run = || {
            let mut worker = Worker::new(self);
            while !stop.load(Ordering::Relaxed) {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(segment) = segments.get(index) else {
                    break;
                };
                match worker.write(segment) {
                    Ok(hash) => {
                        digests.lock().unwrap_or_else(PoisonError::into_inner)[index] = hash;
                    }
                    Err(error) => {
                        stop.store(true, Ordering::Relaxed);
                        let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                        failed.get_or_insert(error);
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..threads.min(segments.len()) {
                scope.spawn(run);
            }
            run();
        });
        if let Some(error) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        let digests = digests.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut all = Vec::with_capacity(segments.len() + 1);
        all.push(SegmentDigest {
            len: BLOCK,
            hash: [0; 32],
        });
        all.extend(
            segments
                .iter()
                .zip(digests)
                .map(|(segment, hash)| SegmentDigest {
                    len: segment.len,
                    hash,
                }),
        );
        // The rest's digest names the image, so that equal trees give equal images.
        let superblock = self.superblock(uuid(&all)).encode();
        write_all(self.out, &superblock, 0)?;
        all[0].hash = *blake3::hash(&superblock).as_bytes();
        Ok(all)
    }

    fn superblock(&self, uuid: [u8; 16]) -> Superblock {
        let layout = self.layout;
        Superblock {
            // The root is the first inode of the first group, and the shared attributes before it are bounded.
            root_nid: u16::try_from(layout.places[0].nid()).unwrap_or(u16::MAX),
            inodes: self.tree.inodes.len() as u64,
            epoch: layout.epoch.0,
            epoch_nsec: layout.epoch.1,
            blocks: u32::try_from(layout.blocks).unwrap_or(u32::MAX),
            xattr_block: layout.xattr_block,
            chunked: !layout.chunks.is_empty(),
            uuid,
        }
    }
}

/// The first bytes of a digest over the image's segments, marked as a UUID of a private kind.
fn uuid(segments: &[SegmentDigest]) -> [u8; 16] {
    let digest = digest(segments);
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&digest[..16]);
    uuid[6] = (uuid[6] & 0x0f) | 0x80;
    uuid[8] = (uuid[8] & 0x3f) | 0x80;
    uuid
}

/// What identifies an image: the digest of its segments' lengths and digests.
pub(crate) fn digest(segments: &[SegmentDigest]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for segment in segments {
        hasher.update(&segment.len.to_le_bytes());
        hasher.update(&segment.hash);
    }
    *hasher.finalize().as_bytes()
}

struct Worker<'a> {
    writer: &'a Writer<'a>,
    buffer: Vec<u8>,
    /// The directory that was needed last: files come in the order of their directories.
    open: Option<(Arc<SourceDir>, OwnedFd)>,
}

impl<'a> Worker<'a> {
    fn new(writer: &'a Writer<'a>) -> Worker<'a> {
        Worker {
            writer,
            buffer: Vec::new(),
            open: None,
        }
    }

    fn write(&mut self, segment: &Segment) -> Result<[u8; 32], ImageError> {
        let writer = self.writer;
        let bytes = match &segment.content {
            SegmentContent::File { inode, from } => {
                return self.copy_file(segment, *inode, *from);
            }
            SegmentContent::SharedXattrs => &writer.layout.shared.area[..],
            SegmentContent::Group(inodes) => {
                let mut buffer = std::mem::take(&mut self.buffer);
                buffer.clear();
                buffer.resize(length(segment.len), 0);
                let result = inodes
                    .iter()
                    .try_for_each(|inode| self.fill(*inode, segment.offset, &mut buffer));
                self.buffer = buffer;
                result?;
                &self.buffer[..]
            }
        };
        write_all(writer.out, bytes, segment.offset)?;
        Ok(*blake3::hash(bytes).as_bytes())
    }

    /// Puts an inode, what is behind it and its blocks into its group's buffer.
    fn fill(
        &mut self,
        index: InodeIndex,
        group_offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), ImageError> {
        let writer = self.writer;
        let inode = &writer.tree.inodes[index];
        let place = &writer.layout.places[index];
        let at = length(place.at - group_offset);
        raw_inode(writer.layout, inode, place, index).encode(&mut buffer[at..]);
        let xattrs_at = at + place.inode_len();
        let behind = xattrs_at + place.xattr_len;
        writer
            .layout
            .shared
            .encode(inode, &mut buffer[xattrs_at..behind]);

        if let Some(chunks) = writer.layout.chunks.get(&index) {
            for (i, block) in chunks.table.iter().enumerate() {
                put32(buffer, behind + 4 * i, *block);
            }
            return Ok(());
        }
        // A large file's blocks have segments of their own; its tail is here all the same.
        let data_at = u64::from(place.block) * BLOCK;
        let here = place.blocks() > 0
            && data_at >= group_offset
            && data_at < group_offset + buffer.len() as u64;
        let data_len = if here {
            length(place.blocks() * BLOCK)
        } else {
            0
        };
        let data_start = if here {
            length(data_at - group_offset)
        } else {
            buffer.len()
        };
        let (metadata, data) = buffer.split_at_mut(data_start);
        let data = &mut data[..data_len];
        let tail = &mut metadata[behind..behind + place.tail_len()];
        match &inode.content {
            Content::Directory(entries) => directory::encode(entries, data, tail, |entry| {
                let content = &writer.tree.inodes[entry.inode].content;
                (writer.layout.places[entry.inode].nid(), content.file_type())
            }),
            Content::Symlink(target) => {
                let out = if tail.is_empty() { data } else { tail };
                out[..target.len()].copy_from_slice(target);
            }
            Content::File(file) if !(data.is_empty() && tail.is_empty()) => {
                self.read_small(inode, file, place, data, tail)?;
            }
            _ => {}
        }
        Ok(())
    }

    /// Reads what of a file goes into its group: all of it, or the tail of a large one.
    fn read_small(
        &mut self,
        inode: &Inode,
        file: &FileContent,
        place: &Place,
        data: &mut [u8],
        tail: &mut [u8],
    ) -> Result<(), ImageError> {
        let fd = self.open(file)?;
        if !data.is_empty() {
            // Without a tail, the last block is not full.
            let len = data.len().min(length(file.size));
            self.read_at(&fd, file, &mut data[..len], 0)?;
        }
        if !tail.is_empty() {
            self.read_at(&fd, file, tail, place.blocks() * BLOCK)?;
        }
        self.check_unchanged(&fd, inode, file)
    }

    /// Copies part of a large file, and zeroes to the end of its last block.
    fn copy_file(
        &mut self,
        segment: &Segment,
        index: InodeIndex,
        from: u64,
    ) -> Result<[u8; 32], ImageError> {
        let inode = &self.writer.tree.inodes[index];
        let Content::File(file) = &inode.content else {
            return Ok(*blake3::hash(&[]).as_bytes());
        };
        let fd = self.open(file)?;
        let mut hasher = blake3::Hasher::new();
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(PIECE, 0);
        let mut done = 0;
        while done < segment.len {
            let len = length((segment.len - done).min(PIECE as u64));
            let content = length((file.size.saturating_sub(from + done)).min(len as u64));
            self.read_at(&fd, file, &mut buffer[..content], from + done)?;
            buffer[content..len].fill(0);
            hasher.update(&buffer[..len]);
            write_all(self.writer.out, &buffer[..len], segment.offset + done)?;
            done += len as u64;
        }
        self.buffer = buffer;
        self.check_unchanged(&fd, inode, file)?;
        Ok(*hasher.finalize().as_bytes())
    }

    fn open(&mut self, file: &FileContent) -> Result<OwnedFd, ImageError> {
        let layers = self.writer.layers;
        let failed = |e: Errno| layers.read_error(&file.dir, &file.name, e);
        let dir = match &self.open {
            Some((dir, fd)) if Arc::ptr_eq(dir, &file.dir) => fd,
            _ => {
                let fd = layers.open_dir(&file.dir).map_err(failed)?;
                &self.open.insert((Arc::clone(&file.dir), fd)).1
            }
        };
        open_file(dir.as_fd(), &file.name).map_err(failed)
    }

    fn read_at(
        &self,
        fd: &OwnedFd,
        file: &FileContent,
        mut out: &mut [u8],
        mut at: u64,
    ) -> Result<(), ImageError> {
        while !out.is_empty() {
            match rustix::io::pread(fd, &mut *out, at) {
                Ok(0) => return Err(self.changed(file)),
                Ok(read) => {
                    out = &mut out[read..];
                    at += read as u64;
                }
                Err(Errno::INTR) => {}
                Err(e) => return Err(self.writer.layers.read_error(&file.dir, &file.name, e)),
            }
        }
        Ok(())
    }

    /// A layer stands still; if it does not, half of one state and half of another must not be kept.
    fn check_unchanged(
        &self,
        fd: &OwnedFd,
        inode: &Inode,
        file: &FileContent,
    ) -> Result<(), ImageError> {
        let stat = rustix::fs::fstat(fd)
            .map_err(|e| self.writer.layers.read_error(&file.dir, &file.name, e))?;
        let same = stat.st_size.unsigned_abs() == file.size
            && stat.st_mtime == inode.mtime
            && u32::try_from(stat.st_mtime_nsec) == Ok(inode.mtime_nsec);
        if same {
            Ok(())
        } else {
            Err(self.changed(file))
        }
    }

    fn changed(&self, file: &FileContent) -> ImageError {
        ImageError::Changed {
            path: self.writer.layers.path(&file.dir, &file.name),
        }
    }
}

fn raw_inode(layout: &Layout, inode: &Inode, place: &Place, index: InodeIndex) -> RawInode {
    let union = match (&inode.content, place.layout) {
        (Content::CharDevice(device) | Content::BlockDevice(device), _) => *device,
        (_, DataLayout::Chunked) => layout.chunks.get(&index).map_or(0, |chunks| chunks.format),
        _ => place.block,
    };
    RawInode {
        extended: place.extended,
        layout: place.layout,
        xattr_len: place.xattr_len,
        mode: inode.mode,
        nlink: inode.nlink,
        size: place.size,
        union,
        // 32 bits reach as far as block numbers: an inode takes 32 bytes at least.
        ino: u32::try_from(place.at / SLOT).unwrap_or(0),
        uid: inode.uid,
        gid: inode.gid,
        mtime: inode.mtime,
        mtime_nsec: inode.mtime_nsec,
    }
}

fn write_all(out: &OwnedFd, mut bytes: &[u8], mut at: u64) -> Result<(), ImageError> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(out, bytes, at) {
            Ok(0) => return Err(ImageError::Write(Errno::IO.into())),
            Ok(written) => {
                bytes = &bytes[written..];
                at += written as u64;
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err(ImageError::Write(e.into())),
        }
    }
    Ok(())
}

/// A length of something in memory. kiln runs on 64-bit machines only.
fn length(len: u64) -> usize {
    const _: () = assert!(usize::BITS >= u64::BITS);
    len as usize
}

const _: () = assert!(PIECE.is_multiple_of(BLOCK_LEN));
