//! All tests, by what they are about. Each is a statement that holds for any runtime.

mod claims;
mod lifecycle;
mod on_node;
mod pods;
mod resources;
mod security;
mod upgrades;
mod verbs;
mod volumes;
mod workloads;

use kiln_e2e::harness;
use kiln_k8s::Test;

/// A test on the cluster.
pub(crate) type Case = harness::Case<Test>;

pub(crate) fn all() -> Vec<Case> {
    [
        pods::cases(),
        verbs::cases(),
        lifecycle::cases(),
        workloads::cases(),
        volumes::cases(),
        claims::cases(),
        on_node::cases(),
        resources::cases(),
        security::cases(),
        upgrades::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Fails unless two values are equal, and shows both.
macro_rules! same {
    ($left:expr, $right:expr) => {
        match (&$left, &$right) {
            (left, right) => anyhow::ensure!(
                left == right,
                "{}: {left:?}, expected {right:?}",
                stringify!($left)
            ),
        }
    };
}
pub(crate) use same;
