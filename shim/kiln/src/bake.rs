//! `kiln bake`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use kiln_bake::{Baked, Order, Progress};
use kiln_node::config::Config;
use kiln_store::{Class, Store};

use crate::args::Bake;
use crate::failure::Failure;
use crate::output::{Output, size};

pub(crate) fn run(config: &Config, options: &Bake, output: &Output) -> Result<ExitCode, Failure> {
    let order = order(config, options)?;
    let store = Store::open_or_create(&config.store)?;
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
    let (memory_mib, max_memory_mib) = (mib(options.memory)?, mib(options.max_memory)?);
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
    })
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
        let line = ["kiln", "bake", "--agent", "/a", "--vmm", "/v"];
        let args = Args::try_parse_from(line.iter().chain(arguments)).unwrap();
        match &args.command {
            Command::Bake(options) => order(&Config::default(), options),
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
    fn program_that_is_nowhere_is_named_with_its_option() {
        let error = program(None, "kiln-nowhere", "--agent")
            .unwrap_err()
            .to_string();
        assert!(error.contains("kiln-nowhere") && error.contains("--agent"));
    }
}
