//! A VMM's process: started, told what to do, and followed to its end.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kiln_overlay::Seat;
use kiln_vmm_control::{Jail, Spawn, Vmm};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
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
    /// What nobody has begun to wait for yet.
    not_followed: Mutex<Option<Follower>>,
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
        // Nobody can have reaped it yet, so the number is still its own.
        let process = i32::try_from(vmm.pid()).ok().and_then(Pid::from_raw);
        let process = process.ok_or(rustix::io::Errno::SRCH);
        let process = process.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()));
        let (tell, ended) = watch::channel(None);
        let (stopping, seat) = (Arc::default(), Arc::default());
        let follower = Follower {
            process: process.map_err(|errno| Error::system("watch the VMM")(errno.into()))?,
            vmm: Arc::clone(&vmm),
            stopping: Arc::clone(&stopping),
            seat: Arc::clone(&seat),
            words: start.words,
            oom_kills: start.oom_kills,
            tell,
        };
        Ok(Machine {
            control: Control::new(vmm),
            stopping,
            seat,
            not_followed: Mutex::new(Some(follower)),
            ended,
        })
    }

    /// Has somebody wait for the VMM's end. A task is enough, which costs a start fewer system calls than a thread.
    fn follow(&self) {
        if let Some(follower) = lock(&self.not_followed).take() {
            tokio::spawn(follower.follow());
        }
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
        *lock(&self.seat) = seat;
        self.follow();
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
        self.follow();
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

/// Returns when the process of a pidfd has ended. Has to be called within a runtime.
pub fn process_ended(pidfd: OwnedFd) -> io::Result<impl Future<Output = ()> + Send> {
    // SAFETY: an `OwnedFd` gives the same descriptor each time it is asked, and keeps it open as long as it lives.
    let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
    Ok(async move {
        // An error would be one of the runtime's end.
        let _ = pidfd.readable().await;
    })
}

/// What waits for a VMM's end and tells the others of it.
struct Follower {
    process: OwnedFd,
    vmm: Arc<Vmm>,
    stopping: Arc<AtomicBool>,
    seat: Arc<Mutex<Option<Arc<Seat>>>>,
    words: Option<LastWords>,
    oom_kills: Box<dyn FnOnce() -> bool + Send>,
    tell: watch::Sender<Option<End>>,
}

impl Follower {
    async fn follow(self) {
        let Ok(ended) = process_ended(self.process) else {
            // Those who wait hear that nobody does.
            return;
        };
        ended.await;
        // It has ended, so this does not block.
        let status = self.vmm.wait_status();
        drop(lock(&self.seat).take());
        let by_us = self.stopping.load(Ordering::SeqCst);
        let (last, console) = match self.words {
            Some(words) => words.after_the_end().await,
            None => <_>::default(),
        };
        let end = End::of(status, by_us, self.oom_kills, (&last, console));
        self.tell.send_replace(Some(end));
    }
}

impl std::fmt::Debug for Follower {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Follower").field(&self.process).finish()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
