//! `kiln run`, and what one does with what it started: `exec`, `ps`, `console`.
//!
//! The process that runs a μVM owns it: the VMM ends with it, whatever ends it. There is no daemon.

mod guest;
pub(crate) mod net;
mod place;
mod seccomp;
mod session;
mod spec;
mod terminal;
mod volumes;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, ensure};
use kiln_agent_api::client::Vsock;
use kiln_agent_api::stream::TOKEN_LEN;
use kiln_node::config::Config;
use kiln_oci::Image;
use kiln_overlay::Budget;
use kiln_store::private;
use kiln_uvm::baked::Baked;
use kiln_uvm::guest::{Agent, Guest, Identity};
use kiln_uvm::jail::Jail;
use kiln_uvm::launch::{HostSide, Order, launch};
use kiln_uvm::machine::{Machine, Start as StartVmm, in_time};
use kiln_uvm::scratch::{Scratch, ScratchLimits, join_budget, spill_file};
use kiln_uvm::size::{BLOCK, Size};
use kiln_uvm::timeline::{Timeline, Trace, step};
use kiln_uvm::uvm::Uvm;
use kiln_uvm::{Flush, jail, pick, random, share, words};

use crate::args;
use crate::failure::Failure;
use crate::output::{Output, size};
use crate::trace;
use guest::{CONTAINER, NotStarted, Process};
use net::Net;
use place::{Facts, PLACES, Place};
use session::{Session, Signals};
use spec::Wanted;
use volumes::{Volume, Volumes};

/// Exit code of `kiln run` and `kiln exec` when it is kiln that failed, not the command.
const OWN_FAILURE: u8 = 125;
/// How long a resumed guest may take for what a person waits for: many at once on a slow machine take long.
const START_LIMIT: Duration = Duration::from_secs(120);
/// How much later than its connections a VMM may end.
const END_LIMIT: Duration = Duration::from_millis(500);
/// The timeline of a μVM's start, in its place.
const TRACE: &str = "trace.json";
/// How often a console that is followed is looked at.
const FOLLOW: Duration = Duration::from_millis(200);

/// The command's own exit code, or one that says that it never ran.
fn exit(result: Result<u8>) -> ExitCode {
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("kiln: {error:#}");
            let not_started = error.downcast_ref::<NotStarted>();
            ExitCode::from(not_started.map_or(OWN_FAILURE, |error| error.code))
        }
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the runtime")
}

fn token() -> Result<[u8; TOKEN_LEN]> {
    random::bytes().context("making a token")
}

/// Runs `work`, and gives up its threads: one of them may wait for a key for ever.
fn finish(work: impl Future<Output = Result<u8>>) -> Result<u8> {
    let runtime = runtime()?;
    let result = runtime.block_on(work);
    runtime.shutdown_background();
    result
}

/// `kiln run`.
pub(crate) fn run(config: &Config, options: &args::Run) -> ExitCode {
    exit(start(config, options))
}

fn start(config: &Config, options: &args::Run) -> Result<u8> {
    check_terminal(options.tty)?;
    let image = Image::open(&options.image)?;
    let user = options.user.as_deref().unwrap_or(&image.defaults().user);
    let wanted = Wanted {
        command: &options.command,
        entrypoint: options.entrypoint.as_deref(),
        environment: &options.env,
        directory: options.workdir.as_deref(),
        owner: image.user(user)?,
        terminal: options.tty,
    };
    let process = spec::process(&wanted, image.defaults())?;
    let volumes = options
        .volumes
        .iter()
        .map(|text| Volume::parse(text))
        .collect::<Result<Vec<_>>>()?;
    let volumes = Volumes::make(&volumes)?;
    let net = Net::open(&options.net, &options.ip, &options.gateway, &options.dns)?;
    let seccomp = seccomp::profile(options.seccomp.as_deref())?;
    let vmm = crate::bake::vmm(options.vmm.as_deref(), config)?;
    finish(resume_and_run(Start {
        config,
        options,
        image,
        process,
        volumes,
        net,
        seccomp,
        vmm,
    }))
}

