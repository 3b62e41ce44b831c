//! The pod's cgroup on the host: shim and VMM live in it, so that what the pod costs is charged to
//! the pod from the first page on.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

const ROOT: &str = "/sys/fs/cgroup";

/// Where the OCI spec's `cgroupsPath` lies on a node with cgroup v2; `None` on another node, and
/// for a path that leads out of the tree.
pub fn directory(cgroups_path: &str) -> Option<PathBuf> {
    if !Path::new(ROOT).join("cgroup.controllers").exists() {
        return None;
    }
    relative(cgroups_path).map(|path| Path::new(ROOT).join(path))
}

/// systemd's form is `slice:prefix:name`; a slice's name spells its parents with dashes.
fn relative(cgroups_path: &str) -> Option<PathBuf> {
    let mut parts = cgroups_path.split(':');
    let path = match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(slice), Some(prefix), Some(name), None) => {
            let slice = if slice.is_empty() {
                "system.slice"
            } else {
                slice
            };
            let stem = slice.strip_suffix(".slice")?;
            let mut path = PathBuf::new();
            let mut at = 0;
            while let Some(dash) = stem.get(at..).and_then(|s| s.find('-')) {
                path.push(format!("{}.slice", &stem[..at + dash]));
                at += dash + 1;
            }
            path.push(slice);
            let unit = if prefix.is_empty() {
                name.into()
            } else {
                format!("{prefix}-{name}")
            };
            path.push(format!("{unit}.scope"));
            path
        }
        (Some(path), None, None, None) => PathBuf::from(path.trim_start_matches('/')),
        _ => return None,
    };
    let inside = path.components().all(|c| matches!(c, Component::Normal(_)));
    (inside && !path.as_os_str().is_empty()).then_some(path)
}

/// Whether the pod has a limit, by a file such as `memory.max` of the cgroup above the sandbox's. The kubelet sets it if each
/// container of the pod has one.
pub fn pod_has_limit(cgroups_path: &str, file: &str) -> bool {
    let above = directory(cgroups_path).and_then(|own| Some(own.parent()?.join(file)));
    let text = above.and_then(|path| fs::read_to_string(path).ok());
    text.is_some_and(|text| !text.starts_with("max"))
}

/// Makes the cgroup and moves a process into it.
pub fn enter(directory: &Path, pid: u32) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    hand_down(directory);
    fs::write(directory.join("cgroup.procs"), pid.to_string())
}

/// Has the ancestors account for the cgroup's memory, CPU time, I/O and processes. Whoever manages the
/// node (kubelet, systemd) has usually done so; an ancestor that refuses keeps its figures to itself.
fn hand_down(directory: &Path) {
    let mut ancestors: Vec<_> = directory
        .ancestors()
        .skip(1)
        .take_while(|d| d.starts_with(ROOT))
        .collect();
    ancestors.reverse();
    for ancestor in ancestors {
        let control = ancestor.join("cgroup.subtree_control");
        let active = fs::read_to_string(&control).unwrap_or_default();
        for controller in ["cpu", "memory", "io", "pids"] {
            if !active.split_whitespace().any(|c| c == controller) {
                // One at a time: a controller that isn't there must not cost the others.
                let _ = fs::write(&control, format!("+{controller}"));
            }
        }
    }
}

/// How long the kernel may take to take a killed process, or its VM's own threads, out of a cgroup.
const BUSY_WAIT: Duration = Duration::from_secs(2);

/// Removes the cgroup. Whoever removes the one it is in itself leaves it first.
pub fn remove(directory: &Path) -> io::Result<()> {
    let own = fs::read_to_string("/proc/self/cgroup")?;
    let inside = own
        .lines()
        .filter_map(|line| line.strip_prefix("0::"))
        .any(|path| Path::new(ROOT).join(path.trim_start_matches('/')) == directory);
    if inside && let Some(parent) = nearest_usable(directory) {
        fs::write(parent.join("cgroup.procs"), std::process::id().to_string())?;
    }
    let begun = Instant::now();
    loop {
        match fs::remove_dir(directory) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy && begun.elapsed() < BUSY_WAIT => {
                std::thread::sleep(Duration::from_millis(5));
            }
            other => return other,
        }
    }
}

/// The closest ancestor that may hold processes: one that hands no controllers down, or the root.
fn nearest_usable(directory: &Path) -> Option<PathBuf> {
    directory
        .ancestors()
        .skip(1)
        .take_while(|d| d.starts_with(ROOT))
        .find(|d| {
            *d == Path::new(ROOT)
                || fs::read_to_string(d.join("cgroup.subtree_control"))
                    .is_ok_and(|text| text.trim().is_empty())
        })
        .map(Path::to_owned)
}

/// Processes of a cgroup that the kernel killed because memory ran out, from a moment on.
#[derive(Debug)]
pub struct OomKills {
    events: PathBuf,
    before: Option<u64>,
}

impl OomKills {
    /// Counts from now on what happens in the cgroup and below it.
    pub fn since_now(directory: &Path) -> Self {
        let events = directory.join("memory.events");
        let before = oom_kills(&events);
        Self { events, before }
    }

    /// Whether there were any. Not, if the cgroup doesn't tell.
    pub fn any(&self) -> bool {
        matches!((self.before, oom_kills(&self.events)), (Some(before), Some(now)) if now > before)
    }
}

fn oom_kills(events: &Path) -> Option<u64> {
    let text = fs::read_to_string(events).ok()?;
    let count = text
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill "))?;
    count.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oom_kills_are_those_since_the_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let tell = |kills: u32| {
            let text = format!("low 0\nhigh 0\nmax 9\noom 5\noom_kill {kills}\noom_group_kill 7\n");
            fs::write(dir.path().join("memory.events"), text).unwrap();
        };
        let untold = OomKills::since_now(dir.path());
        tell(2);
        let kills = OomKills::since_now(dir.path());
        assert!(!kills.any());
        tell(3);
        assert!(kills.any());
        assert!(!untold.any(), "it is not known how many there were before");
        fs::remove_file(dir.path().join("memory.events")).unwrap();
        assert!(!kills.any());
    }

    #[test]
    fn cgroupfs_paths_are_taken_as_they_are() {
        assert_eq!(
            relative("/kubepods/pod1/abc"),
            Some("kubepods/pod1/abc".into())
        );
        assert_eq!(relative("/default/x"), Some("default/x".into()));
    }

    #[test]
    fn systemd_paths_spell_out_their_slices() {
        assert_eq!(
            relative("kubepods-besteffort-pod1.slice:cri-containerd:abc"),
            Some(
                "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/\
                 cri-containerd-abc.scope"
                    .into()
            )
        );
        assert_eq!(relative(":x:y"), Some("system.slice/x-y.scope".into()));
    }

    #[test]
    fn paths_that_lead_out_are_refused() {
        for path in ["", "/", "/../etc", "a/../../b", "a:b", "x:y:z"] {
            assert_eq!(relative(path), None, "{path}");
        }
    }
}
