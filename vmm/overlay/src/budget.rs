//! The node's budget of overlay RAM, shared by processes that know nothing of each other.
//!
//! The budget is a file of [`Budget::FILE_LEN`] bytes that every process maps. It holds one slot per
//! member, and only the member writes its slot's figures: how much RAM it has taken on the account,
//! and how much it would like. The sum of the slots *is* the state, so nothing can be left half done.
//! Whoever wants more adds up the slots and decides by itself ([`Membership::grow`]):
//!
//! - while the sum stays within the budget, everyone may grow;
//! - beyond it, a member may grow up to its fair share (max-min: nobody gets more than it asks for,
//!   and what some leave is shared by the others), and wakes those above theirs, who shrink to it;
//! - a member above its share may not grow: it spills its own data first.
//!
//! So the sum may pass the budget for as long as those above their share take to shrink.
//!
//! Each member holds a lock on its slot's bytes of the file, which the kernel drops when the last
//! descriptor of that opening of the file is closed, whatever ends the process. A slot without a lock
//! is nobody's, whatever is in it. For that, **each member must have its own opening of the file**
//! (`open`, not a duplicate of another's), and whoever passes it on closes its copy.
//!
//! The figures are other processes' word: a member that lies makes others spill earlier or later than
//! fair, and can do no more. Nobody may shorten the file; a process that faces a guest should not be
//! allowed `ftruncate`.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use thiserror::Error;

use crate::signal;

const MAGIC: u64 = u64::from_le_bytes(*b"kilnBUDG");
const VERSION: u32 = 1;
/// Members a node can have: twice what the kubelet runs at most by default, and some.
const SLOTS: usize = 255;
/// What a member may always have, so that it can go on, if slowly.
const LEAST: u64 = 2 << 20;

/// Why there is no budget to be had.
#[derive(Debug, Error)]
pub enum BudgetError {
    /// The file could not be made or read.
    #[error("can't {what} the node's overlay budget")]
    File {
        /// What was being done.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// It is not a budget, or another version's.
    #[error("the file is no overlay budget of version {VERSION}; remove it when no pod runs")]
    Format,
    /// Every slot has a living owner.
    #[error("the node's overlay budget has no slot left for another pod ({SLOTS} are in use)")]
    Full,
}

#[repr(C, align(64))]
struct Header {
    magic: AtomicU64,
    version: AtomicU32,
    slots: AtomicU32,
    total: AtomicU64,
}

#[repr(C, align(64))]
struct Slot {
    /// What the member's workers sleep on.
    wake: AtomicU32,
    joined: AtomicU32,
    /// Bytes on the member's account.
    used: AtomicU64,
    /// Bytes the member would like, if that is more.
    claim: AtomicU64,
}

#[repr(C)]
struct Shared {
    header: Header,
    slots: [Slot; SLOTS],
}

const _: () = assert!(size_of::<Header>() == 64 && size_of::<Slot>() == 64);
const _: () = assert!(size_of::<Shared>() == Budget::FILE_LEN as usize);

/// The budget's file, before anyone joins.
#[derive(Debug)]
pub struct Budget;

impl Budget {
    /// Length of the file.
    pub const FILE_LEN: u64 = 64 * (SLOTS as u64 + 1);

    /// Makes an empty file a budget of `total` bytes.
    pub fn init(file: &File, total: u64) -> Result<(), BudgetError> {
        let write = || {
            file.set_len(Self::FILE_LEN)?;
            let mut header = Vec::new();
            header.extend(VERSION.to_ne_bytes());
            header.extend((SLOTS as u32).to_ne_bytes());
            header.extend(total.to_ne_bytes());
            file.write_all_at(&header, 8)?;
            // Last: a file with it is whole.
            file.write_all_at(&MAGIC.to_ne_bytes(), 0)
        };
        write().map_err(|source| BudgetError::File {
            what: "initialise",
            source,
        })
    }

