//! One container of a pod, with its execs.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::message;
use super::process::Process;
use crate::error::{Error, Result};
use crate::rootfs::Storage;
use crate::size::Limits;
use crate::spec::Spec;
use crate::stand_in::StandIn;
use kiln_uvm::timeline::Timeline;

/// What stands behind a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// CRI's pause container: the μVM itself. No process, no root file system.
    Pause,
    /// A container in the guest.
    Guest,
}

/// A container.
#[derive(Debug)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// What people call it: its name in the pod, or its id.
    pub name: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// What stands behind it.
    pub kind: Kind,
    /// Its first process.
    pub init: Arc<Process>,
    /// Of its start.
    pub(super) timeline: Timeline,
    /// How likely its first process is to be killed when memory runs out.
    pub(super) oom_score_adj: Option<i32>,
    /// The node's file for why it ended.
    pub(super) message: Option<PathBuf>,
    pub(super) limits: Mutex<Limits>,
    pub(super) storage: Mutex<Option<Storage>>,
    /// The process that stands for it on the node, as long as it lives.
    stand_in: Mutex<Option<StandIn>>,
    pid: u32,
    execs: Mutex<HashMap<String, Exec>>,
}

/// An exec and, until it is started, what is to be run.
#[derive(Debug, Clone)]
pub(super) struct Exec {
    pub(super) process: Arc<Process>,
    /// An OCI process object, JSON.
    pub(super) spec: Arc<[u8]>,
}

impl Container {
    pub(super) fn new(
        id: &str,
        bundle: PathBuf,
        kind: Kind,
        init: Arc<Process>,
        stand_in: StandIn,
        spec: &Spec,
    ) -> Self {
        Self {
            pid: stand_in.pid(),
            stand_in: Mutex::new(Some(stand_in)),
            id: id.to_owned(),
            bundle,
            kind,
            name: spec.container_name().unwrap_or(id).to_owned(),
            init,
            timeline: Timeline::default(),
            oom_score_adj: spec.oom_score_adj(),
            // Mounts that can't be read are an error of the container's creation.
            message: spec.mounts().ok().and_then(|mounts| message::file(&mounts)),
            limits: Mutex::new(spec.limits()),
            storage: Mutex::new(None),
            execs: Mutex::default(),
        }
    }

    /// Its process id on the node.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it is the one that the node's process stands for. After its end the number may be another's.
    pub(super) fn is_process(&self, pid: u32) -> bool {
        self.pid == pid && self.lock_stand_in().is_some()
    }

    /// Ends the process that stands for it.
    pub(super) fn end_stand_in(&self) {
        drop(self.lock_stand_in().take());
    }

    fn lock_stand_in(&self) -> MutexGuard<'_, Option<StandIn>> {
        self.stand_in.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_execs(&self) -> MutexGuard<'_, HashMap<String, Exec>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds a process: the first one for an empty id.
    pub fn process(&self, exec: &str) -> Result<Arc<Process>> {
        if exec.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        self.exec(exec).map(|e| e.process)
    }

    pub(super) fn exec(&self, exec: &str) -> Result<Exec> {
        self.lock_execs()
            .get(exec)
            .cloned()
            .ok_or_else(|| Error::NotFound(format!("exec {exec} of container {}", self.id)))
    }

    pub(super) fn add_exec(&self, exec: Exec) -> Result<()> {
        let id = exec.process.exec_id().to_owned();
        let mut execs = self.lock_execs();
        if execs.contains_key(&id) {
            return Err(Error::AlreadyExists(format!(
                "exec {id} of container {}",
                self.id
            )));
        }
        execs.insert(id, exec);
        Ok(())
    }

    pub(super) fn remove_exec(&self, exec: &str) {
        self.lock_execs().remove(exec);
    }

    pub(super) fn execs(&self) -> Vec<Arc<Process>> {
        self.lock_execs()
            .values()
            .map(|e| Arc::clone(&e.process))
            .collect()
    }

    pub(super) fn limits(&self) -> Limits {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
