//! One PCI bus: configuration space by ECAM, MSI-X, and the dispatch of BAR accesses.

pub mod config;
pub mod msix;
pub mod root;

pub use config::PciConfig;
pub use msix::{Msix, MsixState};
pub use root::{PciFunction, PciRoot};
