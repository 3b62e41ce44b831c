//! Parts: programs that no Debian package has, each a read-only disk of the node, cached by a hash of its recipe.

mod go;
mod suite_images;

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::{cache, cleanup};
use go::{GoModule, Program};
use suite_images::SuiteImages;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// containerd, ctr and runc's shim
    Containerd,
    /// an older containerd, as containerd-1.7
    #[value(name = "containerd-1.7")]
    Containerd17,
    /// an older containerd, as containerd-2.1
    #[value(name = "containerd-2.1")]
    Containerd21,
    /// crictl and critest
    CriTools,
    /// etcd
    Etcd,
    /// runsc and its shim
    Gvisor,
    /// the last kubelet but one that knows containerd 1.7, as kubelet-1.35
    #[value(name = "kubelet-1.35")]
    Kubelet135,
    /// kubelet, kubectl and the control plane
    Kubernetes,
    /// Kubernetes' own tests of a node
    NodeTests,
    /// the images that Kubernetes' own tests pull
    SuiteImages,
}

/// How a part's content comes about.
pub(crate) trait Recipe: Sync {
    /// All that the content depends on: with another key another content.
    fn key(&self) -> Result<Vec<u8>>;
    /// Writes the content. What lies in its folder `bin` is on the node's path.
    fn write(&self, workshop: &Workshop) -> Result<()>;
}

/// Where a recipe works.
#[derive(Debug)]
pub(crate) struct Workshop {
    /// The part's root.
    content: PathBuf,
    /// Thrown away afterwards.
    scratch: PathBuf,
    log: PathBuf,
}

/// A part as a node gets it.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) name: &'static str,
    /// Open, so that it stays whole if another program's build replaces it.
    pub(crate) file: File,
}

/// Raise it when the way to a disk changes in a way that no recipe's key shows.
const FORMAT: u32 = 1;
const LOG_LINES_SHOWN: usize = 20;

impl Part {
    /// The disk's serial number, of which a guest sees 20 bytes.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Part::Containerd => "containerd",
            Part::Containerd17 => "containerd-1.7",
            Part::Containerd21 => "containerd-2.1",
            Part::CriTools => "cri-tools",
            Part::Etcd => "etcd",
            Part::Gvisor => "gvisor",
            Part::Kubelet135 => "kubelet-1.35",
            Part::Kubernetes => "kubernetes",
            Part::NodeTests => "node-tests",
            Part::SuiteImages => "suite-images",
        }
    }

    fn recipe(self) -> &'static dyn Recipe {
        match self {
            Part::Containerd => &CONTAINERD,
            Part::Containerd17 => &CONTAINERD_1_7,
            Part::Containerd21 => &CONTAINERD_2_1,
            Part::CriTools => &CRI_TOOLS,
            Part::Etcd => &ETCD,
            Part::Gvisor => &GVISOR,
            Part::Kubelet135 => &KUBELET_1_35,
            Part::Kubernetes => &KUBERNETES,
            Part::NodeTests => &NODE_TESTS,
            Part::SuiteImages => &SuiteImages,
        }
    }
}

macro_rules! module {
    ($name:literal) => {
        (
            include_str!(concat!("../parts/", $name, "/go.mod")),
            include_str!(concat!("../parts/", $name, "/go.sum")),
        )
    };
}

static CONTAINERD: GoModule = GoModule {
    files: module!("containerd"),
    of: "github.com/containerd/containerd/v2",
    tags: "no_btrfs",
    variables: "github.com/containerd/containerd/v2/version.Version={version}",
    programs: &[
        Program::new("containerd", "/cmd/containerd"),
        Program::new("containerd-shim-runc-v2", "/cmd/containerd-shim-runc-v2"),
        Program::new("ctr", "/cmd/ctr"),
    ],
};

static CONTAINERD_1_7: GoModule = GoModule {
    files: module!("containerd-1.7"),
    of: "github.com/containerd/containerd",
    tags: "no_btrfs",
    variables: "github.com/containerd/containerd/version.Version={version}",
    programs: &[Program::new("containerd-1.7", "/cmd/containerd")],
};

static CONTAINERD_2_1: GoModule = GoModule {
    files: module!("containerd-2.1"),
    programs: &[Program::new("containerd-2.1", "/cmd/containerd")],
    ..CONTAINERD
};

static CRI_TOOLS: GoModule = GoModule {
    files: module!("cri-tools"),
    of: "sigs.k8s.io/cri-tools",
    tags: "",
    variables: "sigs.k8s.io/cri-tools/pkg/version.Version={number}",
    programs: &[
        Program::new("crictl", "/cmd/crictl"),
        Program::tests("critest", "/cmd/critest"),
    ],
};

static ETCD: GoModule = GoModule {
    files: module!("etcd"),
    of: "go.etcd.io/etcd/server/v3",
    tags: "",
    variables: "",
    programs: &[Program::new("etcd", "")],
};

