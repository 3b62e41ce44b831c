//! Containers' lives: order, probes, hooks, restarts, ends.

use anyhow::{Context, Result, ensure};
use kiln_e2e::cases;
use kiln_k8s::pods::Pod;
use kiln_k8s::{Test, pods};

use super::{Case, same};

pub(crate) fn cases() -> Vec<Case> {
    cases![
        init_containers_and_sidecars_run_in_order.short(),
        readiness_probes_of_each_kind_hold_pods_back.short(),
        liveness_and_startup_probes_restart_what_fails,
        hooks_run_and_grace_is_given.short(),
        restart_policies_are_kept_and_restarts_back_off,
        container_over_its_memory_is_oom_killed.short(),
    ]
}

async fn init_containers_and_sidecars_run_in_order(test: Test) -> Result<()> {
    test.apply(
        r#"
restartPolicy: Never
volumes: [{name: shared, emptyDir: {}}]
initContainers:
- name: first
  command: [sh, -c, "echo first > /shared/order"]
  volumeMounts: [{name: shared, mountPath: /shared}]
- name: sidecar
  restartPolicy: Always
  command: [sh, -c, "echo sidecar >> /shared/order; trap 'echo asked; exit 0' TERM; while :; do sleep 0.2; done"]
  startupProbe: {exec: {command: [grep, -q, sidecar, /shared/order]}, periodSeconds: 1, failureThreshold: 120}
  volumeMounts: [{name: shared, mountPath: /shared}]
- name: last
  command: [sh, -c, "echo last >> /shared/order"]
  volumeMounts: [{name: shared, mountPath: /shared}]
containers:
- name: main
  command: [sh, -c, "cat /shared/order"]
  volumeMounts: [{name: shared, mountPath: /shared}]
"#,
    )
    .await?;
    // A sidecar does not keep its pod from ending.
    let pod = test.ended("pod").await?;
    same!(pods::phase(&pod), "Succeeded");
    same!(
        test.log("pod", Some("main")).await?,
        "first\nsidecar\nlast\n"
    );
    same!(test.log("pod", Some("sidecar")).await?, "asked\n");
    Ok(())
}

async fn readiness_probes_of_each_kind_hold_pods_back(test: Test) -> Result<()> {
    test.apply(
        r#"
volumes: [{name: shared, emptyDir: {}}]
containers:
- name: exec
  command: [testprog, started]
  readinessProbe: {exec: {command: [test, -e, /shared/exec]}, periodSeconds: 1, timeoutSeconds: 60}
  volumeMounts: [{name: shared, mountPath: /shared}]
- name: http
  command: [httpd, -f, -p, "8080", -h, /shared]
  readinessProbe: {httpGet: {path: /http, port: 8080}, periodSeconds: 1, timeoutSeconds: 60}
  volumeMounts: [{name: shared, mountPath: /shared}]
- name: tcp
  command: [sh, -c, "until [ -e /shared/tcp ]; do sleep 0.2; done; exec testprog http 8081"]
  readinessProbe: {tcpSocket: {port: 8081}, periodSeconds: 1, timeoutSeconds: 60}
  volumeMounts: [{name: shared, mountPath: /shared}]
- name: grpc
  command: [testprog, health, "8082", /shared/grpc]
  readinessProbe: {grpc: {port: 8082}, periodSeconds: 1, timeoutSeconds: 60}
  volumeMounts: [{name: shared, mountPath: /shared}]
"#,
    )
    .await?;
    let names = ["exec", "http", "tcp", "grpc"];
    let all_run = move |pod: Option<&Pod>| {
        pod.is_some_and(|pod| names.iter().all(|name| pods::is_running(pod, name)))
    };
    let pod = test.until("pod", "to run", all_run).await?;
    ensure!(!pods::is_ready(&pod), "ready without a cause: {pod:#?}");
    for name in names {
        let script = format!("touch /shared/{name}");
        test.kubectl()
            .run(&["exec", "pod", "-c", "exec", "--", "sh", "-c", &script])
            .await?;
        let is_ready = move |pod: Option<&Pod>| {
            let status = pod.and_then(|pod| pods::container(pod, name));
            status.is_some_and(|status| status.ready)
        };
        test.until("pod", "to have one more container that is ready", is_ready)
            .await?;
    }
    let pod = test.ready("pod").await?;
    for name in names {
        same!(pods::restarts(&pod, name), 0);
    }
    test.kubectl()
        .run(&["exec", "pod", "-c", "exec", "--", "rm", "/shared/http"])
        .await?;
    let not_ready = |pod: Option<&Pod>| pod.is_some_and(|pod| !pods::is_ready(pod));
    test.until("pod", "to be ready no more", not_ready).await?;
    Ok(())
}

