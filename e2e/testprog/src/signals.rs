//! Catching signals, by `sigwait`: no handler runs, so nothing has to be signal-safe.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use crate::text::say;

/// Names of the signals that a test may send.
const NAMES: &[(&str, i32)] = &[
    ("HUP", libc::SIGHUP),
    ("INT", libc::SIGINT),
    ("QUIT", libc::SIGQUIT),
    ("USR1", libc::SIGUSR1),
    ("USR2", libc::SIGUSR2),
    ("TERM", libc::SIGTERM),
    ("CONT", libc::SIGCONT),
    ("WINCH", libc::SIGWINCH),
    ("ALRM", libc::SIGALRM),
];

/// A set of signals that this process no longer reacts to by itself but takes one by one.
pub(crate) struct Signals(libc::sigset_t);

impl Signals {
    pub(crate) fn new(signals: &[i32]) -> Result<Self> {
        // SAFETY: an all-zero sigset_t is a valid object for sigemptyset to write to; the other
        // calls get pointers to that live, initialized set.
        let (set, blocked) = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            for signal in signals {
                libc::sigaddset(&raw mut set, *signal);
            }
            (
                set,
                libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()),
            )
        };
        if blocked != 0 {
            return Err(std::io::Error::last_os_error()).context("cannot block signals");
        }
        Ok(Signals(set))
    }

    /// Waits for the next one.
    pub(crate) fn next(&self) -> Result<i32> {
        let mut signal = 0;
        // SAFETY: both pointers are to live objects of the right types.
        match unsafe { libc::sigwait(&raw const self.0, &raw mut signal) } {
            0 => Ok(signal),
            error => {
                Err(std::io::Error::from_raw_os_error(error)).context("cannot wait for signals")
            }
        }
    }
}

enum Reaction {
    Print,
    Ignore,
    Exit(u8),
}

/// Prints `ready`, then each signal's name. `NAME=CODE` exits with CODE when it comes,
/// `NAME=ignore` does not even print it.
pub(crate) fn watch(arguments: &[String]) -> Result<ExitCode> {
    let mut reactions = Vec::new();
    for argument in arguments {
        let (name, reaction) = argument
            .split_once('=')
            .with_context(|| format!("{argument:?} is not NAME=CODE"))?;
        let reaction = match reaction {
            "ignore" => Reaction::Ignore,
            code => Reaction::Exit(
                code.parse()
                    .with_context(|| format!("{code:?} is no exit code (0 to 255)"))?,
            ),
        };
        reactions.push((by_name(name)?, reaction));
    }
    let signals = Signals::new(&NAMES.iter().map(|(_, signal)| *signal).collect::<Vec<_>>())?;
    say("ready")?;
    loop {
        let signal = signals.next()?;
        let reaction = reactions
            .iter()
            .find(|(listed, _)| *listed == signal)
            .map_or(&Reaction::Print, |(_, reaction)| reaction);
        match reaction {
            Reaction::Print => say(&format!("signal {}", name_of(signal)))?,
            Reaction::Ignore => {}
            Reaction::Exit(code) => {
                say(&format!("signal {}", name_of(signal)))?;
                return Ok(ExitCode::from(*code));
            }
        }
    }
}

fn by_name(name: &str) -> Result<i32> {
    match NAMES.iter().find(|(known, _)| *known == name) {
        Some((_, signal)) => Ok(*signal),
        None => bail!(
            "signal {name:?} cannot be caught here; one of: {}",
            NAMES
                .iter()
                .map(|(known, _)| *known)
                .collect::<Vec<_>>()
                .join(" ")
        ),
    }
}

fn name_of(signal: i32) -> &'static str {
    NAMES
        .iter()
        .find(|(_, known)| *known == signal)
        .map_or("?", |(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_match_both_ways() {
        for (name, signal) in NAMES {
            assert_eq!(by_name(name).unwrap(), *signal);
            assert_eq!(name_of(*signal), *name);
        }
        assert!(by_name("KILL").is_err());
    }

    #[test]
    fn what_is_not_a_reaction_is_refused() {
        for bad in ["TERM", "TERM=300", "KILL=1", "TERM=x"] {
            assert!(watch(&[bad.to_owned()]).is_err(), "{bad}");
        }
    }
}
