//! `kiln run`, and what one does with what it started: `exec`, `save`, `ps`, `console`.
//!
//! The process that runs a μVM owns it: the VMM ends with it, whatever ends it. There is no daemon.

mod fresh;
mod from;
mod guest;
pub(crate) mod net;
mod place;
mod saving;
mod seccomp;
mod session;
mod spec;
mod terminal;
mod volumes;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail, ensure};
use kiln_agent_api::client::Vsock;
use kiln_agent_api::proto;
use kiln_agent_api::stream::TOKEN_LEN;
use kiln_node::config::Config;
use kiln_overlay::Budget;
use kiln_store::private;
use kiln_uvm::guest::{Agent, Guest};
use kiln_uvm::jail::Jail;
use kiln_uvm::launch::{HostSide, Tap};
use kiln_uvm::machine::{Machine, Start as StartVmm, in_time};
use kiln_uvm::scratch::{Scratch, ScratchLimits, join_budget, spill_file};
use kiln_uvm::timeline::{Timeline, Trace};
use kiln_uvm::uvm::Uvm;
use kiln_uvm::{Flush, jail, random, words};

use crate::args;
use crate::failure::Failure;
use crate::output::{Output, size};
use crate::trace;
use fresh::Fresh;
use from::Earlier;
use guest::{CONTAINER, NotStarted, Process};
use place::{Facts, PLACES, Place};
pub(crate) use saving::save;
use saving::{Door, Running};
use session::{Session, Signals};
use spec::Wanted;

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
    let what = match (&options.from, &options.image) {
        (Some(name), _) => What::Saved(Box::new(Earlier::open(config, options, name)?)),
        (None, Some(archive)) => What::Image(Box::new(Fresh::open(config, options, archive)?)),
        (None, None) => bail!("give an image archive, or what was saved (--from)"),
    };
    finish(resume_and_attend(config, options, what))
}

/// A terminal that is asked for has to be one.
fn check_terminal(wanted: bool) -> Result<()> {
    ensure!(
        !wanted || terminal::is_terminal(0),
        "-t needs a terminal on standard input: leave it out"
    );
    Ok(())
}

/// What is started.
enum What<'a> {
    Image(Box<Fresh<'a>>),
    Saved(Box<Earlier<'a>>),
}

async fn resume_and_attend(config: &Config, options: &args::Run, what: What<'_>) -> Result<u8> {
    let mut signals = Signals::listen()?;
    let timeline = Timeline::default();
    let name = match &options.name {
        Some(name) => name.clone(),
        None => random::hex::<4>().context("making a name")?,
    };
    let place = Place::make_here(&name)?;
    let door = Door::open(&place)?;
    let started = async {
        Ok(match what {
            What::Image(fresh) => fresh.run(&name, &place, &timeline).await,
            What::Saved(earlier) => earlier.resume(&name, &place, &timeline).await,
        })
    };
    let started = in_time("start the command", START_LIMIT, started);
    let running = tokio::select! {
        running = started => running??,
        number = signals.end() => return Ok(128 + number.unsigned_abs() as u8),
    };
    if options.timings {
        eprint!("{}", trace::drawn(&timeline.steps(), str::to_owned));
    }
    attend(config, options, &running, &door, &mut signals).await
}

/// Stays with what runs until it ends, or is saved and ended.
async fn attend(
    config: &Config,
    options: &args::Run,
    running: &Running,
    door: &Door,
    signals: &mut Signals,
) -> Result<u8> {
    let uvm = &running.uvm;
    let mut process = running.container.process();
    // What is resumed may have an input that nobody wants now; it waits for one.
    process.stdin &= options.interactive;
    let session = Session::attach(uvm.agent(), &process);
    let session = unless_it_ends(uvm, session).await?;
    let mut talk = std::pin::pin!(session.run(signals));
    let saved = tokio::select! {
        code = unless_it_ends(uvm, talk.as_mut()) => return code,
        saved = door.serve(config, running) => saved?,
    };
    uvm.stop().await?;
    // What it has said may still be on its way; that nobody answers any more is known.
    drop(talk.await);
    eprintln!("kiln: saved as {saved}, and ended");
    Ok(0)
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

fn limits(config: &Config, options: &args::Run) -> ScratchLimits {
    ScratchLimits {
        ram: options.overlay_ram.unwrap_or(config.overlay.ram),
        disk: options.overlay_disk.unwrap_or(config.overlay.disk),
    }
}

fn jail_of_vmms(config: &Config) -> Result<Option<Jail>> {
    Ok(jail::of_this_process(config.vmm_ids)?)
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

/// What of the host's side differs between what is started.
struct HostFiles {
    /// The budget is that of the pods, and root's as they are.
    shares_budget: bool,
    share: Option<File>,
    taps: Vec<Tap>,
}

/// The host's side of a μVM whose socket, console and log are in `place`.
fn host_side(
    config: &Config,
    options: &args::Run,
    place: &Place,
    limits: ScratchLimits,
    files: HostFiles,
) -> Result<HostSide> {
    let socket = place.path("vsock");
    let listener = UnixListener::bind(&socket)
        .with_context(|| format!("listening on {}", socket.display()))?;
    let console = private::create(&place.path("console")).context("making the console's file")?;
    let seat = if files.shares_budget {
        let path = config.state_dir.join(Budget::FILE_NAME);
        Some(join_budget(&path, config.overlay_node_ram, limits.ram)?.into())
    } else {
        None
    };
    let spill = options.overlay_dir.as_ref();
    let spill = spill_file(spill.unwrap_or(&config.overlay_dir))?;
    Ok(HostSide {
        vsock: (socket, listener),
        scratch: Scratch {
            limits,
            flush: Flush::None,
            spill: Some(spill.into()),
            seat,
        },
        share: files.share,
        taps: files.taps,
        console: Some(console),
    })
}

/// What `kiln ps` and `kiln exec` are told.
fn facts(name: &str, running: &Running, size: &proto::ResourceState) -> Result<Facts> {
    let (uvm, container) = (&running.uvm, &running.container);
    let id = uvm.baked().map(|lease| lease.id().to_string());
    Ok(Facts {
        name: name.to_owned(),
        pid: std::process::id(),
        vmm: uvm.pid(),
        uvm: id.unwrap_or_default(),
        image: container.image.clone(),
        command: serde_json::from_value(container.process["args"].clone())?,
        started: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs(),
        cpus: size.cpus_online,
        memory: size.memory_online_bytes,
        process: container.process.clone(),
    })
}

fn keep_trace(place: &Place, timeline: &Timeline) {
    for path in [place.path(TRACE), last_trace()] {
        // The container is none the worse for it.
        if let Err(error) = Trace::new(path, timeline.clone()).save() {
            eprintln!("kiln: the timeline is not kept: {error}");
        }
    }
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
