//! What kiln's programs on one node share: where things are, what the configuration says, what a pod's shim tells, and how
//! containerd is told of kiln. It starts nothing and links no client of a cluster.

pub mod config;
pub mod containerd;
pub mod inspect;
pub mod pods;
