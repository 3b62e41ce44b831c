//! How likely the kernel is to choose a pod's VMM when memory runs out.
//!
//! The VMM is all of the pod's memory, so its score is the pod's. Without one of its own it has the
//! shim's, which is containerd's and next to never chosen. The sandbox's spec is no help: it is the
//! pause program's, which CRI protects like containerd itself.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;

/// What the kubelet gives a container by its pod's class (`pkg/kubelet/qos`). A burstable one's depends on
/// its request, from 3 to this.
const BEST_EFFORT: i32 = 1000;
const BURSTABLE: i32 = 999;
const GUARANTEED: i32 = -997;
/// No pod is safer than containerd's shims, which are one above containerd's -999.
const LOWEST: i32 = -998;
const HIGHEST: i32 = 1000;

/// The score of a pod with nothing in it yet, by the class that the kubelet's cgroups spell; of another pod, `otherwise`.
pub fn of_pod(cgroups_path: Option<&str>, otherwise: i32) -> i32 {
    let parts: Vec<_> = cgroups_path
        .unwrap_or_default()
        .split(['/', ':', '-', '.'])
        .filter(|part| *part != "slice")
        .collect();
    let follows = |class| parts.windows(2).any(|pair| pair == ["kubepods", class]);
    let score = if follows("besteffort") {
        BEST_EFFORT
    } else if follows("burstable") {
        BURSTABLE
    } else if parts.contains(&"kubepods") {
        GUARANTEED
    } else {
        otherwise
    };
    score.clamp(LOWEST, HIGHEST)
}

/// The score of a pod by those of its live containers; with none that states one, `of_pod`.
///
/// It is the lowest. The kubelet takes a thousandth off for each thousandth of the node's memory that a
/// container requests. The pod as a whole requests the sum, so by the same formula its score would be lower
/// than any container's, and the lowest of them never protects it more than that.
pub fn of_containers(of_pod: i32, containers: impl IntoIterator<Item = Option<i32>>) -> i32 {
    let lowest = containers.into_iter().flatten().min();
    lowest.unwrap_or(of_pod).clamp(LOWEST, HIGHEST)
}

/// A process whose score can be set.
#[derive(Debug)]
pub struct Scored {
    /// Its directory in `/proc`, which is never another process's, as its number may be one day.
    process: File,
}

impl Scored {
    /// A child of ours that was not waited for yet.
    pub fn new(pid: u32) -> io::Result<Self> {
        let process = File::open(format!("/proc/{pid}"))?;
        Ok(Self { process })
    }

    /// Sets the score. False if the process has ended, and needs none.
    pub fn set(&self, score: i32) -> io::Result<bool> {
        let directory = self.process.as_raw_fd();
        let path = format!("/proc/self/fd/{directory}/oom_score_adj");
        match fs::write(path, score.to_string()) {
            Ok(()) => Ok(true),
            Err(e) if matches!(e.raw_os_error(), Some(libc::ESRCH | libc::ENOENT)) => Ok(false),
            Err(e) => Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn class_is_read_off_the_cgroup_whoever_manages_it() {
        let slice = "kubepods-besteffort-pod1.slice";
        for (path, score) in [
            ("/kubepods/besteffort/pod1/sb", 1000),
            ("/kubepods/burstable/pod1/sb", 999),
            ("/kubepods/pod1/sb", -997),
            ("kubepods-besteffort-pod1.slice:cri-containerd:sb", 1000),
            ("kubepods-burstable-pod1.slice:cri-containerd:sb", 999),
            ("kubepods-pod1.slice:cri-containerd:sb", -997),
            ("kubepods-pod1.slice:cri-containerd:besteffort", -997),
            (
                &format!("/kubepods.slice/kubepods-besteffort.slice/{slice}/sb"),
                1000,
            ),
            (
                "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/x/sb",
                999,
            ),
        ] {
            assert_eq!(of_pod(Some(path), 7), score, "{path}");
        }
        for path in [None, Some("/default/c"), Some("besteffort.slice:x:kube")] {
            assert_eq!(of_pod(path, 7), 7, "{path:?}");
        }
        assert_eq!(of_pod(None, -1000), LOWEST);
    }

    #[test]
    fn containers_bring_their_own_and_the_lowest_counts() {
        assert_eq!(of_containers(999, [None, Some(990), Some(700)]), 700);
        assert_eq!(of_containers(999, [None]), 999);
        assert_eq!(of_containers(999, []), 999);
        assert_eq!(of_containers(0, [Some(-1000)]), LOWEST);
        assert_eq!(of_containers(0, [Some(i32::MAX)]), HIGHEST);
    }

    #[test]
    fn score_is_the_processs_and_never_its_successors() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let scored = Scored::new(child.id()).unwrap();
        assert!(scored.set(777).unwrap());
        let path = format!("/proc/{}/oom_score_adj", child.id());
        assert_eq!(fs::read_to_string(path).unwrap().trim(), "777");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!scored.set(778).unwrap());
    }
}
