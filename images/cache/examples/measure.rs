//! How long an image takes, against `mkfs.erofs` on the same tree: `measure DIRECTORY [ROUNDS]`.
//!
//! Both write to the same file system, turn about, with the tree in the page cache. Prints every round and the
//! ratio of the medians.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kiln_cache::Lowers;
use kiln_cache::erofs::Plan;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let tree = PathBuf::from(
        arguments
            .next()
            .ok_or("usage: measure DIRECTORY [ROUNDS]")?,
    );
    let rounds: usize = match arguments.next() {
        Some(rounds) => rounds.to_str().ok_or("ROUNDS is a number")?.parse()?,
        None => 5,
    };
    let scratch = tempfile::tempdir()?;
    let ours = scratch.path().join("kiln.erofs");
    let theirs = scratch.path().join("mkfs.erofs");
    // Once each, unmeasured, for the page cache.
    kiln(&tree, &ours)?;
    mkfs(&tree, &theirs)?;
    let mut figures = (Vec::new(), Vec::new());
    for round in 1..=rounds {
        let kiln = kiln(&tree, &ours)?;
        let mkfs = mkfs(&tree, &theirs)?;
        println!("round {round}: kiln {kiln:?}, mkfs.erofs {mkfs:?}");
        figures.0.push(kiln);
        figures.1.push(mkfs);
    }
    let (kiln, mkfs) = (median(figures.0), median(figures.1));
    println!(
        "median: kiln {kiln:?} ({} bytes), mkfs.erofs {mkfs:?} ({} bytes), ratio {:.2}",
        std::fs::metadata(&ours)?.len(),
        std::fs::metadata(&theirs)?.len(),
        kiln.as_secs_f64() / mkfs.as_secs_f64()
    );
    Ok(())
}

fn kiln(tree: &Path, image: &Path) -> Result<Duration> {
    let _ = std::fs::remove_file(image);
    let start = Instant::now();
    let plan = Plan::new(&Lowers::plain(tree.to_owned()))?;
    let planned = start.elapsed();
    plan.write(&OwnedFd::from(File::create(image)?))?;
    let all = start.elapsed();
    println!("  planned in {planned:?}, written in {:?}", all - planned);
    Ok(all)
}

fn mkfs(tree: &Path, image: &Path) -> Result<Duration> {
    let _ = std::fs::remove_file(image);
    let start = Instant::now();
    let status = Command::new("mkfs.erofs")
        .args(["--quiet", "-T0"])
        .args([image, tree])
        .stdout(Stdio::null())
        .status()?;
    if !status.success() {
        return Err(format!("mkfs.erofs: {status}").into());
    }
    Ok(start.elapsed())
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
