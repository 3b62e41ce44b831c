//! Resources of a pod as a whole, and changes of them that have to wait.

use anyhow::{Context, Result, ensure};
use kiln_e2e::cases;
use kiln_k8s::Test;
use kiln_k8s::pods::{self, Pod};
use serde_json::json;

use super::{Case, same};

pub(crate) fn cases() -> Vec<Case> {
    cases![
        limits_of_a_pod_hold_for_all_its_containers,
        resize_without_room_waits_or_is_refused.alone(),
    ]
}

async fn limits_of_a_pod_hold_for_all_its_containers(test: Test) -> Result<()> {
    test.apply(
        r#"
restartPolicy: Never
resources: {limits: {memory: 128Mi, cpu: "1"}}
containers:
- name: small
  command: [testprog, fill, "32"]
- name: large
  command: [sh, -c, "sleep 2; exec testprog fill 400"]
"#,
    )
    .await?;
    let killed =
        |pod: Option<&Pod>| pod.is_some_and(|pod| pods::terminated(pod, "large").is_some());
    let pod = test.until("pod", "to be out of memory", killed).await?;
    let end = pods::terminated(&pod, "large").context("no end")?;
    same!(
        (end.reason.as_deref(), end.exit_code),
        (Some("OOMKilled"), 137)
    );
    Ok(())
}

async fn resize_without_room_waits_or_is_refused(test: Test) -> Result<()> {
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
    resources: {limits: {memory: 64Mi, cpu: "${CPU}"}}
"#;
    test.apply_with(POD, &[("NAME", "pod"), ("CPU", "100m")])
        .await?;
    test.ready("pod").await?;
    let refused = test.resize(json!({"cpu": "64"})).await.err();
    let refused = refused.context("more CPUs than the node has are granted")?;
    ensure!(
        format!("{refused:#}").contains("allocatable"),
        "{refused:#}"
    );
    // The node has three CPUs.
    test.apply_with(POD, &[("NAME", "beside"), ("CPU", "2")])
        .await?;
    test.ready("beside").await?;
    test.resize(json!({"cpu": "1500m"})).await?;
    waits(&test, Some("Deferred")).await?;
    same!(
        test.exec("cat /sys/fs/cgroup/cpu.max").await?,
        "10000 100000\n"
    );
    test.delete("beside").await?;
    waits(&test, None).await?;
    let has_it = |pod: Option<&Pod>| {
        let status = pod.and_then(|pod| pods::container(pod, "main"));
        let resources = status.and_then(|status| status.resources.as_ref());
        let limits = resources.and_then(|resources| resources.limits.as_ref());
        limits.is_some_and(|limits| limits.get("cpu").is_some_and(|cpu| cpu.0 == "1500m"))
    };
    let pod = test.until("pod", "to have its CPU time", has_it).await?;
    same!(pods::restarts(&pod, "main"), 0);
    same!(
        test.exec("cat /sys/fs/cgroup/cpu.max").await?,
        "150000 100000\n"
    );
    Ok(())
}

/// Waits until the pod says why its resize waits, or that none does.
async fn waits(test: &Test, why: Option<&'static str>) -> Result<()> {
    let says =
        move |pod: Option<&Pod>| pod.is_some_and(|pod| pods::why(pod, "PodResizePending") == why);
    let what = format!("to have a resize that waits: {why:?}");
    test.until("pod", &what, says).await.map(drop)
}
