//! The node's budget of overlay RAM, shared by processes that do not trust each other.
//!
//! The budget is one file. Its first pages are *trusted*: only root processes write them, and they say how
//! large the budget is, which slots have a member, and how much each member may ever account for. Then
//! comes one page for each slot, the only thing that slot's VMM can write: what it has taken, and what it
//! would like. The sum of the slots *is* the state, so nothing can be left half done. Whoever wants more
//! adds up the slots and decides by itself ([`Membership::grow`]):
//!
//! - while the sum stays within the budget, everyone may grow;
//! - beyond it, a member may grow up to its fair share (max-min: nobody gets more than it asks for,
//!   and what some leave is shared by the others), and wakes those above theirs, who shrink to it;
//! - a member above its share may not grow: it spills its own data first.
//!
//! So the sum may pass the budget for as long as those above their share take to shrink.
//!
//! # Who may do what
//!
//! A root process ([`Budget`]) makes the file, joins for a VMM and holds the [`Seat`]. The VMM
//! ([`Membership`]) maps the whole file from a read-only descriptor, which no `mprotect` makes writable,
//! and its own page from the seat's descriptor; it keeps neither. It takes a filter to keep it from
//! growing that mapping over its neighbours' pages (`mremap`), from punching its page out of the file
//! (`MADV_REMOVE`), and from moving those who sleep on a neighbour's word elsewhere (`FUTEX_REQUEUE`).
//!
//! A page's figures are its VMM's word. Whatever they are, others count at most the member's limit, which
//! is trusted: a liar is worth what an honest pod is that fills its own limit, and no more. Saying less
//! than it has gains it nothing but RAM of its own cgroup.
//!
//! # Who is alive
//!
//! A slot belongs to whoever holds the lock on it. The lock is the open file description's with which
//! the seat was taken, and that lives until the holder has closed it *and* the VMM's mapping of its page
//! is gone, whatever ends either. So a slot whose lock is free has nobody who could write its page.

use std::io;

use thiserror::Error;

mod layout;
mod member;
mod node;

pub use member::Membership;
pub use node::{Budget, Seat};

use layout::{SLOTS, VERSION};

/// What a member may always have, so that it can go on, if slowly.
const LEAST: u64 = 2 << 20;

/// Why there is no budget to be had.
#[derive(Debug, Error)]
pub enum BudgetError {
    /// The system refused something.
    #[error("cannot {what} the node's overlay budget")]
    File {
        /// What was being done.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// It is not a budget, or another version's.
    #[error("the file is no overlay budget of version {VERSION}")]
    Format,
    /// Every slot has a living owner.
    #[error("the node's overlay budget has no slot left for another pod ({SLOTS} are in use)")]
    Full,
    /// The slot is not one of the file's, or nobody has joined in it.
    #[error(
        "slot {0} of the node's overlay budget is nobody's: whoever starts a VMM has to join first"
    )]
    Slot(usize),
    /// The descriptors are not those of a seat.
    #[error("the descriptors are not those of a seat in the node's overlay budget: {0}")]
    Descriptors(&'static str),
}

fn file_error(what: &'static str) -> impl Fn(io::Error) -> BudgetError {
    move |source| BudgetError::File { what, source }
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