async fn liveness_and_startup_probes_restart_what_fails(test: Test) -> Result<()> {
    test.apply(
        r#"
volumes: [{name: shared, emptyDir: {}}]
containers:
- name: live
  command: [testprog, started]
  # Whoever is started the second time lives.
  livenessProbe: {exec: {command: [sh, -c, "[ -e /shared/live ] || { touch /shared/live; exit 1; }"]}, periodSeconds: 2, failureThreshold: 1, timeoutSeconds: 60}
  volumeMounts: [{name: shared, mountPath: /shared}]
- name: startup
  command: [sh, -c, "echo start >> /shared/starts; exec testprog started"]
  startupProbe: {exec: {command: [sh, -c, "[ $(wc -l < /shared/starts) -ge 2 ]"]}, periodSeconds: 2, failureThreshold: 1, timeoutSeconds: 60}
  # Would end it at once if the startup probe did not hold it back.
  livenessProbe: {exec: {command: [sh, -c, "[ $(wc -l < /shared/starts) -ge 2 ]"]}, periodSeconds: 1, failureThreshold: 1, timeoutSeconds: 60}
  volumeMounts: [{name: shared, mountPath: /shared}]
"#,
    )
    .await?;
    let restarted = |pod: Option<&Pod>| {
        pod.is_some_and(|pod| {
            ["live", "startup"]
                .iter()
                .all(|name| pods::restarts(pod, name) == 1 && pods::is_running(pod, name))
                && pods::is_ready(pod)
        })
    };
    test.until("pod", "to have restarted each container once", restarted)
        .await?;
    Ok(())
}

async fn hooks_run_and_grace_is_given(test: Test) -> Result<()> {
    test.run(
        r#"
terminationGracePeriodSeconds: 120
volumes: [{name: node, hostPath: {path: "${SCRATCH}"}}]
containers:
- name: main
  command: [sh, -c, "trap 'sleep 3; echo end >> /node/said; exit 0' TERM; echo ready; while :; do sleep 0.1; done"]
  lifecycle:
    postStart: {exec: {command: [sh, -c, "echo postStart >> /node/said"]}}
    preStop: {exec: {command: [sh, -c, "echo preStop >> /node/said"]}}
  volumeMounts: [{name: node, mountPath: /node}]
"#,
    )
    .await?;
    let said = test.scratch().join("said");
    same!(std::fs::read_to_string(&said)?, "postStart\n");
    test.logged("pod", None, "ready").await?;
    test.delete("pod").await?;
    same!(std::fs::read_to_string(&said)?, "postStart\npreStop\nend\n");
    Ok(())
}

async fn restart_policies_are_kept_and_restarts_back_off(test: Test) -> Result<()> {
    const POD: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: "${NAME}"}
spec:
  runtimeClassName: ${RUNTIME}
  restartPolicy: ${POLICY}
  volumes: [{name: shared, emptyDir: {}}]
  containers:
  - name: main
    image: ${IMAGE}
    command: [sh, -c, "echo start >> /shared/starts; [ $(wc -l < /shared/starts) -ge ${GOOD} ]"]
    volumeMounts: [{name: shared, mountPath: /shared}]
"#;
    for (name, policy, good) in [
        ("never", "Never", "2"),
        ("on-failure", "OnFailure", "2"),
        ("always", "Always", "100"),
    ] {
        let values = [("NAME", name), ("POLICY", policy), ("GOOD", good)];
        test.apply_with(POD, &values).await?;
    }
    let never = test.ended("never").await?;
    same!(pods::phase(&never), "Failed");
    same!(pods::restarts(&never, "main"), 0);
    let on_failure = test.ended("on-failure").await?;
    same!(pods::phase(&on_failure), "Succeeded");
    same!(pods::restarts(&on_failure, "main"), 1);
    let backs_off =
        |pod: Option<&Pod>| pod.is_some_and(|pod| pods::waits(pod, "main") == "CrashLoopBackOff");
    let always = test.until("always", "to back off", backs_off).await?;
    let before = pods::terminated_before(&always, "main").context("no end before")?;
    same!(before.exit_code, 1);
    let twice = |pod: Option<&Pod>| pod.is_some_and(|pod| pods::restarts(pod, "main") >= 2);
    test.until("always", "to start again and again", twice)
        .await?;
    Ok(())
}

async fn container_over_its_memory_is_oom_killed(test: Test) -> Result<()> {
    test.apply(
        r#"
restartPolicy: Never
containers:
- name: main
  command: [testprog, fill, "200"]
  resources: {limits: {memory: 64Mi}}
- name: beside
  command: [sh, -c, "until [ -e /tmp/go ]; do sleep 0.2; done"]
  resources: {limits: {memory: 32Mi}}
"#,
    )
    .await?;
    let killed = |pod: Option<&Pod>| pod.is_some_and(|pod| pods::terminated(pod, "main").is_some());
    let pod = test.until("pod", "to be out of memory", killed).await?;
    let end = pods::terminated(&pod, "main").context("no end")?;
    same!(end.reason.as_deref(), Some("OOMKilled"));
    same!(end.exit_code, 137);
    // The other container has memory of its own.
    test.kubectl()
        .run(&["exec", "pod", "-c", "beside", "--", "touch", "/tmp/go"])
        .await?;
    let pod = test.ended("pod").await?;
    let end = pods::terminated(&pod, "beside").context("no end")?;
    same!(end.exit_code, 0);
    Ok(())
}