static GVISOR: GoModule = GoModule {
    files: module!("gvisor"),
    of: "gvisor.dev/gvisor",
    tags: "",
    variables: "gvisor.dev/gvisor/runsc/version.version={version}",
    programs: &[
        Program::new("runsc", "/runsc"),
        Program::new("containerd-shim-runsc-v1", "/shim"),
    ],
};

static KUBELET_1_35: GoModule = GoModule {
    files: module!("kubelet-1.35"),
    programs: &[Program::new("kubelet-1.35", "/cmd/kubelet")],
    ..KUBERNETES_MODULE
};

static KUBERNETES: GoModule = GoModule {
    programs: &[
        Program::new("kubelet", "/cmd/kubelet"),
        Program::new("kube-apiserver", "/cmd/kube-apiserver"),
        Program::new("kube-scheduler", "/cmd/kube-scheduler"),
        Program::new("kube-controller-manager", "/cmd/kube-controller-manager"),
        Program::new("kube-proxy", "/cmd/kube-proxy"),
        Program::new("kubectl", "/cmd/kubectl"),
    ],
    ..KUBERNETES_MODULE
};

static NODE_TESTS: GoModule = GoModule {
    programs: &[
        Program::new("agnhost", "/test/images/agnhost"),
        Program::tests("e2e_node.test", "/test/e2e_node"),
    ],
    ..KUBERNETES_MODULE
};

const KUBERNETES_MODULE: GoModule = GoModule {
    files: module!("kubernetes"),
    of: "k8s.io/kubernetes",
    tags: "",
    // Without them kubelet is v0.0.0-master, whom others do not trust with what is new.
    variables: "k8s.io/component-base/version.gitVersion={version} \
                k8s.io/component-base/version.gitMajor={major} \
                k8s.io/component-base/version.gitMinor={minor}",
    programs: &[],
};

/// The disks of these parts, from the cache or built now.
pub(crate) fn prepare(parts: &[Part]) -> Result<Vec<Disk>> {
    let folder = cache::folder()?.join("parts");
    parts
        .iter()
        .map(|part| {
            disk(part.name(), part.recipe(), &folder)
                .with_context(|| format!("the node's part {}", part.name()))
        })
        .collect()
}

fn disk(name: &'static str, recipe: &dyn Recipe, folder: &Path) -> Result<Disk> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&FORMAT.to_le_bytes());
    hasher.update(&recipe.key()?);
    let entry = cache::Entry {
        folder: folder.to_owned(),
        name,
        hash: cache::short_hash(&hasher),
        ending: ".erofs",
    };
    entry.prepare(|work| {
        let workshop = Workshop {
            content: work.join("content"),
            scratch: work.join("scratch"),
            log: folder.join(format!("{name}.log")),
        };
        for folder in [&workshop.content, &workshop.scratch] {
            fs::create_dir(folder).with_context(|| format!("creating {}", folder.display()))?;
        }
        File::create(&workshop.log)
            .with_context(|| format!("creating {}", workshop.log.display()))?;
        recipe.write(&workshop)?;
        let disk = work.join("disk.erofs");
        workshop.run(
            Command::new("mkfs.erofs")
                .args(["--all-root", "-T0", "--quiet"])
                .args(["-U", "00000000-0000-0000-0000-000000000000"])
                .args([&disk, &workshop.content]),
            "`make setup` installs it; a full disk is the other thing that stops it",
        )?;
        // Only a build that failed has something to say.
        fs::remove_file(&workshop.log)?;
        Ok(disk)
    })?;
    let path = entry.path();
    let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
    Ok(Disk { name, file })
}

impl Workshop {
    /// For a step on the way, whose content is not the part's.
    fn within(&self, step: &str) -> Result<Workshop> {
        let folder = self.scratch.join(step);
        let workshop = Workshop {
            content: folder.join("content"),
            scratch: folder.join("scratch"),
            log: self.log.clone(),
        };
        for folder in [&workshop.content, &workshop.scratch] {
            fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        }
        Ok(workshop)
    }

    /// Runs a program whose words go to the log. `remedy` says what helps if it fails.
    fn run(&self, command: &mut Command, remedy: &str) -> Result<()> {
        let log = File::options()
            .append(true)
            .open(&self.log)
            .with_context(|| format!("opening {}", self.log.display()))?;
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        // SAFETY: the closure makes only system calls that are safe between fork and exec.
        unsafe {
            command.pre_exec(|| {
                cleanup::unblock_signals()?;
                nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGTERM)?;
                Ok(())
            });
        }
        let line = command_line(command);
        let status = command
            .status()
            .with_context(|| format!("running {line}; {remedy}"))?;
        if !status.success() {
            bail!(
                "{line} ended with {status}; the end of {}:\n{}\n{remedy}",
                self.log.display(),
                last_lines(&fs::read_to_string(&self.log).unwrap_or_default())
            );
        }
        Ok(())
    }
}

fn command_line(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|argument| {
        let argument = argument.to_string_lossy();
        if argument.is_empty() || argument.contains(' ') {
            format!("'{argument}'")
        } else {
            argument.into_owned()
        }
    }));
    words.join(" ")
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n")
}

#[cfg(test)]
mod tests;
