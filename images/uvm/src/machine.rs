//! A VMM's process: started, told what to do, and followed to its end.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiln_overlay::Seat;
use kiln_vmm_control::{Jail, Spawn, Vmm};
use tokio::sync::watch;

use crate::Error;
use crate::control::Control;
use crate::end::End;
use crate::words::LastWords;

/// How much later than its connections a VMM may end.
const END_LIMIT: Duration = Duration::from_millis(500);

/// How to start a VMM.
pub struct Start<'a> {
    /// The program.
    pub program: &'a Path,
    /// Where it is locked in; without a jail (tests, people) it keeps the caller's rights.
    pub jail: Option<Jail>,
    /// Where its log goes.
    pub log: File,
    /// Who reads that, if somebody does.
    pub words: Option<LastWords>,
    /// Tells, after its end, whether the kernel killed any process for want of memory where the VMM was.
    pub oom_kills: Box<dyn FnOnce() -> bool + Send>,
}

/// A VMM's process. Dropping it ends the process, and with it every call that is under way.
#[derive(Debug)]
pub struct Machine {
    control: Control,
    /// Set before it is killed.
    stopping: Arc<AtomicBool>,
    /// Given back when the VMM has ended, not before.
    seat: Arc<Mutex<Option<Arc<Seat>>>>,
    ended: watch::Receiver<Option<End>>,
}

impl Machine {
    /// Starts a VMM, which makes its VM at once and waits to be told what to run in it.
    pub fn start(start: Start<'_>) -> Result<Machine, Error> {
        let spawn = Spawn {
            program: start.program.to_owned(),
            jail: start.jail,
            log: Some(start.log),
        };
        let vmm = Arc::new(Vmm::spawn(spawn).map_err(Error::Spawn)?);
        let (tell, ended) = watch::channel(None);
        let machine = Machine {
            control: Control::new(Arc::clone(&vmm)),
            stopping: Arc::default(),
            seat: Arc::default(),
            ended,
        };
        let (stopping, seat) = (Arc::clone(&machine.stopping), Arc::clone(&machine.seat));
        let (oom_kills, words) = (start.oom_kills, start.words);
        std::thread::Builder::new()
            .name("vmm-end".into())
            .spawn(move || {
                let status = vmm.wait_status();
                drop(seat.lock().unwrap_or_else(PoisonError::into_inner).take());
                let by_us = stopping.load(Ordering::SeqCst);
                let words = words.map(|words| words.after_the_end());
                let (last, console) = words.unwrap_or_default();
                let end = End::of(status, by_us, oom_kills, (&last, console));
                tell.send_replace(Some(end));
            })
            .map_err(Error::system("watch the VMM"))?;
        Ok(machine)
    }

    /// The process's id.
    pub fn pid(&self) -> u32 {
        self.control.pid()
    }

    /// What it can be told.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Keeps a seat in the node's budget as long as the VMM lives.
    pub(crate) fn keep(&self, seat: Option<Arc<Seat>>) {
        *self.seat.lock().unwrap_or_else(PoisonError::into_inner) = seat;
    }

