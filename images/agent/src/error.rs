//! Everything that can go wrong in a call, and the kind of refusal it becomes. The only place that
//! knows both.

use std::error::Error;
use std::io;

use kiln_agent_api::{Refusal, RefusalKind};

use crate::container::cgroup::CgroupError;
use crate::container::spec::SpecError;
use crate::helper::{FaultKind, HelperError};
use crate::network::NetworkError;
use crate::resources::ResourceError;
use crate::storage::StorageError;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    /// Before SetIdentity.
    #[error("the μVM has no identity yet; call SetIdentity first")]
    GateShut,
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// No such container, exec or process.
    #[error("{0}: not found")]
    NotFound(String),
    /// There is one already.
    #[error("{0} exists already")]
    Exists(String),
    /// Not now.
    #[error("{0}")]
    State(String),
    /// The spec.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The process could not be made.
    #[error(transparent)]
    Helper(#[from] HelperError),
    /// Limits and their kin.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Mounts.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// Interfaces, addresses, routes.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// CPUs and memory.
    #[error(transparent)]
    Resource(#[from] ResourceError),
    /// The kernel refused something else.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried.
        action: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A bug, or a task that was torn down.
    #[error("{0}")]
    Internal(String),
}

impl AgentError {
    fn kind(&self) -> RefusalKind {
        match self {
            Self::GateShut | Self::State(_) => RefusalKind::REFUSAL_STATE,
            Self::Invalid(_) | Self::Spec(_) => RefusalKind::REFUSAL_USAGE,
            Self::Storage(StorageError::Path(_) | StorageError::NoUsers(_)) => {
                RefusalKind::REFUSAL_USAGE
            }
            Self::Network(NetworkError::Parse { .. }) => RefusalKind::REFUSAL_USAGE,
            Self::NotFound(_) | Self::Network(NetworkError::NoInterface(..)) => {
                RefusalKind::REFUSAL_NOT_FOUND
            }
            Self::Exists(_) => RefusalKind::REFUSAL_ALREADY_EXISTS,
            Self::Cgroup(CgroupError::Timeout { .. })
            | Self::Resource(ResourceError::Timeout { .. })
            | Self::Storage(StorageError::NoDevice { .. }) => RefusalKind::REFUSAL_TIMEOUT,
            Self::Helper(HelperError::Failed(fault)) => match fault.kind {
                FaultKind::NoProgram => RefusalKind::REFUSAL_PROGRAM_NOT_FOUND,
                FaultKind::NotExecutable => RefusalKind::REFUSAL_PROGRAM_NOT_EXECUTABLE,
                FaultKind::Other => RefusalKind::REFUSAL_FAILED,
            },
            other if is_full(other) => RefusalKind::REFUSAL_NO_SPACE,
            _ => RefusalKind::REFUSAL_FAILED,
        }
    }
}

/// Whether a file system that was written to has no room.
fn is_full(error: &AgentError) -> bool {
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = cause {
        let kind = error.downcast_ref().map(io::Error::kind);
        if let Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) = kind {
            return true;
        }
        cause = error.source();
    }
    false
}

impl From<AgentError> for ttrpc::Error {
    fn from(error: AgentError) -> Self {
        let refusal = Refusal {
            kind: error.kind(),
            text: error.to_string(),
        };
        refusal.into()
    }
}

/// Names the action of a failing system call.
pub(crate) trait Action<T> {
    /// "cannot `action`: ...".
    fn action(self, action: &str) -> Result<T, AgentError>;
}

impl<T, E: Into<io::Error>> Action<T> for Result<T, E> {
    fn action(self, action: &str) -> Result<T, AgentError> {
        self.map_err(|error| AgentError::Io {
            action: action.to_owned(),
            source: error.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(error: impl Into<AgentError>) -> RefusalKind {
        let error: ttrpc::Error = error.into().into();
        let refusal = kiln_agent_api::refusal(&error).expect("a refusal");
        assert!(!refusal.text.is_empty());
        refusal.kind
    }

    #[test]
    fn full_file_system_is_no_space_whoever_met_it() {
        let full = || io::Error::from_raw_os_error(libc::ENOSPC);
        let file = StorageError::File {
            action: "write",
            path: "/run/kiln/etc/hosts".to_owned(),
            source: full(),
        };
        assert_eq!(kind(file), RefusalKind::REFUSAL_NO_SPACE);
        let bundle = Err::<(), _>(full()).action("make the bundle");
        let bundle = bundle.expect_err("full");
        assert_eq!(kind(bundle), RefusalKind::REFUSAL_NO_SPACE);
        let quota = io::Error::from_raw_os_error(libc::EDQUOT);
        assert_eq!(
            kind(StorageError::Events(quota)),
            RefusalKind::REFUSAL_NO_SPACE
        );
        let denied = io::Error::from_raw_os_error(libc::EACCES);
        let denied = Err::<(), _>(denied).action("write config.json");
        let denied = denied.expect_err("denied");
        assert_eq!(kind(denied), RefusalKind::REFUSAL_FAILED);
    }

    #[test]
    fn program_that_can_not_run_is_told_from_other_failures() {
        let of = |kind| {
            let text = "because".to_owned();
            HelperError::from(crate::helper::Fault { kind, text })
        };
        assert_eq!(
            kind(of(FaultKind::NoProgram)),
            RefusalKind::REFUSAL_PROGRAM_NOT_FOUND
        );
        assert_eq!(
            kind(of(FaultKind::NotExecutable)),
            RefusalKind::REFUSAL_PROGRAM_NOT_EXECUTABLE
        );
        assert_eq!(kind(of(FaultKind::Other)), RefusalKind::REFUSAL_FAILED);
        assert_eq!(kind(HelperError::Died), RefusalKind::REFUSAL_FAILED);
    }
}
