//! The node as the kernel and the file system show it: what a runtime may leave behind.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

const CGROUPS: &str = "/sys/fs/cgroup";
/// Where containerd, its shims and the CNI plug-ins keep things by a container's id.
const STATE: &[&str] = &[
    "/run/containerd/io.containerd.runtime.v2.task",
    "/run/containerd/io.containerd.grpc.v1.cri",
    "/run/containerd/runc",
    "/run/containerd/fifo",
    "/run/kiln",
    "/var/lib/containerd/io.containerd.runtime.v2.task",
    "/var/lib/containerd/io.containerd.grpc.v1.cri",
];
/// One for all pods; it stays.
pub const OVERLAY_BUDGET: &str = "/run/kiln/overlay-budget-2";
/// cgroup parent of the tests' pods, as kubelet has `kubepods`. It stays.
pub(crate) const TESTS_CGROUP: &str = "/kiln-e2e";
const CNI: &str = "/var/lib/cni/networks";

/// A process of the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Its arguments, separated by spaces.
    pub command: String,
}

/// All processes with a command line (kernel threads have none).
pub fn processes() -> Result<Vec<Process>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("cannot list /proc")? {
        let Ok(entry) = entry else { continue };
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        // A process that ends meanwhile is no process.
        let Ok(line) = fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        if line.is_empty() {
            continue;
        }
        let command = String::from_utf8_lossy(&line)
            .trim_end_matches('\0')
            .replace('\0', " ")
            .to_owned();
        found.push(Process { pid, command });
    }
    Ok(found)
}

/// Everything on the node whose name has one of these ids in it, in words.
pub fn traces(ids: &[String]) -> Result<Vec<String>> {
    let named = |text: &str| ids.iter().any(|id| text.contains(id.as_str()));
    let mut found = Vec::new();
    for process in processes()? {
        if named(&process.command) {
            found.push(format!("process {}: {}", process.pid, process.command));
        }
    }
    for mount in mounts()? {
        if named(&mount) {
            found.push(format!("mount {mount}"));
        }
    }
    for cgroup in cgroups() {
        if named(&cgroup) {
            found.push(format!("cgroup {cgroup}"));
        }
    }
    for root in STATE {
        for path in tree(Path::new(root), 3) {
            if path
                .file_name()
                .and_then(|name| name.to_str())
                .is_some_and(named)
            {
                found.push(format!("file {}", path.display()));
            }
        }
    }
    for path in tree(Path::new(CNI), 2) {
        if fs::read_to_string(&path).is_ok_and(|owner| named(&owner)) {
            found.push(format!("address {}", path.display()));
        }
    }
    Ok(found)
}

/// Mount points with their type and source.
pub fn mounts() -> Result<Vec<String>> {
    let text = fs::read_to_string("/proc/self/mounts").context("cannot read the mount table")?;
    Ok(text
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (source, target, kind) = (words.next()?, words.next()?, words.next()?);
            Some(format!("{target} ({kind} of {source})"))
        })
        .collect())
}

/// Paths of all cgroups.
pub fn cgroups() -> Vec<String> {
    let mut found: Vec<String> = directories(Path::new(CGROUPS), 12)
        .into_iter()
        .map(|path| path.display().to_string())
        .collect();
    found.sort();
    found
}

/// The cgroup that all tests' pods are in, made if it is not there.
pub fn tests_cgroup() -> Result<PathBuf> {
    let path = Path::new(CGROUPS).join(TESTS_CGROUP.trim_start_matches('/'));
    fs::create_dir_all(&path).with_context(|| format!("making cgroup {}", path.display()))?;
    Ok(path)
}

/// Removes a cgroup and those below it, which works only if no process is in any of them.
pub fn remove_cgroup(path: &str) -> io::Result<()> {
    for root in cgroup_roots() {
        let top = root.join(path.trim_start_matches('/'));
        let mut all = directories(&top, 12);
        all.push(top);
        // Deepest first.
        all.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
        for path in all {
            match fs::remove_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}

/// The cgroup file system, or each hierarchy of it on a node with cgroup v1.
fn cgroup_roots() -> Vec<PathBuf> {
    let root = PathBuf::from(CGROUPS);
    if root.join("cgroup.controllers").exists() {
        return vec![root];
    }
    let hierarchies = fs::read_dir(&root).into_iter().flatten().flatten();
    hierarchies
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect()
}

/// Whether the node has one cgroup hierarchy (v2), as Kubernetes now demands.
pub fn has_cgroup_v2() -> bool {
    Path::new(CGROUPS).join("cgroup.controllers").exists()
}

fn directories(root: &Path, depth: usize) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(root) else {
        return found;
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if depth > 1 {
                found.append(&mut directories(&entry.path(), depth - 1));
            }
            found.push(entry.path());
        }
    }
    found
}

