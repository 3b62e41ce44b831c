//! The guest's cgroups: one for the agent, one for the pod, below it one for each container.
//!
//! ```text
//! /            kernel threads
//! ├── agent    the agent and its helper: protected memory, most of the CPU under contention
//! └── pod      everything of the user's; limited to what leaves the agent room
//!     ├── c1   one container
//!     └── c2
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use libcgroups::common::{CgroupManager, ControllerOpt};
use libcgroups::v2::manager::Manager;
use libcontainer::oci_spec::runtime::LinuxResources;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use thiserror::Error;
use tokio::io::unix::AsyncFd;

use crate::sys;

/// Memory that the pod may not have, so that the agent and the kernel go on working when it wants
/// all: a part of the guest's memory, between these bounds.
const MIN_RESERVE: u64 = 12 << 20;
const MAX_RESERVE: u64 = 64 << 20;
/// Of the threads that the kernel allows in all, these are the agent's.
const RESERVED_THREADS: u64 = 256;
/// The agent's memory that is never reclaimed for others.
const AGENT_MEMORY_MIN: u64 = 24 << 20;
/// How long a killed cgroup may take to empty.
const EMPTY_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a cgroup may take to freeze.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(10);

/// What went wrong with a cgroup.
#[derive(Debug, Error)]
pub(crate) enum CgroupError {
    /// A file of it could not be read or written.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// "read", "write ..." and so on.
        action: String,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The resources are not to be had.
    #[error("cannot apply the container's resources: {0}")]
    Apply(String),
    /// The kernel did not do in time what it had accepted.
    #[error("{path} did not become {state} within {limit:?}")]
    Timeout {
        /// The cgroup.
        path: PathBuf,
        /// "empty", "frozen".
        state: &'static str,
        /// How long it was waited for.
        limit: Duration,
    },
}

type Result<T> = std::result::Result<T, CgroupError>;

/// A cgroup, by its path in the file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cgroup {
    path: PathBuf,
}

/// The hierarchy.
#[derive(Debug, Clone)]
pub(crate) struct Hierarchy {
    root: PathBuf,
}

impl Hierarchy {
    /// The hierarchy that is mounted at `root`; makes the agent's and the pod's cgroups, and moves
    /// this process into the former. Which controllers are missing is in the second part.
    pub(crate) fn set_up(root: &Path) -> Result<(Self, Vec<String>)> {
        let hierarchy = Self {
            root: root.to_owned(),
        };
        let agent = hierarchy.agent();
        agent.make()?;
        agent.write("cgroup.procs", "0")?;
        let mut missing = Vec::new();
        let available = read(&root.join("cgroup.controllers"))?;
        for name in ["cpu", "cpuset", "io", "memory", "pids", "hugetlb"] {
            if !available.split_whitespace().any(|one| one == name) {
                missing.push(name.to_owned());
                continue;
            }
            let enable = format!("+{name}");
            write(&root.join("cgroup.subtree_control"), &enable)?;
            let pod = hierarchy.pod();
            pod.make()?;
            pod.write("cgroup.subtree_control", &enable)?;
        }
        hierarchy.pod().make()?;
        Cgroup {
            path: hierarchy.pod_extra(),
        }
        .make()?;
        agent.write_if_there("memory.min", &AGENT_MEMORY_MIN.to_string())?;
        agent.write_if_there("cpu.weight", "10000")?;
        if let Ok(threads) = fs::read_to_string("/proc/sys/kernel/threads-max")
            && let Ok(threads) = threads.trim().parse::<u64>()
        {
            let limit = threads
                .saturating_sub(RESERVED_THREADS)
                .max(RESERVED_THREADS);
            hierarchy
                .pod()
                .write_if_there("pids.max", &limit.to_string())?;
        }
        Ok((hierarchy, missing))
    }

    /// The agent's own.
    pub(crate) fn agent(&self) -> Cgroup {
        Cgroup {
            path: self.root.join("agent"),
        }
    }

    /// All containers'.
    pub(crate) fn pod(&self) -> Cgroup {
        Cgroup {
            path: self.root.join("pod"),
        }
    }

    /// Where processes in the guest itself run that the host asked for.
    pub(crate) fn pod_extra(&self) -> PathBuf {
        self.root.join("pod").join("guest")
    }

    /// One container's, and its path from the hierarchy's root.
    pub(crate) fn container(&self, name: &str) -> (Cgroup, PathBuf) {
        let inner = Path::new("/pod").join(name);
        (
            Cgroup {
                path: self.root.join("pod").join(name),
            },
            inner,
        )
    }

    /// Leaves the agent room in a guest with so much memory.
    pub(crate) fn limit_pod_memory(&self, total: u64) -> Result<()> {
        let reserve = (total / 16).clamp(MIN_RESERVE, MAX_RESERVE);
        let limit = total.saturating_sub(reserve).max(total / 2);
        self.pod().write_if_there("memory.max", &limit.to_string())
    }

