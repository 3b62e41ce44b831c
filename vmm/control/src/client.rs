//! Spawns a VMM and talks to it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};

use crate::api::{Reply, Request};
use crate::refusal::RefusalKind;
use crate::wire;

/// Why a VMM did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The process could not be started.
    #[error("starting {program} failed")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The socket failed.
    #[error("talking to the VMM failed; its log says why it ended")]
    Socket(#[source] io::Error),
    /// The VMM is gone.
    #[error("the VMM has ended; its log says why")]
    Gone,
    /// The VMM refused.
    #[error("the VMM refused: {why}")]
    Refused {
        /// What kind of reason it has.
        kind: RefusalKind,
        /// The reason.
        why: String,
    },
    /// The VMM answered something else than was asked.
    #[error("the VMM answered out of turn; client and VMM are of different versions")]
    Protocol,
}

/// Who the VMM becomes before it reads its first request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Jail {
    /// User it runs as.
    pub uid: u32,
    /// Group it runs as.
    pub gid: u32,
    /// An empty directory that becomes its root.
    pub root: PathBuf,
}

/// How to start a VMM.
#[derive(Debug)]
pub struct Spawn {
    /// The kiln-vmm program.
    pub program: PathBuf,
    /// The jail; without one (tests, people) the VMM keeps the caller's rights.
    pub jail: Option<Jail>,
    /// Where its log goes; without one, the caller's standard error.
    pub log: Option<File>,
}

/// A VMM process. Dropping it ends the process.
#[derive(Debug)]
pub struct Vmm {
    child: Mutex<Child>,
    pid: u32,
    socket: Mutex<UnixStream>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One request and its reply.
fn exchange(
    socket: &UnixStream,
    request: &Request,
    fds: &[BorrowedFd<'_>],
    most_back: usize,
) -> Result<(Reply, Vec<OwnedFd>), VmmError> {
    let gone = |e: io::Error| match e.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => VmmError::Gone,
        _ => VmmError::Socket(e),
    };
    wire::send(socket, request, fds).map_err(gone)?;
    match wire::receive(socket, most_back).map_err(gone)? {
        Some((Reply::Refused { kind, why }, _)) => Err(VmmError::Refused { kind, why }),
        Some(answer) => Ok(answer),
        None => Err(VmmError::Gone),
    }
}

impl Vmm {
    /// Starts a VMM. It makes its VM at once and waits for its first request: start one ahead of time and
    /// KVM's grace period is over when the pod comes.
    pub fn spawn(spawn: Spawn) -> Result<Self, VmmError> {
        let failed = |source| VmmError::Spawn {
            program: spawn.program.clone(),
            source,
        };
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let mut command = Command::new(&spawn.program);
        command.arg("serve").env_clear();
        if let Some(jail) = &spawn.jail {
            command.arg("--uid").arg(jail.uid.to_string());
            command.arg("--gid").arg(jail.gid.to_string());
            command.arg("--root").arg(&jail.root);
        }
        command
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            // A terminal's signals are for the client: the VMM ends when the socket closes.
            .process_group(0);
        if let Some(log) = spawn.log {
            command.stderr(Stdio::from(log));
        }
        let child = command.spawn().map_err(failed)?;
        Ok(Self {
            pid: child.id(),
            child: Mutex::new(child),
            socket: Mutex::new(ours),
        })
    }

