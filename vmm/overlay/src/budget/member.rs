//! The VMM's side: its account, and what others' figures come to.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use super::layout::{
    Access, Entry, FILE_LEN, MAGIC, Mapping, Page, SLOTS, Shared, VERSION, page_offset,
};
use super::{BudgetError, LEAST, file_error, level};
use crate::signal;

/// A VMM's part in the budget, in the place that a [`Seat`](super::Seat) keeps for it.
#[derive(Debug)]
pub struct Membership {
    /// Everything, to be read only.
    all: Mapping<Shared>,
    /// What this member writes.
    page: Mapping<Page>,
    mine: usize,
}

/// All that is to be known of the members at some moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct View {
    /// Bytes on all accounts.
    pub(super) sum: u64,
    /// The budget.
    pub(super) total: u64,
    /// What nobody should have more than, given what everybody would like.
    pub(super) level: u64,
}

/// What a member's figures count for.
#[derive(Debug, Clone, Copy)]
struct Figures {
    used: u64,
    claim: u64,
}

impl Membership {
    /// Takes slot `number` by a seat's two descriptors. Both are closed when this returns: what a guest
    /// that has broken this process finds is a page of its own, and figures that it can read.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "both are closed when it returns"
    )]
    pub fn new(view: File, page: File, number: usize) -> Result<Self, BudgetError> {
        let of = |file: &File| file.metadata().map_err(file_error("inspect"));
        let (whole, own) = (of(&view)?, of(&page)?);
        if (whole.dev(), whole.ino()) != (own.dev(), own.ino()) {
            return Err(BudgetError::Descriptors("they are of two files"));
        }
        if whole.len() != FILE_LEN {
            return Err(BudgetError::Format);
        }
        let all: Mapping<Shared> =
            Mapping::new(&view, 0, Access::Read).map_err(file_error("map"))?;
        if all.can_be_made_writable() {
            return Err(BudgetError::Descriptors(
                "the one to read the whole by can be written to",
            ));
        }
        let header = &all.trusted.header;
        if header.magic.load(Ordering::Relaxed) != MAGIC
            || header.version.load(Ordering::Relaxed) != VERSION
            || header.slots.load(Ordering::Relaxed) as usize != SLOTS
        {
            return Err(BudgetError::Format);
        }
        let taken = all.trusted.entries.get(number).is_some_and(is_joined);
        if !taken {
            return Err(BudgetError::Slot(number));
        }
        let page =
            Mapping::new(&page, page_offset(number), Access::Write).map_err(file_error("map"))?;
        Ok(Membership {
            all,
            page,
            mine: number,
        })
    }

    pub(crate) fn wake_word(&self) -> &AtomicU32 {
        &self.page.wake
    }

    /// Bytes on this member's account.
    pub(crate) fn used(&self) -> u64 {
        self.page.used.load(Ordering::SeqCst)
    }

    /// What this member may have, whatever room there is.
    fn limit(&self) -> u64 {
        limit_of(&self.all.trusted.entries[self.mine])
    }

    /// Takes the account to `to` bytes, if that is within the rules; `limit` is how much this member
    /// could ever make use of. Called by one thread at a time.
    pub(crate) fn grow(&self, to: u64, limit: u64) -> bool {
        if to > self.limit() {
            return false;
        }
        let before = self.page.used.swap(to, Ordering::SeqCst);
        let view = self.view();
        if view.sum <= view.total {
            return true;
        }
        self.page.claim.store(limit, Ordering::SeqCst);
        let view = self.view();
        self.wake_above(view.level);
        if to <= view.level.max(LEAST) {
            return true;
        }
        self.page.used.store(before, Ordering::SeqCst);
        false
    }

    /// Takes the account down to `to` bytes. With `content`, this member does not want more.
    pub(crate) fn shrink(&self, to: u64, content: bool) {
        self.page.used.store(to, Ordering::SeqCst);
        if content {
            self.page.claim.store(0, Ordering::SeqCst);
        }
    }

    /// How much this member should have at most: all it may have while the node has a sixteenth to spare.
    pub(crate) fn allowance(&self) -> u64 {
        let view = self.view();
        let most = self.limit();
        if view.sum > view.total - view.total / 16 {
            view.level.max(LEAST).min(most)
        } else {
            most
        }
    }

    pub(super) fn view(&self) -> View {
        // What this member wrote must be seen by the others before what they wrote is read here: of two
        // that grow at once, one at least then sees both. It also stands in for the order of the loads,
        // which have to be relaxed because this memory is read-only.
        fence(Ordering::SeqCst);
        let total = self.all.trusted.header.total.load(Ordering::Relaxed);
        let mut sum = 0u64;
        let mut claims = Vec::new();
        for (_, entry, page) in self.members() {
            let figures = figures(entry, page);
            if figures.claim > 0 {
                sum = sum.saturating_add(figures.used);
                claims.push(figures.claim);
            }
        }
        View {
            sum,
            total,
            level: level(claims, total),
        }
    }

    /// Those whose slots are taken.
    fn members(&self) -> impl Iterator<Item = (usize, &Entry, &Page)> {
        let Shared { trusted, pages } = &*self.all;
        let in_use = trusted.header.in_use.load(Ordering::Relaxed) as usize;
        let all = trusted.entries.iter().zip(pages).enumerate().take(in_use);
        all.filter(|(_, (entry, _))| is_joined(entry))
            .map(|(number, (entry, page))| (number, entry, page))
    }

    /// Wakes everyone else who has more than `level`.
    ///
    /// Their words are read-only here, so a wake that comes between a member's last look and its sleep is
    /// lost. That is harmless: it keeps what it has above its share until the next try of anyone who wants
    /// more, each of which wakes again, so the sum passes the budget by no more than what was taken by tries
    /// whose wakes were lost.
    fn wake_above(&self, level: u64) {
        for (number, entry, page) in self.members() {
            if number != self.mine && figures(entry, page).used > level.max(LEAST) {
                signal::wake(&page.wake);
            }
        }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.shrink(0, true);
    }
}

fn is_joined(entry: &Entry) -> bool {
    entry.joined.load(Ordering::Relaxed) != 0
}

fn limit_of(entry: &Entry) -> u64 {
    entry.limit.load(Ordering::Relaxed).max(LEAST)
}

/// A member's word, as far as it goes.
fn figures(entry: &Entry, page: &Page) -> Figures {
    let most = limit_of(entry);
    let used = page.used.load(Ordering::Relaxed).min(most);
    let claim = page.claim.load(Ordering::Relaxed).min(most).max(used);
    Figures { used, claim }
}
