//! A μVM in a host program's hands: what whoever resumes one (the shim, `kiln run`) gives it.
//!
//! - [`share`]: the directory of volumes that the guest sees.
//!
//! Trusted: the caller. Not trusted: the guest, and the VMM that faces it. Nothing here names a path that either of
//! them can write.

mod mounts;
pub mod share;
