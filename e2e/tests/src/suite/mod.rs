//! All tests, by what they are about. Each is a statement that holds for any runtime.

mod cni_shapes;
mod config_volumes;
mod empty_dirs;
mod exec;
mod exit;
mod fault_matrix;
mod faults;
mod hostile;
mod identity;
mod kernel_modules;
mod kiln_run;
mod kubelet;
mod last_words;
mod logs;
mod mounts;
mod namespaces;
mod network;
mod out_of_memory;
mod overlay;
mod pods;
mod refusals;
mod resources;
mod run_bake;
mod run_load;
mod run_net;
mod run_save;
mod run_seccomp;
mod run_terminal;
mod shared_files;
mod snapshotters;
mod statistics;
mod streams;
mod tasks;
mod users;
mod vmm;
mod volumes;

use anyhow::Context;
use kiln_e2e::harness::Case;

pub(crate) fn all() -> Vec<Case> {
    [
        pods::cases(),
        identity::cases(),
        exec::cases(),
        streams::cases(),
        exit::cases(),
        faults::cases(),
        fault_matrix::cases(),
        logs::cases(),
        volumes::cases(),
        shared_files::cases(),
        empty_dirs::cases(),
        config_volumes::cases(),
        mounts::cases(),
        users::cases(),
        network::cases(),
        kernel_modules::cases(),
        cni_shapes::cases(),
        resources::cases(),
        tasks::cases(),
        vmm::cases(),
        kiln_run::cases(),
        overlay::cases(),
        hostile::cases(),
        out_of_memory::cases(),
        snapshotters::cases(),
        run_terminal::cases(),
        run_bake::cases(),
        run_load::cases(),
        run_net::cases(),
        run_save::cases(),
        run_seccomp::cases(),
        statistics::cases(),
        namespaces::cases(),
        refusals::cases(),
        last_words::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// How often tests that try their luck do so: `KILN_E2E_ROUNDS`, or once.
fn rounds() -> anyhow::Result<u32> {
    const NAME: &str = "KILN_E2E_ROUNDS";
    match std::env::var(NAME) {
        Ok(text) => text.parse().context(NAME),
        Err(_) => Ok(1),
    }
}

/// Fails unless two values are equal, and shows both.
macro_rules! same {
    ($left:expr, $right:expr) => {
        same!($left, $right, "{}", stringify!($left))
    };
    ($left:expr, $right:expr, $($what:tt)+) => {
        match (&$left, &$right) {
            (left, right) => anyhow::ensure!(
                left == right,
                "{}: {left:?}, expected {right:?}",
                format!($($what)+)
            ),
        }
    };
}
pub(crate) use same;
