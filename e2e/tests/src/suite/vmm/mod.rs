//! The VMM alone, without containerd: every device with a real guest, before and after a resume.

mod disks;
mod files;
mod life;
mod saving;
mod size;
mod traffic;

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result};
use kiln_e2e::Test;
use kiln_e2e::harness::Case;
use kiln_e2e::uvm::{Baked, Kit, Shape, Uvm};
use kiln_uvm::RefusalKind;

pub(crate) fn cases() -> Vec<Case> {
    let all = [
        files::cases(),
        disks::cases(),
        size::cases(),
        life::cases(),
        saving::cases(),
        traffic::cases(),
    ];
    let named = |case: Case| case.only_with("kiln", "vmm");
    all.into_iter().flatten().map(named).collect()
}

/// Made once and left for the run: not in a test's own folder.
const SHARED: &str = "/var/lib/kiln-e2e/vmm";

/// A machine with all devices, baked once.
fn baked() -> Result<Baked> {
    static DONE: Mutex<bool> = Mutex::new(false);
    let mut done = DONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let dir = Path::new(SHARED);
    if !*done {
        let kit = Kit::make("", dir)?;
        let uvm = Uvm::boot(dir, &kit, Shape::default())?;
        uvm.sh("echo 3 > /proc/sys/vm/drop_caches")?;
        uvm.snapshot(dir, false)?;
        *done = true;
    }
    Ok(Baked::in_dir(dir))
}

/// Runs a test's body, which waits in system calls, off the async threads.
async fn blocking(
    test: Test,
    body: impl FnOnce(&Path) -> Result<()> + Send + 'static,
) -> Result<()> {
    tokio::task::spawn_blocking(move || body(test.scratch())).await?
}

/// The kind of the VMM's refusal, if the error is one.
fn refusal(error: &anyhow::Error) -> Option<RefusalKind> {
    error.downcast_ref::<kiln_uvm::Error>()?.refusal()
}

fn folder(parent: &Path, name: &str) -> Result<PathBuf> {
    let path = parent.join(name);
    std::fs::create_dir_all(&path).with_context(|| format!("{}", path.display()))?;
    Ok(path)
}
