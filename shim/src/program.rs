//! The four things the binary does.

use std::env;
use std::fs;
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::{Message, MessageField};

use crate::bootstrap::{self, Action, Answer, Args, Fork, ShimSocket, StartParams, StartProtocol};
use crate::events::Exit;
use crate::record::{PodDir, ProcessRef, Record};
use crate::server::Shim;
use crate::spec::Spec;
use crate::time::timestamp;
use crate::uvm::Launcher;
use crate::{cleanup, features, log};
use kiln_node::config::{AnswerForm, Config};

/// The longest input anybody sends.
const LONGEST_INPUT: u64 = 10 << 20;

/// Runs the program. `launcher` makes what starts μVMs, in the background process only.
pub fn main<L>(launcher: L) -> Result<()>
where
    L: FnOnce(&Shim) -> Arc<dyn Launcher>,
{
    let args = Args::parse(env::args().skip(1))?;
    match args.action {
        Action::Version => version(),
        Action::Info => info(),
        Action::Start => start(&args, launcher),
        Action::Delete => delete(&args),
    }
}

fn version() -> Result<()> {
    writeln!(
        io::stdout(),
        "containerd-shim-kiln-v2:\n  Version:  {}",
        env!("CARGO_PKG_VERSION")
    )?;
    Ok(())
}

/// `-info`: the options on standard input are of no use to it.
fn info() -> Result<()> {
    let info = RuntimeInfo {
        name: "io.containerd.kiln.v2".to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        }),
        features: MessageField::some(features::message()),
        ..Default::default()
    };
    io::stdout().write_all(&info.write_to_bytes()?)?;
    Ok(())
}

fn start<L>(args: &Args, launcher: L) -> Result<()>
where
    L: FnOnce(&Shim) -> Arc<dyn Launcher>,
{
    let params = StartParams::read(
        &read_input()?,
        args,
        &env::var("TTRPC_ADDRESS").unwrap_or_default(),
    );
    let path = params
        .options
        .as_ref()
        .and_then(bootstrap::runtime_options_config_path);
    let config = Config::load(path.as_deref().map(Path::new))?;
    let bundle = env::current_dir().context("find the bundle (the working directory)")?;
    // With the Sandbox API there is no specification yet.
    let spec = if bundle.join("config.json").exists() {
        Some(Spec::load(&bundle)?)
    } else {
        None
    };
    let group = match spec.as_ref().and_then(Spec::group) {
        Some(group) if bootstrap::is_identifier(group) => group.to_owned(),
        Some(group) => anyhow::bail!("the pod's id {group:?} is not a valid identifier"),
        None => args.id.clone(),
    };
    let address = bootstrap::address_for(
        params.socket_dir.as_deref(),
        &params.grpc_address,
        &args.namespace,
        &group,
    );
    let dir = PodDir::new(&config.state_dir, &args.namespace, &group);
    // SAFETY: nothing so far has started a thread.
    match unsafe { bootstrap::fork_daemon() }.context("go into the background")? {
        Fork::Daemon { starter, mut tell } => {
            // What is made is made on this side: `start` may be killed at any moment, and this side sees to the rest.
            let begun = begin(&bundle, &address, &dir);
            let word = match &begun {
                Ok(Some(_)) => vec![SERVING],
                Ok(None) => vec![FOUND],
                Err(error) => format!("{error:#}").into_bytes(),
            };
            // That `start` is gone is noticed where its answer is waited for.
            let _ = tell.write_all(&word);
            drop(tell);
            let Some(listener) = begun? else {
                return Ok(());
            };
            let shim = Shim {
                namespace: args.namespace.clone(),
                group,
                bundle,
                address,
                ttrpc_address: params.ttrpc_address.clone(),
                debug: params.debug,
                config,
            };
            run_in_background(shim, starter, listener, spec.as_ref(), launcher)
        }
        Fork::Starter {
            daemon,
            mut told,
            mut answered,
        } => {
            let mut word = Vec::new();
            told.read_to_end(&mut word)
                .context("hear how the shim began")?;
            match word.as_slice() {
                [SERVING] => {}
                [FOUND] => {
                    let given_before = dir.load().and_then(|record| record.answer);
                    return answer(&params, &config, given_before, address);
                }
                [] => {
                    if !bootstrap::is_alive(&address) {
                        cleanup::pod(&dir, &address);
                    }
                    anyhow::bail!("the shim was killed as it began");
                }
                error => anyhow::bail!("{}", String::from_utf8_lossy(error)),
            }
            // A shim that is killed a little later than it should be is no reason not to start.
            let _ = bootstrap::adjust_oom_score(daemon);
            answer(&params, &config, None, address)?;
            answered
                .write_all(&[1])
                .context("tell the shim that it is known")
        }
    }
}

/// What the shim says of its beginning, if not what went wrong: it serves, or has found one that does.
const SERVING: u8 = 1;
const FOUND: u8 = 2;