/// A terminal that is asked for has to be one.
fn check_terminal(wanted: bool) -> Result<()> {
    ensure!(
        !wanted || terminal::is_terminal(0),
        "-t needs a terminal on standard input: leave it out"
    );
    Ok(())
}

/// All that is known before anything is resumed.
struct Start<'a> {
    config: &'a Config,
    options: &'a args::Run,
    image: Image,
    process: serde_json::Value,
    volumes: Option<Volumes>,
    net: Net,
    seccomp: Option<serde_json::Value>,
    vmm: PathBuf,
}

async fn resume_and_run(start: Start<'_>) -> Result<u8> {
    let mut signals = Signals::listen()?;
    let timeline = Timeline::default();
    let options = start.options;
    let name = match &options.name {
        Some(name) => name.clone(),
        None => random::hex::<4>().context("making a name")?,
    };
    let place = Place::make_here(&name)?;
    let process = Process {
        exec: String::new(),
        token: token()?,
        stdin: options.interactive,
        terminal: options.tty,
    };
    let started = in_time("start the command", START_LIMIT, async {
        Ok(async {
            let resumed = resume(&start, &name, &place, &timeline);
            let uvm = timeline.of(step::LAUNCH, resumed).await?;
            let begun = begin(&start, &name, &place, &process, &uvm, &timeline);
            unless_it_ends(&uvm, begun).await?;
            anyhow::Ok(uvm)
        }
        .await)
    });
    let uvm = tokio::select! {
        uvm = started => uvm??,
        number = signals.end() => return Ok(128 + number.unsigned_abs() as u8),
    };
    if options.timings {
        eprint!("{}", trace::drawn(&timeline.steps(), str::to_owned));
    }
    let session = Session::attach(uvm.agent(), &process).await;
    unless_it_ends(&uvm, async { session?.run(&mut signals).await }).await
}

/// Does something with a μVM as long as it runs. A guest that does not answer may be one whose machine has ended.
async fn unless_it_ends<T>(uvm: &Uvm, work: impl Future<Output = Result<T>>) -> Result<T> {
    let ended = |end| Err(anyhow!("the μVM ended: {end}"));
    let result = tokio::select! {
        result = work => result,
        end = uvm.ended() => return ended(end),
    };
    match result {
        Err(error) if !error.is::<NotStarted>() => {
            match tokio::time::timeout(END_LIMIT, uvm.ended()).await {
                Ok(end) => ended(end),
                Err(_) => Err(error),
            }
        }
        result => result,
    }
}

/// Resumes a μVM of the store in a VMM whose socket, console and log are in `place`.
async fn resume(start: &Start<'_>, name: &str, place: &Place, timeline: &Timeline) -> Result<Uvm> {
    let options = start.options;
    let size = Size {
        cpus: options.cpus,
        memory: options
            .memory
            .unwrap_or(start.config.memory_without_limit())
            .next_multiple_of(BLOCK),
    };
    let limits = ScratchLimits {
        ram: options.overlay_ram.unwrap_or(start.config.overlay.ram),
        disk: options.overlay_disk.unwrap_or(start.config.overlay.disk),
    };
    let jail = jail::of_this_process(start.config.vmm_ids)?;
    // The budget is that of the pods, and root's as they are.
    let shares_budget = jail.is_some();
    // A store without a fitting μVM costs no process.
    let lease = timeline.time(step::FILES, || pick::lease(&start.config.store, size))?;
    let machine = timeline.time(step::SPAWN, || spawn(&start.vmm, jail, place))?;
    let (baked, host) = timeline.time(step::FILES, || {
        let host = host_side(start, place, limits, shares_budget)?;
        anyhow::Ok((Baked::open(lease)?, host))
    })?;
    let order = Order {
        size,
        identity: Identity {
            hostname: options.hostname.as_deref().unwrap_or(name).to_owned(),
            network: Some(start.net.in_the_guest()?),
            mounts: start.volumes.iter().map(|_| share::guest_mount()).collect(),
            scratch_limit: limits.content(),
            ..Default::default()
        },
        patient: true,
    };
    Ok(launch(machine, baked, host, order, timeline).await?)
}

