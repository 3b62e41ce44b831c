//! The benches, one file each. A new one is a file here and a line in [`all`].

mod density;
mod overlay;
mod overlay_curve;
mod pod_start;
mod resume;
mod steady;
pub(crate) mod store;

use std::future::Future;
use std::pin::Pin;

use anyhow::Result;

use crate::result::Measured;

/// What the command line says to every bench.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// Runtime handlers to compare.
    pub(crate) runtimes: Vec<String>,
    /// How often each thing is measured.
    pub(crate) runs: u32,
}

type Run = fn(Settings) -> Pin<Box<dyn Future<Output = Result<Measured>>>>;

/// A bench.
pub(crate) struct Bench {
    pub(crate) name: &'static str,
    pub(crate) run: Run,
}

/// All benches.
pub(crate) fn all() -> Vec<Bench> {
    vec![
        Bench {
            name: "pod-start",
            run: |settings| Box::pin(pod_start::run(settings)),
        },
        Bench {
            name: "steady",
            run: |settings| Box::pin(steady::run(settings)),
        },
        Bench {
            name: "overlay-fsync",
            run: |settings| Box::pin(overlay::fsync(settings)),
        },
        Bench {
            name: "overlay-short-job",
            run: |settings| Box::pin(overlay::short_job(settings)),
        },
        Bench {
            name: "overlay-curve",
            run: |settings| Box::pin(overlay_curve::run(settings)),
        },
        Bench {
            name: "resume",
            run: |settings| Box::pin(resume::run(settings)),
        },
        Bench {
            name: "store",
            run: |settings| Box::pin(store::run(settings)),
        },
        Bench {
            name: "density",
            run: |settings| Box::pin(density::run(settings)),
        },
    ]
}
