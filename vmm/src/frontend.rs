//! The front-end for people and for tests: runs a machine in the foreground.

use std::fs::File;
use std::io::{BufRead, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use anyhow::{Context, Result, bail};
use kiln_vmm::devices::block::Rings;
use kiln_vmm::event::EventLoop;
use kiln_vmm::machine::{
    BootSpec, DeviceKind, DeviceSpec, HostEnd, HostEnds, Machine, MachineConfig, Observer,
    ResumeSpec,
};
use kiln_vmm::memory::{HostMemory, MemoryShape};
use kiln_vmm::platform::hotplug::HotplugAction;
use kiln_vmm::platform::power::Outcome;
use kiln_vmm::snapshot::{self, Labels};
use kiln_vmm::timeline::Timeline;
use kiln_vmm::vm::VmSeed;
use kiln_vmm_control::api::exit;

const USAGE: &str = "\
usage: kiln-vmm boot --kernel FILE [--initrd FILE] [--cmdline TEXT] [--memory MIB] [--hotplug MIB]
                     [--cpus N] [--max-cpus N] [--disk FILE]... [--slots N] [--vsock PATH] [--quiet]
       kiln-vmm resume DIR [--vsock PATH] [--quiet]
commands on standard input: snapshot DIR | pause | unpause | cpus N | attach SLOT FILE | detach SLOT |
                            stats | stop | help";

enum Message {
    Line(String),
    Ended(Outcome),
    Hotplug(HotplugAction),
}

#[derive(Debug)]
struct Notify(std::sync::Mutex<Sender<Message>>);

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Message")
    }
}

impl Notify {
    fn send(&self, message: Message) {
        let sender = self
            .0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        // The receiver only goes away when the process does.
        let _ = sender.send(message);
    }
}

impl Observer for Notify {
    fn ended(&self, outcome: &Outcome, _last_words: &str) {
        self.send(Message::Ended(outcome.clone()));
    }

    fn hotplug(&self, action: HotplugAction) {
        self.send(Message::Hotplug(action));
    }
}

#[derive(Default)]
struct Options {
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    cmdline: String,
    memory: u64,
    hotplug: u64,
    cpus: u8,
    max_cpus: u8,
    disks: Vec<PathBuf>,
    slots: u8,
    vsock: Option<PathBuf>,
    quiet: bool,
    positional: Vec<PathBuf>,
}

fn parse(args: impl Iterator<Item = String>) -> Result<Options> {
    let mut o = Options {
        cmdline: "console=ttyS0".to_owned(),
        memory: 256,
        cpus: 1,
        ..Options::default()
    };
    let mut args = args;
    while let Some(arg) = args.next() {
        let mut value = || {
            args.next()
                .with_context(|| format!("{arg} wants a value\n{USAGE}"))
        };
        match arg.as_str() {
            "--kernel" => o.kernel = Some(value()?.into()),
            "--initrd" => o.initrd = Some(value()?.into()),
            "--cmdline" => o.cmdline = value()?,
            "--memory" => o.memory = value()?.parse()?,
            "--hotplug" => o.hotplug = value()?.parse()?,
            "--cpus" => o.cpus = value()?.parse()?,
            "--max-cpus" => o.max_cpus = value()?.parse()?,
            "--disk" => o.disks.push(value()?.into()),
            "--slots" => o.slots = value()?.parse()?,
            "--vsock" => o.vsock = Some(value()?.into()),
            "--quiet" => o.quiet = true,
            other if other.starts_with('-') => bail!("unknown option {other}\n{USAGE}"),
            other => o.positional.push(other.into()),
        }
    }
    o.max_cpus = o.max_cpus.max(o.cpus);
    Ok(o)
}

/// Puts a machine together: the machine and its kernel's version.
type Start = fn(&Options, VmSeed, EventLoop, Arc<Notify>) -> Result<(Arc<Machine>, String)>;

