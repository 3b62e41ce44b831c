//! The command line: what can be asked, and how it is explained.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{CommandFactory, Parser, Subcommand, ValueHint};
use kiln_uvm::size::{Bytes, NotASize};

use crate::run::net::{Address, Wanted};

const EXIT_CODES: &str = "Exit codes:
  0  done; for doctor: pods can run; for verify: nothing is damaged
  1  failed; for doctor: pods cannot run; for verify: something is damaged
  2  the command line makes no sense
  3  no such μVM or image, or no store
  4  the μVM or the image is in use, or pinned, or others are stored as what differs from it
  5  the store's budget or the disk has no room
For run and exec: the command's own code (128 and the signal's number, if a signal ended it), or
  125  kiln failed    126  the command cannot be run    127  there is no such command";

const RUN_EXAMPLES: &str = "Examples:
  kiln run busybox.tar                          the image's own command
  kiln run busybox.tar -- uname -a              another one
  kiln run -it --cpus 2 --memory 1Gi busybox.tar sh
  tar c . | kiln run -i busybox.tar tar t       streams pass through
  kiln run --net tap:t0 --ip 10.0.0.2/24 --gateway 10.0.0.1 busybox.tar ping 10.0.0.1

The archive is what `docker save`, `podman save` and `ctr image export` write. Its root file system is
made into a read-only image once and kept; what the container writes lies in its memory and goes with
it. Needs root and a baked μVM (`kiln bake`).";

/// Runs containers in μVMs that were baked beforehand.
///
/// A pod that kiln runs does not boot a kernel: it resumes a μVM that was baked earlier. `kiln`
/// bakes μVMs, looks after the store they are kept in, and says whether this machine can run them.
///
/// Begin with `kiln doctor`: it tells what is missing on this machine and how to mend it.
#[derive(Debug, Parser)]
#[command(name = "kiln", version, after_help = EXIT_CODES, max_term_width = 100)]
pub(crate) struct Args {
    /// Print JSON, for programs. The names in it are stable.
    #[arg(long, global = true)]
    pub(crate) json: bool,

    /// The directory in which baked μVMs, and the images of root file systems, are kept; by default that of kiln's
    /// configuration.
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "KILN_STORE",
        value_hint = ValueHint::DirPath
    )]
    pub(crate) store: Option<PathBuf>,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Say what this machine can do, and how to mend what is missing.
    ///
    /// Runs a small guest on /dev/kvm (a device that exists proves nothing), looks at the kernel,
    /// the cgroups, containerd and its configuration, the programs of kiln, disk and memory, and
    /// the store. Takes a few seconds at most. Exit code 0 means that pods can run.
    Doctor,

    /// Print what containerd's configuration needs, in the form that the installed containerd reads.
    ///
    /// Add it to the file that its first line names, and restart containerd. `kiln doctor` says
    /// whether kiln is registered.
    ContainerdConfig,

    /// Bake a μVM: boot a guest once, save it, and enter it in the store.
    ///
    /// Puts the guest together from an installed distribution kernel and kiln's agent, boots it,
    /// waits for the agent, gives back what the guest does not need, saves it, resumes a copy to
    /// try it out, and enters it in the store. Baking the same inputs again does nothing. Needs
    /// root and a usable KVM (see `kiln doctor`).
    Bake(Bake),

    /// Run a container from an image archive in a μVM of its own, without containerd.
    ///
    /// Resumes a baked μVM, grows it to the size asked for, and runs the command in it. Standard
    /// input, output and errors, signals and the exit code are the command's; when it ends, all is
    /// removed. Ctrl-C goes to the command; the fourth one kills it.
    #[command(after_help = RUN_EXAMPLES)]
    Run(Box<Run>),

    /// Run another command in a container that `kiln run` started.
    Exec(Exec),

    /// Save a container that `kiln run` runs, with all that is in its memory, and end it.
    ///
    /// It becomes a μVM of the store, which takes the room of what differs from the baked one that it was resumed from.
    /// `kiln run --from NAME` goes on with it, as often as wanted and as many at once as wanted: each has an identity of
    /// its own, and its processes do not know that they were copied. It stays until it is removed (`kiln rm`). A container
    /// with files of this machine (`-v`) or with a network can't be saved.
    Save(Save),

    /// List what `kiln run` runs.
    Ps,

    /// Show what a running guest's kernel and agent have written to its serial console.
    ///
    /// Nothing is there if nothing went wrong: a resumed guest has no reason to write.
    Console(Console),

    /// Show where the time of a start went, step by step.
    ///
    /// Of a pod, of a container that `kiln run` runs, or of the last `kiln run` that reached its command.
    /// Steps lie within each other: those of the VMM and of the guest's agent within the one that waited
    /// for them.
    Trace(Trace),

    /// List the baked μVMs, the newest first, and the images of root file systems.
    #[command(visible_alias = "ls")]
    List,

    /// Show everything that is known of a baked μVM or an image, or what a running pod's μVM takes.
    Inspect {
        /// A digest that `kiln list` shows or a pod's id, or the first digits of it (4 at least), or `latest`.
        #[arg(value_name = "UVM|IMAGE|POD", default_value = "latest")]
        name: String,
    },

    /// Read baked μVMs and images, and compare them with what was written.
    ///
    /// Names every object that has changed, has another length or is missing. A damaged μVM is
    /// mended by removing it (`kiln rm`) and baking again; a damaged image is made again.
    Verify {
        /// Which ones; all of them if none is named.
        #[arg(value_name = "UVM|IMAGE")]
        names: Vec<String>,
    },

    /// Remove baked μVMs or images. Those in use and pinned ones are refused.
    Rm {
        /// Their digests, the first digits of them (4 at least), or `latest`.
        #[arg(value_name = "UVM|IMAGE", required = true)]
        names: Vec<String>,
    },

    /// Keep a baked μVM from `rm` and `gc`.
    Pin {
        /// Its digest, the first digits of it (4 at least), or `latest`.
        uvm: String,
    },

    /// Take the pin off a baked μVM.
    Unpin {
        /// Its digest, the first digits of it (4 at least), or `latest`.
        uvm: String,
    },

    /// Remove what nobody needs any more.
    ///
    /// Removes what interrupted bakes left, and μVMs for which there is a newer one of the same
    /// size class, kernel release and CPU. If the store is over its budget, the least recently used
    /// images go too, which are made again when a container needs them, and then the least recently
    /// used μVMs. What is pinned or in use always stays.
    Gc(Gc),

    /// Print a completion script for a shell.
    ///
    /// For bash: kiln completions bash > /etc/bash_completion.d/kiln
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },

    /// Write the manual pages to a directory.
    #[command(hide = true)]
    Man {
        /// The directory.
        #[arg(value_hint = ValueHint::DirPath)]
        dir: PathBuf,
    },
}

