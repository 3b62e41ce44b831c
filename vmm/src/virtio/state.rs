//! A device's saved state: a kind, a version, and bytes behind them.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Why saved state was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StateError {
    /// The state belongs to another device.
    #[error("saved state is of kind {found:?}, this device is {expected:?}")]
    Kind {
        /// What the state says.
        found: String,
        /// What the device is.
        expected: &'static str,
    },
    /// The state has a version this build does not know.
    #[error("saved {kind} state has version {found}, this build reads {expected}; bake again")]
    Version {
        /// The device's kind.
        kind: &'static str,
        /// What the state says.
        found: u16,
        /// What this build reads.
        expected: u16,
    },
    /// The bytes do not decode, or decode to values that can't be.
    #[error("saved {kind} state is damaged: {what}")]
    Damaged {
        /// The device's kind.
        kind: &'static str,
        /// What is wrong.
        what: String,
    },
}

/// One device's own state, as it is written to a state file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// The device's kind, such as `block`.
    pub kind: String,
    /// Version of the layout behind it; counts up with every change.
    pub version: u16,
    /// The encoded state struct.
    pub bytes: Vec<u8>,
}

impl DeviceState {
    /// Encodes a state struct.
    pub fn encode<T: Serialize>(
        kind: &'static str,
        version: u16,
        state: &T,
    ) -> Result<Self, StateError> {
        let bytes = postcard::to_stdvec(state).map_err(|e| StateError::Damaged {
            kind,
            what: e.to_string(),
        })?;
        Ok(Self {
            kind: kind.to_owned(),
            version,
            bytes,
        })
    }

    /// Decodes a state struct; every byte must be used.
    pub fn decode<T: DeserializeOwned>(
        &self,
        kind: &'static str,
        version: u16,
    ) -> Result<T, StateError> {
        if self.kind != kind {
            return Err(StateError::Kind {
                found: self.kind.clone(),
                expected: kind,
            });
        }
        if self.version != version {
            return Err(StateError::Version {
                kind,
                found: self.version,
                expected: version,
            });
        }
        let (state, rest) =
            postcard::take_from_bytes(&self.bytes).map_err(|e| StateError::Damaged {
                kind,
                what: e.to_string(),
            })?;
        if rest.is_empty() {
            Ok(state)
        } else {
            Err(StateError::Damaged {
                kind,
                what: format!("{} bytes too many", rest.len()),
            })
        }
    }
}
