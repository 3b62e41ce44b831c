//! How a μVM ended.

use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use kiln_vmm_control::{VmmError, exit};

/// How a μVM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// For people: how it came, and what the VMM said last.
    pub reason: String,
    /// Whether the kernel killed the VMM because memory ran out.
    pub out_of_memory: bool,
    /// Whether the VMM was ended because its user wanted so.
    pub wanted: bool,
    /// The end of the guest's console, line by line, if it was the guest that ended. Whatever the guest chose to write.
    pub console: Vec<String>,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl End {
    /// `by_us`: the VMM was killed because its user wanted so. `oom_kills` tells whether the kernel killed any process for
    /// want of memory where the VMM was.
    pub(crate) fn of(
        status: Result<ExitStatus, VmmError>,
        by_us: bool,
        oom_kills: impl FnOnce() -> bool,
        (last_words, console): (&str, Vec<String>),
    ) -> End {
        let signal = status.as_ref().ok().and_then(ExitStatusExt::signal);
        let out_of_memory = signal == Some(libc::SIGKILL) && !by_us && oom_kills();
        let how = match status {
            _ if out_of_memory => "the kernel killed kiln-vmm because memory ran out".to_owned(),
            Ok(status) => match (status.code(), signal) {
                (Some(exit::ENDED), _) => "it was powered off or stopped".to_owned(),
                (Some(exit::RESET), _) => "the guest asked for a reset".to_owned(),
                (Some(exit::PANICKED), _) => "the guest's kernel panicked".to_owned(),
                (Some(code), _) => format!("kiln-vmm failed with status {code}"),
                (None, _) if by_us => "it was stopped".to_owned(),
                (None, signal) => format!("kiln-vmm was killed by signal {}", signal.unwrap_or(0)),
            },
            Err(error) => format!("kiln-vmm can't be waited for: {error}"),
        };
        let reason = if last_words.is_empty() {
            how
        } else {
            format!("{how}; its last words: {last_words}")
        };
        End {
            reason,
            out_of_memory,
            wanted: by_us,
            console,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_kill_that_is_not_ours_and_that_was_counted_is_for_want_of_memory() {
        let killed = || Ok(ExitStatus::from_raw(libc::SIGKILL));
        let of = |status, by_us, counted| {
            End::of(status, by_us, || counted, ("", Vec::new())).out_of_memory
        };
        assert!(of(killed(), false, true));
        assert!(!of(killed(), false, false));
        assert!(!of(killed(), true, true));
        assert!(!of(Ok(ExitStatus::from_raw(libc::SIGABRT)), false, true));
        assert!(!of(Ok(ExitStatus::from_raw(1 << 8)), false, true));
        assert!(!of(Err(VmmError::Gone), false, true));
    }

    #[test]
    fn end_says_how_it_came_and_what_the_vmm_said_last() {
        let of = |status| End::of(status, false, || false, ("the disk is full", Vec::new())).reason;
        let aborted = of(Ok(ExitStatus::from_raw(libc::SIGABRT)));
        assert!(aborted.contains("signal 6") && aborted.ends_with("the disk is full"));
        let reset = of(Ok(ExitStatus::from_raw(exit::RESET << 8)));
        assert!(reset.contains("reset"), "{reset}");
    }
}