/// Makes the pod's socket and record, unless there is a shim that has.
fn begin(bundle: &Path, address: &str, dir: &PodDir) -> Result<Option<UnixListener>> {
    let ShimSocket::New(listener) = bootstrap::bind_or_find(address)? else {
        write_address(bundle, address)?;
        return Ok(None);
    };
    let made = (|| {
        write_address(bundle, address)?;
        dir.create()
            .with_context(|| format!("make {}", dir.path().display()))?;
        let record = Record {
            bundle: Some(bundle.to_owned()),
            address: Some(address.to_owned()),
            ..Record::default()
        };
        dir.save(&record).context("write the pod's record")
    })();
    if let Err(error) = made {
        // Best effort, so that the next start finds nothing half-made.
        let _ = bootstrap::remove(address);
        let _ = dir.remove();
        return Err(error);
    }
    Ok(Some(listener))
}

fn run_in_background<L>(
    shim: Shim,
    starter: io::PipeReader,
    listener: UnixListener,
    spec: Option<&Spec>,
    launcher: L,
) -> Result<()>
where
    L: FnOnce(&Shim) -> Arc<dyn Launcher>,
{
    let dir = shim.pod_dir();
    let mut record = dir.load().unwrap_or_default();
    record.shim = i32::try_from(std::process::id())
        .ok()
        .and_then(ProcessRef::of);
    dir.save(&record).context("write the pod's record")?;
    shim.run(starter, listener, spec, launcher).context("serve")
}

/// Tells containerd where the shim listens, in the form it takes.
fn answer(
    params: &StartParams,
    config: &Config,
    given_before: Option<AnswerForm>,
    address: String,
) -> Result<()> {
    let form = match params.protocol {
        StartProtocol::Bootstrap => AnswerForm::Protobuf,
        StartProtocol::Legacy => given_before
            .filter(|form| *form != AnswerForm::Protobuf)
            .or(config.answer)
            .unwrap_or_else(|| legacy_form(&params.grpc_address)),
    };
    let mut stdout = io::stdout().lock();
    stdout.write_all(&Answer { form, address }.encode())?;
    stdout.flush()?;
    Ok(())
}

/// Version 3 is promised only to a containerd that is known to take it.
fn legacy_form(grpc_address: &str) -> AnswerForm {
    let major = bootstrap::containerd_version(grpc_address)
        .ok()
        .and_then(|version| bootstrap::major_version(&version));
    if major >= Some(2) {
        AnswerForm::JsonV3
    } else {
        AnswerForm::Bare
    }
}

fn delete(args: &Args) -> Result<()> {
    let bundle = match &args.bundle {
        Some(bundle) => bundle.clone(),
        None => env::current_dir().context("find the bundle (the working directory)")?,
    };
    log::init(&bundle, args.debug);
    let group = Spec::load(&bundle)
        .ok()
        .and_then(|spec| spec.group().map(str::to_owned))
        .filter(|group| bootstrap::is_identifier(group))
        .unwrap_or_else(|| args.id.clone());
    let config = Config::load(None).unwrap_or_default();
    let address = read_address(&bundle)
        .unwrap_or_else(|| bootstrap::address_for(None, &args.address, &args.namespace, &group));
    let dir = PodDir::new(&config.state_dir, &args.namespace, &group);
    let pid = dir
        .load()
        .and_then(|record| record.vmm)
        .map_or(0, |vmm| vmm.pid);
    // containerd also calls this for one container of a pod whose shim goes on living.
    if !bootstrap::is_alive(&address) {
        cleanup::pod(&dir, &address);
    }
    let exit = Exit::killed_now();
    let response = DeleteResponse {
        pid: u32::try_from(pid).unwrap_or(0),
        exit_status: exit.status,
        exited_at: MessageField::some(timestamp(exit.at)),
        ..Default::default()
    };
    io::stdout().write_all(&response.write_to_bytes()?)?;
    Ok(())
}

/// containerd 1.7 finds its shims again by this file after a restart.
fn write_address(bundle: &Path, address: &str) -> Result<()> {
    let new = bundle.join(".address");
    fs::write(&new, address)
        .and_then(|()| fs::rename(&new, bundle.join("address")))
        .context("write the shim's address into the bundle")
}

fn read_address(bundle: &Path) -> Option<String> {
    let text = fs::read_to_string(bundle.join("address")).ok()?;
    Some(text.trim().to_owned()).filter(|a| a.starts_with("unix://"))
}

fn read_input() -> Result<Vec<u8>> {
    let mut input = Vec::new();
    let stdin = io::stdin();
    // A person who tries the shim by hand sends nothing.
    if !stdin.is_terminal() {
        stdin
            .lock()
            .take(LONGEST_INPUT)
            .read_to_end(&mut input)
            .context("read standard input")?;
    }
    Ok(input)
}
