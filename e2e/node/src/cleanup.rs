//! Nothing stays behind: not on success, not on failure, not on Ctrl-C.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::termios::Termios;

#[derive(Default)]
struct Leftovers {
    folders: Vec<PathBuf>,
    terminal: Option<Termios>,
}

static LEFTOVERS: Mutex<Leftovers> = Mutex::new(Leftovers {
    folders: Vec::new(),
    terminal: None,
});

fn with_leftovers<T>(change: impl FnOnce(&mut Leftovers) -> T) -> T {
    change(&mut LEFTOVERS.lock().unwrap_or_else(PoisonError::into_inner))
}

/// From here on a signal that ends the program first clears up. Call it before any other thread runs.
/// QEMU and the image builder need no care: the kernel ends the one, the terminal the other.
pub(crate) fn on_signals() -> Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block().context("blocking signals")?;
    std::thread::spawn(move || {
        if let Ok(signal) = signals.wait() {
            clear();
            std::process::exit(128 + signal as i32);
        }
    });
    Ok(())
}

/// Children would inherit the blocked signals; call this in them before exec.
pub(crate) fn unblock_signals() -> std::io::Result<()> {
    SigSet::all().thread_unblock().map_err(std::io::Error::from)
}

fn clear() {
    let (folders, terminal) =
        with_leftovers(|left| (std::mem::take(&mut left.folders), left.terminal.take()));
    if let Some(terminal) = terminal {
        restore_terminal(&terminal);
    }
    for folder in folders {
        // The next build of this image removes what is left.
        let _ = fs::remove_dir_all(folder);
    }
}

pub(crate) struct TemporaryFolder {
    path: PathBuf,
}

impl TemporaryFolder {
    pub(crate) fn new(path: PathBuf) -> TemporaryFolder {
        with_leftovers(|left| left.folders.push(path.clone()));
        TemporaryFolder { path }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        with_leftovers(|left| left.folders.retain(|folder| folder != &self.path));
        if self.path.exists()
            && let Err(error) = fs::remove_dir_all(&self.path)
        {
            eprintln!("node: removing {}: {error}", self.path.display());
        }
    }
}

/// The terminal in raw mode, until dropped.
pub(crate) struct RawTerminal;

impl RawTerminal {
    pub(crate) fn new() -> Result<RawTerminal> {
        use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
        let before = tcgetattr(std::io::stdin()).context("reading the terminal's settings")?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        with_leftovers(|left| left.terminal = Some(before));
        tcsetattr(std::io::stdin(), SetArg::TCSANOW, &raw).context("setting up the terminal")?;
        Ok(RawTerminal)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(terminal) = with_leftovers(|left| left.terminal.take()) {
            restore_terminal(&terminal);
        }
    }
}

fn restore_terminal(settings: &Termios) {
    use nix::sys::termios::{SetArg, tcsetattr};
    // The terminal may have gone with whoever closed it.
    let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, settings);
}
