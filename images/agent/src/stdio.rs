//! Standard streams of processes, carried to the host.
//!
//! Each stream is a pipe (or the terminal's master) whose agent's end waits in a [`Slot`]. A
//! connection from the host takes it, carries bytes and puts it back if the connection breaks.
//! Nothing is read while nobody is connected, and no more than one buffer ahead of what the
//! connection takes: the process itself is held back by its full pipe. So no byte is lost, and the
//! end of the stream follows the last of them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kiln_agent_api::stream::{Kind, Status, TOKEN_LEN};
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, watch};

use crate::gathering::Gathering;
use crate::sys;

/// Bytes on their way in one stream.
const BUFFER: usize = 32 * 1024;

/// A connection from the host.
pub(crate) trait Connection: AsyncRead + AsyncWrite + Send + Sync + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> Connection for T {}

/// The agent's end of one stream.
#[derive(Debug)]
struct Channel {
    fd: OwnedFd,
    /// Output that was read but could not be delivered.
    pending: Vec<u8>,
}

#[derive(Debug)]
enum State {
    Free(Channel),
    Busy,
    /// Ended, or never there.
    Closed,
}

#[derive(Debug)]
struct Slot {
    state: Mutex<State>,
}

impl Slot {
    fn closed() -> Self {
        Self {
            state: Mutex::new(State::Closed),
        }
    }

