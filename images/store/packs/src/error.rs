//! What can go wrong, by stage: reading a pack, writing one, reading an image's index.

use std::io;

use crate::{INDEX_VERSION, MAX_PAGES, MAX_RUNS, VERSION};

/// A pack that could not be read, or memory that could not be rebuilt of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused something.
    #[error("{action}")]
    Io {
        /// What was being done, such as `reading the pack's header`.
        action: &'static str,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The file begins otherwise than a pack.
    #[error("this is no pack: make it anew")]
    NotAPack,
    /// Another kiln wrote the pack.
    #[error(
        "the pack has format {found}, this kiln reads format {VERSION}: make it anew with this kiln"
    )]
    Version {
        /// What its header says.
        found: u32,
    },
    /// A number in the header that no writer of this format writes.
    #[error("the pack's header is damaged ({0}): make the pack anew")]
    Header(&'static str),
    /// The file is shorter or longer than its header says.
    #[error("the pack has {found} bytes instead of {expected}: make it anew")]
    Length {
        /// Length that the header gives.
        expected: u64,
        /// Length of the file.
        found: u64,
    },
    /// Header, page map or frame table differ from what was written.
    #[error("the pack's header, page map or frame table is damaged: make the pack anew")]
    Checksum,
    /// A run of the page map that no writer writes.
    #[error("run {run} of the page map {fault}: make the pack anew")]
    Run {
        /// Number of the run.
        run: usize,
        /// What is wrong with it.
        fault: RunFault,
    },
    /// The page map ends before the memory does.
    #[error("the page map covers {covered} of {pages} pages: make the pack anew")]
    MapShort {
        /// Pages that the runs cover.
        covered: u32,
        /// Pages of the memory.
        pages: u32,
    },
    /// An entry of the frame table that no writer writes.
    #[error("entry {frame} of the frame table {fault}: make the pack anew")]
    Entry {
        /// Number of the frame.
        frame: u32,
        /// What is wrong with it.
        fault: TableFault,
    },
    /// The caller asked for a frame that the pack does not have.
    #[error("frame {frame} of a pack of {frames}")]
    NoSuchFrame {
        /// Number of the frame.
        frame: u32,
        /// How many the pack has.
        frames: u32,
    },
    /// A frame could not be read from the file.
    #[error("reading frame {frame} of the pack")]
    ReadFrame {
        /// Number of the frame.
        frame: u32,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// A frame's stored bytes differ from what was written.
    #[error("frame {frame} of the pack is damaged: make the pack anew")]
    Stored {
        /// Number of the frame.
        frame: u32,
    },
    /// A frame's stored bytes are those that were written, but not what they should be.
    #[error("frame {frame} of the pack cannot be decompressed ({reason}): make the pack anew")]
    Decompress {
        /// Number of the frame.
        frame: u32,
        /// As the decompressor says.
        reason: &'static str,
    },
    /// A frame that needs nothing else gives other pages than were packed.
    #[error("frame {frame} of the pack holds other pages than were packed: make the pack anew")]
    Raw {
        /// Number of the frame.
        frame: u32,
    },
    /// A frame gives other pages than were packed, with the parent that was given.
    #[error(
        "frame {frame} of the pack gives other pages than were packed: parent {parent} differs from the one \
         that the pack was made with; rebuild the parent"
    )]
    RawOfParent {
        /// Number of the frame.
        frame: u32,
        /// Number of the parent.
        parent: u16,
    },
    /// A parent could not be read.
    #[error("reading parent {parent} at page {page}")]
    ReadParent {
        /// Number of the parent.
        parent: u16,
        /// First page that was asked for.
        page: u32,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// An image could not be read.
    #[error("reading image {image} at block {block}")]
    ReadImage {
        /// Number of the image.
        image: u16,
        /// First block that was asked for.
        block: u32,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The caller gave fewer parents than the pack was made with.
    #[error("the pack needs parent {parent}, which was not given")]
    ParentMissing {
        /// Number of the parent.
        parent: u16,
    },
    /// The caller gave fewer images than the pack was made with.
    #[error("the pack needs image {image}, which was not given")]
    ImageMissing {
        /// Number of the image.
        image: u16,
    },
    /// What was given as a parent or an image has another length than at writing.
    #[error(
        "{what} {number} has {found} bytes instead of {expected}: it is not the one that the pack was made with"
    )]
    OtherOrigin {
        /// `parent` or `image`.
        what: &'static str,
        /// Number of the parent or image.
        number: usize,
        /// Length at writing.
        expected: u64,
        /// Length now.
        found: u64,
    },
    /// A patch was asked for, of a pack that has no parent.
    #[error("the pack has no parent to patch: rebuild it whole")]
    NoParent,
}

