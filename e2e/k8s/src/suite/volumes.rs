//! Volumes of each kind that needs no other program.

use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;

use anyhow::{Result, ensure};
use kiln_e2e::{cases, wait};
use kiln_k8s::{STEP, Test, pods};

use super::{Case, same};

pub(crate) fn cases() -> Vec<Case> {
    cases![
        empty_dir_is_shared_and_outlives_a_container.short(),
        empty_dir_over_its_limit_evicts_the_pod.limit(600),
        ephemeral_storage_over_its_limit_evicts_the_pod.limit(600),
        downward_api_and_projected_volumes_tell_of_the_pod,
        config_map_is_mounted_and_its_change_is_seen,
        sub_paths_show_a_part_of_a_volume.short(),
        host_paths_of_each_type_are_as_asked,
    ]
}

async fn empty_dir_is_shared_and_outlives_a_container(test: Test) -> Result<()> {
    test.apply(
        r#"
restartPolicy: OnFailure
volumes:
- {name: disk, emptyDir: {}}
- {name: memory, emptyDir: {medium: Memory, sizeLimit: 16Mi}}
containers:
- name: writer
  # Ends badly the first time; the second time both files are there.
  command: [sh, -c, "cat /disk/file /memory/file && exit 0; echo disk > /disk/file; echo memory > /memory/file; exit 1"]
  volumeMounts: [{name: disk, mountPath: /disk}, {name: memory, mountPath: /memory}]
- name: reader
  command: [sh, -c, "until [ -e /memory/file ]; do sleep 0.2; done; cat /disk/file /memory/file; stat -f -c %T /memory; df -m /memory | tail -1 | awk '{print $2}'"]
  volumeMounts: [{name: disk, mountPath: /disk}, {name: memory, mountPath: /memory}]
"#,
    )
    .await?;
    let pod = test.ended("pod").await?;
    same!(pods::phase(&pod), "Succeeded");
    same!(pods::restarts(&pod, "writer"), 1);
    same!(test.log("pod", Some("writer")).await?, "disk\nmemory\n");
    same!(
        test.log("pod", Some("reader")).await?,
        "disk\nmemory\ntmpfs\n16\n"
    );
    Ok(())
}

async fn empty_dir_over_its_limit_evicts_the_pod(test: Test) -> Result<()> {
    test.apply(
        r#"
volumes: [{name: small, emptyDir: {sizeLimit: 4Mi}}]
containers:
- name: main
  command: [sh, -c, "testprog put /small/file 33554432 1; exec testprog started"]
  volumeMounts: [{name: small, mountPath: /small}]
"#,
    )
    .await?;
    is_evicted(&test).await
}

async fn ephemeral_storage_over_its_limit_evicts_the_pod(test: Test) -> Result<()> {
    test.apply(
        r#"
containers:
- name: main
  command: [sh, -c, "testprog put /tmp/file 33554432 1; exec testprog started"]
  resources: {limits: {ephemeral-storage: 4Mi}}
"#,
    )
    .await?;
    is_evicted(&test).await
}

/// Waits until the pod is evicted for the limit of 4 MiB that both tests set.
async fn is_evicted(test: &Test) -> Result<()> {
    let pod = test.ended("pod").await?;
    same!(pods::phase(&pod), "Failed");
    same!(pods::reason(&pod), "Evicted");
    let message = pod.status.and_then(|status| status.message);
    let message = message.unwrap_or_default();
    ensure!(message.contains("4Mi"), "{message}");
    Ok(())
}

