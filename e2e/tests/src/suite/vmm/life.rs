//! Boot, snapshot, resume, and every way to end.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use kiln_e2e::harness::Case;
use kiln_e2e::uvm::{Baked, Kit, Shape, Uvm};
use kiln_e2e::{Test, cases};
use kiln_vmm_control::exit;

use super::{baked, blocking, folder};
use crate::suite::same;

pub(super) fn cases() -> Vec<Case> {
    cases![
        an_older_kernel_boots_is_saved_and_resumed,
        the_way_a_guest_ends_is_told_apart,
        clones_live_side_by_side_with_their_own_random_numbers,
        a_machine_goes_on_after_its_snapshot,
        a_damaged_state_file_is_refused_by_name,
    ]
}

const END: Duration = Duration::from_secs(30);

async fn an_older_kernel_boots_is_saved_and_resumed(test: Test) -> Result<()> {
    blocking(test, |dir| {
        let kit = Kit::make("6.1.", dir)?;
        let uvm = Uvm::boot(dir, &kit, Shape::default())?;
        ensure!(uvm.sh("uname -r")?.starts_with("6.1."), "another kernel");
        let baked = uvm.snapshot(&dir.join("baked"), false)?;
        drop(uvm);
        let uvm = Uvm::resume(dir, &baked, vec![], &[])?;
        ensure!(uvm.sh("uname -r")?.starts_with("6.1."), "another kernel");
        uvm.run("poweroff -f").ok();
        same!(uvm.wait(END)?, exit::ENDED);
        Ok(())
    })
    .await
}

async fn the_way_a_guest_ends_is_told_apart(test: Test) -> Result<()> {
    blocking(test, |dir| {
        for (script, code) in [
            ("poweroff -f", exit::ENDED),
            ("reboot -f", exit::RESET),
            ("echo c > /proc/sysrq-trigger", exit::PANICKED),
        ] {
            let uvm = Uvm::resume(dir, &baked()?, vec![], &[])?;
            // The answer does not come; the end does.
            uvm.run(script).ok();
            let got = uvm.wait(END).map_err(|e| e.context(script))?;
            same!(got, code, "{script}: {}", uvm.log());
        }
        Ok(())
    })
    .await
}

async fn clones_live_side_by_side_with_their_own_random_numbers(test: Test) -> Result<()> {
    blocking(test, |dir| {
        const COUNT: usize = 10;
        let baked = baked()?;
        let mut clones = Vec::new();
        for i in 0..COUNT {
            clones.push(Uvm::resume(
                &folder(dir, &i.to_string())?,
                &baked,
                vec![],
                &[],
            )?);
        }
        let mut numbers = std::collections::BTreeSet::new();
        for uvm in &clones {
            numbers.insert(uvm.sh("head -c 16 /dev/urandom | sha256sum")?);
        }
        same!(numbers.len(), COUNT, "different random numbers");
        Ok(())
    })
    .await
}

async fn a_machine_goes_on_after_its_snapshot(test: Test) -> Result<()> {
    blocking(test, |dir| {
        let uvm = Uvm::resume(dir, &baked()?, vec![], &[])?;
        uvm.sh("echo before > /tmp/f")?;
        let saved = uvm.snapshot(&dir.join("saved"), true)?;
        uvm.sh("echo after > /tmp/f")?;
        same!(uvm.sh("cat /tmp/f")?, "after");
        let copy = Uvm::resume(&folder(dir, "copy")?, &saved, vec![], &[])?;
        same!(copy.sh("cat /tmp/f")?, "before");
        same!(uvm.sh("cat /tmp/f")?, "after");
        Ok(())
    })
    .await
}

async fn a_damaged_state_file_is_refused_by_name(test: Test) -> Result<()> {
    blocking(test, |dir| {
        let good = baked()?;
        let bytes = std::fs::read(&good.state)?;
        let bad = Baked {
            state: dir.join("bad-state"),
            memory: good.memory.clone(),
        };
        let refused = |bytes: &[u8], memory: &Path, word: &str| -> Result<()> {
            std::fs::write(&bad.state, bytes)?;
            let bad = Baked {
                memory: memory.to_owned(),
                ..bad.clone()
            };
            let error = match Uvm::resume(dir, &bad, vec![], &[]) {
                Ok(_) => anyhow::bail!("a state file with a damaged {word} was resumed"),
                Err(e) => format!("{e:#}"),
            };
            ensure!(error.contains(word), "{word:?} is not in: {error}");
            Ok(())
        };
        refused(&bytes[..100], &good.memory, "length")?;
        refused(&bytes[..bytes.len() - 1], &good.memory, "length")?;
        let flipped = |at: usize| {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1;
            bytes
        };
        refused(&flipped(0), &good.memory, "magic")?;
        refused(&flipped(300), &good.memory, "checksum")?;
        refused(&flipped(1000), &good.memory, "checksum")?;
        let short = dir.join("short-memory");
        std::fs::write(&short, vec![0; 4096])?;
        refused(&bytes, &short, "memory")?;
        Ok(())
    })
    .await
}
