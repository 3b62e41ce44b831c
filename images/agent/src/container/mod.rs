//! The pod's containers, from their creation to the last thing known about them.
//!
//! Owned here: which containers and processes there are, in which state, and everything in the guest
//! that was made for them (mounts, bundle, cgroup), which goes with them. Trusted: the host's
//! requests, as far as their shape goes. Not trusted: whatever runs in a container.

pub(crate) mod cgroup;
mod device_filter;
mod devices;
mod lifecycle;
pub(crate) mod process;
pub(crate) mod spec;
mod usage;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_agent_api::proto;
use kiln_agent_api::users::IdMap;
use libcontainer::oci_spec::runtime::{self as oci, LinuxCapabilities, LinuxSeccomp};
use tokio::sync::broadcast;

use self::cgroup::{Cgroup, Hierarchy};
pub(crate) use self::lifecycle::{blocking, set_sysctl};
use self::process::Process;
use crate::error::AgentError;
use crate::helper::Helper;
use crate::reaper::Reaper;
use crate::storage::Placed;
use crate::users::AllUsers;

/// Events that a slow listener may lag behind.
const EVENTS: usize = 1024;
/// As runc has it, and short enough for file names.
const MAX_ID: usize = 128;

/// What happens without being asked for.
#[derive(Debug, Clone)]
pub(crate) enum Event {
    /// A process has ended.
    Exit {
        container: String,
        exec: String,
        pid: i32,
        status: proto::ExitStatus,
    },
    /// The kernel killed in a container for want of memory.
    Oom { container: String, kills: u64 },
    /// The μVM has been resumed once more.
    Resumed,
}

/// Where a container stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Created,
    Running,
    Paused,
    Stopped,
}

#[derive(Debug)]
struct Mutable {
    phase: Phase,
    /// Execs by their id.
    execs: BTreeMap<String, Arc<Process>>,
    /// Tells how the `exec` of the first process went, once it is started.
    started: Option<OwnedFd>,
    /// OOM kills that have been told.
    oom_told: u64,
}

/// One container.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) id: String,
    /// Short name, for paths.
    name: String,
    pub(crate) init: Arc<Process>,
    cgroup: Cgroup,
    /// What was mounted and made for it.
    files: Placed,
    seccomp: Option<LinuxSeccomp>,
    capabilities: Option<LinuxCapabilities>,
    /// `CLONE_NEW*` of its namespaces.
    namespaces: i32,
    /// Who its users are outside of its user namespace, if it has one.
    users: Option<IdMap>,
    rootfs: PathBuf,
    mutable: Mutex<Mutable>,
}

impl Container {
    fn lock(&self) -> MutexGuard<'_, Mutable> {
        self.mutable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where it stands.
    pub(crate) fn phase(&self) -> Phase {
        if self.init.exit().is_some() {
            Phase::Stopped
        } else {
            self.lock().phase
        }
    }

    /// Its process of that id; empty for the first.
    pub(crate) fn process(&self, exec: &str) -> Result<Arc<Process>, AgentError> {
        if exec.is_empty() {
            return Ok(self.init.clone());
        }
        let process = self.lock().execs.get(exec).cloned();
        process.ok_or_else(|| AgentError::NotFound(format!("exec {exec} of container {}", self.id)))
    }

    fn processes(&self) -> Vec<Arc<Process>> {
        let mut all = vec![self.init.clone()];
        all.extend(self.lock().execs.values().cloned());
        all
    }
}

#[derive(Debug, Default)]
struct Table {
    /// `None`: being made.
    containers: BTreeMap<String, Option<Arc<Container>>>,
    /// Processes in the guest itself.
    guest_execs: BTreeMap<String, Arc<Process>>,
}

/// What containers need of the guest.
#[derive(Debug)]
pub(crate) struct Environment {
    pub(crate) helper: Helper,
    pub(crate) reaper: Reaper,
    pub(crate) hierarchy: Hierarchy,
    /// Bundles and libcontainer's state.
    pub(crate) state: PathBuf,
    /// AppArmor is enabled in the kernel.
    pub(crate) apparmor: bool,
}

/// All containers of the pod.
#[derive(Debug)]
pub(crate) struct Containers {
    environment: Environment,
    table: Mutex<Table>,
    /// The first processes of the PID namespaces that containers may share, by the user namespace that these belong to.
    pod_init: tokio::sync::Mutex<BTreeMap<Option<PathBuf>, i32>>,
    /// The user namespaces that containers run in.
    users: AllUsers,
    next_name: AtomicU64,
    events: broadcast::Sender<Event>,
}

impl Containers {
    /// No containers yet.
    pub(crate) fn new(environment: Environment) -> Self {
        Self {
            environment,
            table: Mutex::default(),
            pod_init: tokio::sync::Mutex::default(),
            users: AllUsers::default(),
            next_name: AtomicU64::new(1),
            events: broadcast::channel(EVENTS).0,
        }
    }

