//! The node VM: a Debian machine with real KVM, containerd and runc, on any host.

mod cache;
mod cleanup;
mod emulator;
mod image;
mod initramfs;
mod machine;
mod parts;
mod payload;
mod session;
mod suite;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;

use emulator::Emulator;
use machine::{Clock, Engine, Machine};
use parts::Part;
use payload::Put;
use session::{Input, Session};
use suite::Suite;

/// Boots a node VM, runs a command in it (or a shell), and leaves nothing behind.
#[derive(Debug, Parser)]
#[command(name = "kiln-node-vm", version)]
struct Cli {
    /// Which Debian the node runs, and with it which containerd.
    #[arg(long, default_value = "trixie")]
    suite: Suite,
    /// Gives the node a part beside those of its suite: programs built once, which lie on its path.
    #[arg(long, value_name = "NAME")]
    part: Vec<Part>,
    /// How time passes in the node.
    #[arg(long, default_value = "wall")]
    clock: Clock,
    /// The node's memory in MiB; by default 8192, and 12288 of suite k8s.
    #[arg(long)]
    memory: Option<u32>,
    /// The node's init program (kiln-node-init); by default the one beside this program.
    #[arg(long)]
    init: Option<PathBuf>,
    /// Copies a file or a folder into the node before the command runs: HOST:NODE.
    #[arg(long, value_name = "HOST:NODE")]
    put: Vec<Put>,
    /// Copies a folder of the node to the host after the command ran, whatever became of it: NODE:HOST.
    #[arg(long, value_name = "NODE:HOST")]
    get: Vec<Put>,
    /// Sets a variable for the command: NAME=VALUE.
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_variable)]
    env: Vec<(String, String)>,
    /// Ends the node if the command takes longer than so many seconds.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Shows the node's console.
    #[arg(long)]
    console: bool,
    /// Makes image and parts if they are not in the cache yet, and boots nothing.
    #[arg(long)]
    image_only: bool,
    /// The command and its arguments; a shell if there is none.
    #[arg(last = true)]
    command: Vec<String>,
}

fn parse_variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("NAME=VALUE is wanted")?;
    Ok((name.to_owned(), value.to_owned()))
}

/// A cold boot under emulation takes about ten seconds; a busy host may need many times that.
const BOOT_PATIENCE: Duration = Duration::from_secs(300);
/// The first time; most that take longer never come up.
const EMULATED_BOOT_PATIENCE: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("node: {error:#}");
            // As `env` and `timeout` do: the failure is ours, not the command's.
            let gone = error.downcast_ref::<session::NodeGone>().is_some();
            ExitCode::from(if gone { 126 } else { 125 })
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode> {
    cleanup::on_signals()?;
    let image = image::prepare(cli.suite.debian())?;
    let mut parts = cli.suite.parts().to_vec();
    for part in &cli.part {
        if !parts.contains(part) {
            parts.push(*part);
        }
    }
    let disks = parts::prepare(&parts)?;
    if cli.image_only {
        return Ok(ExitCode::SUCCESS);
    }
    let memory_mib = cli.memory.unwrap_or(cli.suite.memory_mib());
    machine::check_memory(memory_mib)?;
    let engine = machine::choose_engine(cli.clock);
    let emulator = match &engine {
        Engine::Kvm => {
            eprintln!("node: booting {} on this machine's KVM", cli.suite.name());
            Emulator::installed()
        }
        Engine::Emulation { because } => {
            eprintln!(
                "node: booting {} with an emulated CPU ({because})",
                cli.suite.name()
            );
            let (emulator, said) = Emulator::for_emulation();
            said.iter().for_each(|line| eprintln!("node: {line}"));
            emulator
        }
    };
    let start = Instant::now();
    let init = read_init(cli.init.as_deref())?;
    let options = machine::Options {
        image: &image,
        clock: cli.clock,
        engine: &engine,
        emulator: &emulator,
        memory_mib,
        files: payload::system_files(cli.suite, &parts),
        parts: &disks,
        payload: &payload::archive(&cli.put)?,
        init: &init,
        show_console: cli.console,
    };
    let machine = boot(&options)?;
    let mut session = Session::of(&machine)?;
    eprintln!("node: up after {:.1} s", start.elapsed().as_secs_f64());

    let interactive = cli.command.is_empty();
    let command = if interactive {
        vec!["bash".to_owned(), "-l".to_owned()]
    } else {
        cli.command.clone()
    };
    let mut env: BTreeMap<_, _> = cli.env.iter().cloned().collect();
    if let Ok(terminal) = std::env::var("TERM") {
        env.entry("TERM".to_owned()).or_insert(terminal);
    }
    session.limit(cli.timeout.map(Duration::from_secs));
    let input = Input::of_this_process(interactive);
    let result = session.run(&command, &env, input, &mut std::io::stdout());
    // Results are worth most when the command failed.
    session.limit(Some(BOOT_PATIENCE));
    for get in cli.get.iter().filter(|_| result.is_ok()) {
        let from = get.from.to_string_lossy();
        session
            .fetch(&from, Path::new(&get.to))
            .with_context(|| format!("fetching {from}"))?;
    }
    Ok(ExitCode::from(u8::try_from(result?).unwrap_or(1)))
}

/// Boots the node. An emulated one hangs now and then before its first program runs, and is given up for another then.
fn boot(options: &machine::Options) -> Result<Machine> {
    if let Engine::Emulation { .. } = options.engine {
        let machine = Machine::boot(options)?;
        let begin = Instant::now();
        match Session::wait_until_up(&machine, EMULATED_BOOT_PATIENCE) {
            Ok(()) => return Ok(machine),
            Err(error) if begin.elapsed() < EMULATED_BOOT_PATIENCE => return Err(error),
            Err(error) => eprintln!("node: {error:#}\nnode: booting another one (docs/node.md)"),
        }
    }
    let machine = Machine::boot(options)?;
    Session::wait_until_up(&machine, BOOT_PATIENCE)?;
    Ok(machine)
}

fn read_init(given: Option<&Path>) -> Result<Vec<u8>> {
    let path = match given {
        Some(path) => path.to_owned(),
        None => std::env::current_exe()?.with_file_name("kiln-node-init"),
    };
    std::fs::read(&path)
        .with_context(|| format!("reading {}; `make build` builds it", path.display()))
}
