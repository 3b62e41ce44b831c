//! How a failure becomes a message and an exit code: the one place that decides.

use std::io;
use std::process::ExitCode;

/// What a command ends with when it cannot do what was asked.
#[derive(Debug)]
pub(crate) struct Failure(anyhow::Error);

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure(error.into())
    }
}

impl Failure {
    /// Prints what went wrong, with every cause, to the standard error.
    pub(crate) fn print(&self) {
        eprintln!("kiln: {:#}", self.0);
    }

    /// See `kiln --help` for what the codes mean.
    pub(crate) fn code(&self) -> ExitCode {
        ExitCode::from(self.number())
    }

    pub(crate) fn number(&self) -> u8 {
        let full = self.0.chain().any(|cause| {
            cause.downcast_ref::<io::Error>().is_some_and(|error| {
                matches!(
                    error.kind(),
                    io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
                )
            })
        });
        if full {
            return 5;
        }
        let store = self
            .0
            .chain()
            .find_map(|cause| cause.downcast_ref::<kiln_store::Error>());
        match store {
            Some(kiln_store::Error::NotFound(_) | kiln_store::Error::NoStore(_)) => 3,
            Some(
                kiln_store::Error::InUse { .. }
                | kiln_store::Error::Pinned(_)
                | kiln_store::Error::HasChildren { .. },
            ) => 4,
            Some(
                kiln_store::Error::OverBudget { .. }
                | kiln_store::Error::NoSpace { .. }
                | kiln_store::Error::NoRoomToRebuild { .. },
            ) => 5,
            _ => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_store::{Digest, Error};

    #[test]
    fn exit_codes_are_the_documented_ones() {
        let id = Digest::of_bytes(b"x");
        let number = |error: Error| Failure::from(error).number();
        assert_eq!(number(Error::NotFound("x".into())), 3);
        assert_eq!(number(Error::NoStore("/x".into())), 3);
        assert_eq!(number(Error::InUse { kind: "μVM", id }), 4);
        assert_eq!(number(Error::Pinned(id)), 4);
        let parent = Error::HasChildren {
            id,
            child: id,
            count: 1,
        };
        assert_eq!(number(parent), 4);
        assert_eq!(
            number(Error::OverBudget {
                used: 1,
                needed: 1,
                budget: 1
            }),
            5
        );
        let no_room = Error::NoRoomToRebuild {
            object: id,
            needed: 1,
            root: "/x".into(),
        };
        assert_eq!(number(no_room), 5);
        assert_eq!(number(Error::ManifestDigest(id)), 1);
        let full = Error::Io {
            action: "writing",
            path: "/x".into(),
            source: io::ErrorKind::StorageFull.into(),
        };
        assert_eq!(number(full), 5);
    }
}
