//! A Kubernetes cluster of one node, made of real programs on the node that this runs on, and what
//! tests need to work with it.
//!
//! [`cluster`] brings it up and takes it down: certificates ([`pki`]), configuration ([`config`]),
//! and the programs themselves ([`component`]), each in a cgroup of its own. A test gets a [`Test`],
//! which has a namespace and a client; [`kubectl`] is for what people do with `kubectl`.
//! [`conformance`] runs critest.

pub mod calls;
pub mod cluster;
pub mod component;
pub mod config;
pub mod conformance;
pub mod evidence;
pub mod kubectl;
pub mod manifest;
pub mod pki;
pub mod pods;
mod set_up;
mod test;

pub use set_up::set_up;
pub use test::{IMAGE, STEP, Test};