/// What `kiln run` runs.
#[derive(Debug, clap::Args)]
pub(crate) struct Run {
    /// Pass standard input on to the command.
    #[arg(long, short)]
    pub(crate) interactive: bool,

    /// Give the command a terminal: the one on standard input.
    #[arg(long, short)]
    pub(crate) tty: bool,

    /// vCPUs; a μVM never has fewer than it was baked with.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) cpus: u32,

    /// Memory of the μVM, its kernel's share included, such as 512Mi; by default what a pod without limits has. Less than
    /// the μVM was baked with limits the container in it.
    #[arg(long, short, value_name = "SIZE", value_parser = bytes)]
    pub(crate) memory: Option<u64>,

    /// A name for `exec`, `ps` and `console`; by default a random one.
    #[arg(long)]
    pub(crate) name: Option<String>,

    /// The guest's host name; by default its name.
    #[arg(long)]
    pub(crate) hostname: Option<String>,

    /// Set a variable: NAME=VALUE, or NAME for the value it has here.
    #[arg(long, short, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,

    /// The directory to run in.
    #[arg(long, short, value_name = "DIR")]
    pub(crate) workdir: Option<String>,

    /// Whom to run as: a name in the image, or a number.
    #[arg(long, short, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,

    /// Run this in place of the image's entry point.
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) entrypoint: Option<String>,

    /// Show a file or directory of this machine to the container.
    #[arg(long = "volume", short = 'v', value_name = "SOURCE:TARGET[:ro]")]
    pub(crate) volumes: Vec<String>,

    /// RAM for what the command writes to its root file system; the rest goes to this machine's disk. By default as much
    /// as kiln's configuration gives a pod.
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub(crate) overlay_ram: Option<u64>,

    /// Disk for what the command writes beyond that; by default as much as a pod gets.
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub(crate) overlay_disk: Option<u64>,

    /// Where on this machine's disk: a directory for files without names; by default as for pods.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) overlay_dir: Option<PathBuf>,

    /// The container's network: `none`, or `tap:NAME`, a tap that is there already and that nothing else uses.
    #[arg(long, value_name = "none|tap:NAME", default_value = "none")]
    pub(crate) net: Wanted,

    /// An address of the container, with its network's prefix, such as 10.0.0.2/24. May be repeated.
    #[arg(long, value_name = "ADDRESS/PREFIX")]
    pub(crate) ip: Vec<Address>,

    /// Where the container sends what is for other networks. Once for each of IPv4 and IPv6.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) gateway: Vec<IpAddr>,

    /// A name server for the container. May be repeated.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) dns: Vec<IpAddr>,

    /// Which system calls the container may make: a profile in the runtime specification's form (its
    /// `linux.seccomp`), or `unconfined`. By default those that container engines allow.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) seccomp: Option<PathBuf>,

    /// Print to standard error where the time until the command's start went (see `kiln trace`).
    #[arg(long)]
    pub(crate) timings: bool,

    /// The VMM; by default kiln-vmm beside this program or on the PATH.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) vmm: Option<PathBuf>,

    /// Go on with a container that was saved (`kiln save`): its name, its digest or the first digits of that (4 at least).
    /// Its command, its output and its input, if that is wanted again (`-i`), are what they were.
    #[arg(long, value_name = "NAME|UVM", conflicts_with_all = [
        "tty", "env", "workdir", "user", "entrypoint", "volumes", "net", "ip", "gateway", "dns", "seccomp", "image",
        "command",
    ])]
    pub(crate) from: Option<String>,

    /// The image archive.
    #[arg(value_name = "IMAGE.tar", value_hint = ValueHint::FilePath, required_unless_present = "from")]
    pub(crate) image: Option<PathBuf>,

    /// The command and its arguments; by default the image's.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

