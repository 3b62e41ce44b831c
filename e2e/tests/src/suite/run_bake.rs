//! `kiln bake`: what comes out, and what is left when it is interrupted.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kiln_e2e::harness::Case;
use kiln_e2e::{Test, cases};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr, Command};

use super::same;

pub(crate) fn cases() -> Vec<Case> {
    let all = cases![
        baked_guest_is_small_and_says_what_it_uses,
        interrupted_bake_cleans_up_and_says_so,
    ];
    let named = |case: Case| case.only_with("kiln", "run");
    all.into_iter().map(named).collect()
}

/// A store of the test's own.
struct Store(PathBuf);

impl Store {
    fn new(test: &Test) -> Self {
        Store(test.scratch().join("store"))
    }

    fn kiln(&self, arguments: &[&str]) -> Command {
        let mut kiln = Command::new("kiln");
        kiln.arg("--store").arg(&self.0).args(arguments);
        kiln.stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        kiln
    }

    /// Has to succeed.
    async fn done(&self, arguments: &[&str]) -> Result<Output> {
        let output = self.kiln(arguments).output().await?;
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success(), "{arguments:?}: {text}{errors}");
        Ok(output)
    }

    /// A bake, and the lines that it tells its progress by.
    fn bake(&self) -> Result<(Child, Lines<BufReader<ChildStderr>>)> {
        let mut bake = self.kiln(&["bake", "--again"]).spawn()?;
        let stderr = bake.stderr.take().context("no progress")?;
        Ok((bake, BufReader::new(stderr).lines()))
    }
}

/// The size on disk that a settled μVM of the default class may have with Debian's cloud kernel.
const MOST: u64 = 64 << 20;

/// Bakes; what that takes on the disk.
async fn bake_and_measure(store: &Store) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;

    let output = store.done(&["bake", "--again"]).await?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(told.contains("in use"), "{told}");
    let output = store.done(&["--json", "inspect"]).await?;
    let uvm: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let about = &uvm;
    ensure!(
        about["kernel"]["release"].to_string().contains("cloud"),
        "{about}"
    );
    same!(about["class"]["memory_mib"], 256);
    let used = about["guest_used_kib"].as_u64().context("no use")?;
    let objects = uvm["objects"].as_array().context("no objects")?;
    let memory = objects
        .iter()
        .find(|object| object["kind"] == "memory")
        .context("no memory")?;
    let digest = memory["digest"].as_str().context("no digest")?;
    let path = store.0.join("objects").join(&digest[..2]).join(digest);
    let file = std::fs::metadata(&path).with_context(|| format!("{}", path.display()))?;
    same!(file.len(), memory["length"].as_u64().unwrap_or(0));
    let on_disk = file.blocks() * 512;
    println!(
        "memory file {:.1} MiB on disk, {:.1} MiB in use in the guest",
        on_disk as f64 / f64::from(1 << 20),
        used as f64 / 1024.0
    );
    ensure!(used > 0 && used << 10 < on_disk, "{used} KiB in use");
    Ok(on_disk)
}

async fn baked_guest_is_small_and_says_what_it_uses(test: Test) -> Result<()> {
    let store = Store::new(&test);
    let on_disk = bake_and_measure(&store).await?;
    ensure!(on_disk <= MOST, "{on_disk} bytes on disk");
    // The same inputs again: nothing to do.
    let output = store.done(&["bake"]).await?;
    ensure!(
        String::from_utf8_lossy(&output.stdout).contains("nothing to do"),
        "{output:?}"
    );
    Ok(())
}

fn nothing_in(dir: &Path) -> Result<()> {
    let left: Vec<_> = std::fs::read_dir(dir)?.collect();
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

async fn interrupted_bake_cleans_up_and_says_so(test: Test) -> Result<()> {
    let store = Store::new(&test);
    let (mut bake, mut lines) = store.bake()?;
    let mut told = String::new();
    while let Some(line) = lines.next_line().await? {
        told = line;
        if told.starts_with("boot") {
            tokio::time::sleep(Duration::from_secs(1)).await;
            super::kiln_run::send(&bake, libc::SIGINT)?;
        }
    }
    same!(bake.wait().await?.code(), Some(1), "{told}");
    ensure!(told.contains("nothing was baked"), "{told}");
    nothing_in(&store.0.join("tmp"))?;
    nothing_in(&store.0.join("objects"))
}
