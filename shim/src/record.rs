//! What a shim writes down about its pod, so that somebody can clean up after it when it is killed.
//!
//! Written before a thing is made, not after: a name in the record may be one that never came to
//! be, never the other way round.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_node::pods;
use kiln_overlay::Budget;
use kiln_store::lock::{self, LockError};
use kiln_store::private::{self, PrivateError};
use serde::{Deserialize, Serialize};

use kiln_node::config::AnswerForm;

/// A process that must not be mistaken for another one with the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRef {
    /// Its id.
    pub pid: i32,
    /// When it was started, in clock ticks since boot (`/proc/PID/stat`, field 22).
    pub started: u64,
}

/// The record of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Record {
    /// The shim.
    pub shim: Option<ProcessRef>,
    /// The VMM.
    pub vmm: Option<ProcessRef>,
    /// The network namespace in which devices were made.
    pub netns: Option<PathBuf>,
    /// Names of interfaces whose traffic was redirected there.
    pub redirected: Vec<String>,
    /// Names of taps made there.
    pub taps: Vec<String>,
    /// The cgroup, as a directory.
    pub cgroup: Option<PathBuf>,
    /// The bundle that the shim was started in, which containerd removes when it knows nothing of the pod any more.
    pub bundle: Option<PathBuf>,
    /// Where the shim listens.
    pub address: Option<String>,
    /// How `start` was answered; containers of the pod that ask again get the same.
    pub answer: Option<AnswerForm>,
}

/// While it is held nobody takes the pod away: who cleans up waits, and then finds all that was made.
#[derive(Debug)]
pub struct Stay {
    _lock: File,
}

/// How long who cleans up waits for what is just being made. A thread that hangs must not keep a pod for ever, and
/// containerd gives `delete` five seconds.
const END_WAIT: Duration = Duration::from_secs(2);
/// How long who makes something waits for who cleans up, who then has removed the record.
const STAY_WAIT: Duration = Duration::from_secs(10);

/// Nothing may be made for a pod.
#[derive(Debug, thiserror::Error)]
pub enum StayError {
    /// Its record is gone, or its directory is.
    #[error("the pod is being removed")]
    Ended,
    /// They can't be looked at.
    #[error("look at the pod's directory {}", path.display())]
    Unknown {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another process has its directory locked, and keeps it.
    #[error(transparent)]
    Locked(#[from] LockError),
}

/// Where a pod's record and sockets lie, and where its volumes are mounted. All of it is root's alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodDir {
    state_dir: PathBuf,
    dir: PathBuf,
    budget: PathBuf,
}

impl PodDir {
    /// The directory of a pod; ids were checked to be file names.
    pub fn new(state_dir: &Path, namespace: &str, group: &str) -> Self {
        let of = |kind: &str| state_dir.join(kind).join(namespace).join(group);
        Self {
            dir: of("pods"),
            state_dir: state_dir.to_owned(),
            budget: state_dir.join(Budget::FILE_NAME),
        }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// The socket that leads to the guest.
    pub fn vsock(&self) -> PathBuf {
        self.dir.join("vsock.sock")
    }

    /// The VMM's root: an empty directory.
    pub fn empty_root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// The socket that tells what the pod's μVM is and takes.
    pub fn inspect(&self) -> PathBuf {
        self.dir.join(pods::INSPECT)
    }

    /// Where the time of the start went.
    pub fn trace(&self) -> PathBuf {
        self.dir.join(pods::TRACE)
    }

    /// The budget that all pods' overlays share. It is the node's, and stays when a pod goes.
    pub fn overlay_budget(&self) -> PathBuf {
        self.budget.clone()
    }

    fn record_path(&self) -> PathBuf {
        self.dir.join("record.json")
    }

    /// Where the record is once the pod is being removed.
    fn ended_path(&self) -> PathBuf {
        self.dir.join("record.ended.json")
    }

    /// For whoever makes something that has to be cleaned up. Fails when the pod is being removed.
    pub fn stay(&self) -> Result<Stay, StayError> {
        self.stay_within(STAY_WAIT)
    }

    fn stay_within(&self, limit: Duration) -> Result<Stay, StayError> {
        let unless_gone = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => StayError::Ended,
            _ => StayError::Unknown {
                path: self.dir.clone(),
                source,
            },
        };
        let dir = File::open(&self.dir).map_err(unless_gone)?;
        lock::shared(&dir, limit)?;
        fs::metadata(self.record_path()).map_err(unless_gone)?;
        Ok(Stay { _lock: dir })
    }

    /// Has nothing more be made for this pod, and reads what was. Can be called again.
    pub fn end(&self) -> Option<Record> {
        self.end_within(END_WAIT)
    }

    fn end_within(&self, limit: Duration) -> Option<Record> {
        let dir = File::open(&self.dir).ok()?;
        if let Err(error) = lock::exclusive(&dir, limit) {
            tracing::warn!(%error, "the pod is removed although something may still be made for it");
        }
        // Not there the second time.
        let _ = fs::rename(self.record_path(), self.ended_path());
        self.ended()
    }

    fn ended(&self) -> Option<Record> {
        serde_json::from_slice(&fs::read(self.ended_path()).ok()?).ok()
    }

    /// Makes the directory, and those that lead to it from the state directory on private.
    pub fn create(&self) -> Result<(), PrivateError> {
        let relative = self.dir.strip_prefix(&self.state_dir);
        private::below(&self.state_dir, relative.unwrap_or(&self.dir)).map(drop)
    }