    /// Opens the budget at `path`, on a tmpfs, and makes one of `total` bytes if there is none. Any
    /// number of processes may do so at once. Each call is an opening of its own.
    pub fn open_or_make(path: &Path, total: u64) -> Result<File, BudgetError> {
        let error = |what| move |source| BudgetError::File { what, source };
        let open = || File::options().read(true).write(true).open(path);
        match open() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            result => return result.map_err(error("open")),
        }
        let mut draft = path.as_os_str().to_owned();
        draft.push(format!(".{}", std::process::id()));
        let made = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&draft)
            .map_err(error("make"))?;
        Self::init(&made, total)?;
        let linked = std::fs::hard_link(&draft, path);
        std::fs::remove_file(&draft).map_err(error("tidy up after making"))?;
        match linked {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(error("make")(e)),
            _ => open().map_err(error("open")),
        }
    }

    /// Changes the budget. Members act on it when they next grow.
    pub fn set_total(file: &File, total: u64) -> Result<(), BudgetError> {
        file.write_all_at(&total.to_ne_bytes(), 16)
            .map_err(|source| BudgetError::File {
                what: "change",
                source,
            })
    }
}

/// A place in the budget. It is given back when dropped, or when the process ends.
#[derive(Debug)]
pub struct Membership {
    file: File,
    shared: NonNull<Shared>,
    mine: usize,
}

// SAFETY: the pointer is to a shared mapping of nothing but atomics, which lives as long as `self`.
unsafe impl Send for Membership {}
// SAFETY: as above.
unsafe impl Sync for Membership {}

/// All that is to be known of the members at some moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct View {
    /// Bytes on all accounts.
    sum: u64,
    /// The budget.
    total: u64,
    /// What nobody should have more than, given what everybody would like.
    level: u64,
}