    /// Events from now on.
    pub(crate) fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Tells everybody.
    pub(crate) fn tell(&self, event: Event) {
        // Nobody listening is no error.
        drop(self.events.send(event));
    }

    /// The cgroups.
    pub(crate) fn hierarchy(&self) -> &Hierarchy {
        &self.environment.hierarchy
    }

    /// One container.
    pub(crate) fn get(&self, id: &str) -> Result<Arc<Container>, AgentError> {
        let container = self.lock().containers.get(id).cloned().flatten();
        container.ok_or_else(|| AgentError::NotFound(format!("container {id}")))
    }

    /// A process of a container, or with an empty container id one in the guest itself.
    pub(crate) fn process(&self, container: &str, exec: &str) -> Result<Arc<Process>, AgentError> {
        if !container.is_empty() {
            return self.get(container)?.process(exec);
        }
        let process = self.lock().guest_execs.get(exec).cloned();
        process.ok_or_else(|| AgentError::NotFound(format!("exec {exec} in the guest")))
    }

    /// Whether there are any.
    pub(crate) fn is_empty(&self) -> bool {
        let table = self.lock();
        table.containers.is_empty() && table.guest_execs.is_empty()
    }

    /// All that there are.
    pub(crate) fn all(&self) -> Vec<Arc<Container>> {
        self.lock().containers.values().flatten().cloned().collect()
    }

    /// Every process that the host started.
    pub(crate) fn list(&self) -> Vec<proto::ProcessState> {
        let mut list = Vec::new();
        for container in self.all() {
            let phase = container.phase();
            for process in container.processes() {
                list.push(process.state(phase));
            }
        }
        let execs: Vec<_> = self.lock().guest_execs.values().cloned().collect();
        list.extend(execs.iter().map(|process| process.state(Phase::Running)));
        list
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A short name that no container had before.
    fn name(&self) -> String {
        format!("c{}", self.next_name.fetch_add(1, Ordering::Relaxed))
    }

    fn bundle(&self, name: &str) -> PathBuf {
        self.environment.state.join("bundles").join(name)
    }

    /// Namespaces that are kept as files.
    fn namespaces(&self) -> PathBuf {
        self.environment.state.join("namespaces")
    }

    fn runtime_state(&self) -> PathBuf {
        self.environment.state.join("runtime")
    }
}

/// Ids become folder names and parts of messages.
fn checked_id<'a>(what: &str, id: &'a str) -> Result<&'a str, AgentError> {
    let fits = !id.is_empty() && id.len() <= MAX_ID && id != "." && id != "..";
    let plain = |c: char| c.is_ascii_alphanumeric() || "_.+-".contains(c);
    if fits && id.chars().all(plain) {
        Ok(id)
    } else {
        Err(AgentError::Invalid(format!(
            "{what} {id:?} is not made of 1 to {MAX_ID} letters, digits, '_', '.', '+' and '-'"
        )))
    }
}

/// The user and group whose a process's streams are to be: its own, as they are called outside of its user namespace.
fn owner_of(process: &oci::Process, users: Option<&IdMap>) -> Result<(u32, u32), AgentError> {
    let (uid, gid) = (process.user().uid(), process.user().gid());
    let Some(map) = users else {
        return Ok((uid, gid));
    };
    map.user(uid).zip(map.group(gid)).ok_or_else(|| {
        AgentError::Invalid(format!(
            "user {uid} and group {gid} are not in the container's user namespace: choose others, or a wider one"
        ))
    })
}

/// Reads a small file of a container's root directory without leaving it.
fn read_in_root(root: &Path, path: &str) -> Option<String> {
    use std::io::Read;

    use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

    const MOST: u64 = 1 << 20;
    let root = std::fs::File::open(root).ok()?;
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let file = std::fs::File::from(openat2(&root, path, how).ok()?);
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut text = String::new();
    file.take(MOST).read_to_string(&mut text).ok()?;
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_plain_words() {
        for good in ["a", "web-1", "0f3_.+", &"x".repeat(MAX_ID)] {
            assert!(checked_id("container id", good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a b", "ä", &"x".repeat(MAX_ID + 1)] {
            assert!(checked_id("container id", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_root_directory_is_not_left() {
        let folder = tempfile::tempdir().expect("folder");
        std::fs::write(folder.path().join("passwd"), "inside").expect("file");
        std::os::unix::fs::symlink("/passwd", folder.path().join("link")).expect("link");
        std::os::unix::fs::symlink("../../../../etc/passwd", folder.path().join("out"))
            .expect("link");
        assert_eq!(
            read_in_root(folder.path(), "link").as_deref(),
            Some("inside")
        );
        assert_eq!(read_in_root(folder.path(), "out"), None);
        assert_eq!(read_in_root(folder.path(), "../../../../etc/passwd"), None);
    }
}
