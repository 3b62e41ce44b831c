//! Pods as the node has them: cgroups, static pods, and restarts of what runs them.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use kiln_e2e::{cases, wait};
use kiln_k8s::cluster::{self, Cluster};
use kiln_k8s::pods::Pod;
use kiln_k8s::{STEP, Test, pods};
use rustix::process::Signal;
use serde_json::json;

use super::upgrades::replace_containerd;
use super::{Case, same};

pub(crate) fn cases() -> Vec<Case> {
    cases![
        pod_cgroups_have_the_classes_limits_and_the_overhead.short(),
        container_is_resized_in_place_up_and_down.short(),
        static_pod_runs_as_long_as_its_file_is_there,
        pod_outlives_restarts_of_kubelet_and_containerd
            .alone()
            .limit(900),
    ]
}

const MIB: u64 = 1 << 20;

async fn pod_cgroups_have_the_classes_limits_and_the_overhead(test: Test) -> Result<()> {
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
    command: [testprog, started]
    resources: ${RESOURCES}
"#;
    let classes = [
        (
            "guaranteed",
            "Guaranteed",
            "{limits: {memory: 64Mi, cpu: 500m}}",
        ),
        (
            "burstable",
            "Burstable",
            "{requests: {memory: 32Mi, cpu: 100m}, limits: {memory: 64Mi, cpu: 500m}}",
        ),
        ("best-effort", "BestEffort", "{}"),
    ];
    for (name, _, resources) in classes {
        test.apply_with(POD, &[("NAME", name), ("RESOURCES", resources)])
            .await?;
    }
    // In MiB and thousandths of a CPU, as the chart has it.
    let (memory, cpu) = match test.handler() {
        "runc" => (0, 0),
        _ => overhead()?,
    };
    for (name, class, _) in classes {
        let pod = test.ready(name).await?;
        let status = pod.status.as_ref();
        same!(
            status.and_then(|status| status.qos_class.as_deref()),
            Some(class)
        );
        let cgroup = cgroup(&pod)?;
        let read = |file: &str| -> Result<String> {
            let path = cgroup.join(file);
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            Ok(text.trim().to_owned())
        };
        if class == "BestEffort" {
            // A limit of the overhead alone would leave nothing for containers, which have none.
            same!(read("memory.max")?, "max");
        } else {
            same!(read("memory.max")?, ((64 + memory) * MIB).to_string());
            let quota = (500 + cpu) * 100;
            same!(read("cpu.max")?, format!("{quota} 100000"));
        }
    }
    Ok(())
}

/// The chart's overhead in MiB and in thousandths of a CPU.
fn overhead() -> Result<(u64, u64)> {
    let overhead = cluster::overhead()?;
    let number = |name: &str, unit: &str| {
        let text = overhead[name].as_str().unwrap_or_default();
        let number = text.strip_suffix(unit).and_then(|text| text.parse().ok());
        number.with_context(|| format!("the chart's overhead of {name}, {text:?}, not in {unit}"))
    };
    Ok((number("memory", "Mi")?, number("cpu", "m")?))
}

/// The cgroup that kubelet made for a pod.
fn cgroup(pod: &Pod) -> Result<PathBuf> {
    let uid = pod.metadata.uid.as_deref().context("a pod without a uid")?;
    let name = format!("/pod{uid}");
    let found = kiln_e2e::node::cgroups()
        .into_iter()
        .find(|path| path.ends_with(&name));
    found
        .map(PathBuf::from)
        .with_context(|| format!("no cgroup ends with {name}"))
}

