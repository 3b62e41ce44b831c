//! Running commands in a booted node.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kiln_node_channel::{Command, Frame, MAX_PAYLOAD, TerminalSize};

use crate::cleanup::RawTerminal;
use crate::machine::Machine;

nix::ioctl_read_bad!(get_terminal_size, nix::libc::TIOCGWINSZ, nix::libc::winsize);

pub(crate) struct Session<'a> {
    machine: &'a Machine,
    channel: UnixStream,
    deadline: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Input {
    None,
    /// Standard input, as bytes.
    Pipe,
    /// Standard input is a terminal, and the command gets one.
    Terminal,
}

impl Input {
    pub(crate) fn of_this_process(interactive: bool) -> Input {
        match (interactive, io::stdin().is_terminal()) {
            (true, true) => Input::Terminal,
            (true, false) => Input::Pipe,
            (false, _) => Input::None,
        }
    }
}

impl Session<'_> {
    /// Waits until the node is up.
    pub(crate) fn wait_until_up(machine: &Machine, patience: Duration) -> Result<()> {
        let mut session = Session::of(machine)?;
        session.limit(Some(patience));
        match session
            .next_frame()
            .context("waiting for the node to come up")?
        {
            Frame::Ready(problem) if problem.is_empty() => Ok(()),
            Frame::Ready(problem) => {
                bail!(
                    "the node came up with a problem: {problem}\n{}",
                    machine.console()
                )
            }
            other => bail!("the node sent {other:?} before it was ready"),
        }
    }

    /// With a node that is up.
    pub(crate) fn of(machine: &Machine) -> Result<Session<'_>> {
        Ok(Session {
            machine,
            channel: machine.channel.try_clone()?,
            deadline: None,
        })
    }

    pub(crate) fn limit(&mut self, time: Option<Duration>) {
        self.deadline = time.map(|time| Instant::now() + time);
    }

    /// Runs a command with live output and returns its exit code.
    pub(crate) fn run(
        &mut self,
        argv: &[String],
        env: &BTreeMap<String, String>,
        input: Input,
        out: &mut dyn Write,
    ) -> Result<i32> {
        let raw = match input {
            Input::Terminal => Some(RawTerminal::new()?),
            _ => None,
        };
        let terminal = match input {
            Input::Terminal => Some(terminal_size()?),
            _ => None,
        };
        let command = Command {
            argv: argv.to_vec(),
            env: env.clone(),
            terminal,
        };
        Frame::Run(command).write_to(&mut self.channel)?;
        match input {
            Input::None => Frame::StdinEnd.write_to(&mut self.channel)?,
            _ => send_input(self.channel.try_clone()?, terminal),
        }
        let code = loop {
            match self.next_frame()? {
                Frame::Stdout(data) => {
                    out.write_all(&data)?;
                    out.flush()?;
                }
                Frame::Stderr(data) => io::stderr().write_all(&data)?,
                Frame::Exit(code) => break code,
                other => bail!("the node sent {other:?} while a command runs"),
            }
        };
        drop(raw);
        Ok(code)
    }

    /// Copies a folder of the node to the host. A folder that does not exist is no error.
    pub(crate) fn fetch(&mut self, from: &str, to: &std::path::Path) -> Result<()> {
        // A log that is written to meanwhile is as good as it was.
        let script = format!(
            "test ! -d '{from}' || {{ tar -C '{from}' --warning=no-file-changed -cf - .; test $? -le 1; }}"
        );
        let mut archive = tempfile_in_memory()?;
        let argv = ["sh", "-c", &script].map(str::to_owned);
        let code = self.run(&argv, &BTreeMap::new(), Input::None, &mut archive)?;
        if code != 0 {
            bail!("reading {from} in the node ended with {code}");
        }
        io::Seek::rewind(&mut archive)?;
        std::fs::create_dir_all(to).with_context(|| format!("creating {}", to.display()))?;
        let mut archive = tar::Archive::new(archive);
        archive.set_preserve_ownerships(false);
        for entry in archive.entries()? {
            let mut entry = entry?;
            // Only files and folders are results; sockets and fifos beside them are not.
            if matches!(
                entry.header().entry_type(),
                tar::EntryType::Regular | tar::EntryType::Directory
            ) {
                entry
                    .unpack_in(to)
                    .with_context(|| format!("writing to {}", to.display()))?;
            }
        }
        Ok(())
    }

    fn next_frame(&mut self) -> Result<Frame> {
        let left = match self.deadline {
            None => None,
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    bail!(
                        "the time limit is over; the node's console says:\n{}",
                        self.machine.console()
                    );
                }
                Some(left)
            }
        };
        self.channel.set_read_timeout(left)?;
        match Frame::read_from(&mut self.channel) {
            Ok(frame) => Ok(frame),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                bail!(
                    "the time limit is over; the node's console says:\n{}",
                    self.machine.console()
                )
            }
            Err(error) => {
                // QEMU's last words may still be on their way.
                std::thread::sleep(Duration::from_millis(200));
                Err(NodeGone {
                    error,
                    console: self.machine.console(),
                }
                .into())
            }
        }
    }
}

/// The node ended while it was needed: QEMU was killed, or the node's kernel panicked.
#[derive(Debug)]
pub(crate) struct NodeGone {
    error: io::Error,
    console: String,
}

impl std::fmt::Display for NodeGone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (error, console) = (&self.error, &self.console);
        write!(
            f,
            "the node is gone ({error}); its console says:\n{console}"
        )
    }
}

impl std::error::Error for NodeGone {}

fn tempfile_in_memory() -> Result<File> {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    Ok(File::from(memfd_create(c"results", MFdFlags::MFD_CLOEXEC)?))
}

fn terminal_size() -> Result<TerminalSize> {
    let mut size = nix::libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: standard input is open, and the structure outlives the call that fills it.
    unsafe { get_terminal_size(io::stdin().as_raw_fd(), &raw mut size) }
        .context("asking for the terminal's size")?;
    Ok(TerminalSize {
        rows: size.ws_row,
        columns: size.ws_col,
    })
}

/// Sends standard input, and a terminal's changes of size, until the input ends. The thread lives as long as the
/// program: a read of a terminal cannot be called back.
fn send_input(mut channel: UnixStream, mut size: Option<TerminalSize>) {
    std::thread::spawn(move || {
        let mut stdin = io::stdin().lock();
        let mut buffer = vec![0; MAX_PAYLOAD];
        loop {
            let Ok(length) = stdin.read(&mut buffer) else {
                return;
            };
            if let Some(known) = &mut size
                && let Ok(now) = terminal_size()
                && (now.rows, now.columns) != (known.rows, known.columns)
            {
                *known = now;
                if Frame::Resize(now).write_to(&mut channel).is_err() {
                    return;
                }
            }
            let frame = if length == 0 {
                Frame::StdinEnd
            } else {
                Frame::Stdin(buffer[..length].to_vec())
            };
            if frame.write_to(&mut channel).is_err() || length == 0 {
                return;
            }
        }
    });
}
