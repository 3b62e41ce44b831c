//! Benches: each measures several things in one run, interleaved, so that ratios between them mean
//! something whatever else the machine does, and writes JSON, a table and a picture.

mod benches;
mod counters;
mod curve;
mod disk;
mod peer;
mod picture;
mod report;
mod result;
mod tracepoints;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;

use benches::Settings;

/// Runs benches on this node's containerd.
#[derive(Debug, Parser)]
#[command(name = "kiln-bench", version)]
struct Cli {
    /// Which benches; all of them if none is named.
    benches: Vec<String>,
    /// Where results go: NAME.json and NAME.svg for each bench, and report.md for all.
    #[arg(long, default_value = "/var/log/kiln-bench")]
    out: PathBuf,
    /// Runtime handlers to compare; the ratios are to the first.
    #[arg(long, value_delimiter = ',')]
    runtimes: Vec<String>,
    /// How often each thing is measured.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// What a process of the bench `store` does.
    #[arg(long, hide = true, value_name = "DIR")]
    pick_in: Option<PathBuf>,
    /// What is measured, as git describes it.
    #[arg(long, env = "KILN_COMMIT", default_value = "unknown")]
    commit: String,
    /// What it is measured on.
    #[arg(long, env = "KILN_MACHINE", default_value = "unknown")]
    machine: String,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    if let Some(root) = &cli.pick_in {
        return benches::store::pick(root);
    }
    let all = benches::all();
    let names = all.iter().flat_map(|bench| bench.names);
    let unknown = cli
        .benches
        .iter()
        .find(|name| names.clone().all(|known| known != name));
    if let Some(name) = unknown {
        let names: Vec<&str> = names.copied().collect();
        bail!("there is no bench {name:?}, but: {}", names.join(" "));
    }
    let runtimes = if cli.runtimes.is_empty() {
        kiln_e2e::harness::handlers()
    } else {
        cli.runtimes.clone()
    };
    let settings = Settings {
        runtimes,
        runs: cli.runs,
    };
    std::fs::create_dir_all(&cli.out)
        .with_context(|| format!("cannot create {}", cli.out.display()))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    for bench in &all {
        let is_wanted = |name: &&str| cli.benches.iter().any(|wanted| wanted == name);
        let wanted = match cli.benches.is_empty() {
            true => (bench.can_run)(),
            false => bench.names.iter().any(is_wanted),
        };
        if !wanted {
            continue;
        }
        let names = bench.names.join(", ");
        println!("{names}: {} runs of each", settings.runs);
        let measured = runtime
            .block_on((bench.run)(settings.clone()))
            .with_context(|| format!("bench {names}"))?;
        for (name, measured) in measured {
            let result = measured.named(name, &cli.commit, &cli.machine);
            result.write(&cli.out)?;
            println!("{}", report::table(&result));
        }
    }
    report::write(&cli.out)
}
