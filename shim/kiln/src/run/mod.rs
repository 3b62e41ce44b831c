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
mod uvm;
mod volumes;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use kiln_agent_api::stream::TOKEN_LEN;
use kiln_vmm_control::{ScratchLimits, spill_file};

use crate::args;
use crate::failure::Failure;
use crate::image::{self, Image};
use crate::output::{Output, size};
use crate::trace::{self, Timeline};
use guest::{Guest, NotStarted, Process};
use net::Net;
use place::{Facts, PLACES, Place};
use session::{Session, Signals};
use spec::Wanted;
use uvm::{Ends, Size, Uvm, in_time};
use volumes::{Volume, Volumes};

/// Exit code of `kiln run` and `kiln exec` when it is kiln that failed, not the command.
const OWN_FAILURE: u8 = 125;
/// How long a resumed guest may take for what a person waits for: many at once on a slow machine take long.
const START_LIMIT: Duration = Duration::from_secs(120);
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
    Ok(kiln_bake::random("making a token")?)
}

/// Runs `work`, and gives up its threads: one of them may wait for a key for ever.
fn finish(work: impl Future<Output = Result<u8>>) -> Result<u8> {
    let runtime = runtime()?;
    let result = runtime.block_on(work);
    runtime.shutdown_background();
    result
}

/// `kiln run`.
pub(crate) fn run(store: &Path, options: &args::Run) -> ExitCode {
    exit(start(store, options))
}

fn start(store: &Path, options: &args::Run) -> Result<u8> {
    check_terminal(options.tty)?;
    let image = Image::open(&options.image)?;
    let user = options.user.as_deref().unwrap_or(&image.defaults.user);
    let wanted = Wanted {
        command: &options.command,
        entrypoint: options.entrypoint.as_deref(),
        environment: &options.env,
        directory: options.workdir.as_deref(),
        owner: image::user(user, &image)?,
        terminal: options.tty,
    };
    let process = spec::process(&wanted, &image.defaults)?;
    let volumes = options
        .volumes
        .iter()
        .map(|text| Volume::parse(text))
        .collect::<Result<Vec<_>>>()?;
    let volumes = Volumes::make(&volumes)?;
    let net = Net::open(&options.net, &options.ip, &options.gateway, &options.dns)?;
    let seccomp = seccomp::profile(options.seccomp.as_deref())?;
    let vmm = crate::bake::program(options.vmm.as_deref(), "kiln-vmm", "--vmm")?;
    finish(resume_and_run(Start {
        store,
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
    store: &'a Path,
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
    let mut timeline = Timeline::begin();
    let options = start.options;
    let want = Size {
        cpus: options.cpus,
        memory: options.memory,
    };
    let lease = uvm::lease(start.store, want)?;
    let id = lease.id();
    timeline.since("store.lease", 0);
    let name = match &options.name {
        Some(name) => name.clone(),
        None => {
            let random: [u8; 4] = kiln_bake::random("making a name")?;
            random.map(|byte| format!("{byte:02x}")).concat()
        }
    };
    let hostname = options.hostname.as_deref().unwrap_or(&name);
    let place = Place::make_here(&name)?;
    let at = timeline.now();
    let root = start.image.root(start.store)?;
    let image_bytes = root.file.metadata()?.len();
    timeline.since("image.root", at);
    let scratch = ScratchLimits {
        ram: options.overlay_ram,
        disk: options.overlay_disk,
    };
    let ends = Ends {
        root: root.file,
        share: start.volumes.as_ref().map(Volumes::open).transpose()?,
        cable: start.net.cable()?,
        spill: spill_file(&options.overlay_dir)?,
        scratch,
    };
    let at = timeline.now();
    let uvm = Uvm::resume(&start.vmm, lease, &place, ends).await?;
    timeline.since("uvm.resume", at);
    timeline.add_vmm(at, &uvm.steps);

    let process = Process {
        exec: String::new(),
        token: token()?,
        stdin: options.interactive,
        terminal: options.tty,
    };
    let set_up = in_time("start the command", START_LIMIT, async {
        let at = timeline.now();
        let guest = Guest::connect(&place.path("vsock")).await?;
        timeline.since("agent.connect", at);
        let at = timeline.now();
        let identity = guest
            .set_identity(hostname, scratch, start.net.in_the_guest()?)
            .await?;
        timeline.since("agent.identity", at);
        timeline.add_guest(at, &identity.spans);
        let at = timeline.now();
        uvm.resize(want).await?;
        let state = guest.set_cpus(want.cpus.max(uvm.class().cpus)).await?;
        timeline.since("uvm.resize", at);
        place.tell(&Facts {
            name: name.clone(),
            pid: std::process::id(),
            vmm: uvm.pid(),
            uvm: id.to_string(),
            image: fs::canonicalize(&options.image)?,
            command: serde_json::from_value(start.process["args"].clone())?,
            started: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default()
                .as_secs(),
            cpus: state.cpus_online,
            memory: state.memory_online_bytes,
            process: start.process.clone(),
        })?;
        let at = timeline.now();
        guest.write_files(hostname, start.net.resolv_conf()).await?;
        timeline.since("agent.files", at);
        let binds = start.volumes.as_ref().map_or(&[][..], Volumes::binds);
        let base = u64::from(uvm.class().memory_mib) << 20;
        // A guest cannot be smaller than it was baked; its container can.
        let limit = options.memory.filter(|memory| *memory < base);
        let spec = spec::container(
            &start.process,
            hostname,
            limit,
            binds,
            start.seccomp.as_ref(),
        );
        let mounts = guest::mounts(image_bytes, start.volumes.is_some());
        let at = timeline.now();
        let made = guest
            .start(&spec, &process, mounts, terminal::size())
            .await?;
        timeline.since("agent.start", at);
        timeline.add_guest(at, &made.spans);
        for path in [place.path(TRACE), last_trace()] {
            // The container is none the worse for it.
            if let Err(error) = timeline.save(&path) {
                eprintln!("kiln: the timeline is not kept: {error:#}");
            }
        }
        Ok(guest)
    });
    let guest = tokio::select! {
        result = set_up => match result {
            Ok(guest) => guest,
            Err(error) if error.is::<NotStarted>() => return Err(error),
            Err(error) => return Err(uvm.reason(error).await),
        },
        error = uvm.ended() => return Err(error),
        number = signals.end() => return Ok(128 + number.unsigned_abs() as u8),
    };
    if options.timings {
        eprint!("{}", trace::drawn(&timeline.steps(), str::to_owned));
    }
    let session = Session::attach(&guest, &process).await;
    let code = tokio::select! {
        code = async { session?.run(&mut signals).await } => code,
        error = uvm.ended() => Err(error),
    };
    let code = match code {
        Err(error) => Err(uvm.reason(error).await),
        code => code,
    };
    uvm.end();
    code
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
    let random: [u8; 8] = kiln_bake::random("making an id")?;
    let process = Process {
        exec: random.map(|byte| format!("{byte:02x}")).concat(),
        token: token()?,
        stdin: options.interactive,
        terminal: options.tty,
    };
    finish(async {
        let mut signals = Signals::listen()?;
        let guest = Guest::connect(&socket).await?;
        guest.exec(&spec, &process, terminal::size()).await?;
        let session = Session::attach(&guest, &process).await;
        let code = async { session?.run(&mut signals).await }.await;
        // The container may have ended meanwhile, and with it the books.
        drop(guest.delete(&process).await);
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
