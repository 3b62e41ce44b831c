//! Volumes that a pod claims, and those that are images.

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::PersistentVolume;
use kiln_e2e::cases;
use kiln_e2e::node::LoopDevice;
use kiln_k8s::{Test, manifest};
use kube::api::{Api, DeleteParams};

use super::{Case, same};

pub(crate) fn cases() -> Vec<Case> {
    cases![
        claimed_folder_is_kept_from_pod_to_pod,
        claimed_disk_is_a_device_of_the_container,
        image_is_a_volume_that_nobody_writes_to,
    ]
}

/// A volume of the node and the claim for it.
const CLAIM: &str = r#"
apiVersion: v1
kind: PersistentVolume
metadata: {name: "${NAMESPACE}"}
spec:
  capacity: {storage: 24Mi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  storageClassName: of-the-node
  volumeMode: ${MODE}
  local: {path: "${PATH}"}
  claimRef: {namespace: "${NAMESPACE}", name: claim}
  nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: Exists}]}]}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: claim}
spec:
  accessModes: [ReadWriteOnce]
  resources: {requests: {storage: 24Mi}}
  storageClassName: of-the-node
  volumeMode: ${MODE}
"#;

/// A persistent volume, which is in no namespace, as long as the test runs.
async fn claim(test: &Test, mode: &str, path: &str) -> Result<()> {
    for object in test.objects(CLAIM, &[("MODE", mode), ("PATH", path)])? {
        let of_the_cluster = object.data["spec"].get("local").is_some();
        let namespace = (!of_the_cluster).then(|| test.namespace());
        manifest::apply(test.client(), namespace, &object).await?;
    }
    Ok(())
}

async fn unclaim(test: &Test) -> Result<()> {
    let volumes: Api<PersistentVolume> = Api::all(test.client().clone());
    volumes
        .delete(test.namespace(), &DeleteParams::default())
        .await?;
    Ok(())
}

async fn claimed_folder_is_kept_from_pod_to_pod(test: Test) -> Result<()> {
    let folder = test.scratch().join("claimed");
    std::fs::create_dir(&folder)?;
    claim(&test, "Filesystem", &folder.display().to_string()).await?;
    let outcome = use_folder(&test).await;
    unclaim(&test).await?;
    outcome?;
    same!(std::fs::read_to_string(folder.join("file"))?, "one\ntwo\n");
    Ok(())
}

async fn use_folder(test: &Test) -> Result<()> {
    const POD: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: "${NAME}"}
spec:
  runtimeClassName: ${RUNTIME}
  restartPolicy: Never
  securityContext: {runAsUser: 1234, runAsGroup: 1234, fsGroup: 2000}
  volumes: [{name: data, persistentVolumeClaim: {claimName: claim}}]
  containers:
  - name: main
    image: ${IMAGE}
    command: [sh, -c, "echo ${NAME} >> /data/file && stat -c '%u %g' /data/file"]
    volumeMounts: [{name: data, mountPath: /data}]
"#;
    for name in ["one", "two"] {
        test.apply_with(POD, &[("NAME", name)]).await?;
        test.ended(name).await?;
        same!(test.log(name, None).await?, "1234 2000\n");
    }
    Ok(())
}

async fn claimed_disk_is_a_device_of_the_container(test: Test) -> Result<()> {
    const SIZE: u64 = 24 << 20;
    let disk = LoopDevice::over(&test.scratch().join("disk"), SIZE)?;
    claim(&test, "Block", disk.path()).await?;
    let log = test
        .finish(
            r#"
restartPolicy: Never
volumes: [{name: data, persistentVolumeClaim: {claimName: claim}}]
containers:
- name: main
  command: [sh, -c, "blockdev --getsize64 /dev/data && echo hello | dd of=/dev/data conv=fsync 2> /dev/null"]
  volumeDevices: [{name: data, devicePath: /dev/data}]
"#,
        )
        .await;
    unclaim(&test).await?;
    same!(log?, format!("{SIZE}\n"));
    let written = std::fs::read(test.scratch().join("disk"))?;
    ensure!(written.starts_with(b"hello\n"), "{:?}", &written[..8]);
    test.delete("pod").await
}

async fn image_is_a_volume_that_nobody_writes_to(test: Test) -> Result<()> {
    let log = test
        .finish(
            r#"
restartPolicy: Never
volumes: [{name: image, image: {reference: "${IMAGE}", pullPolicy: Never}}]
containers:
- name: main
  command: [sh, -c, "cmp /bin/busybox /image/bin/busybox && ls /etc-of-it/passwd; touch /image/file 2> /dev/null || echo refused"]
  volumeMounts:
  - {name: image, mountPath: /image}
  - {name: image, mountPath: /etc-of-it, subPath: etc}
"#,
        )
        .await?;
    same!(log, "/etc-of-it/passwd\nrefused\n");
    Ok(())
}
