//! PID 1 of the node VM.
//!
//! In the initramfs it loads the disk's driver, mounts the node's system and becomes its init; there it
//! runs the set-up script (everything a person may want to read or change is in that script), and
//! then runs commands for the host, one at a time, until the channel closes. It reaps every orphan.

mod boot;
mod processes;
mod serve;

use std::process::ExitCode;

fn main() -> ExitCode {
    let result = if boot::in_initramfs() {
        boot::enter_system()
    } else {
        serve::run()
    };
    if let Err(error) = result {
        // The console is all there is to say it on.
        eprintln!("kiln-node-init: {error:#}");
    }
    boot::power_off()
}
