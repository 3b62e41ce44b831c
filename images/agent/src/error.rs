//! Everything that can go wrong in a call, and the ttrpc code it becomes. The only place that knows
//! both.

use std::io;

use thiserror::Error;
use ttrpc::Code;

use crate::container::cgroup::CgroupError;
use crate::container::spec::SpecError;
use crate::helper::HelperError;
use crate::network::NetworkError;
use crate::resources::ResourceError;
use crate::storage::StorageError;

/// Why a call failed.
#[derive(Debug, Error)]
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
    fn code(&self) -> Code {
        match self {
            Self::GateShut | Self::State(_) => Code::FAILED_PRECONDITION,
            Self::Invalid(_) | Self::Spec(_) => Code::INVALID_ARGUMENT,
            Self::Storage(StorageError::Path(_)) => Code::INVALID_ARGUMENT,
            Self::Network(NetworkError::Parse { .. }) => Code::INVALID_ARGUMENT,
            Self::NotFound(_) | Self::Network(NetworkError::NoInterface(..)) => Code::NOT_FOUND,
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::Cgroup(CgroupError::Timeout { .. })
            | Self::Resource(ResourceError::Timeout { .. })
            | Self::Storage(StorageError::NoDevice { .. }) => Code::DEADLINE_EXCEEDED,
            _ => Code::INTERNAL,
        }
    }
}

impl From<AgentError> for ttrpc::Error {
    fn from(error: AgentError) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), error.to_string()))
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
