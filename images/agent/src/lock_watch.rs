//! Ends the waiting of threads for which a signal has come while they wait for a lock on a shared file.
//!
//! The kernel does not tell the file server of signals (see `kiln_lockwatch`), so this thread asks it who waits, looks at
//! what has come for these threads, and tells the server whose waiting is to end. While nobody waits long, the question has
//! no answer, and costs nothing.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use kiln_lockwatch::{COMMAND, Wait, decode, encode};

/// A share is watched from then on, when the pod's start is over: nobody has waited long before.
const LATER: Duration = Duration::from_secs(1);
/// How long who waits is left alone between two looks.
const PAUSE: Duration = Duration::from_millis(200);
const STACK: usize = 64 << 10;

/// Watches the share that is mounted at `top`, as long as it is mounted.
pub(crate) fn start(top: &Path) {
    let top = top.to_owned();
    let watching = std::thread::Builder::new()
        .name("lock-watch".to_owned())
        .stack_size(STACK)
        .spawn({
            let top = top.clone();
            move || watch(&top)
        });
    if let Err(error) = watching {
        tracing::error!(top = %top.display(), %error, "nobody watches who waits for locks: what waits can't be killed");
    }
}

fn watch(top: &Path) {
    std::thread::sleep(LATER);
    let error = match File::open(top) {
        Ok(share) => until_it_ends(&share),
        Err(error) => error,
    };
    tracing::warn!(top = %top.display(), %error, "who waits for locks is not watched any more");
}

fn until_it_ends(share: &File) -> io::Error {
    let mut told = Vec::new();
    loop {
        told = match ask(share, &told) {
            Ok(waits) => waits,
            Err(error) => return error,
        };
        std::thread::sleep(PAUSE);
        told.retain(|wait| has_signal(wait.thread));
    }
}

/// Says whose waiting is to end, and gives who waits then.
fn ask(share: &File, told: &[Wait]) -> io::Result<Vec<Wait>> {
    let mut message = encode(told);
    loop {
        // SAFETY: the command's size is the message's, which lives through the call.
        let asked = unsafe { libc::ioctl(share.as_raw_fd(), COMMAND as _, message.as_mut_ptr()) };
        if asked >= 0 {
            return Ok(decode(&message));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Whether a signal has come for a thread that ends its waiting, by a handler or by its end.
fn has_signal(thread: u32) -> bool {
    fs::read_to_string(format!("/proc/{thread}/status")).is_ok_and(|status| is_signalled(&status))
}

fn is_signalled(status: &str) -> bool {
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.map(|rest| rest.trim_start_matches(':').trim())
    };
    let set = |name| field(name).and_then(|text| u64::from_str_radix(text, 16).ok());
    let Some(own) = set("SigPnd") else {
        return false;
    };
    // What has come for the process may be taken by any of its threads; only where there is one is it this one.
    let shared = match field("Threads") {
        Some("1") => set("ShdPnd").unwrap_or_default(),
        _ => 0,
    };
    let held = set("SigBlk").unwrap_or_default() | set("SigIgn").unwrap_or_default();
    (own | shared) & !held != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(threads: u32, own: u64, shared: u64, blocked: u64, ignored: u64) -> String {
        format!(
            "Name:\ttestprog\nThreads:\t{threads}\nSigQ:\t0/1000\nSigPnd:\t{own:016x}\nShdPnd:\t{shared:016x}\n\
             SigBlk:\t{blocked:016x}\nSigIgn:\t{ignored:016x}\nSigCgt:\t0000000000000000\n"
        )
    }

    #[test]
    fn thread_is_signalled_by_what_it_does_not_hold_back() {
        const KILL: u64 = 1 << 8;
        const ALARM: u64 = 1 << 13;
        assert!(is_signalled(&status(1, KILL, 0, 0, 0)));
        assert!(is_signalled(&status(4, KILL, 0, 0, 0)));
        assert!(is_signalled(&status(1, 0, ALARM, 0, 0)));
        for quiet in [
            status(1, 0, 0, 0, 0),
            status(1, ALARM, 0, ALARM, 0),
            status(1, 0, ALARM, 0, ALARM),
            status(4, 0, ALARM, 0, 0),
            String::new(),
        ] {
            assert!(!is_signalled(&quiet), "{quiet}");
        }
    }

    #[test]
    fn a_thread_that_nothing_has_come_for_is_not_signalled() {
        assert!(!has_signal(std::process::id()));
        assert!(!has_signal(u32::MAX));
    }
}
