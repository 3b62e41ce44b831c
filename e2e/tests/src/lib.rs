//! The harness of the end-to-end tests: what a test needs to run pods on a real containerd, and to
//! leave the node as it found it.
//!
//! Everything goes through the interfaces that Kubernetes and other clients use: CRI ([`Cri`],
//! [`Pod`], [`Container`]) and containerd's own API ([`plain`]). A test gets a [`Test`], which knows
//! the runtime to use and removes whatever the test made, however the test ends. [`harness`] runs
//! the tests, each with a time limit; [`evidence`] keeps what is needed to understand a failure.

pub mod agent;
pub mod api;
pub mod cni;
pub mod cri;
pub mod evidence;
pub mod harness;
pub mod inventory;
pub mod log;
pub mod node;
pub mod plain;
pub mod pod;
pub mod setup;
pub mod stream;
pub mod terminal;
mod test;
pub mod uvm;
pub mod wait;

pub use cri::Cri;
pub use pod::{Container, ContainerSpec, Pod, PodSpec};
pub use test::Test;