    /// Tells it something on a thread of its own, for that blocks. If the VMM has ended, the error says how.
    pub async fn call<T, F>(&self, action: &'static str, call: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&Control) -> Result<T, Error> + Send + 'static,
    {
        let control = self.control.clone();
        let called = tokio::task::spawn_blocking(move || call(&control)).await;
        let result = called.map_err(|error| Error::System {
            action,
            source: error.into(),
        })?;
        match result {
            Err(error) => Err(self.explain(action, error).await),
            result => result,
        }
    }

    /// The reason of a failure: who can no longer be talked to may be one that has ended.
    pub(crate) async fn explain(&self, action: &'static str, error: Error) -> Error {
        if !error.is_gone() {
            return error;
        }
        match tokio::time::timeout(END_LIMIT, self.ended()).await {
            Ok(end) => Error::Ended { action, end },
            Err(_) => error,
        }
    }

    /// Comes back when the VMM has ended.
    pub async fn ended(&self) -> End {
        let mut ended = self.ended.clone();
        let unknown = || End {
            reason: "nobody waits for it any more".into(),
            out_of_memory: false,
            wanted: false,
            console: Vec::new(),
        };
        match ended.wait_for(Option::is_some).await {
            Ok(end) => end.clone().unwrap_or_else(unknown),
            Err(_) => unknown(),
        }
    }

    /// What ends the VMM.
    pub fn killer(&self) -> Killer {
        Killer {
            control: self.control.clone(),
            stopping: Arc::clone(&self.stopping),
        }
    }
}

/// Ends a VMM, from whichever thread may wait for that.
#[derive(Debug, Clone)]
pub struct Killer {
    control: Control,
    stopping: Arc<AtomicBool>,
}

impl Killer {
    /// Ends the VMM now. Done twice is done once.
    pub fn kill(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.control.kill();
    }
}

/// Waits no longer than a machine that works may take.
pub async fn in_time<T>(
    action: &'static str,
    limit: Duration,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => Err(Error::Slow { action, limit }),
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Threads that wait for the VMM hold it too: it has to be ended by name.
        self.killer().kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Resume;
    use crate::ends::Ends;
    use crate::words;
    use kiln_vmm_control::VmmError;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    /// A program in the VMM's place.
    fn script(text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmm");
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        (dir, path)
    }

    /// A script that was just written may be busy while another test forks.
    async fn start(program: &Path) -> Machine {
        for _ in 0..100 {
            let (log, words) = words::pipe(|_| {}).unwrap();
            let start = Start {
                program,
                jail: None,
                log,
                words: Some(words),
                oom_kills: Box::new(|| false),
            };
            match Machine::start(start) {
                Err(Error::Spawn(VmmError::Spawn { source, .. }))
                    if source.kind() == std::io::ErrorKind::ExecutableFileBusy =>
                {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                machine => return machine.unwrap(),
            }
        }
        panic!("{} stays busy", program.display());
    }

    async fn resume(machine: &Machine, limit: Duration) -> Error {
        let resume = |vmm: &Control| {
            let file = File::open("/dev/null").map_err(Error::system("open a file"))?;
            let resume = Resume {
                state: &file,
                memory: &file,
                touched: &[],
                one_by_one: false,
                console: None,
            };
            vmm.resume(&resume, Ends::new())
        };
        let action = "resume the guest";
        let resumed = in_time(action, limit, machine.call(action, resume)).await;
        resumed.unwrap_err()
    }

    #[tokio::test]
    async fn end_of_the_vmm_shows_its_last_words() {
        let (_dir, path) = script("echo 'kiln-vmm: /dev/kvm is gone' >&2; exit 1");
        let machine = start(&path).await;
        let error = resume(&machine, Duration::from_secs(20)).await;
        assert!(matches!(error, Error::Ended { .. }), "{error:?}");
        assert!(error.to_string().ends_with("/dev/kvm is gone"), "{error}");
    }

    #[tokio::test]
    async fn silence_is_given_up_at_the_limit_and_the_vmm_killed() {
        let (dir, path) = script("echo $$ > \"${0%/*}/pid\"; exec sleep 60");
        let machine = start(&path).await;
        let error = resume(&machine, Duration::from_millis(300)).await;
        assert!(matches!(error, Error::Slow { .. }), "{error:?}");
        drop(machine);
        let pid = fs::read_to_string(dir.path().join("pid")).unwrap();
        // Killed and reaped before the drop was over.
        assert!(!Path::new("/proc").join(pid.trim()).exists());
    }

    #[tokio::test]
    async fn missing_vmm_is_named() {
        let start = Start {
            program: Path::new("/no/vmm"),
            jail: None,
            log: File::options().write(true).open("/dev/null").unwrap(),
            words: None,
            oom_kills: Box::new(|| false),
        };
        let error = Machine::start(start).unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.contains("/no/vmm"), "{cause}");
    }

    #[tokio::test]
    async fn seat_is_kept_until_the_vmm_has_ended() {
        let (dir, path) = script("exec sleep 60");
        let machine = start(&path).await;
        let budget = crate::scratch::join_budget(&dir.path().join("budget"), 1 << 30, 1 << 20);
        let seat = Arc::new(budget.unwrap());
        machine.keep(Some(Arc::clone(&seat)));
        assert_eq!(Arc::strong_count(&seat), 2);
        machine.killer().kill();
        assert_eq!(machine.ended().await.reason, "it was stopped");
        assert_eq!(Arc::strong_count(&seat), 1);
    }
}