/// Runs what the arguments say.
pub(crate) fn run() -> Result<i32> {
    let mut args = std::env::args().skip(1);
    let command = args.next().unwrap_or_default();
    let start: Start = match command.as_str() {
        "boot" => boot,
        "resume" => resume,
        _ => {
            eprintln!("{USAGE}");
            return Ok(2);
        }
    };
    let options = parse(args)?;
    kiln_vmm::cpu::thread::install_kick_handler()?;
    let seed = VmSeed::create(None)?;
    let events = EventLoop::new()?;
    let (sender, receiver) = channel();
    let notify = Arc::new(Notify(sender.clone().into()));
    let (machine, kernel) = start(&options, seed, events.clone(), notify)?;
    std::thread::Builder::new()
        .name("devices".to_owned())
        .spawn(move || events.run())?;
    std::thread::Builder::new()
        .name("stdin".to_owned())
        .spawn(move || {
            for line in std::io::stdin().lock().lines().map_while(Result::ok) {
                if sender.send(Message::Line(line)).is_err() {
                    return;
                }
            }
        })?;
    machine.unpause();
    serve(&machine, &kernel, &receiver)
}

fn serve(machine: &Arc<Machine>, kernel: &str, receiver: &Receiver<Message>) -> Result<i32> {
    loop {
        match receiver.recv()? {
            Message::Line(line) => match command(machine, kernel, &line) {
                Ok(answer) => eprintln!("kiln-vmm: {answer}"),
                Err(e) => eprintln!("kiln-vmm: {e:#}"),
            },
            Message::Hotplug(action) => {
                eprintln!("kiln-vmm: guest: {action:?}");
                machine.followed(action)?;
            }
            Message::Ended(outcome) => {
                eprintln!("kiln-vmm: ended: {outcome:?}");
                return Ok(match outcome {
                    Outcome::PoweredOff | Outcome::Stopped => exit::ENDED,
                    Outcome::Reset | Outcome::TripleFault => exit::RESET,
                    Outcome::Panicked => exit::PANICKED,
                    Outcome::Failed(_) => exit::FAILED,
                });
            }
        }
    }
}

fn command(machine: &Arc<Machine>, kernel: &str, line: &str) -> Result<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words.as_slice() {
        ["snapshot", dir] => take_snapshot(machine, kernel, Path::new(dir)),
        ["pause"] => machine
            .pause()
            .map(|()| "paused".to_owned())
            .map_err(Into::into),
        ["unpause"] => {
            machine.unpause();
            Ok("running".to_owned())
        }
        ["cpus", n] => {
            machine.request_cpus(n.parse()?)?;
            Ok(format!("asked for {n} vCPUs"))
        }
        ["attach", slot, file] => {
            let disk = HostEnd::Disk {
                file: open_disk(Path::new(file))?,
                read_only: false,
            };
            machine.attach_block(slot.parse()?, disk)?;
            Ok("attached".to_owned())
        }
        ["detach", slot] => {
            machine.detach_block(slot.parse()?)?;
            Ok("detached".to_owned())
        }
        ["stats"] => Ok(format!("{:?}", machine.stats())),
        ["stop"] => {
            machine.stop();
            Ok("stopping".to_owned())
        }
        [] => Ok(String::new()),
        _ => bail!("{USAGE}"),
    }
}

fn take_snapshot(machine: &Arc<Machine>, kernel: &str, dir: &Path) -> Result<String> {
    std::fs::create_dir_all(dir)?;
    machine.pause()?;
    let mut state = machine.save()?;
    let labels = Labels {
        kernel: kernel.to_owned(),
        ..Labels::default()
    };
    let parts = machine.memory().context("the machine is not paused")?;
    let stats = snapshot::write_memory(&File::create(dir.join("memory"))?, &parts)?;
    state.holes = stats.holes;
    let bytes = snapshot::encode(&state, &labels)?;
    snapshot::write_file(&mut File::create(dir.join("state"))?, &bytes)?;
    machine.unpause();
    Ok(format!(
        "saved: {} bytes of state, {} pages with data, {} without",
        bytes.len(),
        stats.data_pages,
        stats.zero_pages
    ))
}

fn open_disk(path: &Path) -> Result<File> {
    File::options()
        .read(true)
        .write(true)
        .open(path)
        .with_context(|| format!("opening {}", path.display()))
}

