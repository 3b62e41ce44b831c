//! The root processes' side: making the file, joining for a VMM, freeing what dead members left.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::layout::{Access, FILE_LEN, MAGIC, Mapping, Page, SLOTS, Trusted, VERSION, page_offset};
use super::{BudgetError, LEAST, file_error};

/// The budget, opened by a root process.
#[derive(Debug)]
pub struct Budget {
    file: File,
    trusted: Mapping<Trusted>,
}

impl Budget {
    /// The file's name in the directory of kiln's state.
    pub const FILE_NAME: &str = "overlay-budget-2";

    /// Opens the budget at `path`, on a tmpfs. Makes one of `total` bytes if there is none, or if what is
    /// there is none: a damaged file must not keep pods from starting. Any number of processes may do so
    /// at once. Each call is an opening of its own.
    pub fn open_or_make(path: &Path, total: u64) -> Result<Self, BudgetError> {
        loop {
            match Self::open(path) {
                Ok(Some(budget)) => return Ok(budget),
                Ok(None) => make(path, total)?,
                Err(BudgetError::Format) => remove_damaged(path)?,
                Err(other) => return Err(other),
            }
        }
    }

    /// Frees the slots of members that are gone, if there is a budget at `path`.
    pub fn bury_at(path: &Path) -> Result<(), BudgetError> {
        match Self::open(path) {
            Ok(budget) => budget.map_or(Ok(()), |budget| budget.bury()),
            // The next pod that starts makes a new one.
            Err(BudgetError::Format) => Ok(()),
            Err(other) => Err(other),
        }
    }

    fn open(path: &Path) -> Result<Option<Self>, BudgetError> {
        match open_file(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            result => Self::check(result.map_err(file_error("open"))?).map(Some),
        }
    }

    fn check(file: File) -> Result<Self, BudgetError> {
        let meta = file.metadata().map_err(file_error("inspect"))?;
        if !meta.is_file() || meta.len() != FILE_LEN {
            return Err(BudgetError::Format);
        }
        let budget = Budget {
            trusted: Mapping::new(&file, 0, Access::Write).map_err(file_error("map"))?,
            file,
        };
        let header = &budget.trusted.header;
        let good = header.magic.load(Ordering::Acquire) == MAGIC
            && header.version.load(Ordering::Relaxed) == VERSION
            && header.slots.load(Ordering::Relaxed) as usize == SLOTS;
        if good {
            Ok(budget)
        } else {
            Err(BudgetError::Format)
        }
    }

    /// Changes the budget. Members act on it when they next grow.
    pub fn set_total(&self, total: u64) {
        self.trusted.header.total.store(total, Ordering::SeqCst);
    }

    /// Joins for a VMM that may have `limit` bytes of RAM for its overlays.
    pub fn join(self, limit: u64) -> Result<Seat, BudgetError> {
        self.bury()?;
        let number = self.take_free_slot()?;
        // Written rather than left a hole, so that no reader ever has to have memory for it.
        self.file
            .write_all_at(&[0; size_of::<Page>()], page_offset(number).cast_unsigned())
            .map_err(file_error("write to"))?;
        let view = reopen_read_only(&self.file).map_err(file_error("open"))?;
        let entry = &self.trusted.entries[number];
        entry.limit.store(limit.max(LEAST), Ordering::SeqCst);
        let header = &self.trusted.header;
        header.in_use.fetch_max(number as u32 + 1, Ordering::SeqCst);
        entry.joined.store(1, Ordering::SeqCst);
        Ok(Seat {
            budget: self,
            view,
            number,
        })
    }

    fn take_free_slot(&self) -> Result<usize, BudgetError> {
        for (number, entry) in self.trusted.entries.iter().enumerate() {
            if entry.joined.load(Ordering::SeqCst) == 0 && self.lock(number)? {
                return Ok(number);
            }
        }
        Err(BudgetError::Full)
    }

    /// Frees the slots of members that are gone.
    fn bury(&self) -> Result<(), BudgetError> {
        let in_use = self.trusted.header.in_use.load(Ordering::SeqCst) as usize;
        for (number, entry) in self.trusted.entries.iter().enumerate().take(in_use) {
            if entry.joined.load(Ordering::SeqCst) != 0 && self.lock(number)? {
                self.clear(number);
                self.unlock(number)
                    .map_err(file_error("unlock a slot of"))?;
            }
        }
        Ok(())
    }

    fn clear(&self, number: usize) {
        let entry = &self.trusted.entries[number];
        entry.joined.store(0, Ordering::SeqCst);
        entry.limit.store(0, Ordering::SeqCst);
    }

    /// Takes the lock of a slot. `false` if its member lives.
    fn lock(&self, number: usize) -> Result<bool, BudgetError> {
        match self.set_lock(number, libc::F_WRLCK) {
            Ok(()) => Ok(true),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
            Err(e) => Err(file_error("lock a slot of")(e)),
        }
    }

    fn unlock(&self, number: usize) -> io::Result<()> {
        self.set_lock(number, libc::F_UNLCK)
    }

