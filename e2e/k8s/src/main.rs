//! `kiln-k8s`: brings a one-node cluster up or down, and runs the tests that need one.

mod suite;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use kiln_e2e::{harness, setup};
use kiln_k8s::cluster::Cluster;
use kiln_k8s::conformance;
use kiln_k8s::set_up;
use libtest_mimic::Arguments;

/// A Kubernetes cluster of one node, and end-to-end tests by its API.
#[derive(Debug, Parser)]
#[command(name = "kiln-k8s", version)]
struct Cli {
    #[command(subcommand)]
    command: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Brings the cluster up, with the tests' images and a baked μVM, and leaves it running.
    Up,
    /// Stops the cluster.
    Down,
    /// Runs critest with kiln's handlers and runc's, what has no result yet.
    Conformance(conformance::Options),
    /// Says how kiln's results of `conformance` differ from runc's.
    Judge {
        /// The folder of results.
        results: PathBuf,
        /// The specs that kiln cannot pass, and why.
        exceptions: PathBuf,
    },
    /// Brings the cluster up unless it runs, and runs tests.
    Test {
        /// As a test program of Rust has them: a part of tests' names, --list, --test-threads N and so on.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Action::Up => up().map(|()| {
            let config = Cluster::default().layout().kubeconfig("admin");
            println!("export KUBECONFIG={}", config.display());
            ExitCode::SUCCESS
        }),
        Action::Down => Cluster::default()
            .down()
            .map(|()| ExitCode::SUCCESS)
            .map_err(Into::into),
        Action::Conformance(options) => conformance(&options).map(code),
        Action::Judge {
            results,
            exceptions,
        } => conformance::judge(&results, &exceptions).map(code),
        Action::Test { arguments } => test(arguments),
    };
    done.unwrap_or_else(|error| {
        eprintln!("kiln-k8s: {error:#}");
        ExitCode::FAILURE
    })
}

/// Of a command that says whether all is well.
fn code(well: bool) -> ExitCode {
    if well {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn conformance(options: &conformance::Options) -> Result<bool> {
    if options
        .runtimes
        .iter()
        .any(|handler| setup::needs_bake(handler))
    {
        setup::bake()?;
    }
    conformance::run(options)
}

#[tokio::main(worker_threads = 2)]
async fn up() -> Result<()> {
    set_up(&Cluster::default(), |ready| println!("{ready}")).await
}

fn test(arguments: Vec<String>) -> Result<ExitCode> {
    let program = "kiln-k8s test".to_owned();
    let arguments = Arguments::from_iter(std::iter::once(program).chain(arguments));
    if arguments.list {
        return Ok(harness::run_selected(
            &suite::all(),
            arguments,
            harness::NEWEST,
        ));
    }
    let cluster = Cluster::default();
    let was_up = cluster.is_up();
    up()?;
    // Kubernetes of today needs a containerd of today: no test is skipped for its age.
    let code = harness::run_selected(&suite::all(), arguments, harness::NEWEST);
    if !was_up {
        cluster.down()?;
    }
    Ok(code)
}
