//! containerd is replaced by its successors while pods run.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use kiln_e2e::{cases, setup, wait};
use kiln_k8s::cluster::Cluster;
use kiln_k8s::{STEP, Test, pods};
use rustix::process::{Pid, Signal, kill_process};

use super::{Case, same};

pub(crate) fn cases() -> Vec<Case> {
    cases![
        pods_go_on_while_containerd_is_upgraded_beneath_them
            .with_programs(&[OLDEST, BETWEEN, OLDER_KUBELET])
            .alone()
            .limit(1200),
    ]
}

const OLDEST: &str = "containerd-1.7";
const BETWEEN: &str = "containerd-2.1";
const NEWEST: &str = "containerd";
/// The newest that knows containerd 1.7.
const OLDER_KUBELET: &str = "kubelet-1.35";
/// As somebody wrote it for 1.7 and has left it since.
const CONFIGURATION: &str = include_str!("../../../node/system/containerd-1.7.toml");

async fn pods_go_on_while_containerd_is_upgraded_beneath_them(test: Test) -> Result<()> {
    let done = upgrade(&test).await;
    // Whatever became of it, other tests get the node as it was.
    let restored = Cluster::default()
        .without_kubelet(async { replace_containerd(Signal::TERM, &[]).await })
        .await;
    done.and(restored)
}

async fn upgrade(test: &Test) -> Result<()> {
    // What the newest has stored is nothing for the oldest, which so begins with nothing.
    let folders = ["root", "state"].map(|name| test.scratch().join(name).display().to_string());
    let configuration = test.write("containerd.toml", CONFIGURATION)?;
    let configuration = configuration.display().to_string();
    let [root, state] = &folders;
    let called = |program| {
        [
            program,
            "--config",
            &configuration,
            "--root",
            root,
            "--state",
            state,
        ]
    };
    let older = Cluster::default().with_kubelet(OLDER_KUBELET);
    older
        .without_kubelet(async {
            replace_containerd(Signal::TERM, &called(OLDEST)).await?;
            let containerd = kiln_e2e::api::connect().await?;
            setup::import(&containerd, &setup::Images::make()?).await
        })
        .await?;
    let mut begun: Vec<(String, String)> = Vec::new();
    for program in [OLDEST, BETWEEN, NEWEST] {
        if program != OLDEST {
            older
                .without_kubelet(async { replace_containerd(Signal::TERM, &called(program)).await })
                .await?;
        }
        for (name, id) in &begun {
            goes_on(test, name, id)
                .await
                .with_context(|| format!("pod {name} under {program}"))?;
        }
        let name = format!("began-with-{}", program.replace('.', "-"));
        let id = start(test, &name).await;
        let id = id.with_context(|| format!("pod {name}"))?;
        begun.push((name, id));
    }
    // The newest ends what each of them has begun.
    for (name, id) in &begun {
        goes_on(test, name, id).await?;
        test.delete(name).await?;
    }
    let tasks = PathBuf::from(state).join("io.containerd.runtime.v2.task/k8s.io");
    wait::until("the end of all shims", STEP, || async {
        let mut left = fs::read_dir(&tasks).with_context(|| format!("{}", tasks.display()))?;
        Ok(left.next().is_none().then_some(()))
    })
    .await
}

/// Starts a pod that counts, and gives its container's id.
async fn start(test: &Test, name: &str) -> Result<String> {
    const POD: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: "${NAME}"}
spec:
  runtimeClassName: ${RUNTIME}
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: ${IMAGE}
    command: [sh, -c, "i=0; while :; do i=$((i + 1)); echo line $i; sleep 0.5; done"]
    volumeMounts: [{name: scratch, mountPath: /scratch}]
  volumes: [{name: scratch, emptyDir: {}}]
"#;
    test.apply_with(POD, &[("NAME", name)]).await?;
    let pod = test.ready(name).await?;
    let status = pods::container(&pod, "main").and_then(|status| status.container_id.clone());
    shell(test, name, "echo kept > /scratch/file").await?;
    status.context("a Ready container without an id")
}

/// It is the same container, writes on, and answers.
async fn goes_on(test: &Test, name: &str, id: &str) -> Result<()> {
    // kubelet calls the node ready before it has seen each pod again.
    wait::until("an exec", STEP, || async {
        let arguments = ["exec", name, "--", "cat", "/scratch/file"];
        let output = test.kubectl().output(&arguments, "").await?;
        Ok((output.stdout == b"kept\n").then_some(()))
    })
    .await?;
    let written = test.log(name, None).await?.lines().count();
    test.logged(name, None, &format!("line {}", written + 3))
        .await?;
    let pod = test.ready(name).await?;
    same!(pods::restarts(&pod, "main"), 0);
    let now = pods::container(&pod, "main").and_then(|status| status.container_id.as_deref());
    same!(now, Some(id));
    Ok(())
}

async fn shell(test: &Test, pod: &str, script: &str) -> Result<String> {
    let arguments = ["exec", pod, "--", "sh", "-c", script];
    test.kubectl().run(&arguments).await
}

/// Ends containerd by a signal, and starts what is called so instead; without a program, the node's own.
pub(super) async fn replace_containerd(signal: Signal, call: &[&str]) -> Result<()> {
    const PID: &str = "/run/containerd.pid";
    let pid = fs::read_to_string(PID).context(PID)?;
    let pid = pid.trim();
    let known = pid.parse().ok().and_then(Pid::from_raw).context(PID)?;
    kill_process(known, signal).context("cannot end containerd")?;
    let process = PathBuf::from("/proc").join(pid);
    wait::until("containerd's end", STEP, || async {
        let state = fs::read_to_string(process.join("stat")).unwrap_or_default();
        let ended = state.is_empty() || state.contains(") Z ");
        Ok(ended.then_some(()))
    })
    .await?;
    let output = tokio::process::Command::new("start-containerd")
        .args(call)
        .output()
        .await?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