    /// Applies a container's resources to its cgroup.
    pub(crate) fn apply(&self, cgroup: &Cgroup, resources: &LinuxResources) -> Result<()> {
        let inner = cgroup.path.strip_prefix(&self.root).unwrap_or(&cgroup.path);
        let resources = cgroup.meaningful(resources);
        let apply = |error: &dyn std::fmt::Display| CgroupError::Apply(error.to_string());
        Manager::new(self.root.clone(), inner.to_owned())
            .map_err(|error| apply(&error))?
            .apply(&ControllerOpt {
                resources: &resources,
                disable_oom_killer: false,
                oom_score_adj: None,
                freezer_state: None,
            })
            .map_err(|error| apply(&error))?;
        // libcgroups takes a swap limit of 0 for "leave it".
        if let Some(memory) = resources.memory()
            && let (Some(limit), Some(swap)) = (memory.limit(), memory.swap())
            && limit > 0
            && swap == limit
        {
            cgroup.write_if_there("memory.swap.max", "0")?;
        }
        Ok(())
    }
}

impl Cgroup {
    /// Its folder.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes it, if need be.
    pub(crate) fn make(&self) -> Result<()> {
        match fs::create_dir(&self.path) {
            Err(source) if source.kind() != ErrorKind::AlreadyExists => Err(CgroupError::File {
                action: "make".to_owned(),
                path: self.path.clone(),
                source,
            }),
            _ => Ok(()),
        }
    }

    /// Writes one of its files.
    pub(crate) fn write(&self, file: &str, value: &str) -> Result<()> {
        write(&self.path.join(file), value)
    }

    /// Writes a file that a kernel without the controller doesn't have.
    fn write_if_there(&self, file: &str, value: &str) -> Result<()> {
        if self.path.join(file).exists() {
            self.write(file, value)
        } else {
            Ok(())
        }
    }

    /// The text of one of its files; empty where the kernel has none of that name.
    pub(super) fn text(&self, file: &str) -> String {
        fs::read_to_string(self.path.join(file)).unwrap_or_default()
    }

    /// One number of it; `max` is the largest.
    pub(super) fn number(&self, file: &str) -> Option<u64> {
        match self.text(file).trim() {
            "max" => Some(u64::MAX),
            number => number.parse().ok(),
        }
    }

    /// A file of `key value` lines.
    pub(super) fn table(&self, file: &str) -> BTreeMap<String, u64> {
        parse_table(&self.text(file))
    }

    /// How many processes of it the kernel has killed for want of memory.
    pub(crate) fn oom_kills(&self) -> u64 {
        self.table("memory.events")
            .get("oom_kill")
            .copied()
            .unwrap_or(0)
    }

    /// Kills everything in it, at once.
    pub(crate) fn kill(&self) -> Result<()> {
        self.write("cgroup.kill", "1")
    }

    /// Its processes, and those of the cgroups below it.
    pub(crate) fn pids(&self) -> Result<Vec<i32>> {
        let mut pids = Vec::new();
        for folder in self.folders()? {
            // A folder that has gone meanwhile has no processes.
            let text = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
            pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
        }
        Ok(pids)
    }

