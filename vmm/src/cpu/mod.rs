//! Virtual CPUs: what they look like to the guest, their saved state, and the threads that run them.

pub mod cpuid;
pub mod state;
pub mod thread;

pub use kiln_vmm_control::cpu::Fingerprint;
pub use state::{CpuError, VcpuState};