fn tree(root: &Path, depth: usize) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(root) else {
        return found;
    };
    for entry in entries.flatten() {
        if depth > 1 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.append(&mut tree(&entry.path(), depth - 1));
        }
        found.push(entry.path());
    }
    found
}

/// How much of everything there is, to compare before and after.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Census(BTreeMap<&'static str, Vec<String>>);

impl Census {
    /// Counts now.
    pub fn take() -> Result<Self> {
        let names = |path: &str| -> Vec<String> {
            let entries = fs::read_dir(path).into_iter().flatten().flatten();
            entries
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .collect()
        };
        let mut census = BTreeMap::from([
            ("mounts", mounts()?),
            (
                "cgroups",
                cgroups()
                    .into_iter()
                    .filter(|path| !path.ends_with(TESTS_CGROUP))
                    .collect(),
            ),
            ("network namespaces", names("/run/netns")),
            ("network interfaces", names("/sys/class/net")),
            (
                "processes",
                processes()?
                    .into_iter()
                    .map(|process| process.command)
                    .collect(),
            ),
            ("shim sockets", names("/run/containerd/s")),
            (
                "snapshots",
                names("/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots"),
            ),
        ]);
        for root in STATE {
            let paths = tree(Path::new(root), 2)
                .into_iter()
                .filter(|path| path != Path::new(OVERLAY_BUDGET));
            census.insert(root, paths.map(|path| path.display().to_string()).collect());
        }
        for list in census.values_mut() {
            list.sort();
        }
        Ok(Census(census))
    }

    /// What is here and was not there before.
    pub fn more_than(&self, before: &Census) -> Vec<String> {
        let mut found = Vec::new();
        for (kind, list) in &self.0 {
            let mut old = before.0.get(kind).cloned().unwrap_or_default();
            for item in list {
                match old.iter().position(|known| known == item) {
                    Some(index) => drop(old.swap_remove(index)),
                    None => found.push(format!("{kind}: {item}")),
                }
            }
        }
        found
    }
}

/// A path as an argument.
pub fn text(path: &Path) -> String {
    path.display().to_string()
}

/// Runs one of busybox's programs on the node; its output.
pub fn busybox(command: &[&str]) -> Result<String> {
    let output = Command::new("busybox").args(command).output();
    let output = output.context("busybox is not on the PATH")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {errors}");
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// A loop device of the node, as long as this lives.
#[derive(Debug)]
pub struct LoopDevice(String);

impl LoopDevice {
    /// Makes a file of that size and the device on it.
    pub fn over(file: &Path, bytes: u64) -> Result<Self> {
        fs::File::create(file)?.set_len(bytes)?;
        // One that takes the device between the two calls makes the second fail: then anew.
        for _ in 0..8 {
            let device = busybox(&["losetup", "-f"])?;
            if busybox(&["losetup", &device, &text(file)]).is_ok() {
                return Ok(LoopDevice(device));
            }
        }
        anyhow::bail!("no free loop device")
    }

    /// Where it is.
    pub fn path(&self) -> &str {
        &self.0
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // A failure shows in what is left on the node.
        let _ = busybox(&["losetup", "-d", &self.0]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_a_trace_of_a_word_in_its_arguments() {
        let word = format!("kiln-trace-{}", std::process::id());
        let mut child = Command::new("sh")
            // Without a child of its own, which would have the same arguments for a moment.
            .args(["-c", "read line", &word])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // A process that has just replaced its program has no arguments to read for a moment.
        let limit = std::time::Instant::now() + std::time::Duration::from_secs(30);
        let mut found = Vec::new();
        while found.is_empty() && std::time::Instant::now() < limit {
            found = traces(std::slice::from_ref(&word)).unwrap();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with("process "), "{found:?}");
    }

    #[test]
    fn a_census_shows_what_was_added_and_counts_what_has_the_same_name() {
        let census = |list: &[&str]| {
            let list = list.iter().map(ToString::to_string).collect();
            Census(BTreeMap::from([("processes", list)]))
        };
        let before = census(&["sh", "sh"]);
        assert_eq!(
            census(&["sh", "sh", "sh"]).more_than(&before),
            ["processes: sh"]
        );
        assert_eq!(census(&["sh"]).more_than(&before), Vec::<String>::new());
    }
}
