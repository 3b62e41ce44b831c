//! What is said of a saved machine: who keeps one, who chooses one and who resumes one mean the same by it.

pub mod cpu;

use serde::{Deserialize, Serialize};

/// Pages of a memory file that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRun {
    /// The first one's number.
    pub first: u32,
    /// How many.
    pub pages: u32,
    /// Whether the guest writes them.
    pub written: bool,
}
