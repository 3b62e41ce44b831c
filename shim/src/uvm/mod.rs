//! The seam between pods and μVMs: what the state machine needs of one, and nothing of how it is done. Behind it stand the
//! launcher (`images/uvm`) and what the host keeps for a pod.

mod inspect;
mod launch;
mod running;

pub use launch::StoreLauncher;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use kiln_uvm::Flush;
pub use kiln_uvm::disks::GuestDisk;
pub use kiln_uvm::end::End;
pub use kiln_uvm::guest::{Guest, GuestEvent};
use kiln_uvm::scratch::ScratchLimits;
use kiln_uvm::share::Volume;
use kiln_uvm::size::Size;
use kiln_uvm::timeline::Timeline;

use crate::error::Result;
use crate::stand_in::StandIn;

/// What a μVM is launched with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodSetup {
    /// The pod's id: the sandbox's, or the task's own.
    pub id: String,
    /// How big.
    pub size: Size,
    /// What its containers may write to their root file systems.
    pub overlay: ScratchLimits,
    /// What it does when they flush these.
    pub overlay_flush: Flush,
    /// The pod's host name; empty: none was asked for.
    pub hostname: String,
    /// The pod's network namespace; `None`: the pod has no network but its loopback.
    pub netns: Option<PathBuf>,
    /// Sysctls of the pod.
    pub sysctls: BTreeMap<String, String>,
    /// The cgroup that the VMM's memory and CPU time are charged to, as the OCI spec writes it.
    pub cgroup: Option<String>,
    /// How likely the VMM is to be killed when memory runs out, as long as the pod has no containers.
    pub oom_score_adj: i32,
}

/// Starts μVMs.
#[async_trait]
pub trait Launcher: Send + Sync {
    /// Resumes a μVM and makes it this pod's. When it returns, the identity gate is open and the
    /// network is up.
    async fn launch(&self, setup: &PodSetup) -> Result<Arc<dyn Uvm>>;
}

/// What containers wrote to their root file systems, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Written {
    /// What the overlay holds, in RAM and spilled: the host's own knowledge.
    pub held: u64,
    /// The most that there can be: what it holds, and a memory full of what the guest has yet to write.
    pub limit: u64,
    /// What the guest says of all containers.
    pub total: u64,
    /// What it says of each that was asked for.
    pub own: Vec<u64>,
}

/// A pod's running μVM, and what the host keeps for it.
#[async_trait]
pub trait Uvm: Send + Sync {
    /// Starts a process that stands for one of its containers on the node.
    fn stand_in(&self, id: &str) -> Result<StandIn>;
    /// What runs in it.
    fn guest(&self) -> &dyn Guest;
    /// The next thing that happened in it unasked; `None` when the guest is gone.
    async fn next_event(&self) -> Option<GuestEvent>;

    /// Waits until it has the pod's size.
    async fn grown(&self) -> Result<()>;
    /// Changes its size.
    async fn resize(&self, size: Size) -> Result<()>;

    /// Gives the guest a disk.
    async fn attach_disk(&self, image: File, read_only: bool) -> Result<GuestDisk>;
    /// Takes it away.
    async fn detach_disk(&self, disk: &GuestDisk) -> Result<()>;
    /// Shows the guest a volume; returns the path it has there. Containers that ask for the same one
    /// share it.
    fn share(&self, volume: &Volume) -> Result<String>;
    /// A container that asked for the volume needs it no longer.
    fn unshare(&self, volume: &Volume);

    /// What containers wrote to their root file systems: all together, and each of these.
    async fn written(&self, containers: &[String]) -> Result<Written>;
    /// The file that holds what has left the overlay's RAM.
    fn spill(&self) -> Option<Arc<File>>;

    /// Keeps for `kiln trace` where the time of a container's start went.
    fn keep_trace(&self, container: &str, name: &str, timeline: &Timeline);
    /// The container is deleted, and with it where the time of its start went.
    fn forget_trace(&self, container: &str);

    /// How likely the VMM is to be killed when memory runs out, from now on.
    fn set_oom_score(&self, score: i32) -> Result<()>;
    /// Ends the μVM and everything that belongs to it on the host. Done twice is done once.
    async fn stop(&self);
    /// Returns when the VMM has ended.
    async fn ended(&self) -> End;
}
