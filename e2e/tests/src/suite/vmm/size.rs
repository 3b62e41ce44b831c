//! vCPUs and memory that come and go.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use kiln_e2e::harness::Case;
use kiln_e2e::uvm::Uvm;
use kiln_e2e::{Test, cases};
use kiln_uvm::RefusalKind;
use kiln_uvm::ends::Ends;

use super::{baked, blocking, refusal};
use crate::suite::same;

pub(super) fn cases() -> Vec<Case> {
    cases![
        vcpus_come_and_go_under_load_also_after_a_second_resume.limit(300),
        // The VMM gives a guest that gives nothing back 20 s.
        memory_comes_and_goes_also_after_a_second_resume
            .limit(300)
            .alone(),
        a_size_that_can_not_be_is_refused,
    ]
}

const MIB: u64 = 1 << 20;
const LIMIT_MS: u32 = 60_000;
const SOON: Duration = Duration::from_secs(20);

/// Asks for a size; what was reached.
fn resize(uvm: &Uvm, cpus: u32, mib: u64) -> Result<(u32, u64)> {
    let reached = uvm.vmm().resize(cpus, mib * MIB, LIMIT_MS)?;
    Ok((reached.cpus, reached.memory / MIB))
}

/// Brings up what is offline, as the agent does, which asks again while the kernel is busy with another: the number of vCPUs
/// that work.
fn online(uvm: &Uvm) -> Result<u32> {
    let text = uvm.sh("for c in /sys/devices/system/cpu/cpu[1-9]*; do \
           for try in 1 2 3 4 5 6 7 8 9 10; do \
             [ -e $c/online ] && [ $(cat $c/online) = 0 ] || break; \
             echo 1 > $c/online && break; sleep 1; done; done 2> /dev/null; \
         grep -c ^processor /proc/cpuinfo")?;
    text.parse()
        .with_context(|| format!("a number of vCPUs: {text:?}"))
}

async fn vcpus_come_and_go_under_load_also_after_a_second_resume(test: Test) -> Result<()> {
    blocking(test, |dir| {
        let mut uvm = Uvm::resume(dir, &baked()?, Ends::new())?;
        // Something that uses whatever CPUs there are.
        uvm.sh("for i in 1 2; do (while :; do :; done) > /dev/null 2>&1 & done")?;
        for round in 0..2 {
            for count in [2, 4, 1] {
                same!(resize(&uvm, count, 256)?.0, count);
                same!(online(&uvm)?, count);
            }
            if round == 0 {
                // With two, so that a hot-added one is part of what is saved.
                same!(resize(&uvm, 2, 256)?.0, 2);
                same!(online(&uvm)?, 2);
                let again = uvm.snapshot(&dir.join("again"), false)?;
                drop(uvm);
                uvm = Uvm::resume(dir, &again, Ends::new())?;
                same!(online(&uvm)?, 2);
            }
        }
        Ok(())
    })
    .await
}

async fn memory_comes_and_goes_also_after_a_second_resume(test: Test) -> Result<()> {
    blocking(test, |dir| {
        let mut uvm = Uvm::resume(dir, &baked()?, Ends::new())?;
        let total = |uvm: &Uvm| -> Result<u64> {
            let kib: u64 = uvm
                .sh("awk '/MemTotal/ { print $2 }' /proc/meminfo")?
                .parse()?;
            Ok(kib / 1024)
        };
        let base = total(&uvm)?;
        // Memory that is in use while it comes and goes; the emulated guest needs its CPU, too.
        let load = "while :; do head -c 16777216 /dev/urandom > /tmp/load; usleep 300000; done";
        uvm.sh(&format!("({load}) > /dev/null 2>&1 &"))?;
        for (round, (most, least)) in [(2048, 512), (1024, 384)].into_iter().enumerate() {
            same!(resize(&uvm, 1, most)?.1, most);
            // The guest counts a block when it is online, a moment after it has taken it.
            let deadline = Instant::now() + SOON;
            let mut more = total(&uvm)?;
            while more < base + most - 256 - 70 {
                ensure!(Instant::now() < deadline, "{base} MiB before, {more} after");
                std::thread::sleep(Duration::from_millis(50));
                more = total(&uvm)?;
            }
            let (_, reached) = resize(&uvm, 1, least)?;
            if !(least..=least + 128).contains(&reached) {
                return Err(uvm.explain(&anyhow!("shrunk to {reached} MiB only")));
            }
            if round == 0 {
                let again = uvm.snapshot(&dir.join("again"), false)?;
                drop(uvm);
                uvm = Uvm::resume(dir, &again, Ends::new())?;
            }
        }
        Ok(())
    })
    .await
}

async fn a_size_that_can_not_be_is_refused(test: Test) -> Result<()> {
    blocking(test, |dir| {
        let uvm = Uvm::resume(dir, &baked()?, Ends::new())?;
        for (cpus, mib) in [(5, 256), (0, 256), (1, 255), (1, 256 + 2049)] {
            let taken = || format!("{cpus} vCPUs and {mib} MiB were taken");
            let error = resize(&uvm, cpus, mib).err().with_context(taken)?;
            same!(refusal(&error), Some(RefusalKind::Usage));
        }
        same!(uvm.sh("echo alive")?, "alive");
        Ok(())
    })
    .await
}
