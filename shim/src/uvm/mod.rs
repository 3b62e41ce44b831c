//! The seam between pods and μVMs: what the state machine needs of one, and nothing of how it is
//! done. Behind it stand the VMM's control client and the guest agent's.

mod guest;
mod inspect;
mod launch;
mod log;
mod running;

pub use guest::Guest;
pub use launch::StoreLauncher;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use kiln_agent_api::proto;
use kiln_agent_api::stream::Header;
use kiln_uvm::share::Volume;
use kiln_vmm_control::{Flush, ScratchLimits};
use tokio::net::UnixStream;

use crate::error::Result;
use crate::events::Exit;
use crate::size::Size;
use crate::timeline::Timeline;

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

/// A block device as the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestDisk {
    /// What the VMM calls it.
    pub slot: u32,
    /// Its device path in the guest.
    pub path: String,
    /// Its size, which the agent waits for.
    pub size: u64,
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

/// What the guest's own events are to the shim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestEvent {
    /// The kernel killed a process of the container because its memory ran out.
    Oom {
        /// The container.
        container: String,
    },
}

/// How a μVM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// For people.
    pub reason: String,
    /// Whether the kernel killed the VMM because memory ran out.
    pub out_of_memory: bool,
}

/// A running μVM.
#[async_trait]
pub trait Uvm: Send + Sync {
    /// The VMM's process id, which stands for every process of the pod on the host.
    fn pid(&self) -> u32;

    /// Makes a container; its first process waits to be started.
    async fn create(
        &self,
        request: proto::CreateContainerRequest,
        timeline: &Timeline,
    ) -> Result<()>;
    /// Starts a container's first process.
    async fn start(&self, container: &str, timeline: &Timeline) -> Result<()>;
    /// Starts another process.
    async fn exec(&self, request: proto::ExecRequest) -> Result<()>;
    /// Sends a signal; an empty `exec` means the first process.
    async fn kill(&self, container: &str, exec: &str, signal: u32, all: bool) -> Result<()>;
    /// Waits for the end of a process. Answers until the process is deleted, so none is missed.
    async fn wait(&self, container: &str, exec: &str) -> Result<Exit>;
    /// Freezes a container.
    async fn pause(&self, container: &str) -> Result<()>;
    /// Thaws it.
    async fn unpause(&self, container: &str) -> Result<()>;
    /// Changes a container's limits: an OCI `LinuxResources`, JSON.
    async fn update(&self, container: &str, resources: Vec<u8>) -> Result<()>;
    /// Usage of a container, or of all together for an empty id.
    async fn stats(&self, container: &str) -> Result<proto::StatsResponse>;
    /// What containers wrote to their root file systems: all together, and each of these.
    async fn written(&self, containers: &[String]) -> Result<Written>;
    /// The file that holds what has left the overlay's RAM.
    fn spill(&self) -> Option<Arc<File>>;
    /// The guest's process ids of a container's processes.
    async fn pids(&self, container: &str) -> Result<Vec<u32>>;
    /// The guest's network counters.
    async fn network(&self) -> Result<proto::NetworkState>;
    /// Changes a terminal's size.
    async fn resize_tty(&self, container: &str, exec: &str, w: u32, h: u32) -> Result<()>;
    /// Ends the books on a process or container, killing it first if need be.
    async fn delete(&self, container: &str, exec: &str) -> Result<()>;
    /// Opens a stream of a process, or a TCP connection into the pod.
    async fn stream(&self, header: &Header) -> Result<UnixStream>;
    /// The next thing that happened unasked; `None` when the guest is gone.
    async fn next_event(&self) -> Option<GuestEvent>;

    /// Writes a file of the guest's own.
    async fn write_file(&self, path: String, text: String) -> Result<()>;
    /// Shows the guest a volume; returns the path it has there. Containers that ask for the same one
    /// share it.
    fn share(&self, volume: &Volume) -> Result<String>;
    /// A container that asked for the volume needs it no longer.
    fn unshare(&self, volume: &Volume);
    /// Gives the guest a disk.
    async fn attach_disk(&self, image: File, read_only: bool) -> Result<GuestDisk>;
    /// Takes it away.
    async fn detach_disk(&self, disk: &GuestDisk) -> Result<()>;
    /// Changes the size of the μVM.
    async fn resize(&self, size: Size) -> Result<()>;

    /// Keeps for `kiln trace` where the time of a container's start went, until the container is deleted.
    fn keep_trace(&self, container: &str, name: &str, timeline: &Timeline);

    /// How likely the VMM is to be killed when memory runs out, from now on.
    fn set_oom_score(&self, score: i32) -> Result<()>;

    /// Ends the μVM and everything that belongs to it on the host. Done twice is done once.
    async fn stop(&self);
    /// Returns when the VMM has ended.
    async fn ended(&self) -> End;
}
