//! kiln's guest agent: PID 1 of a μVM.
//!
//! As PID 1 it takes no arguments. Outside a VM, for development and tests:
//!
//! ```text
//! kiln-agent --listen unix:PATH [--state DIR] [--cgroup DIR]
//! ```
//!
//! in mount, PID, network, UTS, IPC and cgroup namespaces of its own, with cgroup2 at `--cgroup`
//! (`/sys/fs/cgroup`). It then neither boots anything nor sets the clock.

mod agent;
mod beneath;
mod boot;
mod clearing;
mod container;
mod disk;
mod error;
mod gate;
mod gathering;
mod helper;
mod listen;
mod lock_watch;
mod modprobe;
mod network;
mod reaper;
mod resources;
mod scratch;
mod service;
mod spans;
mod stdio;
mod storage;
mod sys;
mod tree;
mod uevent;
mod users;
mod written;

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use kiln_agent_api::{GUEST_STATE_DIR, READY_LINE, proto};
use tracing::level_filters::LevelFilter;

use crate::agent::{Agent, Boot};
use crate::container::cgroup::Hierarchy;
use crate::container::{Containers, Environment};
use crate::gate::{Gate, Scope};
use crate::helper::Helper;
use crate::listen::Endpoint;
use crate::reaper::Reaper;
use crate::service::Service;

/// Threads for what blocks (mounts, waiting for devices); they end when idle.
const BLOCKING_THREADS: usize = 4;
const THREAD_KEEP_ALIVE: Duration = Duration::from_millis(500);

/// How the agent was started.
#[derive(Debug)]
struct Settings {
    endpoint: Endpoint,
    state: PathBuf,
    cgroup: PathBuf,
    owns_guest: bool,
}

fn main() {
    let started_us = agent::now_us();
    let first = std::process::id() == 1;
    let arguments: Vec<String> = if first {
        // The kernel passes on what it doesn't understand of its command line.
        Vec::new()
    } else {
        std::env::args().skip(1).collect()
    };
    match arguments.first().map(String::as_str) {
        Some(helper::HELPER_ARGUMENT) => return ended("helper", helper::serve()),
        Some(clearing::ARGUMENT) => {
            return ended(
                "taker of free memory",
                clearing::serve().map_err(Into::into),
            );
        }
        Some(modprobe::QUIETLY) => {
            std::process::exit(i32::from(!modprobe::serve(&arguments)));
        }
        _ => {}
    }
    // PID 1 of a namespace, in tests, is not PID 1 of a guest: it is told where to listen.
    let arguments = if first { listen_arguments() } else { arguments };
    if let Err(error) = parse(&arguments).and_then(|settings| run(&settings, started_us)) {
        eprintln!("kiln-agent: {error:#}");
        if first && arguments.is_empty() {
            power_off();
        }
        std::process::exit(1);
    }
}

/// The end of a process that the agent has beside itself.
fn ended(what: &str, how: anyhow::Result<()>) {
    if let Err(error) = how {
        eprintln!("kiln-agent {what}: {error:#}");
        std::process::exit(1);
    }
}

/// The arguments of a PID 1 that was started by a program, not by the kernel.
fn listen_arguments() -> Vec<String> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let known = ["--listen", "--version"];
    if arguments
        .first()
        .is_some_and(|one| known.contains(&one.as_str()))
    {
        arguments
    } else {
        Vec::new()
    }
}

fn parse(arguments: &[String]) -> anyhow::Result<Settings> {
    let mut settings = Settings {
        endpoint: Endpoint::Vsock,
        state: PathBuf::from(GUEST_STATE_DIR),
        cgroup: PathBuf::from("/sys/fs/cgroup"),
        owns_guest: arguments.is_empty(),
    };
    let mut rest = arguments.iter();
    while let Some(name) = rest.next() {
        let mut value = || rest.next().with_context(|| format!("{name} needs a value"));
        match name.as_str() {
            "--listen" => {
                let place = value()?;
                let Some(path) = place.strip_prefix("unix:") else {
                    bail!("--listen takes unix:PATH, not {place:?}");
                };
                settings.endpoint = Endpoint::Unix(path.into());
            }
            "--state" => settings.state = value()?.into(),
            "--cgroup" => settings.cgroup = value()?.into(),
            "--version" => {
                println!("kiln-agent {}", env!("CARGO_PKG_VERSION"));
                std::process::exit(0);
            }
            other => bail!("{other:?} is not an argument; use --listen, --state or --cgroup"),
        }
    }
    if settings.endpoint == Endpoint::Vsock && std::process::id() != 1 {
        bail!("outside a μVM the agent needs --listen unix:PATH");
    }
    Ok(settings)
}

