//! Why the agent did not do what it was asked, as far as a program can make something of it.
//!
//! A refusal is a ttrpc status whose details hold a `kiln.agent.v1.Refusal`. The status's code follows from the
//! kind, for those who know of codes only.

use protobuf::{EnumOrUnknown, Message};
use ttrpc::Code;
use ttrpc::proto::{Any, Status};

use crate::proto;
pub use crate::proto::RefusalKind;

/// Names the message in a status's details.
const TYPE_URL: &str = "type.googleapis.com/kiln.agent.v1.Refusal";

/// What the agent answered in place of what was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What kind of reason it has.
    pub kind: RefusalKind,
    /// The reason, for people.
    pub text: String,
}

/// What `error` says of a refusal; nothing if there was no answer, because the guest is gone or silent.
pub fn refusal(error: &ttrpc::Error) -> Option<Refusal> {
    let ttrpc::Error::RpcStatus(status) = error else {
        return None;
    };
    let told = status.details.iter().find(|any| any.type_url == TYPE_URL);
    let kind = match told.map(|any| proto::Refusal::parse_from_bytes(&any.value)) {
        Some(Ok(refusal)) => refusal.kind.enum_value_or_default(),
        // ttrpc answers by itself to calls that it does not know.
        _ => of_code(status.code()),
    };
    Some(Refusal {
        kind,
        text: status.message().to_owned(),
    })
}

impl From<Refusal> for ttrpc::Error {
    fn from(refusal: Refusal) -> Self {
        let told = proto::Refusal {
            kind: EnumOrUnknown::new(refusal.kind),
            ..Default::default()
        };
        let mut status: Status = ttrpc::get_status(code(refusal.kind), refusal.text);
        // Bytes of one enum: there is no way for them not to be encoded, and the code would be left.
        if let Ok(value) = told.write_to_bytes() {
            status.details.push(Any {
                type_url: TYPE_URL.to_owned(),
                value,
                ..Default::default()
            });
        }
        Self::RpcStatus(status)
    }
}

fn code(kind: RefusalKind) -> Code {
    match kind {
        RefusalKind::REFUSAL_NOT_FOUND => Code::NOT_FOUND,
        RefusalKind::REFUSAL_ALREADY_EXISTS => Code::ALREADY_EXISTS,
        RefusalKind::REFUSAL_USAGE => Code::INVALID_ARGUMENT,
        RefusalKind::REFUSAL_STATE => Code::FAILED_PRECONDITION,
        RefusalKind::REFUSAL_NO_SPACE => Code::RESOURCE_EXHAUSTED,
        RefusalKind::REFUSAL_TIMEOUT => Code::DEADLINE_EXCEEDED,
        RefusalKind::REFUSAL_UNKNOWN_CALL => Code::UNIMPLEMENTED,
        RefusalKind::REFUSAL_PROGRAM_NOT_FOUND
        | RefusalKind::REFUSAL_PROGRAM_NOT_EXECUTABLE
        | RefusalKind::REFUSAL_FAILED => Code::INTERNAL,
    }
}

fn of_code(code: Code) -> RefusalKind {
    match code {
        Code::NOT_FOUND => RefusalKind::REFUSAL_NOT_FOUND,
        Code::ALREADY_EXISTS => RefusalKind::REFUSAL_ALREADY_EXISTS,
        Code::INVALID_ARGUMENT => RefusalKind::REFUSAL_USAGE,
        Code::FAILED_PRECONDITION => RefusalKind::REFUSAL_STATE,
        Code::RESOURCE_EXHAUSTED => RefusalKind::REFUSAL_NO_SPACE,
        Code::DEADLINE_EXCEEDED => RefusalKind::REFUSAL_TIMEOUT,
        Code::UNIMPLEMENTED => RefusalKind::REFUSAL_UNKNOWN_CALL,
        _ => RefusalKind::REFUSAL_FAILED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::Enum;

    /// As it arrives: over the wire.
    fn sent(refusal: Refusal) -> ttrpc::Error {
        let ttrpc::Error::RpcStatus(status) = refusal.into() else {
            panic!("no status");
        };
        let bytes = status.write_to_bytes().unwrap();
        ttrpc::Error::RpcStatus(Status::parse_from_bytes(&bytes).unwrap())
    }

    #[test]
    fn every_kind_arrives_with_its_text() {
        for kind in RefusalKind::VALUES {
            let told = Refusal {
                kind: *kind,
                text: "because".to_owned(),
            };
            assert_eq!(refusal(&sent(told.clone())), Some(told));
        }
    }

    #[test]
    fn status_without_details_is_read_by_its_code() {
        let kind_of = |code| {
            let error = ttrpc::Error::RpcStatus(ttrpc::get_status(code, "because"));
            refusal(&error).unwrap().kind
        };
        for kind in RefusalKind::VALUES {
            let same = kind_of(code(*kind));
            assert!(
                same == *kind || same == RefusalKind::REFUSAL_FAILED,
                "{kind:?}"
            );
        }
        assert_eq!(
            kind_of(Code::UNIMPLEMENTED),
            RefusalKind::REFUSAL_UNKNOWN_CALL
        );
        assert_eq!(kind_of(Code::DATA_LOSS), RefusalKind::REFUSAL_FAILED);
    }

    /// A newer agent's kind is a failure, whose text is told as it is.
    #[test]
    fn kind_that_is_not_known_here_is_a_failure() {
        let mut status = ttrpc::get_status(Code::INTERNAL, "because");
        status.details.push(Any {
            type_url: TYPE_URL.to_owned(),
            value: vec![0x08, 99],
            ..Default::default()
        });
        let kind = refusal(&ttrpc::Error::RpcStatus(status)).unwrap().kind;
        assert_eq!(kind, RefusalKind::REFUSAL_FAILED);
    }

    #[test]
    fn guest_that_is_gone_refuses_nothing() {
        assert_eq!(refusal(&ttrpc::Error::RemoteClosed), None);
    }

    /// Baked agents say these numbers.
    #[test]
    fn numbers_are_pinned() {
        let numbers: Vec<(String, i32)> = RefusalKind::VALUES
            .iter()
            .map(|kind| (format!("{kind:?}"), kind.value()))
            .collect();
        assert_eq!(
            numbers,
            [
                ("REFUSAL_FAILED".to_owned(), 0),
                ("REFUSAL_NOT_FOUND".to_owned(), 1),
                ("REFUSAL_ALREADY_EXISTS".to_owned(), 2),
                ("REFUSAL_USAGE".to_owned(), 3),
                ("REFUSAL_STATE".to_owned(), 4),
                ("REFUSAL_NO_SPACE".to_owned(), 5),
                ("REFUSAL_TIMEOUT".to_owned(), 6),
                ("REFUSAL_UNKNOWN_CALL".to_owned(), 7),
                ("REFUSAL_PROGRAM_NOT_FOUND".to_owned(), 8),
                ("REFUSAL_PROGRAM_NOT_EXECUTABLE".to_owned(), 9),
            ]
        );
    }
}
