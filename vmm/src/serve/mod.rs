//! The process as its client runs it: requests from an inherited socket.
//!
//! The main thread answers requests, `devices` runs the event loop, `seed` makes the VM while the first
//! request is read, `hotplug` follows up what the guest lets go of. When the client's end of the socket
//! closes, the process ends: a machine never outlives who is responsible for it.

mod refusal;

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use kiln_vmm::cpu::thread::install_kick_handler;
use kiln_vmm::devices::block::Rings;
use kiln_vmm::event::EventLoop;
use kiln_vmm::machine::{
    Answers, BootSpec, DeviceKind, HostEnd, HostEnds, Machine, MachineConfig, Observer, Paused,
    ResumeSpec,
};
use kiln_vmm::memory::{FileSource, HostMemory, MemoryShape};
use kiln_vmm::platform::hotplug::HotplugAction;
use kiln_vmm::platform::power::Outcome;
use kiln_vmm::snapshot::{self, Labels};
use kiln_vmm::timeline::Timeline;
use kiln_vmm::vm::{VmError, VmSeed};
use kiln_vmm_control::api::{self, End, Reply, Request, exit};
use kiln_vmm_control::wire;
use kiln_vmm_fs::Prepared;

use crate::ends::{Fds, Overlays};
use crate::filter::{self, Kind};
use crate::jail::{self, Jail};
use crate::log;

pub(crate) use refusal::RequestError;

/// Who hears what happens in the machine.
#[derive(Debug)]
struct Watcher {
    answers: Arc<Answers>,
    follow: Mutex<Sender<HotplugAction>>,
}

/// Lines of a guest's console that are logged when it has ended by itself.
const LAST_WORDS: usize = 60;

impl Observer for Watcher {
    fn ended(&self, outcome: &Outcome, last_words: &str) {
        let code = match outcome {
            Outcome::PoweredOff | Outcome::Stopped => exit::ENDED,
            Outcome::Reset | Outcome::TripleFault => exit::RESET,
            Outcome::Panicked => exit::PANICKED,
            Outcome::Failed(_) => exit::FAILED,
        };
        let lines: Vec<&str> = last_words.lines().collect();
        for line in lines.iter().skip(lines.len().saturating_sub(LAST_WORDS)) {
            log::say(&format!("the guest's last words: {line}"));
        }
        log::say(&format!("the machine has ended: {outcome:?}"));
        // SAFETY: ends the process at once; nothing is buffered, and the kernel takes down VM and threads.
        unsafe { libc::_exit(code) }
    }

    fn hotplug(&self, action: HotplugAction) {
        self.answers.hear(action);
        // The receiver lives as long as the process.
        let follow = self.follow.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = follow.send(action);
    }
}

struct Server {
    machine: Arc<Machine>,
    answers: Arc<Answers>,
    kernel: String,
    overlays: Overlays,
}

