//! The `kiln` command: bakes μVMs and looks after them, runs containers in them without containerd,
//! and says whether this machine can do that.

mod args;
mod bake;
mod doctor;
mod failure;
mod output;
mod pod;
mod run;
mod store;
mod trace;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use kiln_node::config::Config;
use kiln_node::pods;

use args::{Args, Command};
use failure::Failure;
use output::Output;

fn main() -> ExitCode {
    let args = Args::parse();
    let output = Output::new(args.json);
    match run(&args, &output) {
        Ok(code) => code,
        Err(failure) => {
            failure.print();
            failure.code()
        }
    }
}

/// The node's configuration, with what the command line says in its place.
fn config(args: &Args) -> anyhow::Result<Config> {
    let loaded = match &args.command {
        // It says what is wrong with the file.
        Command::Doctor => Ok(Config::load(None).unwrap_or_default()),
        _ => Config::load(None),
    };
    let mut config = loaded.context("kiln's configuration cannot be used")?;
    if let Some(store) = &args.store {
        config.store = store.clone();
    }
    Ok(config)
}

fn run(args: &Args, output: &Output) -> Result<ExitCode, Failure> {
    let config = config(args)?;
    let store = &*config.store;
    match &args.command {
        Command::Doctor => doctor::run(store, output),
        Command::ContainerdConfig => doctor::containerd_config(store, output),
        Command::Bake(options) => bake::run(&config, options, output),
        Command::Run(options) => Ok(run::run(&config, options)),
        Command::Exec(options) => Ok(run::exec(options)),
        Command::Save(options) => run::save(options, output),
        Command::Ps => run::ps(output),
        Command::Console(options) => run::console(options),
        Command::Trace(options) => trace::run(&config, options, output),
        Command::List => store::list(store, output),
        Command::Inspect { name } => match find_pod(&config, name)? {
            Some(dir) => pod::inspect(&dir, output),
            None => store::inspect(store, name, output),
        },
        Command::Verify { names } => store::verify(store, names, output),
        Command::Rm { names } => store::remove(store, names, output),
        Command::Pin { uvm } => store::pin(store, uvm, true),
        Command::Unpin { uvm } => store::pin(store, uvm, false),
        Command::Gc(options) => store::collect(store, options, output),
        Command::Completions { shell } => {
            args::completions(*shell);
            Ok(ExitCode::SUCCESS)
        }
        Command::Man { dir } => {
            args::man_pages(dir)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn find_pod(config: &Config, name: &str) -> anyhow::Result<Option<PathBuf>> {
    Ok(pods::find(&config.state_dir, name)?)
}
