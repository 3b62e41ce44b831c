//! What is kept of a test that failed, so that the failure can be understood without running it
//! again: logs of containerd and the kernel from the time of the test, state of its pods and
//! containers, and the node's processes, mounts and cgroups.

use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use k8s_cri::v1 as api;

use crate::{Test, node, plain};

/// Not more than this of any log.
const LOG_LIMIT: u64 = 8 << 20;
/// Shorter than this, files of a bundle are taken whole.
const FILE_LIMIT: u64 = 1 << 20;

/// Where evidence goes: `KILN_E2E_OUT` or `/var/log/kiln-e2e`.
pub fn folder() -> PathBuf {
    std::env::var_os("KILN_E2E_OUT").map_or_else(|| "/var/log/kiln-e2e".into(), PathBuf::from)
}

fn containerd_log() -> PathBuf {
    std::env::var_os("KILN_CONTAINERD_LOG")
        .map_or_else(|| "/var/log/containerd.log".into(), PathBuf::from)
}

/// Where the logs stood when the test began.
#[derive(Debug, Clone)]
pub struct Marks {
    containerd: u64,
    kernel: usize,
}

impl Marks {
    /// Now.
    pub fn set() -> Self {
        Marks {
            containerd: fs::metadata(containerd_log()).map_or(0, |meta| meta.len()),
            kernel: kernel_log().len(),
        }
    }
}

/// Writes all that can be had into the folder of `test`; what cannot be had is noted there.
pub async fn keep(test: &Test, marks: &Marks, failure: &str) -> Result<PathBuf> {
    let mut kept = Kept::of_node(&test.to_string(), marks, failure)?;
    kept.put("cri.txt", cri_state(test).await)?;
    kept.put("plain.txt", plain::describe(test.client()).await)?;
    kept.copy(&test.scratch().join("logs"), "container-logs")?;
    Ok(kept.folder)
}

/// What is kept of one test.
#[derive(Debug)]
pub struct Kept {
    folder: PathBuf,
}

impl Kept {
    /// What the node itself has to say.
    pub fn of_node(test: &str, marks: &Marks, failure: &str) -> Result<Self> {
        let folder = folder().join(test.replace("::", "."));
        if folder.exists() {
            fs::remove_dir_all(&folder).with_context(|| format!("{}", folder.display()))?;
        }
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        let mut kept = Kept { folder };
        kept.put("failure.txt", Ok(failure.to_owned()))?;
        kept.put("containerd.log", tail(&containerd_log(), marks.containerd))?;
        // The kernel's buffer is a ring: if it has turned over, all of it is newer than the mark.
        let kernel = kernel_log();
        let since = kernel.get(marks.kernel..).unwrap_or(&kernel);
        kept.put("kernel.log", Ok(since.to_owned()))?;
        kept.put("node.txt", node_state())?;
        for root in [
            "/run/containerd/io.containerd.runtime.v2.task",
            "/run/kiln",
            "/var/log/kiln",
        ] {
            kept.copy(Path::new(root), root.trim_start_matches('/'))?;
        }
        Ok(kept)
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Writes a file, or why its content could not be had.
    pub fn put(&mut self, name: &str, content: Result<String>) -> Result<()> {
        let content = content.unwrap_or_else(|error| format!("could not be had: {error:#}\n"));
        let path = self.folder.join(name);
        fs::write(&path, content).with_context(|| format!("{}", path.display()))
    }

    /// Copies the regular files of a tree, without root file systems and without what is long.
    pub fn copy(&mut self, from: &Path, to: &str) -> Result<()> {
        copy_tree(from, &self.folder.join(to), 5)
    }
}

fn copy_tree(from: &Path, to: &Path, depth: usize) -> Result<()> {
    let Ok(entries) = fs::read_dir(from) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let Ok(meta) = fs::symlink_metadata(&source) else {
            continue;
        };
        if meta.is_dir() {
            if entry.file_name() != "rootfs" && depth > 1 {
                copy_tree(&source, &target, depth - 1)?;
            }
        } else if meta.is_file() && meta.len() <= FILE_LIMIT {
            fs::create_dir_all(to).with_context(|| format!("{}", to.display()))?;
            // A file may go away meanwhile.
            let _ = fs::copy(&source, &target);
        }
    }
    Ok(())
}