    /// Writes the record, whole or not at all.
    pub fn save(&self, record: &Record) -> io::Result<()> {
        private::replace(&self.record_path(), &serde_json::to_vec(record)?)
    }

    /// Reads the record; `None` if there is none or it can't be read.
    pub fn load(&self) -> Option<Record> {
        serde_json::from_slice(&fs::read(self.record_path()).ok()?).ok()
    }

    /// The record, also of a pod whose removal has begun.
    pub fn last_record(&self) -> Option<Record> {
        self.load().or_else(|| self.ended())
    }

    /// The other pods of the namespace.
    pub fn others(&self) -> Vec<Self> {
        let pods = self.dir.parent().map(fs::read_dir).and_then(Result::ok);
        let names = pods.into_iter().flatten().flatten();
        names
            .map(|entry| Self {
                dir: entry.path(),
                state_dir: self.state_dir.clone(),
                budget: self.budget.clone(),
            })
            .filter(|other| other != self)
            .collect()
    }

    /// Removes the directory and, if it was the last one, its namespace's.
    pub fn remove(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        if let Some(namespace) = self.dir.parent() {
            // Fails while another pod is in it, as it should.
            let _ = fs::remove_dir(namespace);
        }
        Ok(())
    }
}

impl ProcessRef {
    /// The process as it is now.
    pub fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, in parentheses, may contain anything; field 3 follows its end.
        let rest = stat.rsplit_once(')')?.1;
        let started = rest.split_whitespace().nth(19)?.parse().ok()?;
        Some(Self { pid, started })
    }

    /// Whether it still runs (a zombie does not).
    pub fn is_alive(&self) -> bool {
        let zombie = || {
            fs::read_to_string(format!("/proc/{}/stat", self.pid))
                .is_ok_and(|s| s.rsplit_once(')').is_some_and(|(_, r)| r.starts_with(" Z")))
        };
        Self::of(self.pid) == Some(*self) && !zombie()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    #[test]
    fn record_comes_back_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let pod = PodDir::new(dir.path(), "k8s.io", "p1");
        assert_eq!(pod.load(), None);
        pod.create().unwrap();
        let record = Record {
            vmm: Some(ProcessRef { pid: 7, started: 9 }),
            taps: vec!["tap0".into()],
            answer: Some(AnswerForm::JsonV3),
            ..Record::default()
        };
        pod.save(&record).unwrap();
        assert_eq!(pod.load(), Some(record));
        pod.remove().unwrap();
        assert!(!dir.path().join("pods/k8s.io").exists());
        pod.remove().unwrap();
    }

    #[test]
    fn nothing_is_made_behind_an_end_and_an_end_waits_for_what_is() {
        let dir = tempfile::tempdir().unwrap();
        let pod = PodDir::new(dir.path(), "k8s.io", "p1");
        assert!(pod.stay().is_err());
        pod.create().unwrap();
        pod.save(&Record::default()).unwrap();
        let (first, second) = (pod.stay().unwrap(), pod.stay().unwrap());
        let ending = std::thread::spawn({
            let pod = pod.clone();
            move || pod.end()
        });
        std::thread::sleep(Duration::from_millis(50));
        let taps = vec!["tap0".to_owned()];
        let made = Record {
            taps,
            ..Record::default()
        };
        pod.save(&made).unwrap();
        drop((first, second));
        assert_eq!(ending.join().unwrap(), Some(made.clone()));
        assert!(matches!(pod.stay(), Err(StayError::Ended)));
        assert_eq!(pod.load(), None);
        assert_eq!(pod.end(), Some(made));
    }

    #[test]
    fn a_directory_that_somebody_keeps_locked_holds_nobody_up_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let pod = PodDir::new(dir.path(), "k8s.io", "p1");
        pod.create().unwrap();
        pod.save(&Record::default()).unwrap();
        let hostile = File::open(pod.path()).unwrap();
        assert!(lock::try_exclusive(&hostile).unwrap());
        let soon = Duration::from_millis(20);
        let error = pod.stay_within(soon).unwrap_err();
        let own = format!("process {} ", std::process::id());
        assert!(error.to_string().contains(&own), "{error}");
        assert_eq!(pod.end_within(soon), Some(Record::default()));
    }

    #[test]
    fn what_an_older_version_made_is_closed_when_a_pod_starts() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("kiln");
        let pod = PodDir::new(&state, "k8s.io", "p1");
        fs::create_dir_all(pod.path()).unwrap();
        for open in [&state, &state.join("pods"), pod.path()] {
            fs::set_permissions(open, fs::Permissions::from_mode(0o755)).unwrap();
        }
        pod.create().unwrap();
        pod.save(&Record::default()).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        for closed in [
            &state,
            &state.join("pods"),
            &state.join("pods/k8s.io"),
            pod.path(),
        ] {
            assert_eq!(mode(closed), 0o700, "{}", closed.display());
        }
        assert_eq!(mode(&pod.record_path()), 0o600);
    }

    #[test]
    fn another_process_with_the_same_number_is_not_the_one() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let process = ProcessRef::of(pid).unwrap();
        assert!(process.is_alive());
        assert!(
            !ProcessRef {
                pid,
                started: process.started + 1
            }
            .is_alive()
        );
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!process.is_alive());
    }
}
