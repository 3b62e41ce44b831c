//! `kiln-vmm`: one machine, one process.
//!
//! Started by the control client (`serve`) it reads its requests from an inherited socket. There is no other way to run
//! a machine: each one is in its jail.

#![cfg_attr(not(test), no_main)]

mod ends;
mod filter;
mod jail;
mod log;
mod serve;

use anyhow::anyhow;
use kiln_vmm_control::api;

/// Entered by the C library, not by Rust's runtime, which would read a file in /proc to find where the stack ends and
/// give every thread a second stack, all for a line about stack overflows, on the way of every resume.
#[cfg(not(test))]
// SAFETY: no other `main` is linked, and this one has the signature that the C library calls.
#[unsafe(no_mangle)]
extern "C" fn main(_: libc::c_int, _: *const *const libc::c_char) -> libc::c_int {
    // A closed socket is an error where it is written to.
    // SAFETY: no handler runs.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    std::process::exit(run())
}

/// The program: its exit code.
#[cfg_attr(test, allow(dead_code, reason = "tests have a main of their own"))]
fn run() -> i32 {
    std::panic::set_hook(Box::new(|info| {
        // A VMM with a dead thread would be a machine that half works: end it, and say why.
        log::say(&info.to_string());
        std::process::abort();
    }));
    let started = kiln_vmm::timeline::Timeline::default();
    one_heap();
    log::init();
    let mut args = std::env::args().skip(1);
    let result = match args.next().as_deref() {
        Some("serve") => serve::run(args, started),
        _ => Err(anyhow!(
            "kiln-vmm is started by kiln's other programs; `kiln run` starts a μVM by hand"
        )),
    };
    result.unwrap_or_else(|e| {
        log::say(&format!("{e:#}"));
        api::exit::FAILED
    })
}

/// All threads allocate from one heap. One of its own costs each thread private pages, and glibc opens a file in
/// /proc before it shrinks such a heap, which the threads' filters forbid.
fn one_heap() {
    const M_ARENA_MAX: libc::c_int = -8;
    // SAFETY: mallopt takes two numbers; no other thread runs yet.
    unsafe { libc::mallopt(M_ARENA_MAX, 1) };
}