fn console(options: &Options) -> Result<Option<File>> {
    if options.quiet {
        return Ok(None);
    }
    std::io::stdout().flush()?;
    let fd: OwnedFd = std::io::stdout().as_fd().try_clone_to_owned()?;
    Ok(Some(fd.into()))
}

fn listener(path: &Path) -> Result<UnixListener> {
    let _ = std::fs::remove_file(path);
    let listener =
        UnixListener::bind(path).with_context(|| format!("listening on {}", path.display()))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Slot of the vsock device on machines this front-end boots; disks follow the rng behind it.
const VSOCK_SLOT: u8 = 1;
const RNG_SLOT: u8 = 2;
const FIRST_DISK_SLOT: u8 = 3;

fn boot(
    o: &Options,
    seed: VmSeed,
    events: EventLoop,
    notify: Arc<Notify>,
) -> Result<(Arc<Machine>, String)> {
    let kernel = o
        .kernel
        .clone()
        .with_context(|| format!("--kernel is missing\n{USAGE}"))?;
    let open = |p: &Path| File::open(p).with_context(|| format!("opening {}", p.display()));
    let mut devices = vec![
        DeviceSpec {
            slot: VSOCK_SLOT,
            kind: DeviceKind::Vsock { cid: 3 },
        },
        DeviceSpec {
            slot: RNG_SLOT,
            kind: DeviceKind::Rng,
        },
    ];
    let mut ends = HostEnds::new();
    if let Some(path) = &o.vsock {
        ends.insert(VSOCK_SLOT, HostEnd::Listener(listener(path)?));
    }
    let disks = u8::try_from(o.disks.len())?;
    for i in 0..disks.max(o.slots) {
        let slot = FIRST_DISK_SLOT + i;
        let kind = DeviceKind::Block {
            id: format!("slot{i}"),
            queues: 1,
        };
        devices.push(DeviceSpec { slot, kind });
        if let Some(path) = o.disks.get(usize::from(i)) {
            let disk = HostEnd::Disk {
                file: open_disk(path)?,
                read_only: false,
            };
            ends.insert(slot, disk);
        }
    }
    let spec = BootSpec {
        config: MachineConfig {
            boot_cpus: o.cpus,
            max_cpus: o.max_cpus,
            memory: MemoryShape {
                ram: o.memory << 20,
                hotplug: o.hotplug << 20,
                usable: 0,
            },
            serial: true,
            devices,
        },
        kernel: open(&kernel)?,
        initrd: o.initrd.as_deref().map(open).transpose()?,
        cmdline: o.cmdline.clone(),
        console: console(o)?,
        ends,
        rings: Rings::new(1),
    };
    Ok(Machine::boot(
        seed,
        events,
        spec,
        notify,
        Arc::new(|| Ok(())),
    )?)
}

fn resume(
    o: &Options,
    seed: VmSeed,
    events: EventLoop,
    notify: Arc<Notify>,
) -> Result<(Arc<Machine>, String)> {
    let [dir] = o.positional.as_slice() else {
        bail!("{USAGE}")
    };
    let mut timeline = Timeline::default();
    let bytes = snapshot::read_file(&mut File::open(dir.join("state"))?)?;
    let (header, state) = snapshot::decode(&bytes)?;
    let memory = File::open(dir.join("memory"))?;
    snapshot::check_memory_file(&header, &memory)?;
    let host_memory = HostMemory::from_file(state.config.memory, &memory, &state.holes)?;
    timeline.mark("vmm.files");
    let mut ends = HostEnds::new();
    if let Some(path) = &o.vsock {
        ends.insert(VSOCK_SLOT, HostEnd::Listener(listener(path)?));
    }
    let spec = ResumeSpec {
        state,
        memory,
        console: console(o)?,
        ends,
        rings: Rings::new(1),
        touched: Vec::new(),
    };
    let enter = Arc::new(|| Ok(()));
    let machine = Machine::resume(
        seed,
        events,
        host_memory,
        spec,
        notify,
        enter,
        &mut timeline,
    )?;
    for step in timeline.steps() {
        eprintln!("kiln-vmm: {:<20} {:>9} ns", step.name, step.duration_ns);
    }
    Ok((machine, header.kernel))
}
