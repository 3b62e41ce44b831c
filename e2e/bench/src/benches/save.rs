//! How long a guest stands still while it is saved, as it sees it itself, beside a copy of all of its memory while it
//! stands still.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use kiln_e2e::uvm::{Kit, Shape, Uvm, fill_script};
use kiln_uvm::ends::Ends;

use super::Settings;
use crate::result::Measured;

/// Here, on the node's disk, everything of this bench is.
const FOLDER: &str = "/var/lib/kiln-e2e/bench-save";
/// Machines: MiB of memory, and of those what each copy has written since it was resumed.
const SIZES: [(u64, u64); 2] = [(256, 128), (512, 200)];
/// How long the guest watches its clock: as long as saving takes, and more.
const WATCHED: Duration = Duration::from_secs(6);
/// What has to settle before and afterwards.
const PAUSE: Duration = Duration::from_millis(500);

pub(crate) async fn run(settings: Settings) -> Result<Measured> {
    // All of it waits in system calls.
    tokio::task::spawn_blocking(move || measure(&settings)).await?
}

fn measure(settings: &Settings) -> Result<Measured> {
    let folder = Path::new(FOLDER);
    // Of a run that was cut short.
    let _ = std::fs::remove_dir_all(folder);
    let kit = Kit::make("", folder)?;
    let mut measured = Measured::default();
    for (memory, written) in SIZES {
        let dir = folder.join(format!("{memory}"));
        std::fs::create_dir_all(&dir)?;
        let shape = Shape {
            memory,
            hotplug: 0,
            devices: false,
            quiet: true,
            ..Shape::default()
        };
        let baked = Uvm::boot(&dir, &kit, shape)?.snapshot(&dir.join("baked"), false)?;
        let uvm = Uvm::resume(&dir, &baked, Ends::new())?;
        uvm.sh(&fill_script(&written.to_string()))?;
        let name = |what: &str| format!("{what}-{memory}");
        // Run 0 reads programs from the disk and the like: it is not counted.
        for run in 0..=settings.runs {
            let mut unused = Measured::default();
            let into = if run > 0 { &mut measured } else { &mut unused };
            let into_folder = dir.join("saved");
            let beat = still(&uvm, || {
                let (_, stood) = uvm.save(&into_folder, Some(&baked))?;
                into.add(&name("left"), "B", stood.copied as f64);
                Ok(())
            })?;
            into.add(&name("save"), "ms", beat);
            std::fs::remove_dir_all(&into_folder)?;
            let beat = still(&uvm, || uvm.snapshot(&into_folder, true).map(drop))?;
            into.add(&name("copy"), "ms", beat);
            std::fs::remove_dir_all(&into_folder)?;
            println!("  {memory} MiB: run {run} of {}", settings.runs);
        }
        measured.ratio(
            &format!("{}/{}", name("save"), name("copy")),
            &name("save"),
            &name("copy"),
        )?;
    }
    std::fs::remove_dir_all(folder)?;
    Ok(measured)
}

/// The most milliseconds that lay between two looks of the guest at its clock while something was done with it.
fn still(uvm: &Uvm, work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let script = format!("testprog beat {}", WATCHED.as_millis());
    std::thread::scope(|scope| {
        let watching = scope.spawn(|| uvm.sh(&script));
        std::thread::sleep(PAUSE);
        work()?;
        let told = watching.join().ok().context("a thread died")??;
        let longest: f64 = told.trim().parse().with_context(|| format!("{told:?}"))?;
        Ok(longest / 1000.0)
    })
}