impl Membership {
    /// Joins the budget in `file`, which must be an opening of its own.
    pub fn join(file: File) -> Result<Self, BudgetError> {
        let error = |what| move |source| BudgetError::File { what, source };
        let len = file.metadata().map_err(error("inspect"))?.len();
        if len != Budget::FILE_LEN {
            return Err(BudgetError::Format);
        }
        // SAFETY: a fresh shared mapping, at an address of the kernel's choice, of a file that long.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<Shared>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(error("map")(io::Error::last_os_error()));
        }
        let Some(shared) = NonNull::new(memory.cast()) else {
            return Err(BudgetError::Format);
        };
        let mut membership = Membership {
            file,
            shared,
            mine: usize::MAX,
        };
        let header = &membership.shared().header;
        if header.magic.load(Ordering::Acquire) != MAGIC
            || header.version.load(Ordering::Relaxed) != VERSION
            || header.slots.load(Ordering::Relaxed) as usize != SLOTS
        {
            return Err(BudgetError::Format);
        }
        for number in 0..SLOTS {
            if membership.lock(number, libc::F_WRLCK).is_ok() {
                membership.mine = number;
                let slot = &membership.shared().slots[number];
                clear(slot);
                slot.joined.store(1, Ordering::SeqCst);
                return Ok(membership);
            }
        }
        Err(BudgetError::Full)
    }

    fn shared(&self) -> &Shared {
        // SAFETY: mapped with this size until `self` is dropped; all atomics, any bits are valid.
        unsafe { self.shared.as_ref() }
    }

    fn my_slot(&self) -> &Slot {
        &self.shared().slots[self.mine]
    }

    pub(crate) fn wake_word(&self) -> &AtomicU32 {
        &self.my_slot().wake
    }

    /// Bytes on this member's account.
    pub(crate) fn used(&self) -> u64 {
        self.my_slot().used.load(Ordering::SeqCst)
    }

    /// Takes the account to `to` bytes, if that is within the rules; `limit` is how much this member
    /// could ever make use of. Called by one thread at a time.
    pub(crate) fn grow(&self, to: u64, limit: u64) -> bool {
        let slot = self.my_slot();
        let before = slot.used.swap(to, Ordering::SeqCst);
        let mut view = self.view();
        if view.sum <= view.total {
            return true;
        }
        if self.bury_dead() {
            view = self.view();
            if view.sum <= view.total {
                return true;
            }
        }
        slot.claim.store(limit, Ordering::SeqCst);
        let view = self.view();
        self.wake_above(view.level);
        if to <= view.level.max(LEAST) {
            return true;
        }
        slot.used.store(before, Ordering::SeqCst);
        false
    }

    /// Takes the account down to `to` bytes. With `content`, this member does not want more.
    pub(crate) fn shrink(&self, to: u64, content: bool) {
        let slot = self.my_slot();
        slot.used.store(to, Ordering::SeqCst);
        if content {
            slot.claim.store(0, Ordering::SeqCst);
        }
    }

    /// How much this member should have at most. No limit while the node has a sixteenth to spare.
    pub(crate) fn allowance(&self) -> u64 {
        let mut view = self.view();
        let pressing = |view: View| view.sum > view.total - view.total / 16;
        if pressing(view) && self.bury_dead() {
            view = self.view();
        }
        if pressing(view) {
            view.level.max(LEAST)
        } else {
            u64::MAX
        }
    }

    fn view(&self) -> View {
        let shared = self.shared();
        let total = shared.header.total.load(Ordering::SeqCst);
        let mut sum = 0u64;
        let mut claims = Vec::with_capacity(SLOTS);
        for slot in &shared.slots {
            let used = slot.used.load(Ordering::SeqCst);
            let claim = slot.claim.load(Ordering::SeqCst).max(used);
            if claim > 0 {
                sum = sum.saturating_add(used);
                claims.push(claim);
            }
        }
        View {
            sum,
            total,
            level: level(claims, total),
        }
    }

    /// Wakes everyone who has more than `level`.
    fn wake_above(&self, level: u64) {
        for slot in &self.shared().slots {
            if slot.used.load(Ordering::SeqCst) > level.max(LEAST) {
                signal::wake(&slot.wake);
            }
        }
    }

    /// Clears the slots of members that are gone. Tells whether there were any.
    fn bury_dead(&self) -> bool {
        let mut found = false;
        for (number, slot) in self.shared().slots.iter().enumerate() {
            if number != self.mine
                && slot.joined.load(Ordering::SeqCst) != 0
                && self.lock(number, libc::F_WRLCK).is_ok()
            {
                clear(slot);
                found = true;
                let _ = self.lock(number, libc::F_UNLCK);
            }
        }
        found
    }

    /// Locks or unlocks a slot's bytes of the file, if nobody else has them.
    fn lock(&self, number: usize, kind: i32) -> io::Result<()> {
        // SAFETY: all zeroes is a valid `flock`.
        let mut range: libc::flock = unsafe { std::mem::zeroed() };
        range.l_type = kind as i16;
        range.l_whence = libc::SEEK_SET as i16;
        range.l_start = 64 * (number as i64 + 1);
        range.l_len = 64;
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

impl Drop for Membership {
    fn drop(&mut self) {
        if self.mine < SLOTS {
            clear(self.my_slot());
            let _ = self.lock(self.mine, libc::F_UNLCK);
        }
        // SAFETY: mapped by `join` with this size; every borrow of it borrows `self`.
        unsafe { libc::munmap(self.shared.as_ptr().cast(), size_of::<Shared>()) };
    }
}

fn clear(slot: &Slot) {
    slot.joined.store(0, Ordering::SeqCst);
    slot.used.store(0, Ordering::SeqCst);
    slot.claim.store(0, Ordering::SeqCst);
}

/// The level to which `total` fills vessels of the sizes `claims`: the max-min fair share.
fn level(mut claims: Vec<u64>, total: u64) -> u64 {
    claims.sort_unstable();
    let mut left = total;
    let mut vessels = claims.len() as u64;
    for claim in claims {
        let share = left / vessels;
        if claim > share {
            return share;
        }
        left -= claim;
        vessels -= 1;
    }
    u64::MAX
}

#[cfg(test)]
mod tests;
