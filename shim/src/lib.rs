//! containerd's shim for kiln: containerd's Task and Sandbox APIs turned into the life of a μVM.
//!
//! From the outside in: [`bootstrap`] is how containerd starts a shim and finds it, [`service`]
//! translates RPCs, [`pod`] is the state machine that knows the rules, and [`uvm`] the seam behind
//! which the VMM and the guest's agent are.

pub mod bootstrap;
pub mod cgroup;
pub mod cleanup;
pub mod error;
pub mod events;
mod features;
pub mod log;
pub mod network;
pub mod oom;
pub mod pod;
pub mod program;
pub mod publisher;
pub mod record;
pub mod refusal;
pub mod rootfs;
pub mod server;
pub mod service;
pub mod size;
pub mod spec;
pub mod stand_in;
pub mod stats;
pub mod stdio;
pub mod time;
pub mod uvm;
