//! What a worker, or the process that it makes, says of its failure.

use std::os::fd::{BorrowedFd, RawFd};

use serde::{Deserialize, Serialize};

/// A failure that is told from one process to the next.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{text}")]
pub(crate) struct Fault {
    /// What a program can make of it.
    pub(crate) kind: FaultKind,
    /// What happened.
    pub(crate) text: String,
}

/// See [`Fault::kind`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FaultKind {
    /// The program is not there.
    NoProgram,
    /// The program is there and can't be run.
    NotExecutable,
    /// Anything else.
    Other,
}

impl Fault {
    /// A failure that has nothing to do with the program.
    pub(crate) fn other(text: String) -> Self {
        Self {
            kind: FaultKind::Other,
            text,
        }
    }

    /// What `error` comes to: the fault that caused it, or else its whole text.
    pub(super) fn of(error: &anyhow::Error) -> Self {
        match error.downcast_ref::<Self>() {
            Some(fault) => fault.clone(),
            None => Self::other(format!("{error:#}")),
        }
    }

    /// Writes it to a descriptor known by number, as well as possible.
    pub(super) fn tell(&self, fd: RawFd) {
        // SAFETY: the descriptor was inherited over the fork that made this process and nothing in it
        // closes it; it is borrowed for one write.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        // There is nobody to tell about a failure.
        if let Ok(bytes) = serde_json::to_vec(self) {
            let _told = nix::unistd::write(fd, &bytes);
        }
    }

    /// What was told, which is nothing if all went well.
    pub(crate) fn told(bytes: &[u8]) -> Option<Self> {
        if bytes.is_empty() {
            return None;
        }
        // Cut short, it says that something failed all the same.
        let fault = serde_json::from_slice(bytes);
        Some(fault.unwrap_or_else(|_| Self::other(String::from_utf8_lossy(bytes).into_owned())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::AsRawFd;

    #[test]
    fn what_is_told_is_what_is_heard() {
        let (mut reader, writer) = std::io::pipe().expect("pipe");
        let fault = Fault {
            kind: FaultKind::NoProgram,
            text: "exec: \"x\": gone".to_owned(),
        };
        fault.tell(writer.as_raw_fd());
        drop(writer);
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).expect("read");
        assert_eq!(Fault::told(&bytes), Some(fault));
        assert_eq!(Fault::told(b""), None);
        let cut = Fault::told(&bytes[..bytes.len() - 1]).expect("a fault");
        assert_eq!(cut.kind, FaultKind::Other);
    }

    #[test]
    fn fault_below_other_errors_keeps_its_kind() {
        let fault = Fault {
            kind: FaultKind::NotExecutable,
            text: "exec /x: permission denied".to_owned(),
        };
        let error = anyhow::Error::new(fault.clone()).context("run a job");
        assert_eq!(Fault::of(&error), fault);
        let other = anyhow::anyhow!("no memory").context("fork");
        assert_eq!(
            Fault::of(&other),
            Fault::other("fork: no memory".to_owned())
        );
    }
}