/// Serves one machine.
pub(crate) fn run(args: impl Iterator<Item = String>, mut timeline: Timeline) -> Result<i32> {
    jail::close_inherited().context("closing what the process was started with")?;
    let jail = parse(args)?;
    let kvm: OwnedFd = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .context("/dev/kvm can't be opened; run `kiln doctor`")?
        .into();
    let files = Prepared::new(&kiln_vmm_fs::Options::default())?;
    jail::enter(&jail)?;
    let seed = std::thread::Builder::new().name("seed".to_owned()).spawn({
        let jail = jail.clone();
        move || {
            jail::become_user(&jail).map_err(VmError::Jail)?;
            VmSeed::create(Some(kvm))
        }
    })?;
    install_kick_handler()?;
    filter::install_handler()?;
    // SAFETY: descriptor 0 is the socket the client put there; nothing else in this process uses it.
    let socket = unsafe { UnixStream::from_raw_fd(0) };
    let events = EventLoop::new()?;
    timeline.mark("vmm.process");
    let Some((mut request, fds)) = wire::receive::<Request>(&socket, wire::MAX_FDS)? else {
        return Ok(exit::ENDED);
    };
    timeline.skip();
    let mut fds = Fds::new(fds);
    let (ends, rings) = take_ends(&mut request);
    // While rings may still be made.
    let rings = Rings::new(rings.into());
    let overlays = Overlays::default();
    let started = fds.ends(ends, Some(files), &overlays).and_then(|ends| {
        // From here on nothing has rights but the file server's thread, and that only if there is one.
        jail::become_user(&jail).context("changing user")?;
        filter::install(Kind::Control).context("installing the system call filter")?;
        timeline.mark("vmm.jail");
        let ends = (ends, rings);
        start(request, ends, fds, overlays, seed, &events, &mut timeline)
    });
    match started {
        Ok(server) => {
            let kernel = server.kernel.clone();
            wire::send(
                &socket,
                &Reply::Started {
                    kernel,
                    steps: timeline.steps().to_vec(),
                },
                &[],
            )?;
            serve(&server, &socket)
        }
        Err(e) => {
            wire::send(&socket, &refusal::of(&e), &[])?;
            Err(e)
        }
    }
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Jail> {
    let mut jail = Jail::default();
    while let Some(arg) = args.next() {
        let value = args
            .next()
            .with_context(|| format!("{arg} wants a value"))?;
        match arg.as_str() {
            "--uid" => jail.uid = Some(value.parse()?),
            "--gid" => jail.gid = Some(value.parse()?),
            "--root" => jail.root = Some(value.into()),
            _ => bail!("unknown option {arg}"),
        }
    }
    Ok(jail)
}

/// The host's sides, and for how many disks there are to be rings.
fn take_ends(request: &mut Request) -> (Vec<(u8, End)>, u8) {
    match request {
        Request::Boot { ends, rings, .. } | Request::Resume { ends, rings, .. } => {
            (std::mem::take(ends), *rings)
        }
        _ => (Vec::new(), 0),
    }
}

fn start(
    request: Request,
    (ends, rings): (HostEnds, Rings),
    mut fds: Fds,
    overlays: Overlays,
    seed: JoinHandle<Result<VmSeed, VmError>>,
    events: &EventLoop,
    timeline: &mut Timeline,
) -> Result<Server> {
    let (sender, receiver) = channel();
    let answers = Arc::new(Answers::default());
    let watcher = Arc::new(Watcher {
        answers: answers.clone(),
        follow: Mutex::new(sender),
    });
    let enter: kiln_vmm::machine::EnterVcpu = Arc::new(|| filter::install(Kind::Vcpu));
    let join = || {
        seed.join()
            .map_err(|_| anyhow!("the thread that makes the VM died"))?
            .map_err(Into::into)
    };
    let (machine, kernel) = match request {
        Request::Boot {
            machine,
            kernel,
            initrd,
            cmdline,
            console,
            ends: _,
            rings: _,
        } => {
            let spec = BootSpec {
                config: machine_config(machine),
                kernel: fds.file(kernel)?,
                initrd: initrd.map(|fd| fds.file(fd)).transpose()?,
                cmdline,
                console: console.map(|fd| fds.file(fd)).transpose()?,
                ends,
                rings,
            };
            let seed: Result<VmSeed> = join();
            Machine::boot(seed?, events.clone(), spec, watcher.clone(), enter)?
        }
        Request::Resume {
            state,
            memory,
            console,
            ends: _,
            rings: _,
            touched,
            one_by_one,
        } => {
            let bytes = snapshot::read_file(&mut fds.file(state)?)?;
            let (header, state) = snapshot::decode(&bytes)?;
            let memory = fds.file(memory)?;
            snapshot::check_memory_file(&header, &memory)?;
            timeline.mark("vmm.state");
            let source = FileSource {
                file: &memory,
                holes: &state.holes,
                singly: one_by_one,
            };
            let host_memory = HostMemory::from_file(state.config.memory.into(), &source)?;
            timeline.mark("vmm.map");
            let spec = ResumeSpec {
                state,
                memory,
                console: console.map(|fd| fds.file(fd)).transpose()?,
                ends,
                rings,
                touched,
            };
            let seed: Result<VmSeed> = join();
            timeline.mark("vmm.seed");
            let machine = Machine::resume(
                seed?,
                events.clone(),
                host_memory,
                spec,
                watcher.clone(),
                enter,
                timeline,
            )?;
            (machine, header.kernel)
        }
        _ => return Err(RequestError::NoMachine.into()),
    };
    let devices = events.clone();
    std::thread::Builder::new()
        .name("devices".to_owned())
        .spawn(move || {
            if let Err(e) = filter::install(Kind::Devices).and_then(|()| devices.run()) {
                log::say(&format!("the device thread ended: {e}"));
                std::process::abort();
            }
        })?;
    machine.start();
    timeline.mark("vmm.run");
    let (follow, told) = (machine.clone(), answers.clone());
    std::thread::Builder::new()
        .name("hotplug".to_owned())
        .spawn(move || {
            for action in receiver {
                if let Err(e) = follow.followed(action) {
                    tracing::warn!("can't follow up {action:?}: {e}");
                }
                told.wake();
            }
        })?;
    Ok(Server {
        machine,
        answers,
        kernel,
        overlays,
    })
}

fn serve(server: &Server, socket: &UnixStream) -> Result<i32> {
    let mut paused = None;
    while let Some((request, fds)) = wire::receive::<Request>(socket, wire::MAX_FDS)? {
        let stop = request == Request::Stop;
        let reply = match answer(server, &mut paused, request, Fds::new(fds)) {
            Ok(reply) => reply,
            Err(e) => refusal::of(&e),
        };
        wire::send(socket, &reply, &[])?;
        if stop {
            break;
        }
    }
    // The kernel takes down VM, vCPUs and devices with the process; waiting for it here would only make it slower.
    // SAFETY: nothing is buffered.
    unsafe { libc::_exit(exit::ENDED) }
}

fn answer<'s>(
    server: &'s Server,
    paused: &mut Option<Paused<'s>>,
    request: Request,
    mut fds: Fds,
) -> Result<Reply> {
    let machine = &server.machine;
    match request {
        Request::Boot { .. } | Request::Resume { .. } => {
            return Err(RequestError::SecondMachine.into());
        }
        Request::Snapshot {
            state,
            memory,
            digest,
            go_on,
        } => {
            let (mut state, memory) = (fds.file(state)?, fds.file(memory)?);
            let still = pause(machine, paused)?;
            let reply = save(still, &server.kernel, &mut state, &memory, digest);
            if go_on || reply.is_err() {
                *paused = None;
            }
            return reply;
        }
        Request::Memory => return Ok(Reply::Memory(machine.memory_places())),
        Request::SaveState {
            state,
            digest,
            holes,
        } => {
            let still = paused.as_ref().ok_or(RequestError::NotPaused)?;
            save_state(still, &server.kernel, &mut fds.file(state)?, digest, holes)?;
        }
        Request::Pause => {
            pause(machine, paused)?;
        }
        Request::Unpause => *paused = None,
        Request::AttachBlock {
            slot,
            fd,
            read_only,
        } => {
            let file = fds.file(fd)?;
            let slot = machine.attach_disk(slot, HostEnd::Disk { file, read_only })?;
            return Ok(Reply::Slot(slot));
        }
        Request::AttachOverlay { slot, overlay } => {
            let overlay = server.overlays.make(&mut fds, &overlay)?;
            let slot = machine.attach_disk(slot, HostEnd::Overlay(overlay))?;
            return Ok(Reply::Slot(slot));
        }
        Request::LimitOverlays { ram, spill_limit } => server.overlays.limit(ram, spill_limit)?,
        Request::DetachBlock { slot } => machine.detach_disk(&server.answers, slot)?,
        Request::SetNet { slot, taps, mac } => {
            machine.set_net(slot, fds.take_all(taps)?, mac)?;
        }
        Request::SaveOverlay { slot, into } => {
            let still = paused.as_ref().ok_or(RequestError::NotPaused)?;
            let bytes = still.save_overlay(slot, &fds.file(into)?)?;
            return Ok(Reply::SavedOverlay { bytes });
        }
        Request::PlugNet { taps, mac } => {
            let pairs = match u16::try_from(taps.len()) {
                Ok(pairs @ 1..) => pairs,
                _ => return Err(RequestError::Taps.into()),
            };
            let end = HostEnd::Tap(fds.take_all(taps)?);
            let slot = machine.plug_device(DeviceKind::Net { pairs, mac }, Some(end))?;
            return Ok(Reply::Slot(slot));
        }
        Request::Resize {
            cpus,
            memory,
            timeout_ms,
        } => {
            let timeout = Duration::from_millis(timeout_ms.into());
            machine.resize(&server.answers, cpus, memory, timeout)?;
            return Ok(stats(server));
        }
        Request::Stats => return Ok(stats(server)),
        Request::Stop => {}
    }
    Ok(Reply::Done)
}

