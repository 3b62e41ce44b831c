//! Saving a machine while it runs.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kiln_e2e::harness::Case;
use kiln_e2e::uvm::Uvm;
use kiln_e2e::{Test, cases};
use kiln_uvm::ends::Ends;

use super::{baked, blocking, folder};
use crate::suite::same;

pub(super) fn cases() -> Vec<Case> {
    cases![memory_that_is_written_while_it_is_copied_is_that_of_one_moment.limit(300)]
}

/// MiB that the guest writes over and over.
const CHURNED: u64 = 48;

async fn memory_that_is_written_while_it_is_copied_is_that_of_one_moment(test: Test) -> Result<()> {
    blocking(test, |dir| {
        let baked = baked()?;
        let first = Uvm::resume(&folder(dir, "first")?, &baked, Ends::new())?;
        first.sh(&format!(
            "(testprog churn /tmp/churned {CHURNED} > /tmp/churn.log 2>&1 & echo $! > /tmp/churner); \
             dd if=/dev/urandom of=/tmp/kept bs=1M count=8 2> /dev/null; sha256sum /tmp/kept > /tmp/sum"
        ))?;
        std::thread::sleep(Duration::from_secs(1));
        // Who churns ends at the first page that is not as it left it: it has come round to each of them by then.
        let stop = "sleep 1; cat /tmp/churn.log; kill -STOP $(cat /tmp/churner); \
                    testprog churned /tmp/churned; sha256sum -c /tmp/sum";
        let whole = |uvm: &Uvm| -> Result<u64> {
            let told = uvm.sh(stop)?;
            let last = told.lines().find_map(|line| line.strip_prefix("whole "));
            ensure!(told.starts_with("churning\n"), "{told}");
            ensure!(!told.contains("was written") && told.contains("/tmp/kept: OK"), "{told}");
            last.and_then(|last| last.parse().ok()).with_context(|| told.clone())
        };
        // Of one that was resumed from a bake, and of a copy of that.
        let (saved, stood) = first.save(&dir.join("saved"), Some(&baked))?;
        println!("stood still for {:?}, with {} KiB to copy", stood.still, stood.copied >> 10);
        let second = Uvm::resume(&folder(dir, "second")?, &saved, Ends::new())?;
        second.sh("rm /tmp/kept; head -c 100000 /dev/zero > /tmp/kept; sha256sum /tmp/kept > /tmp/sum")?;
        let (again, _) = second.save(&dir.join("again"), Some(&saved))?;
        let third = Uvm::resume(&folder(dir, "third")?, &again, Ends::new())?;
        let last = [whole(&first)?, whole(&second)?, whole(&third)?];
        ensure!(last.iter().all(|last| *last > CHURNED << 8), "{last:?}: too slow to write all");
        // Each went its own way.
        same!(std::collections::BTreeSet::from(last).len(), 3);
        Ok(())
    })
    .await
}