    /// It and all below it, the deepest last.
    fn folders(&self) -> Result<Vec<PathBuf>> {
        let mut folders = vec![self.path.clone()];
        let mut next = 0;
        while let Some(folder) = folders.get(next).cloned() {
            next += 1;
            let Ok(entries) = fs::read_dir(&folder) else {
                continue;
            };
            for entry in entries.flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    folders.push(entry.path());
                }
            }
        }
        Ok(folders)
    }

    /// Freezes or thaws it and waits until that is done.
    pub(crate) async fn freeze(&self, frozen: bool) -> Result<()> {
        let wanted = u64::from(frozen);
        self.write("cgroup.freeze", &wanted.to_string())?;
        let state = if frozen { "frozen" } else { "thawed" };
        self.wait_for(state, FREEZE_TIMEOUT, |events| {
            events.get("frozen") == Some(&wanted)
        })
        .await
    }

    /// Removes it, whose processes have been killed, when the last of them is gone.
    pub(crate) async fn remove(&self) -> Result<()> {
        if !self.path.exists() {
            return Ok(());
        }
        self.wait_for("empty", EMPTY_TIMEOUT, |events| {
            events.get("populated") != Some(&1)
        })
        .await?;
        for folder in self.folders()?.iter().rev() {
            match fs::remove_dir(folder) {
                Err(source) if source.kind() != ErrorKind::NotFound => {
                    let (action, path) = ("remove".to_owned(), folder.clone());
                    return Err(CgroupError::File {
                        action,
                        path,
                        source,
                    });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Waits until `cgroup.events` satisfies `done`; the kernel tells of every change.
    async fn wait_for(
        &self,
        state: &'static str,
        limit: Duration,
        done: impl Fn(&BTreeMap<String, u64>) -> bool,
    ) -> Result<()> {
        if done(&self.table("cgroup.events")) {
            return Ok(());
        }
        let mut changes = Changes::of(&self.path.join("cgroup.events"))?;
        let wait = async {
            while !done(&self.table("cgroup.events")) {
                changes.next().await?;
            }
            Ok(())
        };
        match tokio::time::timeout(limit, wait).await {
            Ok(result) => result,
            Err(_) => Err(CgroupError::Timeout {
                path: self.path.clone(),
                state,
                limit,
            }),
        }
    }

    /// Tells of changes to its OOM counter.
    pub(crate) fn memory_changes(&self) -> Result<Changes> {
        Changes::of(&self.path.join("memory.events"))
    }

    /// `resources` without what the guest doesn't have: CPUs and devices of the host, and page sizes
    /// that this kernel lacks.
    fn meaningful(&self, resources: &LinuxResources) -> LinuxResources {
        let mut resources = resources.clone();
        resources.set_block_io(None);
        resources.set_network(None);
        resources.set_rdma(None);
        // Enforced by a filter of the agent's own.
        resources.set_devices(None);
        if let Some(mut cpu) = resources.cpu().clone() {
            cpu.set_cpus(None);
            cpu.set_mems(None);
            cpu.set_realtime_period(None);
            cpu.set_realtime_runtime(None);
            resources.set_cpu(Some(cpu));
        }
        let pages = resources
            .hugepage_limits()
            .clone()
            .unwrap_or_default()
            .into_iter();
        let here: Vec<_> = pages
            .filter(|limit| {
                self.path
                    .join(format!("hugetlb.{}.max", limit.page_size()))
                    .exists()
            })
            .collect();
        resources.set_hugepage_limits((!here.is_empty()).then_some(here));
        resources
    }
}

/// Changes of one file of a cgroup, as the kernel tells them.
#[derive(Debug)]
pub(crate) struct Changes {
    path: PathBuf,
    inotify: AsyncFd<OwnedFd>,
}

impl Changes {
    fn of(path: &Path) -> Result<Self> {
        let make = || -> io::Result<AsyncFd<OwnedFd>> {
            let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
            inotify.add_watch(path, AddWatchFlags::IN_MODIFY)?;
            sys::watch(inotify)
        };
        let inotify = make().map_err(|source| file_error("watch", path, source))?;
        Ok(Self {
            path: path.to_owned(),
            inotify,
        })
    }

    /// Waits for the next one. The file's removal counts as one.
    pub(crate) async fn next(&mut self) -> Result<()> {
        let error = |source| file_error("watch", &self.path, source);
        loop {
            let mut ready = self.inotify.readable().await.map_err(error)?;
            // What the events say is known: there is one watch.
            let mut events = [0; 1024];
            match ready.try_io(|inotify| Ok(nix::unistd::read(inotify, &mut events)?)) {
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(source)) => return Err(error(source)),
                Err(_would_block) => {}
            }
        }
    }
}

fn file_error(action: &str, path: &Path, source: io::Error) -> CgroupError {
    CgroupError::File {
        action: action.to_owned(),
        path: path.to_owned(),
        source,
    }
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|source| file_error("read", path, source))
}

fn write(path: &Path, value: &str) -> Result<()> {
    fs::write(path, value)
        .map_err(|source| file_error(&format!("write {value:?} to"), path, source))
}

fn parse_table(text: &str) -> BTreeMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.trim().parse().ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use libcontainer::oci_spec::runtime::LinuxResources;

    use super::*;

    #[test]
    fn tables_are_read_line_by_line() {
        let table = parse_table("oom 1\noom_kill 2\nodd\nbad x\n");
        assert_eq!(table.len(), 2);
        assert_eq!(table["oom_kill"], 2);
    }

    #[test]
    fn what_the_guest_lacks_is_left_out() {
        let folder = tempfile::tempdir().expect("folder");
        fs::write(folder.path().join("hugetlb.2MB.max"), "max").expect("file");
        let cgroup = Cgroup {
            path: folder.path().to_owned(),
        };
        let json = r#"{"cpu": {"shares": 512, "cpus": "3-5", "mems": "1"},
            "blockIO": {"weight": 10}, "devices": [{"allow": false, "access": "rwm"}],
            "hugepageLimits": [{"pageSize": "2MB", "limit": 0}, {"pageSize": "1GB", "limit": 0}]}"#;
        let resources: LinuxResources = serde_json::from_str(json).expect("resources");
        let kept = cgroup.meaningful(&resources);
        let cpu = kept.cpu().as_ref().expect("cpu");
        assert_eq!((cpu.shares(), cpu.cpus()), (Some(512), &None));
        assert!(kept.block_io().is_none());
        let pages = kept.hugepage_limits().as_ref().expect("pages");
        assert_eq!(pages.len(), 1);
        assert_eq!(pages[0].page_size(), "2MB");
    }

    #[test]
    fn numbers_know_max() {
        let folder = tempfile::tempdir().expect("folder");
        let cgroup = Cgroup {
            path: folder.path().to_owned(),
        };
        fs::write(folder.path().join("memory.max"), "max\n").expect("file");
        fs::write(folder.path().join("memory.current"), "4096\n").expect("file");
        assert_eq!(cgroup.number("memory.max"), Some(u64::MAX));
        assert_eq!(cgroup.number("memory.current"), Some(4096));
        assert_eq!(cgroup.number("memory.peak"), None);
    }
}
