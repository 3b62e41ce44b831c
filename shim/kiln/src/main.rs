//! The `kiln` command: bakes μVMs and looks after them, runs containers in them without containerd,
//! and says whether this machine can do that.

mod args;
mod bake;
mod doctor;
mod failure;
mod image;
mod output;
mod pod;
mod run;
mod store;
mod trace;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
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

fn run(args: &Args, output: &Output) -> Result<ExitCode, Failure> {
    match &args.command {
        Command::Doctor => doctor::run(&args.store, output),
        Command::ContainerdConfig => doctor::containerd_config(&args.store, output),
        Command::Bake(options) => bake::run(&args.store, options, output),
        Command::Run(options) => Ok(run::run(&args.store, options)),
        Command::Exec(options) => Ok(run::exec(options)),
        Command::Ps => run::ps(output),
        Command::Console(options) => run::console(options),
        Command::Trace(options) => trace::run(options, output),
        Command::List => store::list(&args.store, output),
        Command::Inspect { name } => match find_pod(name)? {
            Some(dir) => pod::inspect(&dir, output),
            None => store::inspect(&args.store, name, output),
        },
        Command::Verify { names } => store::verify(&args.store, names, output),
        Command::Rm { names } => store::remove(&args.store, names, output),
        Command::Pin { uvm } => store::pin(&args.store, uvm, true),
        Command::Unpin { uvm } => store::pin(&args.store, uvm, false),
        Command::Gc(options) => store::collect(&args.store, options, output),
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

fn find_pod(name: &str) -> anyhow::Result<Option<PathBuf>> {
    Ok(pods::find(Path::new(pods::STATE), name)?)
}
