//! What a node can be: a Debian and the parts that belong to it.

use clap::ValueEnum;

use crate::image::Debian;
use crate::parts::Part;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Suite {
    /// Debian 13: containerd 1.7
    Trixie,
    /// Debian unstable: containerd 2.x
    Sid,
    /// Debian unstable with upstream's newest containerd, and all that a Kubernetes node runs
    K8s,
}

impl Suite {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Suite::Trixie => "trixie",
            Suite::Sid => "sid",
            Suite::K8s => "k8s",
        }
    }

    pub(crate) fn debian(self) -> Debian {
        match self {
            Suite::Trixie => Debian::Trixie,
            Suite::Sid | Suite::K8s => Debian::Sid,
        }
    }

    /// The parts that every node of the suite has.
    pub(crate) fn parts(self) -> &'static [Part] {
        match self {
            Suite::Trixie | Suite::Sid => &[],
            Suite::K8s => &[
                Part::Containerd,
                Part::Kubernetes,
                Part::Etcd,
                Part::CriTools,
            ],
        }
    }

    /// The node's memory unless it was chosen. A control plane and a kubelet take 3 GiB before the first pod.
    pub(crate) fn memory_mib(self) -> u32 {
        match self {
            Suite::Trixie | Suite::Sid => 8192,
            Suite::K8s => 12288,
        }
    }
}
