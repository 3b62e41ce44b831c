//! The shim's error and the one place where errors become RPC codes.
//!
//! containerd acts on the code (a `NotFound` task is reaped, a `FailedPrecondition` is retried by
//! nobody), Kubernetes shows the text. So a text names the thing and the remedy, and a code is
//! chosen once, here.

use std::fmt::Write as _;

use kiln_uvm::RefusalKind;
use kiln_uvm::guest::GuestError;
use kiln_uvm::share::ShareError;
use ttrpc::{Code, get_status};

use crate::refusal::Refusal;

/// What went wrong, by what the caller can make of it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such container, exec or sandbox.
    #[error("{0} not found")]
    NotFound(String),
    /// The id is taken.
    #[error("{0} already exists")]
    AlreadyExists(String),
    /// The request itself is wrong.
    #[error("{0}")]
    InvalidArgument(String),
    /// The specification asks for what can't be had in a μVM.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The thing is not in a state in which that can be done.
    #[error("{0}")]
    FailedPrecondition(String),
    /// kiln can't do that (yet); docs/shim.md lists these.
    #[error("{0}")]
    Unimplemented(String),
    /// Not enough of something.
    #[error("{0}")]
    ResourceExhausted(String),
    /// The μVM is gone.
    #[error("{0}")]
    Unavailable(String),
    /// A step failed.
    #[error("{action}")]
    Failed {
        /// The step.
        action: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A step that failed for a reason from below.
    pub fn failed(
        action: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Failed {
            action: action.into(),
            source: source.into(),
        }
    }

    /// The RPC code.
    pub fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NOT_FOUND,
            Self::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Self::InvalidArgument(_) | Self::Refused(_) => Code::INVALID_ARGUMENT,
            Self::FailedPrecondition(_) => Code::FAILED_PRECONDITION,
            Self::Unimplemented(_) => Code::UNIMPLEMENTED,
            Self::ResourceExhausted(_) => Code::RESOURCE_EXHAUSTED,
            Self::Unavailable(_) => Code::UNAVAILABLE,
            Self::Failed { .. } => Code::UNKNOWN,
        }
    }

    /// The message with all its causes on one line.
    pub fn chain(&self) -> String {
        chain(self)
    }
}

/// An error and its causes, joined by colons; a cause whose text the outer one ends with is not
/// repeated.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            // Writing to a String can't fail.
            let _ = write!(text, ": {cause_text}");
        }
        source = cause.source();
    }
    text
}

impl From<ShareError> for Error {
    fn from(error: ShareError) -> Self {
        match error {
            ShareError::Closed => Self::Unavailable(error.to_string()),
            ShareError::Apart(_) | ShareError::System { .. } | ShareError::Owners { .. } => {
                Self::failed("share a volume with the μVM", error)
            }
        }
    }
}

impl From<GuestError> for Error {
    /// What the agent says becomes what containerd is told, kind for kind.
    fn from(error: GuestError) -> Self {
        use kiln_agent_api::RefusalKind as Kind;
        match error {
            GuestError::Refused { what, kind, text } => match kind {
                Kind::REFUSAL_NOT_FOUND => Self::NotFound(what),
                Kind::REFUSAL_ALREADY_EXISTS => Self::AlreadyExists(what),
                Kind::REFUSAL_USAGE => Self::InvalidArgument(format!("{what}: {text}")),
                Kind::REFUSAL_STATE => Self::FailedPrecondition(format!("{what}: {text}")),
                Kind::REFUSAL_UNKNOWN_CALL => Self::Unimplemented(format!("{what}: {text}")),
                Kind::REFUSAL_NO_SPACE => Self::ResourceExhausted(format!("{what}: {text}")),
                Kind::REFUSAL_TIMEOUT
                | Kind::REFUSAL_PROGRAM_NOT_FOUND
                | Kind::REFUSAL_PROGRAM_NOT_EXECUTABLE
                | Kind::REFUSAL_FAILED => Self::failed(format!("the guest could not {what}"), text),
            },
            GuestError::NoStream => Self::NotFound("the process's stream".into()),
            gone => Self::Unavailable(chain(&gone)),
        }
    }
}

impl From<kiln_uvm::Error> for Error {
    fn from(error: kiln_uvm::Error) -> Self {
        use kiln_store::Error as Store;
        use kiln_uvm::Error as Uvm;
        let text = || chain(&error);
        match (&error, error.refusal()) {
            (Uvm::Guest(_), _) => {}
            (Uvm::Pick(_) | Uvm::NotResumable { .. }, _) => return Self::FailedPrecondition(text()),
            (Uvm::Baked(Store::NoRoomToRebuild { .. }), _) => {
                return Self::ResourceExhausted(text());
            }
            (
                Uvm::Baked(
                    Store::Pack { .. }
                    | Store::OtherContent(_)
                    | Store::Parent { .. }
                    | Store::OtherParent { .. },
                ),
                _,
            ) => return Self::FailedPrecondition(text()),
            // The next attempt rebuilds the file.
            (Uvm::Baked(Store::ChangedParent { .. }), _) => return Self::Unavailable(text()),
            (Uvm::NoSlot(_) | Uvm::NotGrown(_), _) => return Self::ResourceExhausted(text()),
            (gone, _) if gone.is_gone() => return Self::Unavailable(text()),
            (_, Some(RefusalKind::Foreign | RefusalKind::Corrupt | RefusalKind::Busy)) => {
                return Self::FailedPrecondition(text());
            }
            (_, Some(RefusalKind::NoSpace)) => return Self::ResourceExhausted(text()),
            (_, Some(RefusalKind::Usage)) => return Self::InvalidArgument(text()),
            (_, Some(RefusalKind::Failed) | None) => {}
        }
        match error {
            Uvm::Guest(error) => error.into(),
            other => Self::failed("run the pod's μVM", other),
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Self::RpcStatus(get_status(error.code(), error.chain()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_told_once_each() {
        let io = std::io::Error::from_raw_os_error(libc::ENOSPC);
        let error = Error::failed("write the state of pod p1", io);
        assert_eq!(
            error.chain(),
            "write the state of pod p1: No space left on device (os error 28)"
        );
    }

    #[test]
    fn memory_that_cannot_be_rebuilt_is_no_fault_of_the_shim() {
        let object = kiln_store::Digest::of_bytes(b"memory");
        let told = |error| Error::from(kiln_uvm::Error::Baked(error));
        let source = std::io::Error::other("frame 3 is damaged");
        let damaged = told(kiln_store::Error::Pack { object, source });
        assert!(matches!(&damaged, Error::FailedPrecondition(text) if text.contains("frame 3")));
        let parent = kiln_store::Digest::of_bytes(b"parent");
        let other = told(kiln_store::Error::OtherParent { object, parent });
        assert!(
            matches!(&other, Error::FailedPrecondition(text) if text.contains(&parent.short()))
        );
        let changed = told(kiln_store::Error::ChangedParent { object, parent });
        assert!(matches!(changed, Error::Unavailable(_)), "{changed:?}");
        let full = told(kiln_store::Error::NoRoomToRebuild {
            object,
            needed: 1,
            root: "/x".into(),
        });
        assert!(matches!(full, Error::ResourceExhausted(_)), "{full:?}");
    }

    #[test]
    fn containerd_sees_not_found_for_an_unknown_task() {
        let ttrpc::Error::RpcStatus(status) = Error::NotFound("task t".into()).into() else {
            panic!("not a status");
        };
        assert_eq!(status.code(), Code::NOT_FOUND);
        assert_eq!(status.message(), "task t not found");
    }
}
