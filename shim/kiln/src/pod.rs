//! Pods that shims run on this machine, by what their shims tell of them.

use std::fs;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kiln_vmm_control::OverlayFigures;
use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::output::{Output, size, table};

/// Their directories: NAMESPACE/POD.
const PODS: &str = "/run/kiln/pods";
/// So much of an id is enough.
const SHORTEST: usize = 4;
/// A shim answers at once or never.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a shim says; see `shim/src/uvm/inspect.rs`.
#[derive(Debug, Serialize, Deserialize)]
struct Said {
    pod: String,
    uvm: String,
    vmm_pid: u32,
    cpus: u32,
    memory: u64,
    paused: bool,
    overlay: Option<OverlayFigures>,
}

/// The directory of the pod with this id, or the first digits of it.
pub(crate) fn find(name: &str) -> Result<Option<PathBuf>> {
    find_in(Path::new(PODS), name)
}

fn find_in(root: &Path, name: &str) -> Result<Option<PathBuf>> {
    let list = |dir: &Path| -> Result<Vec<PathBuf>> {
        let entries = match fs::read_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.with_context(|| format!("reading {}", dir.display()))?,
        };
        Ok(entries.flatten().map(|entry| entry.path()).collect())
    };
    let mut found = Vec::new();
    for namespace in list(root)? {
        for pod in list(&namespace)? {
            let id = pod.file_name().unwrap_or_default().to_string_lossy();
            if *id == *name {
                return Ok(Some(pod));
            }
            if name.len() >= SHORTEST && id.starts_with(name) {
                found.push(pod);
            }
        }
    }
    if found.len() > 1 {
        bail!(
            "{} pods begin with {name}: give more of the id",
            found.len()
        );
    }
    Ok(found.pop())
}

fn ask(dir: &Path) -> Result<Said> {
    let path = dir.join("inspect.sock");
    let asked = || -> io::Result<String> {
        let mut stream = UnixStream::connect(&path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    };
    let text = asked().with_context(|| format!("asking the pod's shim by {}", path.display()))?;
    serde_json::from_str(&text).context("the pod's shim did not answer: its μVM has ended")
}

/// `kiln inspect POD`.
pub(crate) fn inspect(dir: &Path, output: &Output) -> Result<ExitCode, Failure> {
    let said = ask(dir)?;
    if output.is_json() {
        output.json(&said)?;
    } else {
        output.text(&table(&rows(&said)))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn rows(said: &Said) -> Vec<Vec<String>> {
    let mut rows = vec![
        ("pod", said.pod.clone()),
        ("μVM", said.uvm.clone()),
        ("VMM", format!("process {}", said.vmm_pid)),
        ("vCPUs", said.cpus.to_string()),
        ("memory", size(said.memory)),
        ("paused", if said.paused { "yes" } else { "no" }.to_owned()),
    ];
    if let Some(overlay) = &said.overlay {
        rows.extend([
            (
                "overlay in RAM",
                format!("{} of {}", size(overlay.ram), size(overlay.ram_limit)),
            ),
            (
                "overlay on disk",
                format!("{} of {}", size(overlay.spill), size(overlay.spill_limit)),
            ),
            ("written", size(overlay.written)),
            ("read", hits(overlay)),
            (
                "moved",
                format!(
                    "{} to the disk, {} chunks back",
                    size(overlay.spilled),
                    overlay.returned_chunks
                ),
            ),
            (
                "writes that waited",
                format!(
                    "{}, {} ms in all",
                    overlay.stalls,
                    overlay.stall_ns / 1_000_000
                ),
            ),
            ("disk errors", overlay.spill_errors.to_string()),
        ]);
    }
    rows.into_iter()
        .map(|(name, value)| vec![name.to_owned(), value])
        .collect()
}

/// Where reads found what they read.
fn hits(overlay: &OverlayFigures) -> String {
    let parts = [
        ("RAM", overlay.read_ram),
        ("disk", overlay.read_spill),
        ("below", overlay.read_base),
    ];
    let all: u64 = parts.iter().map(|(_, bytes)| bytes).sum();
    if all == 0 {
        return "nothing yet".to_owned();
    }
    let shares: Vec<String> = parts
        .iter()
        .map(|(name, bytes)| format!("{} % {name}", (bytes * 100 + all / 2) / all))
        .collect();
    format!("{}: {}", size(all), shares.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_found_by_id_or_its_beginning() {
        let root = tempfile::tempdir().unwrap();
        for id in ["abcdef", "abcd99", "xyz"] {
            fs::create_dir_all(root.path().join("k8s.io").join(id)).unwrap();
        }
        let find = |name| find_in(root.path(), name);
        let id = |name| {
            let found = find(name).unwrap()?;
            Some(found.file_name()?.to_string_lossy().into_owned())
        };
        assert_eq!(id("abcde").as_deref(), Some("abcdef"));
        assert_eq!(id("xyz").as_deref(), Some("xyz"));
        assert_eq!(id("xy"), None);
        assert!(find("abcd").is_err());
        assert!(
            find_in(&root.path().join("none"), "abcd")
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn hits_add_up() {
        let overlay = OverlayFigures {
            read_ram: 3 << 20,
            read_spill: 1 << 20,
            ..OverlayFigures::default()
        };
        let text = hits(&overlay);
        assert!(text.contains("75 % RAM, 25 % disk, 0 % below"), "{text}");
    }
}
