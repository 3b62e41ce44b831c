//! The end-to-end tests. They run on a node with containerd, for each runtime handler that
//! `KILN_E2E_RUNTIMES` names: what is green with runc holds kiln to account.

mod suite;

fn main() -> std::process::ExitCode {
    kiln_e2e::harness::main(&suite::all())
}
