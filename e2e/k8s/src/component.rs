//! One program of the cluster: started in a cgroup of its own, by which it is known afterwards to
//! whoever asks, and stopped whole.

use std::fs;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How many of a log's last lines an error shows.
const SHOWN: usize = 15;
/// How long a program may take to end when it is asked to.
const GRACE: Duration = Duration::from_secs(60);

/// What went wrong with a program.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not there.
    #[error(
        "cannot start {name}: {program} is not on the path; the node needs Kubernetes' programs, as one of suite k8s has (docs/node.md)"
    )]
    Missing {
        /// Its name.
        name: &'static str,
        /// What was looked for.
        program: &'static str,
    },
    /// It could not be started.
    #[error("cannot start {name}")]
    Start {
        /// Its name.
        name: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It ended by itself.
    #[error("{name} ended before it was ready; the end of {}:\n{last}", log.display())]
    Ended {
        /// Its name.
        name: &'static str,
        /// Its log.
        log: PathBuf,
        /// The log's last lines.
        last: String,
    },
    /// It did not get ready.
    #[error("{name} is not ready after {} s ({why}); the end of {}:\n{last}", limit.as_secs(), log.display())]
    NotReady {
        /// Its name.
        name: &'static str,
        /// How long it had.
        limit: Duration,
        /// What it said last when it was asked.
        why: String,
        /// Its log.
        log: PathBuf,
        /// The log's last lines.
        last: String,
    },
    /// It could not be stopped.
    #[error("cannot stop {name} (cgroup {})", cgroup.display())]
    Stop {
        /// Its name.
        name: &'static str,
        /// Where its processes are.
        cgroup: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// A program and how it is run.
#[derive(Debug, Clone)]
pub struct Component {
    /// Its name: of its log and of its cgroup, and of the program if no other is named.
    pub name: &'static str,
    program: &'static str,
    /// What it is called with.
    pub arguments: Vec<String>,
    cgroups: PathBuf,
    logs: PathBuf,
}

impl Component {
    /// A program of this name on the path, below `cgroups` and with its log in `logs`.
    pub fn new(
        name: &'static str,
        arguments: Vec<String>,
        cgroups: &Path,
        logs: &Path,
    ) -> Component {
        Component {
            name,
            program: name,
            arguments,
            cgroups: cgroups.to_owned(),
            logs: logs.to_owned(),
        }
    }

    /// The same, run by another program.
    pub fn by(self, program: &'static str) -> Component {
        Component { program, ..self }
    }

    fn cgroup(&self) -> PathBuf {
        self.cgroups.join(self.name)
    }

    /// Its log.
    pub fn log(&self) -> PathBuf {
        self.logs.join(format!("{}.log", self.name))
    }

    /// Whether any process of it lives.
    pub fn is_running(&self) -> bool {
        fs::read_to_string(self.cgroup().join("cgroup.events"))
            .is_ok_and(|events| is_populated(&events))
    }

    /// Starts it, unless it runs.
    pub fn start(&self) -> Result<(), Error> {
        if self.is_running() {
            return Ok(());
        }
        let failed = |source| Error::Start {
            name: self.name,
            source,
        };
        let child = self.spawn().map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => Error::Missing {
                name: self.name,
                program: self.program,
            },
            _ => failed(source),
        })?;
        self.reap(child).map_err(failed)
    }

    fn spawn(&self) -> io::Result<Child> {
        let other = |error: io::Error| io::Error::other(error);
        fs::create_dir_all(&self.logs).map_err(other)?;
        fs::create_dir_all(self.cgroup()).map_err(other)?;
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log())
            .map_err(other)?;
        let mut child = Command::new(self.program)
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(other)?)
            .stderr(log)
            // A Ctrl-C is for whoever typed the command, not for the cluster.
            .process_group(0)
            .spawn()?;
        // Before it has children: none of these programs has any that early.
        let moved = fs::write(self.cgroup().join("cgroup.procs"), child.id().to_string());
        if let Err(error) = moved {
            child.kill()?;
            child.wait()?;
            return Err(other(error));
        }
        Ok(child)
    }

    /// Waits for it in a thread, and puts what became of it at the end of its log.
    fn reap(&self, mut child: Child) -> io::Result<()> {
        let (name, log) = (self.name, self.log());
        std::thread::Builder::new()
            .name(format!("wait-{name}"))
            .spawn(move || {
                let Ok(status) = child.wait() else { return };
                let end = fs::OpenOptions::new()
                    .append(true)
                    .open(log)
                    .and_then(|mut log| writeln!(log, "{name} ended: {status}"));
                if let Err(error) = end {
                    eprintln!("{name} ended: {status}, which its log does not say: {error}");
                }
            })
            .map(drop)
    }

    /// An error unless it runs.
    pub fn check(&self) -> Result<(), Error> {
        if self.is_running() {
            return Ok(());
        }
        Err(Error::Ended {
            name: self.name,
            log: self.log(),
            last: self.last_lines(),
        })
    }

    /// The error of one that takes too long.
    pub fn not_ready(&self, limit: Duration, why: String) -> Error {
        Error::NotReady {
            name: self.name,
            limit,
            why,
            log: self.log(),
            last: self.last_lines(),
        }
    }

    fn last_lines(&self) -> String {
        let text = fs::read(self.log()).unwrap_or_default();
        last_lines(&String::from_utf8_lossy(&text), SHOWN)
    }

    /// Asks it to end, kills what has not ended after [`GRACE`], and removes its cgroup.
    pub fn stop(&self) -> Result<(), Error> {
        let failed = |source| Error::Stop {
            name: self.name,
            cgroup: self.cgroup(),
            source,
        };
        if !self.cgroup().exists() {
            return Ok(());
        }
        for pid in self.processes().map_err(failed)? {
            match kill_process(pid, Signal::TERM) {
                Err(rustix::io::Errno::SRCH) | Ok(()) => {}
                Err(error) => return Err(failed(error.into())),
            }
        }
        if !self.ends_within(GRACE) {
            fs::write(self.cgroup().join("cgroup.kill"), "1").map_err(failed)?;
            self.ends_within(GRACE);
        }
        fs::remove_dir(self.cgroup()).map_err(failed)
    }

    fn processes(&self) -> io::Result<Vec<Pid>> {
        let text = fs::read_to_string(self.cgroup().join("cgroup.procs"))?;
        let pids = text.lines().filter_map(|line| line.parse().ok());
        Ok(pids.filter_map(Pid::from_raw).collect())
    }

    fn ends_within(&self, limit: Duration) -> bool {
        let start = Instant::now();
        while self.is_running() {
            if start.elapsed() > limit {
                return false;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        true
    }
}

fn is_populated(events: &str) -> bool {
    events.lines().any(|line| line == "populated 1")
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_of_a_short_log_are_all_of_it() {
        assert_eq!(last_lines("one\ntwo\nthree\n", 2), "two\nthree");
        assert_eq!(last_lines("one\n", 2), "one");
        assert_eq!(last_lines("", 2), "");
    }

    #[test]
    fn a_cgroup_is_populated_if_the_kernel_says_so() {
        assert!(is_populated("populated 1\nfrozen 0\n"));
        assert!(!is_populated("populated 0\nfrozen 0\n"));
    }

    #[test]
    fn a_program_that_is_not_there_is_named_with_the_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let nothing = Component::new("kiln-no-such-program", vec![], folder.path(), folder.path());
        let error = nothing.start().unwrap_err();
        assert!(matches!(error, Error::Missing { .. }), "{error}");
        assert!(error.to_string().contains("kiln-no-such-program"));
    }

    #[test]
    fn one_that_does_not_run_is_an_error_with_the_end_of_its_log() {
        let folder = tempfile::tempdir().unwrap();
        let component = Component::new("etcd", vec![], folder.path(), folder.path());
        fs::write(component.log(), "started\nno space left\n").unwrap();
        let error = component.check().unwrap_err().to_string();
        assert!(error.starts_with("etcd ended"), "{error}");
        assert!(error.ends_with("started\nno space left"), "{error}");
    }
}