    /// The process's id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Sends a request and waits for its reply, which has no descriptors. A refusal becomes [`VmmError::Refused`].
    pub fn call(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<Reply, VmmError> {
        let (reply, _) = self.call_with_fds(request, fds, 0)?;
        Ok(reply)
    }

    /// The same for a reply that may have so many descriptors. With more it fails, and none of them is kept: a VMM that
    /// its guest has broken can't have the client hold what it likes.
    pub fn call_with_fds(
        &self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
        most_back: usize,
    ) -> Result<(Reply, Vec<OwnedFd>), VmmError> {
        exchange(&lock(&self.socket), request, fds, most_back)
    }

    /// For requests that are answered by `Done`.
    pub fn order(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<(), VmmError> {
        match self.call(request, fds)? {
            Reply::Done => Ok(()),
            _ => Err(VmmError::Protocol),
        }
    }

    /// Puts a disk into a slot (or the first empty one) and returns the slot.
    pub fn attach_block(
        &self,
        slot: Option<u8>,
        disk: &File,
        read_only: bool,
    ) -> Result<u8, VmmError> {
        match self.call(
            &Request::AttachBlock {
                slot,
                fd: 0,
                read_only,
            },
            &[disk.as_fd()],
        )? {
            Reply::Slot(slot) => Ok(slot),
            _ => Err(VmmError::Protocol),
        }
    }

    /// Plugs a network card with one queue pair in front of a tap and returns its slot.
    pub fn plug_net(&self, tap: BorrowedFd<'_>, mac: [u8; 6]) -> Result<u8, VmmError> {
        match self.call(&Request::PlugNet { taps: vec![0], mac }, &[tap])? {
            Reply::Slot(slot) => Ok(slot),
            _ => Err(VmmError::Protocol),
        }
    }

    /// Waits for the process to end; returns its exit code (-1 for a signal). See `kiln-vmm`'s exit codes.
    pub fn wait(&self) -> Result<i32, VmmError> {
        Ok(self.wait_status()?.code().unwrap_or(-1))
    }

    /// The same with the signal that ended it, if one did.
    pub fn wait_status(&self) -> Result<ExitStatus, VmmError> {
        // Waits without the lock and without reaping, so that `kill` works meanwhile.
        loop {
            // SAFETY: waitid fills in the siginfo it is given; all-zero is a valid one.
            let rc = unsafe {
                let mut info: libc::siginfo_t = std::mem::zeroed();
                libc::waitid(
                    libc::P_PID,
                    self.pid,
                    &raw mut info,
                    libc::WEXITED | libc::WNOWAIT,
                )
            };
            let e = io::Error::last_os_error();
            // ECHILD: `kill` has reaped it already, and the next line knows its status.
            if rc == 0 || e.raw_os_error() == Some(libc::ECHILD) {
                break;
            }
            if e.kind() != io::ErrorKind::Interrupted {
                return Err(VmmError::Socket(e));
            }
        }
        lock(&self.child).wait().map_err(VmmError::Socket)
    }

    /// Ends the process without asking the machine. Done twice is done once.
    pub fn kill(&self) {
        let mut child = lock(&self.child);
        // Fails only if it has ended.
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    /// What the client gets of a VMM that answers with `sent` descriptors.
    fn answer(reply: &Reply, sent: usize, most: usize) -> Result<(Reply, Vec<OwnedFd>), VmmError> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"of the VMM", 0).unwrap();
        // A reply is shorter than a socket's buffer, so it can be there before the request.
        wire::send(&theirs, reply, &vec![file.as_fd(); sent]).unwrap();
        let answer = exchange(&ours, &Request::Stats, &[], most);
        let asked = wire::receive::<Request>(&theirs, 0).unwrap().unwrap();
        assert_eq!(asked.0, Request::Stats);
        answer
    }

    #[test]
    fn descriptors_come_back_with_a_reply() {
        let (reply, fds) = answer(&Reply::Slot(3), 2, 2).unwrap();
        assert_eq!((reply, fds.len()), (Reply::Slot(3), 2));
        let mut text = String::new();
        for fd in fds {
            let mut file = File::from(fd);
            std::io::Seek::rewind(&mut file).unwrap();
            text.clear();
            file.read_to_string(&mut text).unwrap();
        }
        assert_eq!(text, "of the VMM");
    }

    #[test]
    fn reply_with_more_descriptors_than_were_asked_for_is_refused() {
        for (sent, most) in [(1, 0), (3, 2)] {
            let answer = answer(&Reply::Done, sent, most);
            assert!(matches!(answer, Err(VmmError::Socket(_))), "{answer:?}");
        }
    }

    #[test]
    fn refusal_keeps_its_kind() {
        let refused = Reply::Refused {
            kind: RefusalKind::Busy,
            why: "there is a disk in this slot already".to_owned(),
        };
        let error = answer(&refused, 0, 0).unwrap_err();
        let VmmError::Refused { kind, why } = error else {
            panic!("{error:?}");
        };
        assert_eq!(kind, RefusalKind::Busy);
        assert_eq!(why, "there is a disk in this slot already");
    }
}