/// A file from `offset` on, at most the last [`LOG_LIMIT`] bytes.
fn tail(path: &Path, offset: u64) -> Result<String> {
    let mut file = fs::File::open(path).with_context(|| {
        format!(
            "{}: name containerd's log in KILN_CONTAINERD_LOG",
            path.display()
        )
    })?;
    let length = file.metadata()?.len();
    let start = if offset > length { 0 } else { offset };
    file.seek(SeekFrom::Start(start.max(length.saturating_sub(LOG_LIMIT))))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The kernel's message buffer.
fn kernel_log() -> String {
    const READ_ALL: libc::c_int = 3;
    let mut buffer = vec![0u8; 1 << 20];
    let length = libc::c_int::try_from(buffer.len()).unwrap_or(libc::c_int::MAX);
    // SAFETY: the pointer and the length describe a live buffer, to which klogctl writes bytes.
    let got = unsafe { libc::klogctl(READ_ALL, buffer.as_mut_ptr().cast(), length) };
    buffer.truncate(usize::try_from(got).unwrap_or(0));
    String::from_utf8_lossy(&buffer).into_owned()
}

async fn cri_state(test: &Test) -> Result<String> {
    let mut text = String::new();
    for pod_sandbox_id in test.sandboxes().await? {
        let request = api::PodSandboxStatusRequest {
            pod_sandbox_id,
            verbose: true,
        };
        let status = test.cri().pod_sandbox_status(request).await?;
        writeln!(text, "{status:#?}")?;
    }
    for container_id in test.containers().await? {
        let request = api::ContainerStatusRequest {
            container_id,
            verbose: true,
        };
        let status = test.cri().container_status(request).await?;
        writeln!(text, "{status:#?}")?;
    }
    Ok(text)
}

fn node_state() -> Result<String> {
    let mut text = String::new();
    writeln!(
        text,
        "== memory\n{}",
        fs::read_to_string("/proc/meminfo").unwrap_or_default()
    )?;
    writeln!(
        text,
        "== load\n{}",
        fs::read_to_string("/proc/loadavg").unwrap_or_default()
    )?;
    writeln!(text, "== processes")?;
    for process in node::processes()? {
        let status = fs::read_to_string(format!("/proc/{}/status", process.pid));
        let status = status.unwrap_or_default();
        let of = |name: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .unwrap_or("")
                .trim()
                .to_owned()
        };
        let stack = fs::read_to_string(format!("/proc/{}/wchan", process.pid));
        writeln!(
            text,
            "{:>6} of {:>6} {:12} {:>10} {:20} {}",
            process.pid,
            of("PPid:"),
            of("State:"),
            of("VmRSS:"),
            stack.unwrap_or_default(),
            process.command
        )?;
    }
    writeln!(text, "== mounts\n{}", node::mounts()?.join("\n"))?;
    writeln!(text, "== cgroups\n{}", node::cgroups().join("\n"))?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_kept_from_the_mark_on_or_whole_if_it_was_truncated() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        fs::write(&path, "before after").unwrap();
        assert_eq!(tail(&path, 7).unwrap(), "after");
        assert_eq!(tail(&path, 700).unwrap(), "before after");
        assert!(tail(&folder.path().join("none"), 0).is_err());
    }

    #[test]
    fn a_tree_is_copied_without_root_file_systems_and_pipes() {
        let folder = tempfile::tempdir().unwrap();
        let from = folder.path().join("from");
        fs::create_dir_all(from.join("id/rootfs/bin")).unwrap();
        fs::write(from.join("id/config.json"), "{}").unwrap();
        fs::write(from.join("id/rootfs/bin/sh"), "x").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", from.join("id/link")).unwrap();
        let to = folder.path().join("to");
        copy_tree(&from, &to, 5).unwrap();
        assert_eq!(fs::read_to_string(to.join("id/config.json")).unwrap(), "{}");
        assert!(!to.join("id/rootfs").exists());
        assert!(!to.join("id/link").exists());
    }
}
