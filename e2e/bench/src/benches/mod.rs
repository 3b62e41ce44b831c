//! The benches, one file each. A new one is a file here and a line in [`all`].

mod density;
mod kubelet;
mod overlay;
mod overlay_curve;
mod pod_start;
mod resume;
mod save;
mod steady;
pub(crate) mod store;
mod volumes;

use std::future::Future;
use std::pin::Pin;

use anyhow::Result;
use kiln_k8s::cluster::Cluster;

use crate::result::Measured;

/// What the command line says to every bench.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// Runtime handlers to compare.
    pub(crate) runtimes: Vec<String>,
    /// How often each thing is measured.
    pub(crate) runs: u32,
}

/// What a run found, by the name under which it is kept.
type Found = Result<Vec<(&'static str, Measured)>>;
type Run = fn(Settings) -> Pin<Box<dyn Future<Output = Found>>>;

/// A run that measures one thing, or several that cost no more together.
pub(crate) struct Bench {
    pub(crate) names: &'static [&'static str],
    /// Whether this node has what it needs.
    pub(crate) can_run: fn() -> bool,
    pub(crate) run: Run,
}

macro_rules! bench {
    ($name:literal, $run:path) => {
        Bench {
            names: &[$name],
            can_run: || true,
            run: |settings| Box::pin(async { Ok(vec![($name, $run(settings).await?)]) }),
        }
    };
}

/// All benches.
pub(crate) fn all() -> Vec<Bench> {
    vec![
        bench!("pod-start", pod_start::run),
        bench!("steady", steady::run),
        bench!("volumes", volumes::run),
        bench!("overlay-fsync", overlay::fsync),
        bench!("overlay-short-job", overlay::short_job),
        bench!("overlay-curve", overlay_curve::run),
        bench!("resume", resume::run),
        bench!("save", save::run),
        bench!("store", store::run),
        bench!("density", density::run),
        Bench {
            names: &kubelet::OF_ONE,
            can_run: Cluster::can_be_made,
            run: |settings| Box::pin(kubelet::one(settings)),
        },
        Bench {
            names: &[kubelet::CROWD],
            can_run: Cluster::can_be_made,
            run: |settings| Box::pin(kubelet::crowd(settings)),
        },
    ]
}
