//! The same as people do it: `kubectl apply`, on a cluster of one node.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kiln_k8s::cluster::Cluster;
use kiln_k8s::kubectl::Kubectl;
use kiln_k8s::pods::{self, Pod};
use kiln_k8s::{IMAGE, calls, manifest, set_up};

use crate::GREETING;

const MANIFEST: &str = r#"apiVersion: v1
kind: Pod
metadata:
  name: hello-${RUNTIME}
spec:
  runtimeClassName: ${RUNTIME}
  terminationGracePeriodSeconds: 1
  containers:
  - name: hello
    image: ${IMAGE}
    command: [sh, -c, "echo ${GREETING}; uname -sr; nproc; exec sleep 600"]
"#;
/// Where the manifests lie, in the node.
const FOLDER: &str = "/tmp";

pub(crate) async fn run(runtimes: &[String]) -> Result<()> {
    println!("bringing up a cluster ...");
    set_up(&Cluster::default(), |ready| println!("  {ready}")).await?;
    let kubectl = Kubectl::new("default");
    for runtime in runtimes {
        let values = [
            ("RUNTIME", runtime.as_str()),
            ("IMAGE", IMAGE),
            ("GREETING", GREETING),
        ];
        let text = manifest::fill(MANIFEST, &values);
        let file = format!("{FOLDER}/hello-{runtime}.yaml");
        std::fs::write(&file, &text).with_context(|| format!("writing {file}"))?;
        println!("\n{runtime}: a pod by kubectl\n\n{text}");
        // What a node does once per runtime (reading programs from its disk) is not a pod's start.
        start(&kubectl, &file).await?;
        remove(&kubectl, &file).await?;
        show(&kubectl, runtime, &file).await?;
    }
    println!("\nboth at once\n");
    for runtime in runtimes {
        let file = format!("{FOLDER}/hello-{runtime}.yaml");
        start(&kubectl, &file).await?;
    }
    typed(&kubectl, &["get", "pods", "--output=wide"]).await?;
    for runtime in runtimes {
        remove(&kubectl, &format!("{FOLDER}/hello-{runtime}.yaml")).await?;
    }
    Ok(())
}

/// Starts the pod of a manifest and waits until it is Ready.
async fn start(kubectl: &Kubectl, file: &str) -> Result<Duration> {
    let begin = Instant::now();
    kubectl.run(&["apply", "--filename", file]).await?;
    let ready = [
        "wait",
        "--for=condition=Ready",
        "--timeout=120s",
        "--filename",
        file,
    ];
    kubectl.run(&ready).await?;
    Ok(begin.elapsed())
}

async fn remove(kubectl: &Kubectl, file: &str) -> Result<()> {
    kubectl
        .run(&["delete", "--wait", "--filename", file])
        .await
        .map(drop)
}

/// Starts it once more, and shows what it says and where the time went.
async fn show(kubectl: &Kubectl, runtime: &str, file: &str) -> Result<()> {
    let name = format!("hello-{runtime}");
    println!("$ kubectl apply --filename {file}");
    let ready = start(kubectl, file).await?;
    println!("pod/{name} is Ready after {:.2} s", ready.as_secs_f64());
    let pod: Pod =
        serde_json::from_str(&kubectl.run(&["get", "pod", &name, "--output=json"]).await?)?;
    let uid = pod.metadata.uid.as_deref().context("a pod without a uid")?;
    let status = pods::container(&pod, "hello");
    let id = status.and_then(|status| status.container_id.as_deref());
    let id = id.and_then(|id| id.split("//").nth(1));
    let took = calls::sandbox_to_start(uid, id.context("a Ready pod without a container")?)?;
    println!(
        "of these {:.0} ms from the kubelet's RunPodSandbox to containerd's answer to StartContainer\n",
        took.as_secs_f64() * 1000.0
    );
    typed(kubectl, &["logs", &name]).await?;
    if runtime.starts_with("kiln") {
        println!("$ kiln trace $(crictl pods --quiet --name {name})");
        let id = output("crictl", &["pods", "--quiet", "--name", &name])?;
        println!("{}", output("kiln", &["trace", id.trim()])?);
    }
    remove(kubectl, file).await
}

/// Shows a command and what it says.
async fn typed(kubectl: &Kubectl, command: &[&str]) -> Result<()> {
    println!(
        "$ kubectl {}\n{}",
        command.join(" "),
        kubectl.run(command).await?
    );
    Ok(())
}

fn output(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.with_context(|| format!("running {program}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{program}: {}: {said}",
        output.status
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
