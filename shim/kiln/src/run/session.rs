//! A process in the guest as a person has it in front of them: its streams, its terminal, the
//! signals for it, and its exit code.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::FromRawFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use kiln_agent_api::stream::Kind;
use kiln_uvm::guest::{Agent, Guest};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use super::guest::{self, CONTAINER, Process};
use super::terminal::{self, Raw};

/// What is passed on. SIGWINCH means the terminal's size.
const SIGNALS: [i32; 7] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGWINCH,
];
/// So many requests to end, and the process is killed: it may be ignoring them, as the first
/// process of a PID namespace does unless it asks for them.
const PATIENCE: u32 = 3;
/// How long output may still come when the process has ended.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// This program's signals, from before there is a guest to pass them on to.
pub(crate) struct Signals(mpsc::UnboundedReceiver<i32>);

impl Signals {
    /// Begins to listen; from here on no signal of these ends this program by itself.
    pub(crate) fn listen() -> Result<Signals> {
        let (tell, told) = mpsc::unbounded_channel();
        for number in SIGNALS {
            let mut stream: Signal =
                signal(SignalKind::from_raw(number)).context("listening for signals")?;
            let tell = tell.clone();
            tokio::spawn(async move {
                while stream.recv().await.is_some() {
                    if tell.send(number).is_err() {
                        return;
                    }
                }
            });
        }
        Ok(Signals(told))
    }

    async fn next(&mut self) -> i32 {
        match self.0.recv().await {
            Some(number) => number,
            None => std::future::pending().await,
        }
    }

    /// Comes back when somebody wants an end of it: before the process runs, there is nobody else to tell.
    pub(crate) async fn end(&mut self) -> i32 {
        loop {
            let number = self.next().await;
            if asks_for_the_end(number) {
                return number;
            }
        }
    }
}

fn asks_for_the_end(number: i32) -> bool {
    [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT].contains(&number)
}

/// The streams of a process, connected.
pub(crate) struct Session {
    guest: Agent,
    process: Process,
    outputs: Vec<JoinHandle<io::Result<()>>>,
    /// Somebody closed our output: nobody reads what the process writes.
    broken: mpsc::UnboundedReceiver<()>,
    raw: Option<Raw>,
}

impl Session {
    /// Connects the streams of a process that has been started.
    pub(crate) async fn attach(guest: &Agent, process: &Process) -> Result<Session> {
        let (tell, broken) = mpsc::unbounded_channel();
        let mut outputs = Vec::new();
        let mut kinds = vec![(Kind::Stdout, 1)];
        if !process.terminal {
            kinds.push((Kind::Stderr, 2));
        }
        for (kind, fd) in kinds {
            let stream = blocking(guest::stream(guest, process, kind).await?)?;
            let tell = tell.clone();
            let copy = move || {
                let result = copy_out(stream, fd);
                if result.is_err() {
                    // Nobody listens if the process has ended, and then nothing is lost.
                    let _ = tell.send(());
                }
                result
            };
            let thread = std::thread::Builder::new().name("output".to_owned());
            outputs.push(thread.spawn(copy).context("starting a thread")?);
        }
        // Without input for the process, Ctrl-C stays the terminal's own: it comes as a signal.
        let lent = process.terminal && process.stdin && terminal::is_terminal(0);
        let raw = match lent {
            true => Some(Raw::take().context("taking the terminal")?),
            false => None,
        };
        if process.stdin {
            let stream = blocking(guest::stream(guest, process, Kind::Stdin).await?)?;
            // It ends with this program: nothing else interrupts a read from a terminal.
            let thread = std::thread::Builder::new().name("input".to_owned());
            thread
                .spawn(move || copy_in(&stream))
                .context("starting a thread")?;
        }
        Ok(Session {
            guest: guest.clone(),
            process: process.clone(),
            outputs,
            broken,
            raw,
        })
    }

    /// Passes signals on until the process ends; returns its exit code when its last output is written.
    pub(crate) async fn run(mut self, signals: &mut Signals) -> Result<u8> {
        let guest = self.guest.clone();
        let process = self.process.clone();
        let wait = guest.wait(CONTAINER, &process.exec);
        tokio::pin!(wait);
        let mut requests = 0;
        let status = loop {
            tokio::select! {
                status = &mut wait => break status,
                number = signals.next() => {
                    if number == libc::SIGWINCH {
                        if process.terminal {
                            // It may just have ended.
                            drop(guest.resize_tty(CONTAINER, &process.exec, terminal::size()).await);
                        }
                        continue;
                    }
                    requests += u32::from(asks_for_the_end(number));
                    let number = if requests > PATIENCE { libc::SIGKILL } else { number };
                    drop(kill(&guest, &process, number).await);
                }
                Some(()) = self.broken.recv() => {
                    drop(kill(&guest, &process, libc::SIGKILL).await);
                }
            }
        };
        let outputs = std::mem::take(&mut self.outputs);
        let drained = tokio::task::spawn_blocking(move || {
            outputs.into_iter().try_for_each(|output| {
                output
                    .join()
                    .unwrap_or_else(|_| Err(io::Error::other("a thread died")))
            })
        });
        // A process that was started elsewhere may hold the output open for ever.
        let drained = tokio::time::timeout(DRAIN_LIMIT, drained).await;
        drop(self.raw.take());
        if let Ok(result) = drained {
            match result.context("a thread died")? {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                other => other.context("writing what the command writes")?,
            }
        }
        Ok(u8::try_from(status?.exit_code).unwrap_or(u8::MAX))
    }
}

async fn kill(guest: &Agent, process: &Process, signal: i32) -> Result<()> {
    let signal = signal.unsigned_abs();
    Ok(guest.kill(CONTAINER, &process.exec, signal, false).await?)
}

fn blocking(stream: tokio::net::UnixStream) -> Result<UnixStream> {
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    Ok(stream)
}

fn copy_out(mut stream: UnixStream, fd: i32) -> io::Result<()> {
    // SAFETY: a standard stream, which stays open as long as this program runs; it is not closed here.
    let out = std::mem::ManuallyDrop::new(unsafe { std::fs::File::from_raw_fd(fd) });
    let mut buffer = vec![0; 64 << 10];
    loop {
        match stream.read(&mut buffer) {
            // The μVM's end is the end of what it says.
            Ok(0) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
            Ok(length) => (&*out).write_all(&buffer[..length])?,
        }
    }
}

fn copy_in(mut stream: &UnixStream) {
    // SAFETY: as above: standard input, not closed here.
    let input = std::mem::ManuallyDrop::new(unsafe { std::fs::File::from_raw_fd(0) });
    let mut buffer = vec![0; 64 << 10];
    loop {
        match (&*input).read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A terminal that is gone is an end of input too.
            Ok(0) | Err(_) => break,
            Ok(length) => {
                if stream.write_all(&buffer[..length]).is_err() {
                    return;
                }
            }
        }
    }
    // Fails if the process has ended, and then nothing waits for more.
    drop(stream.shutdown(Shutdown::Write));
}
