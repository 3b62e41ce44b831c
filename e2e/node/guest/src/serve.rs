//! Brings the node up and runs the host's commands.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{self, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, spawn};

use anyhow::{Context, Result, bail};
use kiln_node_channel::{Command, Frame, MAX_PAYLOAD, PORT_NAME, TerminalSize};
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::pty::openpty;

use crate::boot;
use crate::processes::Processes;

const SETUP: &str = "/kiln-node/setup";
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

nix::ioctl_write_ptr_bad!(set_terminal_size, nix::libc::TIOCSWINSZ, nix::libc::winsize);
nix::ioctl_write_int_bad!(take_terminal, nix::libc::TIOCSCTTY);

type Out = Arc<Mutex<File>>;

pub(crate) fn run() -> Result<()> {
    boot::mount_api_filesystems()?;
    let port = OpenOptions::new()
        .read(true)
        .write(true)
        .open(find_port()?)?;
    let out: Out = Arc::new(Mutex::new(port.try_clone()?));
    let processes = Processes::start();

    let (_, setup) = processes
        .spawn(
            process::Command::new(SETUP)
                .env("PATH", PATH)
                .env("HOME", "/root"),
        )
        .with_context(|| format!("running {SETUP}"))?;
    let problem = match setup.recv()? {
        0 => String::new(),
        code => format!("{SETUP} ended with {code}; the console says why"),
    };
    send(&out, &Frame::Ready(problem))?;

    let mut port = port;
    loop {
        match Frame::read_from(&mut port)? {
            Frame::Run(command) => {
                let code = match run_command(&processes, &command, &mut port, &out) {
                    Ok(code) => code,
                    Err(error) => {
                        let text = format!("{}: {error:#}\n", command.argv.join(" "));
                        send(&out, &Frame::Stderr(text.into_bytes()))?;
                        127
                    }
                };
                send(&out, &Frame::Exit(code))?;
            }
            // Input that was under way when its command ended.
            Frame::Stdin(_) | Frame::StdinEnd | Frame::Resize(_) | Frame::Signal(_) => {}
            other => bail!("the host sent {other:?}, which only the node sends"),
        }
    }
}

fn find_port() -> Result<String> {
    for entry in fs::read_dir("/sys/class/virtio-ports").context("no virtio-serial device")? {
        let entry = entry?;
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim() == PORT_NAME {
            return Ok(format!("/dev/{}", entry.file_name().to_string_lossy()));
        }
    }
    bail!("no virtio-serial port is named {PORT_NAME}")
}

