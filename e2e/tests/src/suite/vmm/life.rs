//! Boot, snapshot, resume, and every way to end.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use kiln_e2e::harness::Case;
use kiln_e2e::uvm::{Baked, Kit, Shape, Uvm};
use kiln_e2e::{Test, agent, cases};
use kiln_uvm::ends::Ends;
use kiln_uvm::{RefusalKind, exit};

use super::{baked, blocking, folder, refusal};
use crate::suite::same;

pub(super) fn cases() -> Vec<Case> {
    cases![
        an_older_kernel_boots_is_saved_and_resumed,
        the_way_a_guest_ends_is_told_apart,
        fifty_copies_live_side_by_side_each_itself_and_on_time.limit(300),
        a_killed_vmm_leaves_nothing_behind,
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
        let uvm = Uvm::resume(dir, &baked, Ends::new())?;
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
            let uvm = Uvm::resume(dir, &baked()?, Ends::new())?;
            // The answer does not come; the end does.
            uvm.run(script).ok();
            let got = uvm.wait(END).map_err(|e| e.context(script))?;
            same!(got, code, "{script}: {}", uvm.log());
        }
        Ok(())
    })
    .await
}

/// As many as an issue of kiln promises, all of them there when the last one is looked at.
async fn fifty_copies_live_side_by_side_each_itself_and_on_time(test: Test) -> Result<()> {
    const COUNT: usize = 50;
    /// What the clock may be wrong by, besides the time that the question took.
    const TOLERANCE: u128 = 50_000_000;
    let now = || {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        now.map(|now| now.as_nanos())
    };
    let (lease, baked) = tokio::task::spawn_blocking(agent::baked).await??;
    let mut copies = Vec::new();
    let (mut randoms, mut boots) = (BTreeSet::new(), BTreeSet::new());
    for i in 0..COUNT {
        let dir = folder(test.scratch(), &i.to_string())?;
        copies.push(Uvm::resume(&dir, &baked, Ends::new())?);
        let asked = now()?;
        let answer = agent::identify(&dir).await?;
        let answered = now()?;
        let clock = u128::try_from(answer.wall_clock_ns)?;
        ensure!(
            (asked - TOLERANCE..answered + TOLERANCE).contains(&clock),
            "copy {i} believes it is {clock}, asked at {asked}, answered at {answered}"
        );
        ensure!(answer.random_sample.len() >= 8, "a short sample");
        randoms.insert(answer.random_sample);
        boots.insert(answer.boot_id);
    }
    same!(randoms.len(), COUNT, "different random numbers");
    same!(boots.len(), COUNT, "different boot ids");
    for (i, uvm) in copies.iter().enumerate() {
        same!(uvm.vmm().figures()?.cpus, 1, "of copy {i}");
    }
    drop(lease);
    Ok(())
}

/// Whatever a VMM was at when it was killed: nothing of it is there afterwards, and the next one works.
async fn a_killed_vmm_leaves_nothing_behind(test: Test) -> Result<()> {
    blocking(test, |dir| {
        let baked = baked()?;
        for pause_us in [0, 300, 1_000, 3_000, 10_000, 30_000, 100_000] {
            let vmm = Uvm::spawn(dir)?;
            let pid = vmm.pid();
            let killer = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_micros(pause_us));
                // SAFETY: a plain number, of a child that nobody has waited for.
                unsafe { libc::kill(pid.cast_signed(), libc::SIGKILL) }
            });
            // Too late is as good as too early.
            let resumed = Uvm::resume_in(vmm, dir, &baked, Ends::new());
            if let Ok(uvm) = &resumed {
                let _ = uvm.snapshot(&dir.join("cut"), true);
            }
            killer.join().ok();
            drop(resumed);
            ensure!(
                !Path::new(&format!("/proc/{pid}")).exists(),
                "process {pid} outlives its kill after {pause_us} us"
            );
        }
        // A state file is only whole when its memory is.
        let cut = Baked::in_dir(&dir.join("cut"));
        if cut.state.exists()
            && let Ok(uvm) = Uvm::resume(dir, &cut, Ends::new())
        {
            same!(uvm.sh("echo alive")?, "alive");
        }
        let threads = kvm_threads()?;
        let uvm = Uvm::resume(dir, &baked, Ends::new())?;
        same!(uvm.sh("echo alive")?, "alive");
        drop(uvm);
        let deadline = Instant::now() + END;
        while kvm_threads()? > threads {
            ensure!(Instant::now() < deadline, "KVM's threads stay");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    })
    .await
}

/// Kernel threads that KVM starts for VMs.
fn kvm_threads() -> Result<usize> {
    let mut count = 0;
    for entry in std::fs::read_dir("/proc")? {
        let name = std::fs::read_to_string(entry?.path().join("comm")).unwrap_or_default();
        count += usize::from(name.starts_with("kvm"));
    }
    Ok(count)
}

async fn a_machine_goes_on_after_its_snapshot(test: Test) -> Result<()> {
    blocking(test, |dir| {
        let uvm = Uvm::resume(dir, &baked()?, Ends::new())?;
        uvm.sh("echo before > /tmp/f")?;
        let saved = uvm.snapshot(&dir.join("saved"), true)?;
        uvm.sh("echo after > /tmp/f")?;
        same!(uvm.sh("cat /tmp/f")?, "after");
        let copy = Uvm::resume(&folder(dir, "copy")?, &saved, Ends::new())?;
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
            ..good.clone()
        };
        let refused = |bytes: &[u8], memory: &Path, word: &str| -> Result<()> {
            std::fs::write(&bad.state, bytes)?;
            let bad = Baked {
                memory: memory.to_owned(),
                ..bad.clone()
            };
            let error = match Uvm::resume(dir, &bad, Ends::new()) {
                Ok(_) => anyhow::bail!("a state file with a damaged {word} was resumed"),
                Err(e) => e,
            };
            same!(refusal(&error), Some(RefusalKind::Corrupt));
            let error = format!("{error:#}");
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
