//! Points in time, as the wire has them.

use std::time::{SystemTime, UNIX_EPOCH};

use protobuf::well_known_types::timestamp::Timestamp;

/// Nanoseconds since the Unix epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct UnixNanos(pub i64);

impl UnixNanos {
    /// The host's wall clock.
    pub fn now() -> Self {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Self(i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
    }
}

/// The protobuf form.
pub fn timestamp(at: UnixNanos) -> Timestamp {
    Timestamp {
        seconds: at.0.div_euclid(1_000_000_000),
        // Less than 10^9 by the division.
        nanos: i32::try_from(at.0.rem_euclid(1_000_000_000)).unwrap_or(0),
        ..Default::default()
    }
}
