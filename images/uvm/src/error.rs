//! Why a μVM did not do what it should.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_overlay::BudgetError;
use kiln_store::private::PrivateError;
use kiln_vmm_control::{RefusalKind, VmmError};

use crate::end::End;
use crate::guest::GuestError;
use crate::pick::PickError;
use crate::scratch::SpillError;

/// Why a μVM did not do what it should.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No μVM of the store will do.
    #[error(transparent)]
    Pick(#[from] PickError),
    /// A file of a baked μVM cannot be had.
    #[error("cannot open a baked μVM; bake it again: kiln bake")]
    Baked(#[source] kiln_store::Error),
    /// The VMM's process cannot be started.
    #[error("cannot start the VMM; `vmm` in kiln's configuration, or --vmm, names it")]
    Spawn(#[source] VmmError),
    /// The VMM does not take what was baked: it is damaged, or was baked for something else.
    #[error("the VMM cannot resume the baked μVM ({why}); bake it again: kiln bake")]
    NotResumable {
        /// What kind of reason it has.
        kind: RefusalKind,
        /// Its reason.
        why: String,
    },
    /// The VMM did not do it, and goes on.
    #[error("cannot {action}")]
    Vmm {
        /// What it was to do.
        action: &'static str,
        /// Its answer.
        #[source]
        source: VmmError,
    },
    /// The VMM ended.
    #[error("cannot {action}: the μVM has ended: {end}")]
    Ended {
        /// What was to be done.
        action: &'static str,
        /// How it ended.
        end: End,
    },
    /// No more disks fit.
    #[error(
        "all disk slots of the μVM are in use, one for each container and block volume, and none could be plugged; \
         bake one with more: kiln bake --slots"
    )]
    NoSlot(#[source] Box<Error>),
    /// The guest did not reach the size that was asked for.
    #[error("the μVM could not grow to {0}")]
    NotGrown(String),
    /// It took too long.
    #[error("the μVM did not {action} within {} s", limit.as_secs())]
    Slow {
        /// What it was to do.
        action: &'static str,
        /// How long it was given.
        limit: Duration,
    },
    /// The guest's agent refused, or is gone.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// What the writable layers need cannot be had.
    #[error(transparent)]
    Spill(#[from] SpillError),
    /// The node's budget of RAM for what containers write cannot be joined.
    #[error("cannot take part in the node's budget for containers' writes")]
    Budget(#[source] BudgetError),
    /// kiln's own directory is not kiln's.
    #[error(transparent)]
    Private(#[from] PrivateError),
    /// A file or directory cannot be had.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was to be done.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The system refused something.
    #[error("cannot {action}")]
    System {
        /// What was to be done.
        action: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// A file or directory that cannot be had.
    pub fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
        let path = path.to_owned();
        move |source| Error::File {
            action,
            path,
            source,
        }
    }

    /// Something that the system refused.
    pub fn system(action: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::System { action, source }
    }

    /// What kind of reason the VMM had, if it refused.
    pub fn refusal(&self) -> Option<RefusalKind> {
        match self {
            Error::Vmm {
                source: VmmError::Refused { kind, .. },
                ..
            }
            | Error::NotResumable { kind, .. } => Some(*kind),
            _ => None,
        }
    }

    /// Whether the VMM had no room on a disk for what it was to write.
    pub fn is_full_disk(&self) -> bool {
        self.refusal() == Some(RefusalKind::NoSpace)
    }

    /// Whether the VMM, or the guest's agent, could not be talked to: it has ended, or is about to.
    pub fn is_gone(&self) -> bool {
        matches!(
            self,
            Error::Ended { .. }
                | Error::Guest(GuestError::Gone { .. } | GuestError::Unreachable(_))
                | Error::Vmm {
                    source: VmmError::Gone | VmmError::Socket(_),
                    ..
                }
        )
    }
}
