//! Enters memories in a store of its own, one after the other, each as what differs from the first, and prints what that
//! comes to.
//!
//! `cargo run --release -p kiln-store --example family -- [--lean] MEMORY…`. If there is a file MEMORY.ws, it is a text of
//! the numbers of pages that are needed first.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, ensure};
use kiln_store::testing::description;
use kiln_store::{Digest, Kind, Storage, Store, WorkingSet};

fn main() -> anyhow::Result<()> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let given = arguments.len();
    arguments.retain(|word| word != "--lean");
    let storage = Storage {
        starts_alone: arguments.len() == given,
        ..Storage::default()
    };
    let dir = tempfile::tempdir().context("making a directory")?;
    let store = Store::open_or_create(dir.path().join("store"))?;
    for (number, path) in (0u32..).zip(&arguments) {
        let start = Instant::now();
        let id = enter(&store, number, Path::new(path), storage)?;
        let entering = start.elapsed();
        let manifest = store.entry(id)?.manifest?;
        let memory = manifest.object(Kind::Memory).context("no memory")?;
        let name = memory.digest.to_string();
        let pack = dir.path().join("store/packs").join(&name[..2]).join(&name);
        let stored = fs::metadata(pack)?.len();

        fs::remove_dir_all(dir.path().join("store/flat"))?;
        let lease = store.lease(id)?;
        let start = Instant::now();
        let flat = lease.open(Kind::Memory)?;
        let opening = start.elapsed();
        ensure!(kiln_store::of_file(&flat)?.digest == memory.digest);
        // Zeroes are holes.
        let data = flat.metadata()?.blocks() * 512;
        let ratio = stored as f64 / data as f64;
        let parents = manifest.parents.len();
        println!("{path}: {stored} of {data} bytes ({ratio:.4}), {parents} parents");
        println!(
            "  entered in {entering:.2?}, opened in {opening:.2?} after all flat files were gone"
        );
    }
    Ok(())
}

fn enter(store: &Store, number: u32, path: &Path, storage: Storage) -> anyhow::Result<Digest> {
    let staging = store.begin(0)?;
    let mut from = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    io::copy(&mut from, &mut staging.create(Kind::Memory)?)?;
    fs::write(staging.path(Kind::State), "state")?;
    let list = path.with_extension("ws");
    if list.exists() {
        let text = fs::read_to_string(&list)?;
        let pages = text.split_whitespace().map(str::parse);
        let pages = pages.collect::<Result<Vec<u32>, _>>()?;
        let set: WorkingSet = pages.into_iter().map(|page| (page, false)).collect();
        fs::write(staging.path(Kind::WorkingSet), set.encode())?;
    }
    let mut about = description(&number.to_string());
    about.class.slots = number;
    Ok(staging.commit_as(about, storage)?)
}
