//! What EROFS looks like on disk, as far as kiln writes it: superblock, inodes, directory entries and
//! extended attributes, all little-endian.
//!
//! Owns the encoding of single structures; where they go is decided by [`super::layout`].

/// Blocks, and so the page cache's unit in the guest.
pub(crate) const BLOCK: u64 = 4096;
/// The same, for buffers in memory.
pub(crate) const BLOCK_LEN: usize = 4096;
pub(crate) const BLOCK_BITS: u8 = 12;
/// An inode's number is its position in units of this many bytes.
pub(crate) const SLOT: u64 = 32;
pub(crate) const COMPACT_LEN: usize = 32;
pub(crate) const EXTENDED_LEN: usize = 64;
pub(crate) const DIRENT_LEN: usize = 12;
/// A chunk without data.
pub(crate) const HOLE: u32 = u32::MAX;

const MAGIC: u32 = 0xE0F5_E1E2;
const SUPER_OFFSET: usize = 1024;
const CHECKSUM_OFFSET: usize = SUPER_OFFSET + 4;
const COMPAT_CHECKSUM: u32 = 0x1;
const COMPAT_MTIME: u32 = 0x2;
const INCOMPAT_CHUNKED: u32 = 0x4;
const XATTR_HEADER_LEN: usize = 12;

const _: () = assert!(BLOCK == 1 << BLOCK_BITS && BLOCK_LEN == 1 << BLOCK_BITS);
// The root's number has 16 bits, so it must lie near the image's start.
const _: () = assert!(BLOCK / SLOT <= 0xffff);

/// How a file's content is found from its inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DataLayout {
    /// Whole blocks, one after another.
    Plain = 0,
    /// Whole blocks, and the rest right behind the inode.
    Inline = 2,
    /// Chunks of equal size, each anywhere or nowhere.
    Chunked = 4,
}

/// A directory entry's type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileType {
    Regular = 1,
    Directory = 2,
    CharDevice = 3,
    BlockDevice = 4,
    Fifo = 5,
    Socket = 6,
    Symlink = 7,
}

/// An inode's fields. Which of the two forms it takes is the caller's choice.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RawInode {
    pub(crate) extended: bool,
    pub(crate) layout: DataLayout,
    /// Bytes of extended attributes behind the inode.
    pub(crate) xattr_len: usize,
    pub(crate) mode: u16,
    pub(crate) nlink: u32,
    pub(crate) size: u64,
    /// First data block, device number, or chunk format.
    pub(crate) union: u32,
    pub(crate) ino: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: i64,
    pub(crate) mtime_nsec: u32,
}

/// Bytes that extended attributes take behind an inode can be at most this many.
pub(crate) const XATTR_MAX_LEN: usize = XATTR_HEADER_LEN + 4 * (u16::MAX as usize - 1);

impl RawInode {
    /// Writes the inode to the start of `out`.
    pub(crate) fn encode(&self, out: &mut [u8]) {
        let format = u16::from(self.extended) | ((self.layout as u16) << 1);
        put16(out, 0, format);
        put16(out, 2, xattr_count(self.xattr_len));
        put16(out, 4, self.mode);
        if self.extended {
            put64(out, 8, self.size);
            put32(out, 16, self.union);
            put32(out, 20, self.ino);
            put32(out, 24, self.uid);
            put32(out, 28, self.gid);
            out[32..40].copy_from_slice(&self.mtime.to_le_bytes());
            put32(out, 40, self.mtime_nsec);
            put32(out, 44, self.nlink);
        } else {
            put16(out, 6, low16(self.nlink));
            put32(out, 8, low32(self.size));
            put32(out, 16, self.union);
            put32(out, 20, self.ino);
            put16(out, 24, low16(self.uid));
            put16(out, 26, low16(self.gid));
        }
    }
}

/// The inode's count field for attributes of `len` bytes in all, header included.
fn xattr_count(len: usize) -> u16 {
    match len.checked_sub(XATTR_HEADER_LEN) {
        None => 0,
        Some(rest) => low16(low32(rest as u64 / 4)) + 1,
    }
}

// Callers choose the form in which the value fits: these cut nothing off.
fn low16(value: u32) -> u16 {
    debug_assert!(value <= u32::from(u16::MAX));
    (value & 0xffff) as u16
}

fn low32(value: u64) -> u32 {
    debug_assert!(value <= u64::from(u32::MAX));
    (value & 0xffff_ffff) as u32
}