fn send(out: &Out, frame: &Frame) -> io::Result<()> {
    frame.write_to(&mut *out.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Runs one command. Input frames are read on a thread of their own until the host acknowledges the
/// exit by its next `Run`; so the reader hands the port back by way of that frame.
fn run_command(
    processes: &Processes,
    command: &Command,
    port: &mut File,
    out: &Out,
) -> Result<i32> {
    let Some((program, arguments)) = command.argv.split_first() else {
        bail!("no command was given");
    };
    let mut child = process::Command::new(program);
    child
        .args(arguments)
        .env("PATH", PATH)
        .env("HOME", "/root")
        .current_dir("/root");
    child.envs(&command.env);

    let (mut stdin, outputs, terminal, exit, pid) = match command.terminal {
        Some(size) => {
            let pty = openpty(None, None).context("opening a terminal")?;
            for end in [&pty.master, &pty.slave] {
                fcntl(end, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
            }
            resize(&pty.master, size)?;
            let side = || pty.slave.try_clone().map(Stdio::from);
            child.stdin(side()?).stdout(side()?).stderr(side()?);
            // SAFETY: setsid and the ioctl are async-signal-safe, and standard input is the terminal.
            unsafe {
                child.pre_exec(|| {
                    nix::unistd::setsid()?;
                    take_terminal(0, 0)?;
                    Ok(())
                });
            }
            let (started, exit) = processes.spawn(&mut child)?;
            drop(pty.slave);
            let input = Some(File::from(pty.master.try_clone()?));
            let outputs = vec![forward(
                File::from(pty.master.try_clone()?),
                out,
                Frame::Stdout,
            )];
            (input, outputs, Some(pty.master), exit, started.id())
        }
        None => {
            child
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            child.process_group(0);
            let (mut started, exit) = processes.spawn(&mut child)?;
            let input = started
                .stdin
                .take()
                .map(|pipe| File::from(OwnedFd::from(pipe)));
            let mut outputs = Vec::new();
            if let Some(pipe) = started.stdout.take() {
                outputs.push(forward(pipe, out, Frame::Stdout));
            }
            if let Some(pipe) = started.stderr.take() {
                outputs.push(forward(pipe, out, Frame::Stderr));
            }
            (input, outputs, None, exit, started.id())
        }
    };
    // The command runs from its own variable set: release the descriptors kept for it here.
    drop(child);

    let group = nix::unistd::Pid::from_raw(-pid.cast_signed());
    let mut input_port = port.try_clone()?;
    let waiter = spawn(move || exit.recv().unwrap_or(127));
    let (done_reader, done_writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    let input_thread = spawn(move || -> Result<()> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        loop {
            let mut ready = [
                PollFd::new(done_reader.as_fd(), PollFlags::POLLIN),
                PollFd::new(input_port.as_fd(), PollFlags::POLLIN),
            ];
            poll(&mut ready, PollTimeout::NONE)?;
            if ready[0].any() == Some(true) {
                return Ok(());
            }
            match Frame::read_from(&mut input_port)? {
                Frame::Stdin(data) => {
                    // A command that closed its input is no error of the channel.
                    if let Some(pipe) = &mut stdin
                        && pipe.write_all(&data).is_err()
                    {
                        stdin = None;
                    }
                }
                Frame::StdinEnd => stdin = None,
                Frame::Resize(size) => {
                    if let Some(terminal) = &terminal {
                        resize(terminal, size)?;
                    }
                }
                Frame::Signal(number) => {
                    let signal = nix::sys::signal::Signal::try_from(number)?;
                    // Gone already: its exit is on its way.
                    let _ = nix::sys::signal::kill(group, signal);
                }
                other => bail!("the host sent {other:?} while a command runs"),
            }
        }
    });

    let code = waiter.join().unwrap_or(127);
    drop(done_writer);
    if input_thread.join().is_err() {
        bail!("the input thread panicked");
    }
    // A daemon that the command left behind may keep its output open: the command is over all the same.
    for output in outputs {
        output.finish();
    }
    Ok(code)
}

struct Forward {
    thread: JoinHandle<()>,
    stop: OwnedFd,
}

impl Forward {
    /// What was written before the command ended is forwarded; what others write later is not waited for.
    fn finish(self) {
        drop(self.stop);
        drop(self.thread.join());
    }
}

fn forward<R: Read + AsFd + Send + 'static>(
    mut from: R,
    out: &Out,
    frame: fn(Vec<u8>) -> Frame,
) -> Forward {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let out = Arc::clone(out);
    #[expect(
        clippy::expect_used,
        reason = "PID 1 of a test machine that is out of descriptors is lost"
    )]
    let (stopped, stop) = nix::unistd::pipe2(OFlag::O_CLOEXEC).expect("a pipe");
    let thread = spawn(move || {
        let mut buffer = vec![0; MAX_PAYLOAD];
        let mut stopping = false;
        loop {
            let timeout = if stopping {
                PollTimeout::ZERO
            } else {
                PollTimeout::NONE
            };
            let mut ready = vec![PollFd::new(from.as_fd(), PollFlags::POLLIN)];
            if !stopping {
                ready.push(PollFd::new(stopped.as_fd(), PollFlags::POLLIN));
            }
            if poll(&mut ready, timeout).is_err() {
                return;
            }
            let readable = ready[0].any() == Some(true);
            let stop_seen = ready.get(1).and_then(PollFd::any) == Some(true);
            if !readable {
                if stopping {
                    return;
                }
                stopping = stop_seen;
                continue;
            }
            match from.read(&mut buffer) {
                Ok(length) if length > 0 => {
                    if send(&out, &frame(buffer[..length].to_vec())).is_err() {
                        return;
                    }
                }
                _ => return,
            }
        }
    });
    Forward { thread, stop }
}

fn resize(terminal: &OwnedFd, size: TerminalSize) -> Result<()> {
    let size = nix::libc::winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the descriptor is open and the structure lives through the call, which only reads it.
    unsafe { set_terminal_size(terminal.as_raw_fd(), &raw const size) }
        .context("sizing the terminal")?;
    Ok(())
}