    fn set_lock(&self, number: usize, kind: i32) -> io::Result<()> {
        // SAFETY: all zeroes is a valid `flock`.
        let mut range: libc::flock = unsafe { std::mem::zeroed() };
        range.l_type = kind as i16;
        range.l_whence = libc::SEEK_SET as i16;
        range.l_start = page_offset(number);
        range.l_len = size_of::<Page>() as i64;
        // SAFETY: the structure outlives the call, which only reads it.
        let result =
            unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}

/// A VMM's place in the budget, held by the root process that started it. Dropping it leaves; so does the
/// end of the process, once the VMM is gone too.
#[derive(Debug)]
pub struct Seat {
    budget: Budget,
    view: File,
    number: usize,
}

impl Seat {
    /// The slot's number, which the VMM has to know.
    pub fn number(&self) -> u16 {
        self.number as u16
    }

    /// The whole budget, read-only: for the VMM.
    pub fn view(&self) -> BorrowedFd<'_> {
        self.view.as_fd()
    }

    /// What the VMM maps its own page from: for its first request, and never once a guest runs.
    ///
    /// It must be a duplicate of this very descriptor, as those that travel over sockets are: as long as
    /// the VMM maps its page, the slot then stays taken, even if this process is killed.
    pub fn page(&self) -> BorrowedFd<'_> {
        self.budget.file.as_fd()
    }

    /// Changes how much the VMM may have.
    pub fn set_limit(&self, limit: u64) {
        let entry = &self.budget.trusted.entries[self.number];
        entry.limit.store(limit.max(LEAST), Ordering::SeqCst);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        // The lock is not given up here but by the kernel, when the VMM's mapping is gone too.
        self.budget.clear(self.number);
    }
}

fn open_file(path: &Path) -> io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
}

fn link_of(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// By its descriptor, so that it is the same file whatever has become of its name.
fn reopen_read_only(file: &File) -> io::Result<File> {
    File::open(link_of(file))
}

/// Makes a budget, unless another process is quicker.
fn make(path: &Path, total: u64) -> Result<(), BudgetError> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let draft = nameless_file(directory).map_err(file_error("make"))?;
    draft.set_len(FILE_LEN).map_err(file_error("make"))?;
    draft
        .write_all_at(&[0; size_of::<Trusted>()], 0)
        .map_err(file_error("write to"))?;
    let trusted: Mapping<Trusted> =
        Mapping::new(&draft, 0, Access::Write).map_err(file_error("map"))?;
    let header = &trusted.header;
    header.version.store(VERSION, Ordering::Relaxed);
    header.slots.store(SLOTS as u32, Ordering::Relaxed);
    header.total.store(total, Ordering::Relaxed);
    header.magic.store(MAGIC, Ordering::Release);
    match name(&draft, path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(file_error("name")(e)),
        _ => Ok(()),
    }
}

/// A file that is gone if this process is killed before it has a name.
fn nameless_file(directory: &Path) -> io::Result<File> {
    let open = || {
        File::options()
            .read(true)
            .write(true)
            .mode(0o600)
            .custom_flags(libc::O_TMPFILE)
            .open(directory)
    };
    open().or_else(|error| match error.kind() {
        io::ErrorKind::NotFound => DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .and_then(|()| open()),
        _ => Err(error),
    })
}

fn name(file: &File, path: &Path) -> io::Result<()> {
    use std::ffi::CString;
    use std::os::unix::ffi::OsStrExt;
    let from = CString::new(link_of(file).as_os_str().as_bytes())?;
    let to = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: both paths are NUL-terminated and outlive the call.
    let result = unsafe {
        libc::linkat(
            libc::AT_FDCWD,
            from.as_ptr(),
            libc::AT_FDCWD,
            to.as_ptr(),
            libc::AT_SYMLINK_FOLLOW,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Removes a file that is no budget, and not a good one that another process has put in its place.
fn remove_damaged(path: &Path) -> Result<(), BudgetError> {
    let damaged = match open_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        result => result.map_err(file_error("open"))?,
    };
    lock_in_time(&damaged).map_err(file_error("lock the damaged file of"))?;
    let same = |a: &fs::Metadata, b: &fs::Metadata| a.dev() == b.dev() && a.ino() == b.ino();
    let opened = damaged.metadata().map_err(file_error("inspect"))?;
    let replaced = fs::symlink_metadata(path).map_or(true, |named| !same(&named, &opened));
    if replaced || matches!(Budget::open(path), Ok(Some(_))) {
        return Ok(());
    }
    fs::remove_file(path).map_err(file_error("replace the damaged file of"))
}

/// Whoever replaces a damaged file is done in no time: one that is not hangs, and must not keep pods from starting for ever.
const REPLACE_WAIT: Duration = Duration::from_secs(2);

fn lock_in_time(file: &File) -> io::Result<()> {
    let begun = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) if begun.elapsed() >= REPLACE_WAIT => {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "another process of root's keeps it locked; /proc/locks names it",
                ));
            }
            // There is no call that waits for such a lock and gives up.
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}