/// What `kiln exec` runs.
#[derive(Debug, clap::Args)]
pub(crate) struct Exec {
    /// Pass standard input on to the command.
    #[arg(long, short)]
    pub(crate) interactive: bool,

    /// Give the command a terminal: the one on standard input.
    #[arg(long, short)]
    pub(crate) tty: bool,

    /// Set a variable: NAME=VALUE, or NAME for the value it has here.
    #[arg(long, short, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,

    /// The directory to run in; by default the container's.
    #[arg(long, short, value_name = "DIR")]
    pub(crate) workdir: Option<String>,

    /// Whom to run as, in numbers; by default as the container's first process.
    #[arg(long, short, value_name = "UID[:GID]")]
    pub(crate) user: Option<String>,

    /// The name that `kiln ps` shows.
    pub(crate) name: String,

    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

/// What `kiln save` saves.
#[derive(Debug, clap::Args)]
pub(crate) struct Save {
    /// What it is called in the store; by default what it is called now.
    #[arg(long = "as", value_name = "NAME")]
    pub(crate) name_in_store: Option<String>,

    /// Let it go on. It stands still while its memory is written.
    #[arg(long)]
    pub(crate) leave_running: bool,

    /// The name that `kiln ps` shows.
    pub(crate) name: String,
}

/// Whose console `kiln console` shows.
#[derive(Debug, clap::Args)]
pub(crate) struct Console {
    /// Go on as long as the guest runs.
    #[arg(long, short)]
    pub(crate) follow: bool,

    /// The name that `kiln ps` shows.
    pub(crate) name: String,
}

/// Whose start `kiln trace` shows.
#[derive(Debug, clap::Args)]
pub(crate) struct Trace {
    /// A name that `kiln ps` shows, or a pod's id or the first digits of it (4 at least).
    pub(crate) name: Option<String>,
}

/// What `kiln bake` bakes.
#[derive(Debug, clap::Args)]
pub(crate) struct Bake {
    /// vCPUs the guest begins with.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) cpus: u32,

    /// vCPUs it can grow to.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_cpus: u32,

    /// Memory the guest begins with; by default what a pod without limits has (320Mi, unless the configuration says otherwise), and
    /// at most 1Gi: larger ones grow.
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub(crate) memory: Option<u64>,

    /// Memory it can grow to.
    #[arg(long, value_name = "SIZE", default_value = "4Gi", value_parser = bytes)]
    pub(crate) max_memory: u64,

    /// Block devices that can be filled in later without plugging anything.
    #[arg(long, default_value_t = 8)]
    pub(crate) slots: u32,

    /// The guest's kernel image; by default the newest cloud kernel in /boot.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) kernel: Option<PathBuf>,

    /// The directory of its modules; by default the one in /lib/modules.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, requires = "kernel")]
    pub(crate) modules: Option<PathBuf>,