fn spawn(program: &Path, jail: Option<Jail>, place: &Place) -> Result<Machine> {
    let mut log = private::create(&place.path("vmm.log")).context("making the VMM's log")?;
    let tell = move |line: &str| {
        // Its last line is kept in any case.
        let _ = writeln!(log, "{line}");
    };
    let (log, words) = words::pipe(tell).context("making a pipe for the VMM's log")?;
    Ok(Machine::start(StartVmm {
        program,
        jail,
        log,
        words: Some(words),
        oom_kills: Box::new(|| false),
    })?)
}

fn host_side(
    start: &Start<'_>,
    place: &Place,
    limits: ScratchLimits,
    shares_budget: bool,
) -> Result<HostSide> {
    let socket = place.path("vsock");
    let listener = UnixListener::bind(&socket)
        .with_context(|| format!("listening on {}", socket.display()))?;
    let console = private::create(&place.path("console")).context("making the console's file")?;
    let config = start.config;
    let seat = if shares_budget {
        let path = config.state_dir.join(Budget::FILE_NAME);
        Some(join_budget(&path, config.overlay_node_ram, limits.ram)?.into())
    } else {
        None
    };
    let spill = start.options.overlay_dir.as_ref();
    let spill = spill_file(spill.unwrap_or(&config.overlay_dir))?;
    Ok(HostSide {
        vsock: (socket, listener),
        scratch: Scratch {
            limits,
            flush: Flush::None,
            spill: Some(spill.into()),
            seat,
        },
        share: start.volumes.as_ref().map(Volumes::open).transpose()?,
        taps: start.net.taps()?,
        console: Some(console),
    })
}

/// Starts the command in its container.
async fn begin(
    start: &Start<'_>,
    name: &str,
    place: &Place,
    process: &Process,
    uvm: &Uvm,
    timeline: &Timeline,
) -> Result<()> {
    let options = start.options;
    let hostname = options.hostname.as_deref().unwrap_or(name);
    let begun = timeline.now();
    let root = start.image.root(&start.config.store)?;
    let found = if root.made {
        step::IMAGE_MAKE
    } else {
        step::IMAGE_FIND
    };
    timeline.add(found, begun, timeline.now() - begun);
    let attached = timeline.of(step::PLUG_ROOT, uvm.attach_disk(root.file, true));
    let disk = attached.await?;
    let files = guest::write_files(uvm.agent(), hostname, start.net.resolv_conf());
    timeline.of(step::GUEST_FILES, files).await?;
    let size = uvm.grown().await?;
    let id = uvm.baked().map(|lease| lease.id().to_string());
    place.tell(&Facts {
        name: name.to_owned(),
        pid: std::process::id(),
        vmm: uvm.pid(),
        uvm: id.unwrap_or_default(),
        image: fs::canonicalize(&options.image)?,
        command: serde_json::from_value(start.process["args"].clone())?,
        started: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs(),
        cpus: size.cpus_online,
        memory: size.memory_online_bytes,
        process: start.process.clone(),
    })?;
    let binds = start.volumes.as_ref().map_or(&[][..], Volumes::binds);
    // A guest cannot be smaller than it was baked; its container can.
    let base = Size::of(uvm.class()).memory;
    let limit = options.memory.filter(|memory| *memory < base);
    let spec = spec::container(
        &start.process,
        hostname,
        limit,
        binds,
        start.seccomp.as_ref(),
    );
    let (agent, terminal) = (uvm.agent(), terminal::size());
    guest::start(agent, &spec, process, &disk, terminal, timeline).await?;
    for path in [place.path(TRACE), last_trace()] {
        // The container is none the worse for it.
        if let Err(error) = Trace::new(path, timeline.clone()).save() {
            eprintln!("kiln: the timeline is not kept: {error}");
        }
    }
    Ok(())
}