pub(crate) fn put16(out: &mut [u8], at: usize, value: u16) {
    out[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

pub(crate) fn put32(out: &mut [u8], at: usize, value: u32) {
    out[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

pub(crate) fn put64(out: &mut [u8], at: usize, value: u64) {
    out[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// A directory entry, except for its name, at `at` of its block.
pub(crate) fn put_dirent(
    block: &mut [u8],
    at: usize,
    nid: u64,
    name_offset: u16,
    file_type: FileType,
) {
    put64(block, at, nid);
    put16(block, at + 8, name_offset);
    block[at + 10] = file_type as u8;
}

/// One extended attribute, as it lies on disk but for padding.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct RawXattr {
    /// Which prefix the name's start is replaced by.
    pub(crate) index: u8,
    /// The name without its prefix.
    pub(crate) suffix: Box<[u8]>,
    pub(crate) value: Box<[u8]>,
}

impl RawXattr {
    /// Splits a full name. `None` if EROFS has no prefix for it.
    pub(crate) fn new(name: &[u8], value: &[u8]) -> Option<RawXattr> {
        // The two ACLs come with their whole name as the prefix.
        const PREFIXES: [(&[u8], u8); 5] = [
            (b"user.", 1),
            (b"system.posix_acl_access", 2),
            (b"system.posix_acl_default", 3),
            (b"trusted.", 4),
            (b"security.", 6),
        ];
        let (prefix, index) = PREFIXES.iter().find(|(prefix, index)| match index {
            2 | 3 => name == *prefix,
            _ => name.starts_with(prefix),
        })?;
        let suffix = &name[prefix.len()..];
        if u8::try_from(suffix.len()).is_err() || u16::try_from(value.len()).is_err() {
            return None;
        }
        Some(RawXattr {
            index: *index,
            suffix: suffix.into(),
            value: value.into(),
        })
    }

    /// Bytes on disk, padding included.
    pub(crate) fn len(&self) -> usize {
        (4 + self.suffix.len() + self.value.len()).next_multiple_of(4)
    }

    pub(crate) fn encode(&self, out: &mut [u8]) {
        // `new` admits only lengths that fit.
        out[0] = (self.suffix.len() & 0xff) as u8;
        out[1] = self.index;
        put16(out, 2, low16(low32(self.value.len() as u64)));
        let value_at = 4 + self.suffix.len();
        out[4..value_at].copy_from_slice(&self.suffix);
        out[value_at..value_at + self.value.len()].copy_from_slice(&self.value);
    }
}

/// Length of an inode's attributes: `shared` references and `inline` bytes of entries.
pub(crate) fn xattrs_len(shared: usize, inline: usize) -> usize {
    if shared == 0 && inline == 0 {
        0
    } else {
        XATTR_HEADER_LEN + 4 * shared + inline
    }
}

/// Writes an inode's attributes: references to shared ones first, then its own.
pub(crate) fn encode_xattrs<'a>(
    shared: &[u32],
    inline: impl Iterator<Item = &'a RawXattr>,
    out: &mut [u8],
) {
    out[4] = (shared.len() & 0xff) as u8;
    let mut at = XATTR_HEADER_LEN;
    for id in shared {
        put32(out, at, *id);
        at += 4;
    }
    for xattr in inline {
        xattr.encode(&mut out[at..at + xattr.len()]);
        at += xattr.len();
    }
}

/// What the superblock says.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Superblock {
    pub(crate) root_nid: u16,
    pub(crate) inodes: u64,
    /// The modification time of every compact inode.
    pub(crate) epoch: i64,
    pub(crate) epoch_nsec: u32,
    pub(crate) blocks: u32,
    pub(crate) xattr_block: u32,
    pub(crate) chunked: bool,
    pub(crate) uuid: [u8; 16],
}

impl Superblock {
    /// The image's first block.
    pub(crate) fn encode(&self) -> [u8; BLOCK_LEN] {
        let mut block = [0; BLOCK_LEN];
        let sb = &mut block[SUPER_OFFSET..];
        put32(sb, 0, MAGIC);
        put32(sb, 8, COMPAT_CHECKSUM | COMPAT_MTIME);
        sb[12] = BLOCK_BITS;
        put16(sb, 14, self.root_nid);
        put64(sb, 16, self.inodes);
        sb[24..32].copy_from_slice(&self.epoch.to_le_bytes());
        put32(sb, 32, self.epoch_nsec);
        put32(sb, 36, self.blocks);
        // Inode numbers count from the image's start: no metadata offset.
        put32(sb, 40, 0);
        put32(sb, 44, self.xattr_block);
        sb[48..64].copy_from_slice(&self.uuid);
        sb[64..72].copy_from_slice(b"kiln-img");
        put32(sb, 80, if self.chunked { INCOMPAT_CHUNKED } else { 0 });
        let checksum = crc32c(&block[SUPER_OFFSET..]);
        put32(&mut block, CHECKSUM_OFFSET, checksum);
        block
    }
}

/// CRC-32C without the final inversion, as the kernel computes it for EROFS.
fn crc32c(data: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82F6_3B78;
    data.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (POLYNOMIAL & 0u32.wrapping_sub(crc & 1))
        })
    })
}

/// A device number as the kernel stores it in 32 bits.
pub(crate) fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & 0xfff00) << 12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_is_crc32c_without_the_final_inversion() {
        // The check value of CRC-32C is 0xE3069283 after the inversion.
        assert_eq!(!crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn prefixes_are_matched_whole_for_acls_and_by_start_for_the_rest() {
        let index = |name: &[u8]| RawXattr::new(name, b"v").map(|x| (x.index, x.suffix.len()));
        assert_eq!(index(b"user.a"), Some((1, 1)));
        assert_eq!(index(b"system.posix_acl_access"), Some((2, 0)));
        assert_eq!(index(b"system.posix_acl_default"), Some((3, 0)));
        assert_eq!(index(b"trusted.x"), Some((4, 1)));
        assert_eq!(index(b"security.capability"), Some((6, 10)));
        assert_eq!(index(b"system.posix_acl_access2"), None);
        assert_eq!(index(b"system.nfs4_acl"), None);
        assert_eq!(index(b"btrfs.compression"), None);
    }

    #[test]
    fn device_numbers_take_the_kernels_32_bit_form() {
        assert_eq!(encode_device(0, 0), 0);
        assert_eq!(encode_device(8, 1), 0x801);
        assert_eq!(encode_device(0xfff, 0xf_ffff), 0xffff_ffff);
        assert_eq!(encode_device(259, 0x12345), 0x1231_0345);
    }
}
