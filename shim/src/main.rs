//! The containerd shim's program; all of it is in the library.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use kiln_shim::uvm::StoreLauncher;

fn main() -> ExitCode {
    match kiln_shim::program::main(|shim| {
        Arc::new(StoreLauncher::new(&shim.config, shim.pod_dir()))
    }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // For `start` and `delete` that fail, containerd shows this to the user.
            let _ = writeln!(std::io::stderr(), "containerd-shim-kiln-v2: {error:#}");
            ExitCode::FAILURE
        }
    }
}