async fn container_is_resized_in_place_up_and_down(test: Test) -> Result<()> {
    let pod = test
        .run(
            r#"
containers:
- name: main
  command: [testprog, started]
  resources: {limits: {memory: 64Mi, cpu: 500m}}
"#,
        )
        .await?;
    let before = pods::container(&pod, "main").and_then(|status| status.container_id.clone());
    for (memory, cpu) in [(192, 1500), (96, 250)] {
        let limits = json!({"memory": format!("{memory}Mi"), "cpu": format!("{cpu}m")});
        test.resize(limits).await?;
        let inside = format!("{} {}00 100000", memory * MIB, cpu);
        wait::until(
            &format!("limits {inside} in the container"),
            STEP,
            || async {
                let files = "/sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max";
                let found = test.exec(&format!("cat {files} | xargs")).await?;
                Ok((found.trim() == inside).then_some(()))
            },
        )
        .await?;
        let said = move |pod: Option<&Pod>| {
            let status = pod.and_then(|pod| pods::container(pod, "main"));
            let resources = status.and_then(|status| status.resources.as_ref());
            let limits = resources.and_then(|resources| resources.limits.as_ref());
            let limit = limits.and_then(|limits| limits.get("memory"));
            limit.is_some_and(|limit| limit.0 == format!("{memory}Mi"))
        };
        test.until("pod", "to say its new limit", said).await?;
    }
    let pod = test.ready("pod").await?;
    same!(pods::restarts(&pod, "main"), 0);
    same!(
        pods::container(&pod, "main").and_then(|status| status.container_id.clone()),
        before
    );
    Ok(())
}

/// A file that kubelet runs a pod from, as long as this lives.
struct StaticPod(PathBuf);

impl StaticPod {
    fn write(test: &Test, text: &str) -> Result<Self> {
        let name = format!("{}.yaml", test.namespace());
        let path = Cluster::default().layout().static_pods().join(name);
        // kubelet is to read all of it or nothing: it leaves out what begins with a dot.
        let draft = path.with_file_name(".draft");
        fs::write(&draft, test.fill(text, &[]))?;
        fs::rename(&draft, &path)?;
        Ok(StaticPod(path))
    }
}

impl Drop for StaticPod {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

async fn static_pod_runs_as_long_as_its_file_is_there(test: Test) -> Result<()> {
    let file = StaticPod::write(
        &test,
        r#"
apiVersion: v1
kind: Pod
metadata: {name: fixed, namespace: "${NAMESPACE}"}
spec:
  runtimeClassName: ${RUNTIME}
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: ${IMAGE}
    command: [testprog, started]
"#,
    )?;
    let pod = test.ready("fixed-node").await?;
    test.logged("fixed-node", None, "started").await?;
    drop(file);
    let uid = pod.metadata.uid.unwrap_or_default();
    let gone = kube::runtime::wait::conditions::is_deleted::<Pod>(&uid);
    test.until_some("fixed-node", "to be gone", gone).await?;
    Ok(())
}

async fn pod_outlives_restarts_of_kubelet_and_containerd(test: Test) -> Result<()> {
    let pod = test
        .run(
            r#"
containers:
- name: main
  command: [sh, -c, "i=0; while :; do i=$((i + 1)); echo line $i; sleep 0.5; done"]
"#,
        )
        .await?;
    let id =
        |pod: &Pod| pods::container(pod, "main").and_then(|status| status.container_id.clone());
    let before = id(&pod);
    ensure!(before.is_some(), "a Ready container without an id");
    Cluster::default().restart("kubelet").await?;
    same!(test.exec("echo after kubelet").await?, "after kubelet\n");
    replace_containerd(Signal::KILL, &[]).await?;
    // kubelet calls the node not ready until it has seen containerd again.
    wait::until("an exec after containerd", STEP, || async {
        let output = test
            .kubectl()
            .output(&["exec", "pod", "--", "echo", "after containerd"], "")
            .await?;
        Ok((output.stdout == b"after containerd\n").then_some(()))
    })
    .await?;
    let written = test.log("pod", None).await?.lines().count();
    test.logged("pod", None, &format!("line {}", written + 5))
        .await?;
    let pod = test.ready("pod").await?;
    same!(pods::restarts(&pod, "main"), 0);
    same!(id(&pod), before);
    test.delete("pod").await
}