/// The timeline of the last `kiln run` that got as far as its command.
pub(crate) fn last_trace() -> PathBuf {
    Path::new(PLACES).join(".last-trace.json")
}

/// The timeline of what runs by this name, if something does.
pub(crate) fn trace_of(name: &str) -> Result<Option<PathBuf>> {
    let all = place::all(Path::new(PLACES))?;
    let runs = all.iter().any(|one| one.name == name);
    Ok(runs.then(|| Path::new(PLACES).join(name).join(TRACE)))
}

/// `kiln exec`.
pub(crate) fn exec(options: &args::Exec) -> ExitCode {
    exit(exec_in(options))
}

fn exec_in(options: &args::Exec) -> Result<u8> {
    check_terminal(options.tty)?;
    let (facts, socket) = place::find(Path::new(PLACES), &options.name, "vsock")?;
    let wanted = Wanted {
        command: &options.command,
        environment: &options.env,
        directory: options.workdir.as_deref(),
        terminal: options.tty,
        ..Wanted::default()
    };
    let spec = spec::exec_process(&facts.process, &wanted, options.user.as_deref())?;
    let process = Process {
        exec: random::hex::<8>().context("making an id")?,
        token: token()?,
        stdin: options.interactive,
        terminal: options.tty,
    };
    finish(async {
        let mut signals = Signals::listen()?;
        let guest = Agent::connect(&Vsock::new(socket)).await?;
        guest::exec(&guest, &spec, &process, terminal::size()).await?;
        let session = Session::attach(&guest, &process).await;
        let code = async { session?.run(&mut signals).await }.await;
        // The container may have ended meanwhile, and with it the books.
        drop(guest.delete(CONTAINER, &process.exec).await);
        code
    })
}

/// `kiln ps`.
pub(crate) fn ps(output: &Output) -> Result<ExitCode, Failure> {
    let all = place::all(Path::new(PLACES))?;
    if output.is_json() {
        output.json(&all)?;
        return Ok(ExitCode::SUCCESS);
    }
    if all.is_empty() {
        output.text("Nothing runs: `kiln run IMAGE.tar` starts a container.\n")?;
        return Ok(ExitCode::SUCCESS);
    }
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let mut rows = vec![
        ["NAME", "PID", "VMM", "UP", "CPUS", "MEMORY", "COMMAND"]
            .map(str::to_owned)
            .to_vec(),
    ];
    rows.extend(all.iter().map(|one| {
        vec![
            one.name.clone(),
            one.pid.to_string(),
            one.vmm.to_string(),
            format!("{} s", now.saturating_sub(one.started)),
            one.cpus.to_string(),
            size(one.memory),
            one.command.join(" "),
        ]
    }));
    output.text(&crate::output::table(&rows))?;
    Ok(ExitCode::SUCCESS)
}

/// `kiln console`.
pub(crate) fn console(options: &args::Console) -> Result<ExitCode, Failure> {
    let (_, path) = place::find(Path::new(PLACES), &options.name, "console")?;
    let mut file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
    let mut stdout = io::stdout().lock();
    loop {
        let mut text = Vec::new();
        file.read_to_end(&mut text)
            .with_context(|| format!("reading {}", path.display()))?;
        stdout.write_all(&text).and_then(|()| stdout.flush())?;
        // Removed with the μVM.
        if !options.follow || !path.exists() {
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(FOLLOW);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_that_never_ran_has_its_own_exit_codes() {
        let same = |result, code: u8| {
            let (found, wanted) = (exit(result), ExitCode::from(code));
            assert_eq!(format!("{found:?}"), format!("{wanted:?}"));
        };
        same(Ok(7), 7);
        same(Err(anyhow::anyhow!("x")), OWN_FAILURE);
    }
}
