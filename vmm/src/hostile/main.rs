//! `kiln-vmm-hostile`: a VMM that somebody has taken over. Only for tests; it is not shipped.
//!
//! The same program as `kiln-vmm serve`, but each kind of thread, once its filter is installed, tries to get out and to
//! harm what others share, tells how each attempt ended, and then goes on with its work. The list is in `attacks`.

#[path = "../ends.rs"]
mod ends;
#[path = "../log.rs"]
mod log;
#[path = "../serve/mod.rs"]
mod serve;

mod attacks;
mod filter;
mod jail;
mod raid;

use std::fs::File;

use anyhow::{Context, Result};
use kiln_vmm_control::api;

use filter::Kind;

fn main() {
    // As in the program that is shipped, whose threads share one heap too.
    const M_ARENA_MAX: libc::c_int = -8;
    // SAFETY: mallopt takes two numbers; no other thread runs yet.
    unsafe { libc::mallopt(M_ARENA_MAX, 1) };
    log::init();
    let started = kiln_vmm::timeline::Timeline::default();
    let mut args = std::env::args().skip(1);
    let result = match args.next().as_deref() {
        Some("rehearse") => rehearse(args),
        _ => serve::run(args, started),
    };
    let code = result.unwrap_or_else(|e| {
        log::say(&format!("{e:#}"));
        api::exit::FAILED
    });
    std::process::exit(code)
}

/// The attacks from the same jail, but without a machine: for hosts that can run none. Wants an empty directory, a
/// folder to be served, and a file that the process has open for reading.
fn rehearse(mut args: impl Iterator<Item = String>) -> Result<i32> {
    let root = args.next().context("an empty directory is wanted")?;
    let folder = File::open(args.next().context("a folder is wanted")?)?;
    let _shared = File::open(args.next().context("a file is wanted")?)?;
    raid::remember_held();
    let jail = jail::Jail {
        uid: Some(65534),
        gid: Some(65534),
        root: Some(root.into()),
    };
    let files = kiln_vmm_fs::Prepared::new(&kiln_vmm_fs::Options::default())?;
    jail::enter(&jail)?;
    filter::install_handler()?;
    let attack = |kind| {
        filter::confine(kind)?;
        attacks::run(kind);
        anyhow::Ok(())
    };
    let server = std::thread::spawn(move || {
        let made = files.enter(folder.into(), &[])?;
        // Its descriptors are those of this thread's own table: to other threads their numbers mean other files.
        std::mem::forget(made);
        attack(Kind::Files)
    });
    server.join().map_err(|_| anyhow::anyhow!("it died"))??;
    jail::become_user(&jail)?;
    for kind in [Kind::Control, Kind::Devices, Kind::Vcpu] {
        let thread = std::thread::spawn(move || attack(kind));
        thread.join().map_err(|_| anyhow::anyhow!("it died"))??;
    }
    raid::sum_up();
    Ok(0)
}