    /// The guest's agent; by default kiln-agent beside this program or on the PATH.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) agent: Option<PathBuf>,

    /// The VMM; by default kiln-vmm beside this program or on the PATH.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) vmm: Option<PathBuf>,

    /// Bake even if the store has a μVM of the same inputs.
    #[arg(long)]
    pub(crate) again: bool,

    /// The μVM that this one is stored as the difference to, or `none`.
    ///
    /// That makes it a tenth as large or less, and keeps the other one in the store as long as it is there. By default
    /// it is the newest of the same kernel release that is pinned or of another size, and has no parent itself.
    #[arg(long, value_name = "UVM|none")]
    pub(crate) parent: Option<String>,

    /// Store also the pages that a resumed guest touches first as differences.
    ///
    /// That makes it a third as large as it would be, but it can't be resumed from its own file before its parent's is
    /// read. For a μVM that is never the first one on its node to be resumed.
    #[arg(long)]
    pub(crate) lean: bool,
}

/// What `kiln gc` may do.
#[derive(Debug, clap::Args)]
pub(crate) struct Gc {
    /// Change nothing; print what would be removed.
    #[arg(long, short = 'n')]
    pub(crate) dry_run: bool,

    /// Remove every μVM and image that is neither pinned nor in use.
    #[arg(long)]
    pub(crate) all: bool,

    /// Keep μVMs for which there is a newer one.
    #[arg(long)]
    pub(crate) keep_superseded: bool,

    /// Go on until the store takes no more than this on disk, such as 500M or 20G.
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub(crate) target: Option<u64>,

    /// From now on the store may take this much on disk, such as 40Gi, or `none`; 20Gi if nobody says.
    /// Images make way for what is new, and a bake that would exceed it all the same fails.
    #[arg(long, value_name = "SIZE", value_parser = parse_budget)]
    pub(crate) set_budget: Option<Budget>,

    /// From now on memory that was rebuilt from its pack, to be mapped, may take this much on disk beside the store's
    /// budget, such as 16Gi, or `none`; 8Gi if nobody says.
    #[arg(long, value_name = "SIZE", value_parser = parse_budget)]
    pub(crate) set_flat_budget: Option<Budget>,
}

/// A budget as it is written: a size, or none at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Budget(pub(crate) Option<u64>);

fn parse_budget(text: &str) -> Result<Budget, NotASize> {
    if text == "none" {
        Ok(Budget(None))
    } else {
        bytes(text).map(|size| Budget(Some(size)))
    }
}

fn bytes(text: &str) -> Result<u64, NotASize> {
    text.parse().map(|Bytes(bytes)| bytes)
}

pub(crate) fn completions(shell: clap_complete::Shell) {
    clap_complete::generate(shell, &mut Args::command(), "kiln", &mut std::io::stdout());
}

pub(crate) fn man_pages(dir: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    clap_mangen::generate_to(Args::command(), dir)
        .with_context(|| format!("writing manual pages to {}", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn every_command_and_option_is_explained() {
        fn check(command: &clap::Command, path: &str) {
            for argument in command.get_arguments().filter(|a| a.get_id() != "help") {
                assert!(
                    argument.get_help().is_some(),
                    "{path}: {}",
                    argument.get_id()
                );
            }
            for sub in command.get_subcommands() {
                let path = format!("{path} {}", sub.get_name());
                assert!(sub.get_about().is_some(), "{path}");
                check(sub, &path);
            }
        }
        check(&Args::command(), "kiln");
    }

    #[test]
    fn budget_is_a_size_or_none() {
        assert_eq!(parse_budget("none"), Ok(Budget(None)));
        assert_eq!(parse_budget("20Gi"), Ok(Budget(Some(20 << 30))));
        assert!(parse_budget("much").is_err());
    }

    #[test]
    fn every_command_has_a_manual_page_and_completions() {
        let dir = tempfile::tempdir().unwrap();
        man_pages(dir.path()).unwrap();
        for name in ["kiln", "kiln-doctor", "kiln-gc", "kiln-verify"] {
            let page = std::fs::read_to_string(dir.path().join(format!("{name}.1"))).unwrap();
            assert!(page.contains(".SH NAME"), "{name}");
        }
        let mut script = Vec::new();
        clap_complete::generate(
            clap_complete::Shell::Bash,
            &mut Args::command(),
            "kiln",
            &mut script,
        );
        assert!(String::from_utf8(script).unwrap().contains("doctor"));
    }
}
