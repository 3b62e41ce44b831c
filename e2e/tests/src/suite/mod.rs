//! All tests, by what they are about.

mod pods;

use kiln_e2e::harness::Case;

pub(crate) fn all() -> Vec<Case> {
    [pods::cases()].into_iter().flatten().collect()
}
