//! Standard input and output: lines, echo, terminals.

use std::io::{self, BufWriter, IsTerminal, Read, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::signals;

/// How far ahead of its time [`pace`] may be.
const PIECE: Duration = Duration::from_millis(5);

/// Prints one line and flushes it, so that whoever waits for it need not wait for a full buffer.
pub(crate) fn say(line: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .context("cannot write to stdout")
}

/// Prints `count` lines `N` or, padded to `length` bytes, `N xxxx`; each `error_every`-th goes to stderr.
pub(crate) fn lines(count: u64, length: usize, error_every: u64) -> Result<()> {
    let mut out = BufWriter::with_capacity(64 << 10, io::stdout().lock());
    for index in 0..count {
        let line = line(index, length);
        if error_every != 0 && index % error_every == 0 {
            io::stderr()
                .write_all(line.as_bytes())
                .context("cannot write to stderr")?;
        } else {
            out.write_all(line.as_bytes())
                .context("cannot write to stdout")?;
        }
    }
    out.flush().context("cannot write to stdout")
}

fn line(index: u64, length: usize) -> String {
    let mut line = index.to_string();
    if line.len() + 1 < length {
        line.push(' ');
        line.extend(std::iter::repeat_n('x', length - line.len()));
    }
    line.push('\n');
    line
}

/// Prints `count` lines as [`lines`] does, `rate` of them a second and each by a write of its own, as far as its
/// output is taken so fast; then says on stderr how many milliseconds it took.
pub(crate) fn pace(rate: u64, count: u64, length: usize) -> Result<()> {
    let (mut out, start) = (io::stdout().lock(), Instant::now());
    for index in 0..count {
        let due = Duration::from_nanos(index.saturating_mul(1_000_000_000) / rate.max(1));
        let ahead = due.saturating_sub(start.elapsed());
        // A sleep is longer than the time between two lines.
        if ahead > PIECE {
            std::thread::sleep(ahead);
        }
        out.write_all(line(index, length).as_bytes())
            .context("cannot write to stdout")?;
    }
    out.flush().context("cannot write to stdout")?;
    writeln!(io::stderr(), "{}", start.elapsed().as_millis()).context("cannot write to stderr")
}

/// Copies stdin to stdout until its end, then says on stderr how much it was.
pub(crate) fn echo() -> Result<()> {
    let (mut input, mut out) = (io::stdin().lock(), io::stdout().lock());
    let mut buffer = vec![0; 64 << 10];
    let mut sum = 0u64;
    loop {
        let got = match input.read(&mut buffer) {
            Ok(0) => break,
            Ok(got) => got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).context("cannot read stdin"),
        };
        sum += got as u64;
        out.write_all(&buffer[..got])
            .context("cannot write to stdout")?;
        out.flush().context("cannot write to stdout")?;
    }
    writeln!(io::stderr(), "echoed {sum} bytes").context("cannot write to stderr")
}

/// Says whether stdin, stdout and stderr are terminals and how large; again whenever the size
/// changes; ends on TERM, INT or HUP.
pub(crate) fn tty() -> Result<ExitCode> {
    let signals =
        signals::Signals::new(&[libc::SIGWINCH, libc::SIGTERM, libc::SIGINT, libc::SIGHUP])?;
    say(&format!(
        "tty stdin={} stdout={} stderr={}",
        io::stdin().is_terminal(),
        io::stdout().is_terminal(),
        io::stderr().is_terminal()
    ))?;
    loop {
        let mut size = libc::winsize {
            ws_row: 0,
            ws_col: 0,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: TIOCGWINSZ writes one winsize, which `size` is.
        let result = unsafe { libc::ioctl(0, libc::TIOCGWINSZ, &raw mut size) };
        if result == 0 {
            say(&format!("size {}x{}", size.ws_col, size.ws_row))?;
        } else {
            say("size none")?;
        }
        if signals.next()? != libc::SIGWINCH {
            return Ok(ExitCode::SUCCESS);
        }
    }
}