/// Pausing a paused machine changes nothing.
fn pause<'p, 's>(
    machine: &'s Machine,
    paused: &'p mut Option<Paused<'s>>,
) -> Result<&'p Paused<'s>> {
    Ok(match paused {
        Some(still) => still,
        None => paused.insert(machine.pause()?),
    })
}

fn save(
    still: &Paused<'_>,
    kernel: &str,
    state: &mut File,
    memory: &File,
    digest: [u8; 32],
) -> Result<Reply> {
    let written = snapshot::write_memory(memory, &still.memory())?;
    // Last, so that a state file is only ever whole when its memory is.
    let state_bytes = save_state(still, kernel, state, digest, written.holes)?;
    Ok(Reply::Saved {
        state_bytes,
        data_pages: written.data_pages,
        zero_pages: written.zero_pages,
    })
}

/// Tells how long the file is.
fn save_state(
    still: &Paused<'_>,
    kernel: &str,
    into: &mut File,
    digest: [u8; 32],
    holes: Vec<(u64, u64)>,
) -> Result<u64> {
    let labels = Labels {
        kernel: kernel.to_owned(),
        digest,
    };
    let mut saved = still.save()?;
    saved.holes = holes;
    let bytes = snapshot::encode(&saved, &labels)?;
    snapshot::write_file(into, &bytes)?;
    Ok(bytes.len() as u64)
}

fn stats(server: &Server) -> Reply {
    let machine = &server.machine;
    let s = machine.stats();
    let devices = machine
        .device_specs()
        .into_iter()
        .map(|spec| api::DeviceInfo {
            attached: machine.disk_attached(spec.slot).unwrap_or(false),
            spec,
        })
        .collect();
    Reply::Stats {
        cpus: s.cpus,
        memory: s.memory,
        paused: s.paused,
        devices,
        overlays: server.overlays.figures(),
    }
}

fn machine_config(m: api::MachineSpec) -> MachineConfig {
    MachineConfig {
        boot_cpus: m.cpus,
        max_cpus: m.max_cpus,
        memory: MemoryShape {
            ram: m.memory,
            hotplug: m.hotplug,
            usable: 0,
        },
        serial: m.serial,
        devices: m.devices,
    }
}
