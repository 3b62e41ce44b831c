//! What can go wrong in the store.

use std::io;
use std::path::{Path, PathBuf};

use crate::content::lock::LockError;
use crate::{Digest, Kind, ManifestError, VERSION};

/// An operation on the store that failed. The store is as good as before, whatever it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused something.
    #[error("{action} {path}", path = path.display())]
    Io {
        /// What was being done, such as `reading`.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// Another program holds a lock for too long.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// There is no store.
    #[error("{} is no store yet: bake a μVM first (`kiln bake`)", .0.display())]
    NoStore(PathBuf),
    /// The store was made by another version of kiln.
    #[error(
        "{path} has store format '{found}', this kiln reads '{wanted}': remove it, and bake again (`kiln bake`)",
        path = path.display()
    )]
    Format {
        /// The store.
        path: PathBuf,
        /// What its format file says.
        found: String,
        /// What it should say.
        wanted: &'static str,
    },
    /// Nothing goes by that name.
    #[error("no μVM or image '{0}' in the store: see `kiln list`")]
    NotFound(String),
    /// Several things go by that name.
    #[error("'{name}' may mean {} things: give more digits", matches.len())]
    Ambiguous {
        /// The name.
        name: String,
        /// What it may mean.
        matches: Vec<Digest>,
    },
    /// A saved μVM has that name.
    #[error("μVM {} was saved as '{name}': choose another name, or remove that one (`kiln rm {name}`)", id.short())]
    NameTaken {
        /// The name.
        name: String,
        /// Which one has it.
        id: Digest,
    },
    /// A running μVM was resumed from it, or runs on it.
    #[error("{kind} {} is in use: stop the pods that run on it, then try again", id.short())]
    InUse {
        /// What it is.
        kind: &'static str,
        /// Its name.
        id: Digest,
    },
    /// Others are stored as what differs from it.
    #[error(
        "μVM {id} is needed by {count} others, which are stored as what differs from it: remove them first \
         (`kiln rm {child}`)",
        id = id.short(),
        child = child.short()
    )]
    HasChildren {
        /// Its name.
        id: Digest,
        /// One of the others.
        child: Digest,
        /// How many there are.
        count: usize,
    },
    /// What it is stored as the difference to is gone.
    #[error(
        "μVM {id} is stored as what differs from μVM {parent}, which is gone: remove it (`kiln rm {id}`) and bake again \
         (`kiln bake`)",
        id = id.short(),
        parent = parent.short()
    )]
    NoParent {
        /// Its name.
        id: Digest,
        /// The one that is gone.
        parent: Digest,
    },
    /// A μVM was to be stored as what differs from one that is itself stored so, or that cannot be one's parent otherwise.
    #[error("μVM {id} cannot be a parent: {why}", id = id.short())]
    NotAParent {
        /// Its name.
        id: Digest,
        /// The reason, and what to do.
        why: String,
    },
    /// Someone asked for it to be kept.
    #[error("μVM {short} is pinned: `kiln unpin {short}` first", short = .0.short())]
    Pinned(Digest),
    /// Entering it would take the store over its budget.
    #[error(
        "the store holds {used} bytes, {needed} more would exceed its budget of {budget}: \
         make room (`kiln gc`, `kiln rm`) or raise the budget (`kiln gc --set-budget`)"
    )]
    OverBudget {
        /// Bytes on disk now.
        used: u64,
        /// Bytes to come.
        needed: u64,
        /// The most the store may hold.
        budget: u64,
    },
    /// No room on the disk, not even after everything unused was removed that can be made again.
    #[error(
        "an image of {needed} bytes does not fit on the disk under {root}, though all unused images are gone; \
         free space there, or move the store",
        root = root.display()
    )]
    NoSpace {
        /// The image's size.
        needed: u64,
        /// The store's directory.
        root: PathBuf,
    },
    /// A μVM was to be entered without one of its parts.
    #[error("the baked μVM has no {0} file: the bake did not finish")]
    Incomplete(Kind),
    /// A manifest is not what was written.
    #[error("the manifest of μVM {id} is damaged: remove it (`kiln rm {id}`) and bake again", id = id.short())]
    Manifest {
        /// Its name.
        id: Digest,
        /// What is wrong with it.
        #[source]
        source: ManifestError,
    },
    /// Nothing is wrong with it, but this kiln does not read it.
    #[error(
        "μVM {short} was baked by an older kiln (manifest format {found}, this one reads {VERSION}): bake again \
         (`kiln bake`); `kiln gc` removes it",
        short = id.short()
    )]
    Older {
        /// Its name.
        id: Digest,
        /// Its manifest's format.
        found: u32,
    },
    /// Nothing may be wrong with it, but this kiln does not know.
    #[error(
        "μVM {short} was baked by a newer kiln (manifest format {found}, this one reads {VERSION}): use that kiln, or \
         remove it (`kiln rm {short}`)",
        short = id.short()
    )]
    Newer {
        /// Its name.
        id: Digest,
        /// Its manifest's format.
        found: u32,
    },
    /// A manifest's content is not the one it is named after.
    #[error("the manifest of μVM {id} is not the one that was written: remove it (`kiln rm {id}`) and bake again", id = .0.short())]
    ManifestDigest(Digest),
    /// Another process rebuilds an object, and takes too long.
    #[error("memory {} is rebuilt from its pack by another process, which takes too long", object.short())]
    Rebuilding {
        /// The object.
        object: Digest,
        /// The process.
        #[source]
        source: LockError,
    },
    /// An object can't be rebuilt from its pack.
    #[error(
        "memory {short} cannot be rebuilt from its pack: `kiln verify` tells which μVM it belongs to; remove that \
         (`kiln rm`) and bake again (`kiln bake`)",
        short = object.short()
    )]
    Pack {
        /// The object.
        object: Digest,
        /// What is wrong with the pack.
        #[source]
        source: io::Error,
    },
    /// An object's pack is undamaged, but gives something else.
    #[error(
        "the pack of memory {short} holds another memory: `kiln verify` tells which μVM it belongs to; remove that \
         (`kiln rm`) and bake again (`kiln bake`)",
        short = .0.short()
    )]
    OtherContent(Digest),
    /// What an object's pack refers to can't be had.
    #[error(
        "memory {object} is stored as the difference to memory {parent}, which cannot be read: `kiln verify` tells which \
         μVMs they belong to; remove those (`kiln rm`) and bake again (`kiln bake`)",
        object = object.short(),
        parent = parent.short()
    )]
    Parent {
        /// The object.
        object: Digest,
        /// What its pack refers to.
        parent: Digest,
        /// The reason.
        #[source]
        source: Box<Error>,
    },
    /// An object's pack refers to something else than its μVM says.
    #[error(
        "the pack of memory {object} refers to memory {parent}, which is no parent of its μVM: `kiln verify` tells which \
         μVM it belongs to; remove that (`kiln rm`) and bake again (`kiln bake`)",
        object = object.short(),
        parent = parent.short()
    )]
    OtherParent {
        /// The object.
        object: Digest,
        /// What its pack refers to.
        parent: Digest,
    },
    /// The flat file of what an object's pack refers to is not what it was when it was rebuilt.
    #[error(
        "memory {object} cannot be rebuilt, because the rebuilt file of memory {parent} has changed since it was made: that \
         file is removed, try again; if it happens again, look after the disk",
        object = object.short(),
        parent = parent.short()
    )]
    ChangedParent {
        /// The object.
        object: Digest,
        /// What its pack refers to.
        parent: Digest,
    },
    /// A pack was written, and does not give back what was packed.
    #[error(
        "the new pack of memory {short} does not give that memory back: nothing was entered; bake again (`kiln bake`), and \
         look after disk and RAM if it happens again",
        short = object.short()
    )]
    BadPack {
        /// The object.
        object: Digest,
        /// What is wrong with the pack.
        #[source]
        source: io::Error,
    },
    /// The disk has no room for an object's flat file, not even without those of others.
    #[error(
        "the disk under {root} is full: memory {short} needs {needed} bytes there to be rebuilt from its pack; free space \
         there, or move the store",
        root = root.display(),
        short = object.short()
    )]
    NoRoomToRebuild {
        /// The object.
        object: Digest,
        /// Bytes of its flat file.
        needed: u64,
        /// The store's directory.
        root: PathBuf,
    },
    /// The budget file holds something else than a number.
    #[error("{} does not hold a number of bytes, nor 'none': set it again (`kiln gc --set-budget`, `--set-flat-budget`)", .0.display())]
    Budget(PathBuf),
}

/// Names the action and the path of an I/O error.
pub(crate) trait Context<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T, Error>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T, Error> {
        self.map_err(|source| Error::Io {
            action,
            path: path.to_owned(),
            source,
        })
    }
}
