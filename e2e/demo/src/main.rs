//! Starts a pod with each of the given runtimes (`kiln-demo runc`), and shows where the time went: through CRI, or by kubectl on
//! a node that has what a cluster is made of.

mod cluster;
mod timeline;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kiln_e2e::{ContainerSpec, Pod, PodSpec, Test, setup};
use kiln_k8s::cluster::Cluster;

use timeline::Timeline;

const GREETING: &str = "hello from a pod";
const OUTPUT_PATIENCE: Duration = Duration::from_secs(60);

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<()> {
    let mut runtimes: Vec<String> = std::env::args().skip(1).collect();
    if runtimes.is_empty() {
        runtimes.push("runc".to_owned());
    }
    if Cluster::can_be_made() {
        return cluster::run(&runtimes).await;
    }
    let first = Test::new("demo", "runc").await?;
    let version = first
        .client()
        .version()
        .version(())
        .await?
        .into_inner()
        .version;
    println!("importing two images into containerd {version} ...");
    setup::import(first.client(), &setup::Images::make()?).await?;

    if runtimes.iter().any(|runtime| setup::needs_bake(runtime)) {
        println!("baking a μVM: booting Debian's kernel once, so that no pod has to ...");
        setup::bake()?;
    }
    for runtime in &runtimes {
        let test = Test::new("demo", runtime).await?;
        // What a node does once per runtime (reading programs from its disk) is not a pod's start.
        start_pod(&test, &mut Timeline::default()).await?;
        let mut timeline = Timeline::default();
        let said = start_pod(&test, &mut timeline).await?;
        println!("\n{runtime}: a pod, from nothing to its first words\n\n{timeline}");
        for line in said {
            println!("  the pod says: {line}");
        }
    }
    Ok(())
}

/// Starts a pod, hears what it says, and removes it.
async fn start_pod(test: &Test, timeline: &mut Timeline) -> Result<Vec<String>> {
    let script = format!("echo {GREETING}; exec sleep 600");
    let spec = ContainerSpec::shell("hello", &script);

    let pod = timeline
        .step("RunPodSandbox", test.run_pod(&PodSpec::new()))
        .await?;
    let said = talk(&pod, &spec, timeline).await;
    let removed = timeline.after("stop and remove", pod.remove()).await;
    let said = said?;
    removed?;
    Ok(said)
}

async fn talk(pod: &Pod, spec: &ContainerSpec, timeline: &mut Timeline) -> Result<Vec<String>> {
    let container = timeline.step("CreateContainer", pod.create(spec)).await?;
    timeline.step("StartContainer", container.start()).await?;
    let output = container.log();
    timeline
        .step("first output", async {
            let deadline = tokio::time::Instant::now() + OUTPUT_PATIENCE;
            while !std::fs::read(output.path()).is_ok_and(|log| !log.is_empty()) {
                if tokio::time::Instant::now() > deadline {
                    bail!("the container said nothing within {OUTPUT_PATIENCE:?}");
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            Ok(())
        })
        .await?;
    output.wait_for(GREETING, OUTPUT_PATIENCE).await?;
    let kernel = container
        .shell("uname -sr; nproc")
        .await
        .context("looking into the container")?;
    let mut facts = kernel.lines();
    let facts = match (facts.next(), facts.next()) {
        (Some(kernel), Some(cpus)) => format!("I see {kernel} and {cpus} CPUs"),
        _ => bail!("the container's view is incomplete: {kernel:?}"),
    };
    Ok(vec![GREETING.to_owned(), facts])
}
