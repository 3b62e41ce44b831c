//! Makes the folder of the part `suite-images` by hand, to look at it or to serve it elsewhere than in a node.

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use kiln_test_images::suites::{Sources, make};

fn main() -> ExitCode {
    let Err(error) = run() else {
        return ExitCode::SUCCESS;
    };
    eprintln!("suite-images: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        eprintln!("  since {error}");
        cause = error.source();
    }
    ExitCode::FAILURE
}

fn run() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [testprog, agnhost, porter, cache, out, seen_as] = &arguments[..] else {
        return Err("TESTPROG AGNHOST PORTER CACHE OUT SEEN_AS are wanted".into());
    };
    let sources = Sources {
        testprog: testprog.clone(),
        agnhost: agnhost.clone(),
        porter: porter.clone(),
    };
    std::fs::create_dir_all(out)?;
    make(&sources, cache, out, &seen_as.to_string_lossy())?;
    Ok(())
}