fn run(settings: &Settings, started_us: u64) -> anyhow::Result<()> {
    let mut warnings = Vec::new();
    if settings.owns_guest {
        warnings = boot::set_up().context("set up the guest")?;
    } else {
        sys::process::become_subreaper().context("become a subreaper")?;
        network::loopback_up().context("bring the loopback interface up")?;
    }
    log_to(settings.owns_guest);
    let (hierarchy, missing) = Hierarchy::set_up(&settings.cgroup).context("set up cgroups")?;
    for controller in missing {
        warnings.push(format!(
            "the kernel has no {controller} controller; its limits won't apply"
        ));
    }
    // The helper inherits it; every container's process gets its own.
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        warnings.push(format!(
            "the kernel may kill the agent when memory runs out: {error}"
        ));
    }
    // Before there is a second thread.
    let helper = Helper::start().context("start the helper")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(THREAD_KEEP_ALIVE)
        .build()
        .context("start the runtime")?;
    for warning in &warnings {
        tracing::warn!("{warning}");
    }
    let boot = Boot {
        started_us,
        ready_us: 0,
        warnings,
        owns_guest: settings.owns_guest,
    };
    runtime.block_on(serve(settings, boot, hierarchy, helper))
}

async fn serve(
    settings: &Settings,
    mut boot: Boot,
    hierarchy: Hierarchy,
    helper: Helper,
) -> anyhow::Result<()> {
    let total = resources::state()
        .context("read the guest's size")?
        .mem_total_bytes;
    hierarchy
        .limit_pod_memory(total)
        .context("limit the pod's memory")?;
    let reaper = Reaper::default();
    let environment = Environment {
        helper,
        reaper: reaper.clone(),
        hierarchy,
        state: settings.state.clone(),
        apparmor: agent::apparmor_enabled(),
    };
    let mut machine_id = vec![settings.state.join("machine-id")];
    if settings.owns_guest {
        machine_id.push(PathBuf::from("/etc/machine-id"));
    }
    std::fs::create_dir_all(&settings.state).context("make the state folder")?;
    let calls = settings.endpoint.calls().context("listen for calls")?;
    let streams = settings.endpoint.streams().context("listen for streams")?;
    boot.ready_us = agent::now_us();
    let agent = Arc::new(Agent {
        gate: Gate::new(Scope {
            clock: settings.owns_guest,
            machine_id,
        }),
        containers: Arc::new(Containers::new(environment)),
        boot,
    });
    tokio::spawn(agent.clone().serve_streams(streams));
    let watcher = tokio::spawn(agent.clone().watch_generation());
    let mut server = ttrpc::asynchronous::Server::new()
        .add_listener(ttrpc::asynchronous::transport::Listener::new(calls))
        .register_service(proto::create_agent(Arc::new(Service::new(agent))));
    server.start().await.context("serve calls")?;
    if settings.owns_guest {
        // For a console, should anybody look at one.
        drop(io::stdout().write_all(READY_LINE));
    }
    settings.endpoint.tell_ready().await;
    tokio::select! {
        result = reaper.run() => result.context("collect processes"),
        result = watcher => result.context("the watcher ended")?.context("hear device events"),
    }
}

/// Logs to the kernel's log in a guest, to stderr elsewhere.
fn log_to(kernel: bool) {
    let level = level();
    let builder = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .without_time();
    let installed = if kernel {
        builder
            .with_target(false)
            .with_writer(KernelLog::open)
            .try_init()
    } else {
        builder.with_writer(io::stderr).try_init()
    };
    // Without a log the agent still does its work.
    drop(installed);
}

/// `KILN_LOG`, or `kiln.log=` of the kernel's command line; warnings by default.
fn level() -> LevelFilter {
    let command_line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let wanted = std::env::var("KILN_LOG").ok().or_else(|| {
        let mut words = command_line.split_whitespace();
        words.find_map(|word| word.strip_prefix("kiln.log=").map(str::to_owned))
    });
    wanted
        .and_then(|level| level.parse().ok())
        .unwrap_or(LevelFilter::WARN)
}

/// The kernel's log: one record a line.
struct KernelLog {
    file: Option<std::fs::File>,
}

impl KernelLog {
    fn open() -> Self {
        Self {
            file: std::fs::OpenOptions::new()
                .write(true)
                .open("/dev/kmsg")
                .ok(),
        }
    }
}

impl Write for KernelLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(file) = &mut self.file {
            let mut record = b"<5>kiln-agent: ".to_vec();
            record.extend_from_slice(bytes);
            file.write_all(&record)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Nothing is left to do for a PID 1 that can't go on.
fn power_off() {
    use nix::sys::reboot::{RebootMode, reboot};

    nix::unistd::sync();
    let Err(error) = reboot(RebootMode::RB_POWER_OFF);
    eprintln!("kiln-agent: cannot power off: {error}");
}