    fn with(fd: OwnedFd) -> io::Result<Self> {
        sys::set_nonblocking(&fd)?;
        let channel = Channel {
            fd,
            pending: Vec::new(),
        };
        Ok(Self {
            state: Mutex::new(State::Free(channel)),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Result<Channel, Status> {
        let mut state = self.lock();
        match std::mem::replace(&mut *state, State::Busy) {
            State::Free(channel) => Ok(channel),
            State::Busy => Err(Status::Busy),
            State::Closed => {
                *state = State::Closed;
                Err(Status::NotFound)
            }
        }
    }

    fn put_back(&self, channel: Option<Channel>) {
        *self.lock() = channel.map_or(State::Closed, State::Free);
    }
}

/// Why a connection stopped carrying.
#[derive(Debug, PartialEq, Eq)]
enum Stop {
    /// The stream itself has ended.
    Ended,
    /// The connection has; the stream goes on.
    Disconnected,
}

/// The standard streams of one process.
#[derive(Debug)]
pub(crate) struct Stdio {
    token: [u8; TOKEN_LEN],
    terminal: bool,
    stdin: Slot,
    stdout: Slot,
    stderr: Slot,
    close_stdin: Notify,
}

/// The process's ends of its standard streams.
#[derive(Debug)]
pub(crate) struct ProcessEnds {
    /// stdin, stdout, stderr
    ends: [OwnedFd; 3],
}

impl ProcessEnds {
    /// In the order of their numbers.
    pub(crate) fn borrow(&self) -> [BorrowedFd<'_>; 3] {
        [
            self.ends[0].as_fd(),
            self.ends[1].as_fd(),
            self.ends[2].as_fd(),
        ]
    }

    /// Makes the streams the process's user's, who may want to open them by `/dev/stdout`.
    pub(crate) fn give_to(&self, uid: u32, gid: u32) -> io::Result<()> {
        for end in &self.ends {
            let kind = nix::sys::stat::fstat(end)?.st_mode & libc::S_IFMT;
            if kind == libc::S_IFIFO {
                nix::unistd::fchown(end, Some(uid.into()), Some(gid.into()))?;
            }
        }
        Ok(())
    }
}

/// Which streams the host wants.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Wanted {
    pub(crate) stdin: bool,
    pub(crate) stdout: bool,
    pub(crate) stderr: bool,
    pub(crate) token: [u8; TOKEN_LEN],
}

impl Stdio {
    /// Pipes for a process without a terminal.
    pub(crate) fn pipes(wanted: Wanted) -> io::Result<(Self, ProcessEnds)> {
        let null = || -> io::Result<OwnedFd> {
            Ok(std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open("/dev/null")?
                .into())
        };
        let (stdin, stdin_end) = if wanted.stdin {
            let (theirs, ours) = pipe2(OFlag::O_CLOEXEC)?;
            (Slot::with(ours)?, theirs)
        } else {
            (Slot::closed(), null()?)
        };
        let output = |wanted: bool| -> io::Result<(Slot, OwnedFd)> {
            if wanted {
                let (ours, theirs) = pipe2(OFlag::O_CLOEXEC)?;
                Ok((Slot::with(ours)?, theirs))
            } else {
                Ok((Slot::closed(), null()?))
            }
        };
        let (stdout, stdout_end) = output(wanted.stdout)?;
        let (stderr, stderr_end) = output(wanted.stderr)?;
        let ends = ProcessEnds {
            ends: [stdin_end, stdout_end, stderr_end],
        };
        Ok((Self::new(wanted.token, false, stdin, stdout, stderr), ends))
    }

    /// A terminal's master, for all streams that are wanted.
    pub(crate) fn terminal(wanted: Wanted, master: &OwnedFd) -> io::Result<Self> {
        let slot = |wanted: bool| -> io::Result<Slot> {
            if wanted {
                Slot::with(master.try_clone()?)
            } else {
                Ok(Slot::closed())
            }
        };
        let (stdin, stdout) = (slot(wanted.stdin)?, slot(wanted.stdout)?);
        Ok(Self::new(wanted.token, true, stdin, stdout, Slot::closed()))
    }

    fn new(
        token: [u8; TOKEN_LEN],
        terminal: bool,
        stdin: Slot,
        stdout: Slot,
        stderr: Slot,
    ) -> Self {
        Self {
            token,
            terminal,
            stdin,
            stdout,
            stderr,
            close_stdin: Notify::new(),
        }
    }

    /// Whether `token` opens these streams.
    pub(crate) fn admits(&self, token: &[u8; TOKEN_LEN]) -> bool {
        // Every byte is looked at, so that the time tells nothing.
        self.token
            .iter()
            .zip(token)
            .fold(0, |sum, (a, b)| sum | (a ^ b))
            == 0
    }

    /// Ends the process's input: what has arrived is still delivered.
    pub(crate) fn close_stdin(&self) {
        let mut state = self.stdin.lock();
        match &*state {
            // A terminal's input has no end but the terminal's.
            State::Free(_) if !self.terminal => *state = State::Closed,
            State::Busy if !self.terminal => self.close_stdin.notify_one(),
            _ => {}
        }
    }

    /// Carries one stream over `connection` until either ends, or the connection is `gone`. Answers the header first.
    pub(crate) async fn carry(
        &self,
        kind: Kind,
        mut connection: Box<dyn Connection>,
        gone: impl Future<Output = ()>,
    ) {
        let slot = match kind {
            Kind::Stdin => &self.stdin,
            Kind::Stdout => &self.stdout,
            Kind::Stderr => &self.stderr,
            Kind::Tcp(_) => return answer(&mut connection, Status::BadHeader).await,
        };
        let mut channel = match slot.take() {
            Ok(channel) => channel,
            Err(status) => return answer(&mut connection, status).await,
        };
        if connection
            .write_all(&[Status::Accepted as u8])
            .await
            .is_err()
        {
            return slot.put_back(Some(channel));
        }
        let gone = std::pin::pin!(gone);
        let stop = match kind {
            Kind::Stdin => {
                let close = &self.close_stdin;
                deliver_input(&mut channel, &mut connection, close, gone).await
            }
            _ => deliver_output(&mut channel, &mut connection, gone).await,
        };
        let keep = stop == Stop::Disconnected || (self.terminal && kind == Kind::Stdin);
        slot.put_back(keep.then_some(channel));
        if stop == Stop::Ended {
            // The other side sees the end either way; a reset is no news.
            drop(connection.shutdown().await);
        }
    }
}

/// Refuses a connection.
pub(crate) async fn answer(connection: &mut Box<dyn Connection>, status: Status) {
    // Whoever has gone doesn't need the answer.
    if connection.write_all(&[status as u8]).await.is_ok() {
        drop(connection.shutdown().await);
    }
}

/// Comes back when the guest has another identity than now.
pub(crate) async fn replaced(mut identities: watch::Receiver<u64>) {
    if identities.changed().await.is_err() {
        // Nobody gives identities any more.
        std::future::pending().await
    }
}

async fn deliver_output(
    channel: &mut Channel,
    connection: &mut Box<dyn Connection>,
    mut gone: Pin<&mut impl Future<Output = ()>>,
) -> Stop {
    let Channel { fd, pending } = channel;
    let (mut from_host, mut to_host) = tokio::io::split(connection);
    let mut buffer = vec![0; BUFFER];
    let mut gathering = Gathering::new();
    let mut watched = None;
    let mut ignored = [0; 64];
    loop {
        let length = pending.len();
        while !pending.is_empty() {
            match to_host.write(pending).await {
                Ok(0) | Err(_) => return Stop::Disconnected,
                Ok(written) => drop(pending.drain(..written)),
            }
        }
        if length > 0
            && let Some(pause) = gathering.pause_after(length)
        {
            // Else every piece would wake the runtime meanwhile.
            watched = None;
            tokio::time::sleep(pause).await;
        }
        let read = async {
            let fd = match &watched {
                Some(fd) => fd,
                None => watched.insert(sys::watch_lent(fd.as_fd())?),
            };
            read_channel(fd, &mut buffer).await
        };
        let length = tokio::select! {
            biased;
            read = read => read,
            read = from_host.read(&mut ignored) => match read {
                Ok(0) | Err(_) => return Stop::Disconnected,
                Ok(_) => continue,
            },
            () = gone.as_mut() => return Stop::Disconnected,
        };
        match length {
            Ok(0) => return Stop::Ended,
            Ok(length) => pending.extend_from_slice(&buffer[..length]),
            Err(error) => {
                tracing::warn!(%error, "reading a process's output failed; its stream ends here");
                return Stop::Ended;
            }
        }
    }
}

async fn deliver_input(
    channel: &mut Channel,
    connection: &mut Box<dyn Connection>,
    close: &Notify,
    mut gone: Pin<&mut impl Future<Output = ()>>,
) -> Stop {
    let fd = match sys::watch_lent(channel.fd.as_fd()) {
        Ok(fd) => fd,
        Err(error) => {
            tracing::warn!(%error, "a process's input can't be watched; it ends here");
            return Stop::Ended;
        }
    };
    let mut buffer = vec![0; BUFFER];
    let mut closing = false;
    loop {
        let read = if closing {
            // Only what is here already.
            match tokio::time::timeout(Duration::ZERO, connection.read(&mut buffer)).await {
                Ok(read) => read,
                Err(_) => return Stop::Ended,
            }
        } else {
            tokio::select! {
                biased;
                read = connection.read(&mut buffer) => read,
                () = close.notified() => {
                    closing = true;
                    continue;
                }
                () = gone.as_mut() => return Stop::Disconnected,
            }
        };
        let mut bytes = match read {
            Ok(0) => return Stop::Ended,
            Ok(length) => &buffer[..length],
            Err(_) => return Stop::Disconnected,
        };
        while !bytes.is_empty() {
            match write_channel(&fd, bytes).await {
                Ok(written) => bytes = &bytes[written..],
                // Nobody reads any more.
                Err(_) => return Stop::Ended,
            }
        }
    }
}

async fn read_channel(fd: &AsyncFd<BorrowedFd<'_>>, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        let mut ready = fd.readable().await?;
        match ready.try_io(|fd| Ok(nix::unistd::read(fd, buffer)?)) {
            // A terminal's last user has closed it.
            Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => return Ok(0),
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(result) => return result,
            Err(_would_block) => {}
        }
    }
}

async fn write_channel(fd: &AsyncFd<BorrowedFd<'_>>, bytes: &[u8]) -> io::Result<usize> {
    loop {
        let mut ready = fd.writable().await?;
        match ready.try_io(|fd| Ok(nix::unistd::write(fd, bytes)?)) {
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(result) => return result,
            Err(_would_block) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::sync::Arc;

    use tokio::net::UnixStream;

    use super::*;

    const ALL: Wanted = Wanted {
        stdin: true,
        stdout: true,
        stderr: true,
        token: [3; TOKEN_LEN],
    };

    struct Process {
        stdin: std::fs::File,
        stdout: std::fs::File,
    }

    fn pipes() -> (Arc<Stdio>, Process) {
        let (stdio, ends) = Stdio::pipes(ALL).expect("pipes");
        let [stdin, stdout, _] = ends.ends;
        (
            Arc::new(stdio),
            Process {
                stdin: stdin.into(),
                stdout: stdout.into(),
            },
        )
    }

    async fn connect(stdio: &Arc<Stdio>, kind: Kind) -> (UnixStream, Status) {
        let (ours, theirs) = UnixStream::pair().expect("pair");
        let stdio = stdio.clone();
        tokio::spawn(async move {
            let gone = std::future::pending();
            stdio.carry(kind, Box::new(theirs), gone).await;
        });
        let mut ours = ours;
        let status = ours.read_u8().await.expect("status");
        (ours, Status::from_byte(status))
    }

    #[tokio::test]
    async fn output_from_before_the_connection_waits_for_it() {
        let (stdio, mut process) = pipes();
        process.stdout.write_all(b"early").expect("write");
        drop(process.stdout);
        let (mut host, status) = connect(&stdio, Kind::Stdout).await;
        assert_eq!(status, Status::Accepted);
        let mut text = String::new();
        host.read_to_string(&mut text).await.expect("read");
        assert_eq!(text, "early");
    }

    #[tokio::test]
    async fn a_megabyte_arrives_whole_though_the_host_is_slow() {
        let (stdio, mut process) = pipes();
        let bytes: Vec<u8> = (0..1_u32 << 18).flat_map(u32::to_le_bytes).collect();
        let expected = bytes.clone();
        let writer = std::thread::spawn(move || process.stdout.write_all(&bytes));
        let (mut host, _) = connect(&stdio, Kind::Stdout).await;
        let mut got = Vec::new();
        let mut piece = [0; 1000];
        loop {
            tokio::task::yield_now().await;
            match host.read(&mut piece).await.expect("read") {
                0 => break,
                length => got.extend_from_slice(&piece[..length]),
            }
        }
        assert!(writer.join().expect("writer").is_ok());
        assert!(got == expected, "{} bytes of {}", got.len(), expected.len());
    }

    #[tokio::test]
    async fn many_small_pieces_are_gathered() {
        let (stdio, mut process) = pipes();
        let (mut host, _) = connect(&stdio, Kind::Stdout).await;
        let lines: Vec<String> = (0..20_000).map(|i| format!("line {i}\n")).collect();
        let expected = lines.concat();
        let writer = std::thread::spawn(move || {
            lines
                .iter()
                .try_for_each(|line| process.stdout.write_all(line.as_bytes()))
        });
        let (mut got, mut piece, mut pieces) = (Vec::new(), [0; 64 << 10], 0);
        loop {
            match host.read(&mut piece).await.expect("read") {
                0 => break,
                length => got.extend_from_slice(&piece[..length]),
            }
            pieces += 1;
        }
        assert!(writer.join().expect("writer").is_ok());
        assert!(got == expected.as_bytes(), "{} bytes", got.len());
        assert!(pieces < 10_000, "{pieces} messages");
    }

    #[tokio::test]
    async fn a_broken_connection_leaves_the_stream_to_the_next() {
        let (stdio, mut process) = pipes();
        let (host, _) = connect(&stdio, Kind::Stdout).await;
        drop(host);
        process.stdout.write_all(b"later").expect("write");
        drop(process.stdout);
        // The agent notices the break in its own time.
        let mut text = String::new();
        loop {
            let (mut host, status) = connect(&stdio, Kind::Stdout).await;
            if status == Status::Busy {
                tokio::task::yield_now().await;
                continue;
            }
            host.read_to_string(&mut text).await.expect("read");
            break;
        }
        assert_eq!(text, "later");
    }

    #[tokio::test]
    async fn only_one_connection_carries_a_stream() {
        let (stdio, _process) = pipes();
        let (_first, status) = connect(&stdio, Kind::Stdout).await;
        assert_eq!(status, Status::Accepted);
        let (_second, status) = connect(&stdio, Kind::Stdout).await;
        assert_eq!(status, Status::Busy);
    }

    #[tokio::test]
    async fn the_hosts_half_close_ends_input_after_its_last_byte() {
        let (stdio, mut process) = pipes();
        let (mut host, _) = connect(&stdio, Kind::Stdin).await;
        host.write_all(b"typed").await.expect("write");
        host.shutdown().await.expect("half-close");
        let text = tokio::task::spawn_blocking(move || {
            let mut text = String::new();
            process.stdin.read_to_string(&mut text).map(|_| text)
        });
        assert_eq!(text.await.expect("join").expect("read"), "typed");
    }

    #[tokio::test]
    async fn closing_stdin_delivers_what_has_arrived() {
        let (stdio, mut process) = pipes();
        let (mut host, _) = connect(&stdio, Kind::Stdin).await;
        host.write_all(b"typed").await.expect("write");
        stdio.close_stdin();
        let text = tokio::task::spawn_blocking(move || {
            let mut text = String::new();
            process.stdin.read_to_string(&mut text).map(|_| text)
        });
        assert_eq!(text.await.expect("join").expect("read"), "typed");
    }

    #[tokio::test]
    async fn closing_stdin_needs_no_connection() {
        let (stdio, mut process) = pipes();
        stdio.close_stdin();
        let mut text = String::new();
        process.stdin.read_to_string(&mut text).expect("read");
        assert_eq!(connect(&stdio, Kind::Stdin).await.1, Status::NotFound);
    }

    #[test]
    fn a_token_opens_only_its_own_streams() {
        let stdio = Stdio::new(
            [3; TOKEN_LEN],
            false,
            Slot::closed(),
            Slot::closed(),
            Slot::closed(),
        );
        assert!(stdio.admits(&[3; TOKEN_LEN]));
        let mut wrong = [3; TOKEN_LEN];
        wrong[15] = 4;
        assert!(!stdio.admits(&wrong));
    }
}
