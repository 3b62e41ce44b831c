//! A node made ready for tests: a baked μVM, the tests' images, and the cluster.

use std::process::Command;

use anyhow::{Context, Result};
use kiln_e2e::{harness, setup};

use crate::cluster::Cluster;
use crate::test::remove_leftovers;

/// Brings the cluster up, with what its pods need. `tell` hears what is ready. May be done again at any time.
pub async fn set_up(cluster: &Cluster, tell: impl Fn(&str)) -> Result<()> {
    // The μVM first: both are busy work for a CPU.
    let kiln = harness::handlers()
        .iter()
        .any(|handler| setup::needs_bake(handler));
    if kiln || installed("kiln") {
        setup::bake()?;
        tell("a μVM is baked");
    }
    let containerd = kiln_e2e::api::connect().await?;
    setup::import(&containerd, &setup::Images::make()?).await?;
    cluster.up(tell).await?;
    remove_leftovers(&cluster.client().await?)
        .await
        .context("cannot remove an earlier run's namespaces")
}

fn installed(program: &str) -> bool {
    Command::new(program)
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success())
}
