//! What controllers make of pods.

use anyhow::{Result, ensure};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, StatefulSet};
use k8s_openapi::api::batch::v1::Job;
use kiln_e2e::cases;
use kiln_k8s::pods::Pod;
use kiln_k8s::{Test, pods};
use kube::api::ListParams;

use super::{Case, same};

pub(crate) fn cases() -> Vec<Case> {
    cases![
        deployment_scales_and_rolls_out.short().limit(600),
        stateful_set_has_pods_with_names_that_stay,
        daemon_set_has_a_pod_on_the_node,
        job_runs_its_pods_and_counts_failures,
    ]
}

const DEPLOYMENT: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: many}
spec:
  replicas: ${REPLICAS}
  selector: {matchLabels: {app: many}}
  template:
    metadata: {labels: {app: many}}
    spec:
      runtimeClassName: ${RUNTIME}
      containers:
      - name: main
        image: ${IMAGE}
        command: [testprog, http, "8080"]
        env: [{name: VERSION, value: "${VERSION}"}]
        readinessProbe: {httpGet: {path: /, port: 8080}}
"#;

async fn deployment_scales_and_rolls_out(test: Test) -> Result<()> {
    let apply = async |replicas: &str, version: &str| {
        let values = [("REPLICAS", replicas), ("VERSION", version)];
        test.apply_with(DEPLOYMENT, &values).await
    };
    let available = async |count: i32| {
        let enough = move |deployment: Option<&Deployment>| {
            let status = deployment.and_then(|deployment| deployment.status.as_ref());
            status.is_some_and(|status| {
                status.available_replicas == Some(count) && status.replicas == Some(count)
            })
        };
        test.until("many", "to have all its pods", enough).await
    };
    apply("1", "one").await?;
    available(1).await?;
    apply("3", "one").await?;
    available(3).await?;
    apply("2", "two").await?;
    test.kubectl()
        .run(&["rollout", "status", "deployment/many", "--timeout=170s"])
        .await?;
    let list = test.api::<Pod>().list(&ListParams::default()).await?;
    let current = list
        .items
        .iter()
        .filter(|pod| pod.metadata.deletion_timestamp.is_none());
    let versions: Vec<_> = current.filter_map(version).collect();
    same!(versions, ["two", "two"]);
    Ok(())
}

fn version(pod: &Pod) -> Option<&str> {
    let container = pod.spec.as_ref()?.containers.first()?;
    container.env.as_ref()?.first()?.value.as_deref()
}

async fn stateful_set_has_pods_with_names_that_stay(test: Test) -> Result<()> {
    test.apply(
        r#"
apiVersion: v1
kind: Service
metadata: {name: named}
spec: {clusterIP: None, selector: {app: named}, ports: [{port: 80}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: named}
spec:
  replicas: 2
  serviceName: named
  selector: {matchLabels: {app: named}}
  template:
    metadata: {labels: {app: named}}
    spec:
      runtimeClassName: ${RUNTIME}
      terminationGracePeriodSeconds: 1
      containers:
      - name: main
        image: ${IMAGE}
        command: [sh, -c, "hostname -f 2>/dev/null || hostname; exec testprog started"]
"#,
    )
    .await?;
    let complete = |set: Option<&StatefulSet>| {
        let status = set.and_then(|set| set.status.as_ref());
        status.is_some_and(|status| status.ready_replicas == Some(2))
    };
    test.until("named", "to have both pods", complete).await?;
    let first = test.ready("named-0").await?;
    let host = test.log("named-1", None).await?;
    ensure!(host.starts_with("named-1"), "{host:?}");
    test.delete("named-0").await?;
    let again = test.ready("named-0").await?;
    ensure!(first.metadata.uid != again.metadata.uid, "the same pod");
    Ok(())
}

async fn daemon_set_has_a_pod_on_the_node(test: Test) -> Result<()> {
    test.apply(
        r#"
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: everywhere}
spec:
  selector: {matchLabels: {app: everywhere}}
  template:
    metadata: {labels: {app: everywhere}}
    spec:
      runtimeClassName: ${RUNTIME}
      containers:
      - name: main
        image: ${IMAGE}
        command: [testprog, started]
"#,
    )
    .await?;
    let complete = |set: Option<&DaemonSet>| {
        let status = set.and_then(|set| set.status.as_ref());
        status
            .is_some_and(|status| status.desired_number_scheduled == 1 && status.number_ready == 1)
    };
    test.until("everywhere", "to be ready", complete).await?;
    Ok(())
}

async fn job_runs_its_pods_and_counts_failures(test: Test) -> Result<()> {
    test.apply(
        r#"
apiVersion: batch/v1
kind: Job
metadata: {name: good}
spec:
  completions: 3
  parallelism: 2
  completionMode: Indexed
  template:
    spec:
      runtimeClassName: ${RUNTIME}
      restartPolicy: Never
      containers:
      - name: main
        image: ${IMAGE}
        command: [sh, -c, "echo index $JOB_COMPLETION_INDEX"]
---
apiVersion: batch/v1
kind: Job
metadata: {name: bad}
spec:
  backoffLimit: 0
  template:
    spec:
      runtimeClassName: ${RUNTIME}
      restartPolicy: Never
      containers:
      - name: main
        image: ${IMAGE}
        command: [testprog, exit, "3"]
"#,
    )
    .await?;
    let done = |job: Option<&Job>| {
        job.and_then(|job| job.status.as_ref())
            .is_some_and(|status| status.completion_time.is_some())
    };
    let job: Job = test.until("good", "to be complete", done).await?;
    same!(job.status.and_then(|status| status.succeeded), Some(3));
    let failed = |job: Option<&Job>| {
        let status = job.and_then(|job| job.status.as_ref());
        let conditions = status.and_then(|status| status.conditions.as_ref());
        conditions
            .into_iter()
            .flatten()
            .any(|condition| condition.type_ == "Failed" && condition.status == "True")
    };
    test.until("bad", "to fail", failed).await?;
    let all = ListParams::default().labels("job-name=bad");
    let list = test.api::<Pod>().list(&all).await?.items;
    let codes: Vec<_> = list
        .iter()
        .filter_map(|pod| pods::terminated(pod, "main"))
        .map(|end| end.exit_code)
        .collect();
    same!(codes, [3]);
    Ok(())
}
