//! `kiln bake`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use kiln_bake::{Baked, Order, Progress};
use kiln_node::config::Config;
use kiln_store::{Basis, Class, Storage, Store};
use kiln_uvm::size::BLOCK;

use crate::args::Bake;
use crate::failure::Failure;
use crate::output::{Output, size};

pub(crate) fn run(config: &Config, options: &Bake, output: &Output) -> Result<ExitCode, Failure> {
    let mut order = order(config, options)?;
    let store = Store::open_or_create(&config.store)?;
    if let Some(name) = &options.parent {
        order.storage.basis = basis(&store, name)?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let mut tell = |progress: Progress| eprintln!("{}", progress_text(&progress));
    let baked = runtime.block_on(async {
        // Ctrl-C drops the bake, and with it the guest and all that was written.
        tokio::select! {
            baked = kiln_bake::bake(&store, &order, &mut tell) => baked.map(Some),
            _ = tokio::signal::ctrl_c() => Ok(None),
        }
    })?;
    let Some(baked) = baked else {
        eprintln!("interrupted: nothing was baked");
        return Ok(ExitCode::FAILURE);
    };
    let (id, new) = match baked {
        Baked::New(id) => (id, true),
        Baked::Already(id) => (id, false),
    };
    if output.is_json() {
        output.json(&serde_json::json!({ "id": id, "new": new }))?;
    } else if new {
        output.text(&format!("baked {}\n", id.short()))?;
    } else {
        output.text(&format!(
            "{} was baked of the same inputs already: nothing to do (--again bakes anew)\n",
            id.short()
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn order(config: &Config, options: &Bake) -> anyhow::Result<Order> {
    let max_memory_mib = mib(options.max_memory)?;
    let memory_mib = match options.memory {
        Some(memory) => mib(memory)?,
        None => mib(memory_of_most(config))?.min(max_memory_mib),
    };
    if options.max_cpus < options.cpus {
        bail!(
            "--max-cpus {} is less than --cpus {}",
            options.max_cpus,
            options.cpus
        );
    }
    if max_memory_mib < memory_mib {
        bail!("--max-memory is less than --memory");
    }
    Ok(Order {
        class: Class {
            cpus: options.cpus,
            max_cpus: options.max_cpus,
            memory_mib,
            max_memory_mib,
            slots: options.slots,
        },
        kernel: options.kernel.clone(),
        modules: options.modules.clone(),
        agent: program(options.agent.as_deref(), "kiln-agent", "--agent")?,
        vmm: vmm(options.vmm.as_deref(), config)?,
        vmm_ids: config.vmm_ids,
        again: options.again,
        storage: Storage {
            starts_alone: !options.lean,
            ..Storage::default()
        },
    })
}

/// The parent that is meant by a name.
fn basis(store: &Store, name: &str) -> Result<Basis, kiln_store::Error> {
    match name {
        "none" => Ok(Basis::None),
        name => store.resolve(name).map(Basis::Of),
    }
}

/// What a pod without limits has, so that its start need not wait for a guest that grows. A pod that has less keeps the whole of
/// it, of which the guest's kernel takes a sixtieth to keep account of it.
fn memory_of_most(config: &Config) -> u64 {
    const MOST: u64 = 1 << 30;
    let memory = config.memory_without_limit();
    memory.min(MOST).next_multiple_of(BLOCK)
}

/// A whole number of MiB.
fn mib(bytes: u64) -> anyhow::Result<u32> {
    if !bytes.is_multiple_of(1 << 20) {
        bail!("a guest's memory is a whole number of MiB, such as 256Mi");
    }
    u32::try_from(bytes >> 20).context("no guest has that much memory")
}

/// A program of kiln's: the one that is named, or the one beside this program, or on the PATH.
pub(crate) fn program(named: Option<&Path>, name: &str, option: &str) -> anyhow::Result<PathBuf> {
    if let Some(path) = named {
        return Ok(path.to_owned());
    }
    let own = std::env::current_exe().ok();
    let beside = own.as_deref().and_then(Path::parent).map(Path::to_owned);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = beside
        .into_iter()
        .chain(std::env::split_paths(&path))
        .map(|dir| dir.join(name));
    found
        .into_iter()
        .find(|path| path.is_file())
        .with_context(|| {
            format!("{name} is neither beside kiln nor on the PATH: name it ({option})")
        })
}

/// The VMM: the one that is named, the configuration's, or one that is found.
pub(crate) fn vmm(named: Option<&Path>, config: &Config) -> anyhow::Result<PathBuf> {
    let configured = Some(&*config.vmm).filter(|path| path.is_file());
    program(named.or(configured), "kiln-vmm", "--vmm")
}

fn progress_text(progress: &Progress) -> String {
    match progress {
        Progress::Prepared {
            kernel,
            modules,
            initramfs,
        } => {
            format!(
                "guest     kernel {kernel}, {modules} modules, initramfs {}",
                size(*initramfs)
            )
        }
        Progress::Booting => "boot      …".to_owned(),
        Progress::Ready(after) => format!("ready     after {} ms", after.as_millis()),
        Progress::Settled { used } => format!("settled   {} in use", size(*used)),
        Progress::Saved { bytes } => format!("saved     {} on disk", size(*bytes)),
        Progress::Tried { took, touched } => {
            format!(
                "tried     a copy resumed and took its identity in {} ms, touching {}",
                took.as_millis(),
                size(*touched)
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Args, Command};
    use clap::Parser;

    fn ordered(arguments: &[&str]) -> anyhow::Result<Order> {
        ordered_with(&Config::default(), arguments)
    }

    fn ordered_with(config: &Config, arguments: &[&str]) -> anyhow::Result<Order> {
        let line = ["kiln", "bake", "--agent", "/a", "--vmm", "/v"];
        let args = Args::try_parse_from(line.iter().chain(arguments)).unwrap();
        match &args.command {
            Command::Bake(options) => order(config, options),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn sizes_that_contradict_each_other_are_refused() {
        assert!(ordered(&["--cpus", "4", "--max-cpus", "2"]).is_err());
        assert!(ordered(&["--memory", "1Gi", "--max-memory", "512Mi"]).is_err());
        assert!(
            ordered(&["--memory", "1000000"])
                .unwrap_err()
                .to_string()
                .contains("MiB")
        );
        let class = ordered(&["--memory", "512Mi", "--slots", "3"])
            .unwrap()
            .class;
        assert_eq!((class.memory_mib, class.slots, class.cpus), (512, 3, 1));
    }

    #[test]
    fn bake_starts_alone_unless_it_is_to_be_lean() {
        assert_eq!(ordered(&[]).unwrap().storage, Storage::default());
        assert!(ordered(&[]).unwrap().storage.starts_alone);
        assert!(!ordered(&["--lean"]).unwrap().storage.starts_alone);
    }

    #[test]
    fn parent_is_a_uvm_of_the_store_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_create(dir.path().join("s")).unwrap();
        let id = crate::store::tests::bake(&store, "one");
        assert_eq!(basis(&store, "none").unwrap(), Basis::None);
        assert_eq!(basis(&store, "latest").unwrap(), Basis::Of(id));
        assert_eq!(basis(&store, &id.short()).unwrap(), Basis::Of(id));
        assert!(basis(&store, "ffff0000").is_err());
    }

    #[test]
    fn default_is_the_size_of_a_pod_without_limits() {
        let mut config = Config::default();
        let of = |config: &Config, arguments: &[&str]| {
            ordered_with(config, arguments).unwrap().class.memory_mib
        };
        assert_eq!(of(&config, &[]), 320);
        assert_eq!(of(&config, &["--max-memory", "256Mi"]), 256);
        config.default_memory = 511 << 20;
        assert_eq!(of(&config, &[]), 576);
        config.default_memory = 8 << 30;
        assert_eq!(of(&config, &[]), 1024);
    }

    #[test]
    fn program_that_is_nowhere_is_named_with_its_option() {
        let error = program(None, "kiln-nowhere", "--agent")
            .unwrap_err()
            .to_string();
        assert!(error.contains("kiln-nowhere") && error.contains("--agent"));
    }
}