/// What is wrong with a run of a page map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RunFault {
    /// No pages.
    #[error("is empty")]
    Empty,
    /// It goes beyond the end of the memory.
    #[error("goes beyond the memory")]
    BeyondMemory,
    /// It comes from a parent or an image that the header does not name.
    #[error("has an unknown source")]
    UnknownSource,
    /// Zeroes come from nowhere, so their place must be 0.
    #[error("has zeroes from a place")]
    PlacedZeroes,
    /// It goes beyond the end of what it comes from.
    #[error("goes beyond its source")]
    BeyondSource,
    /// It continues the run before.
    #[error("continues the run before it")]
    NotMerged,
}

/// What is wrong with an entry of a frame table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TableFault {
    /// A number that stands for no coding.
    #[error("has an unknown coding")]
    UnknownCoding,
    /// Not compressed, and of another length than its pages.
    #[error("has another length than its pages")]
    RawLength,
    /// Compressed to nothing, or to no less than its pages.
    #[error("has a length that compression does not give")]
    CompressedLength,
    /// It has a window, but its coding needs none.
    #[error("has a window without need")]
    NeedlessWindow,
    /// Its window is empty, too large, or not inside of a parent.
    #[error("has a window outside of its parent")]
    Window,
}

/// A pack that could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The operating system refused something.
    #[error("{action}")]
    Io {
        /// What was being done, such as `reading the memory`.
        action: &'static str,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// Not a memory: a length that is not one of whole pages, or is too large.
    #[error("a memory of {length} bytes cannot be packed: whole pages, and at most {MAX_PAGES}")]
    MemoryLength {
        /// The length.
        length: u64,
    },
    /// More parents or images than a pack can name.
    #[error("a pack cannot have {parents} parents and {images} images")]
    TooManyOrigins {
        /// How many parents were given.
        parents: usize,
        /// How many images were given.
        images: usize,
    },
    /// An image's index belongs to another image.
    #[error("the index of image {image} belongs to another image: make it anew")]
    ForeignIndex {
        /// Number of the image.
        image: usize,
    },
    /// The working set has a page that the memory does not have.
    #[error("the working set has page {page} of a memory of {pages} pages")]
    WorkingSet {
        /// Number of the page.
        page: u32,
        /// Pages of the memory.
        pages: u32,
    },
    /// Ranges of unchanged pages that do not ascend, overlap, or are not inside of parent 0.
    #[error("the list of unchanged pages is wrong at pages {start} to {end}")]
    Unchanged {
        /// First page of the range.
        start: u32,
        /// Page after the last one of the range.
        end: u32,
    },
    /// The memory is in too many pieces.
    #[error("the page map would have more than {MAX_RUNS} runs")]
    TooManyRuns,
    /// The compressor failed.
    #[error("compressing frame {frame}: {reason}")]
    Compress {
        /// Number of the frame.
        frame: u32,
        /// As the compressor says.
        reason: &'static str,
    },
}

/// An image's index that could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// The bytes begin otherwise than an index.
    #[error("this is no index of an image: make it anew")]
    NotAnIndex,
    /// Another kiln wrote the index.
    #[error(
        "the image's index has format {found}, this kiln reads format {INDEX_VERSION}: make it anew"
    )]
    Version {
        /// What its header says.
        found: u32,
    },
    /// Shorter or longer than its header says.
    #[error("the image's index has {found} bytes instead of {expected}: make it anew")]
    Length {
        /// Length that the header gives.
        expected: u64,
        /// Length of the bytes.
        found: u64,
    },
    /// The bytes differ from what was written.
    #[error("the image's index is damaged: make it anew")]
    Checksum,
    /// An entry is out of order, or names a block that the image does not have.
    #[error("entry {entry} of the image's index is wrong: make it anew")]
    Entry {
        /// Number of the entry.
        entry: usize,
    },
}
