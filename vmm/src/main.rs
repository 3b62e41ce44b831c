//! `kiln-vmm`: one machine, one process.
//!
//! Started by the control client it reads its command from an inherited socket. Started by a person, `boot`
//! and `resume` run a machine in the foreground, with the guest's console on standard output and commands
//! on standard input (`help` lists them).

mod ends;
mod filter;
mod frontend;
mod jail;
mod serve;

use std::process::ExitCode;

fn main() -> ExitCode {
    std::panic::set_hook(Box::new(|info| {
        // A VMM with a dead thread would be a machine that half works: end it, and say why.
        eprintln!("kiln-vmm: {info}");
        std::process::abort();
    }));
    let started = kiln_vmm::timeline::Timeline::default();
    one_heap();
    let mut args = std::env::args().skip(1);
    let result = match args.next().as_deref() {
        Some("serve") => serve::run(args, started),
        _ => frontend::run(),
    };
    match result {
        Ok(code) => code,
        Err(e) => {
            eprintln!("kiln-vmm: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// All threads allocate from one heap. One of its own costs each thread private pages, and glibc opens a file in
/// /proc before it shrinks such a heap, which the threads' filters forbid.
fn one_heap() {
    const M_ARENA_MAX: libc::c_int = -8;
    // SAFETY: mallopt takes two numbers; no other thread runs yet.
    unsafe { libc::mallopt(M_ARENA_MAX, 1) };
}