async fn downward_api_and_projected_volumes_tell_of_the_pod(test: Test) -> Result<()> {
    let log = test
        .finish(
            r#"
apiVersion: v1
kind: Secret
metadata: {name: secret}
stringData: {password: hidden}
---
apiVersion: v1
kind: Pod
metadata:
  name: pod
  labels: {colour: blue}
spec:
  runtimeClassName: ${RUNTIME}
  restartPolicy: Never
  volumes:
  - name: info
    downwardAPI:
      items:
      - {path: labels, fieldRef: {fieldPath: metadata.labels}}
      - {path: memory, resourceFieldRef: {containerName: main, resource: limits.memory, divisor: 1Mi}}
  - name: all
    projected:
      defaultMode: 0o440
      sources:
      - serviceAccountToken: {path: token, audience: somebody, expirationSeconds: 3600}
      - secret: {name: secret}
      - downwardAPI: {items: [{path: name, fieldRef: {fieldPath: metadata.name}}]}
  containers:
  - name: main
    image: ${IMAGE}
    command:
    - sh
    - -c
    - |
      cat /info/labels; echo; cat /info/memory; echo
      cat /all/name /all/password; echo
      stat -L -c %a /all/password
      # The second of a token's three parts says for whom it is.
      cut -d. -f2 /all/token | tr _- /+ | base64 -d 2>/dev/null | grep -o '"aud":\["somebody"\]'
      echo $NAME $NODE $CPU
      [ "$IP" = "$(hostname -i)" ] && echo same address
      cat /var/run/secrets/kubernetes.io/serviceaccount/namespace
    env:
    - {name: NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
    - {name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
    - {name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
    - {name: CPU, valueFrom: {resourceFieldRef: {resource: limits.cpu, divisor: 1m}}}
    resources: {limits: {memory: 64Mi, cpu: 500m}}
    volumeMounts: [{name: info, mountPath: /info}, {name: all, mountPath: /all}]
"#,
        )
        .await?;
    let expected = [
        "colour=\"blue\"",
        "64",
        "podhidden",
        "440",
        "\"aud\":[\"somebody\"]",
        "pod node 500",
        "same address",
        test.namespace(),
    ];
    same!(log.lines().collect::<Vec<_>>(), expected);
    Ok(())
}

async fn config_map_is_mounted_and_its_change_is_seen(test: Test) -> Result<()> {
    const MAP: &str = r#"
apiVersion: v1
kind: ConfigMap
metadata: {name: map}
data: {key: "${VALUE}"}
"#;
    test.apply_with(MAP, &[("VALUE", "one")]).await?;
    test.run(
        r#"
volumes: [{name: map, configMap: {name: map}}]
containers:
- name: main
  command: [sh, -c, "echo env $KEY; while :; do echo file $(cat /map/key); sleep 1; done"]
  env: [{name: KEY, valueFrom: {configMapKeyRef: {name: map, key: key}}}]
  volumeMounts: [{name: map, mountPath: /map}]
"#,
    )
    .await?;
    same!(test.logged("pod", None, "env ").await?, "one");
    test.logged("pod", None, "file one").await?;
    test.apply_with(MAP, &[("VALUE", "two")]).await?;
    test.logged("pod", None, "file two").await?;
    Ok(())
}

async fn sub_paths_show_a_part_of_a_volume(test: Test) -> Result<()> {
    std::fs::create_dir_all(test.scratch().join("below/deeper"))?;
    test.write("below/deeper/file", "deep\n")?;
    test.write("below/secret", "not to be seen\n")?;
    let log = test
        .finish(
            r#"
apiVersion: v1
kind: ConfigMap
metadata: {name: map}
data: {one: "first", two: "second"}
---
restartPolicy: Never
volumes:
- {name: node, hostPath: {path: "${SCRATCH}"}}
- {name: map, configMap: {name: map}}
- {name: empty, emptyDir: {}}
containers:
- name: main
  command: [sh, -c, "cat /deep/file /etc/one; echo; ls /deep /etc/two 2>&1; echo made > /made/here; ls /all/made-here-pod"]
  env: [{name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}]
  volumeMounts:
  - {name: node, mountPath: /deep, subPath: below/deeper}
  - {name: map, mountPath: /etc/one, subPath: one}
  - {name: empty, mountPath: /made, subPathExpr: made-here-$(POD)}
  - {name: empty, mountPath: /all}
"#,
        )
        .await?;
    same!(
        log,
        "deep\nfirst\nls: /etc/two: No such file or directory\n/deep:\nfile\nhere\n"
    );
    Ok(())
}

async fn host_paths_of_each_type_are_as_asked(test: Test) -> Result<()> {
    test.write("file", "of the node\n")?;
    let socket = test.scratch().join("socket");
    let _listener = UnixListener::bind(&socket)?;
    std::fs::create_dir_all(test.scratch().join("folder"))?;
    let log = test
        .finish(
            r#"
restartPolicy: Never
volumes:
- {name: file, hostPath: {path: "${SCRATCH}/file", type: File}}
- {name: new-file, hostPath: {path: "${SCRATCH}/new-file", type: FileOrCreate}}
- {name: folder, hostPath: {path: "${SCRATCH}/folder", type: Directory}}
- {name: new-folder, hostPath: {path: "${SCRATCH}/new-folder", type: DirectoryOrCreate}}
- {name: socket, hostPath: {path: "${SCRATCH}/socket", type: Socket}}
containers:
- name: main
  command: [sh, -c, "cat /file; echo more >> /new-file; echo more > /folder/more; echo more > /new-folder/more; [ -S /socket ] && echo socket; echo x 2>/dev/null > /read-only/x || echo read-only"]
  volumeMounts:
  - {name: file, mountPath: /file, readOnly: true}
  - {name: new-file, mountPath: /new-file}
  - {name: folder, mountPath: /folder}
  - {name: folder, mountPath: /read-only, readOnly: true}
  - {name: new-folder, mountPath: /new-folder}
  - {name: socket, mountPath: /socket}
"#,
        )
        .await?;
    same!(log, "of the node\nsocket\nread-only\n");
    for path in ["new-file", "folder/more", "new-folder/more"] {
        let path = test.scratch().join(path);
        same!(std::fs::read_to_string(&path)?, "more\n");
        same!(path.metadata()?.uid(), 0);
    }

    // What is of another type keeps its pod from starting, and the event says why.
    test.apply(
        r#"
apiVersion: v1
kind: Pod
metadata: {name: wrong}
spec:
  runtimeClassName: ${RUNTIME}
  terminationGracePeriodSeconds: 1
  volumes: [{name: file, hostPath: {path: "${SCRATCH}/folder", type: File}}]
  containers:
  - name: main
    image: ${IMAGE}
    command: [testprog, started]
    volumeMounts: [{name: file, mountPath: /file}]
"#,
    )
    .await?;
    wait::until("an event about the type", STEP, || async {
        let events = test.kubectl().run(&["events", "--for=pod/wrong"]).await?;
        Ok(events.contains("hostPath type check failed").then_some(()))
    })
    .await
}
