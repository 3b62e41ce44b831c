//! Volumes without a shared file system: what is small and only read is copied into the guest,
//! what belongs to the pod alone lives there, and the rest is refused.
//!
//! A path of the host becomes the same guest path for every container of the pod, so that
//! containers share what they share on a node.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use kiln_agent_api::{GUEST_SHM, GUEST_STATE_DIR, proto};
use sha2::{Digest, Sha256};
use tokio::sync::Mutex;

use crate::error::{Error, Result};
use crate::spec::SpecMount;
use crate::uvm::Uvm;

/// Larger volumes aren't copied. Kubernetes keeps configMaps and secrets below 1 MiB.
const LARGEST: u64 = 4 << 20;
/// A volume of more files isn't copied.
const MOST_FILES: usize = 1000;
/// Files that the runtime makes for a pod; the guest's copy is the pod's own.
const POD_FILES: [&str; 4] = [
    "/etc/hosts",
    "/etc/hostname",
    "/etc/resolv.conf",
    "/dev/termination-log",
];
/// Directories of the kubelet whose content is projected from the API server.
const PROJECTED: [&str; 4] = [
    "/volumes/kubernetes.io~configmap/",
    "/volumes/kubernetes.io~secret/",
    "/volumes/kubernetes.io~projected/",
    "/volumes/kubernetes.io~downward-api/",
];
const EMPTY_DIR: &str = "/volumes/kubernetes.io~empty-dir/";

/// What becomes of a mount.
#[derive(Debug, PartialEq, Eq)]
enum Plan {
    /// It needs nothing of the host.
    Keep,
    /// The pod's shared memory.
    SharedMemory,
    /// A file or a directory of files is copied.
    Copy,
    /// A directory in the guest's memory that the pod's containers share.
    InGuest,
}

fn plan(mount: &SpecMount) -> Result<Plan> {
    if !mount.is_bind() {
        return Ok(Plan::Keep);
    }
    if mount.destination == "/dev/shm" {
        return Ok(Plan::SharedMemory);
    }
    let source = mount.source.as_str();
    let below = |markers: &[&str]| markers.iter().any(|m| source.contains(m));
    if POD_FILES.contains(&mount.destination.as_str()) || below(&PROJECTED) {
        return Ok(Plan::Copy);
    }
    if below(&[EMPTY_DIR]) {
        return Ok(Plan::InGuest);
    }
    if mount.is_read_only() {
        return Ok(Plan::Copy);
    }
    Err(Error::Unimplemented(format!(
        "the volume {source} at {} is writable and on the host, which needs virtio-fs; only \
         emptyDir volumes, projected volumes and small read-only ones are supported so far",
        mount.destination
    )))
}

/// The directories of the guest that the pod's containers share already.
#[derive(Debug, Default)]
pub struct SharedVolumes(Mutex<HashSet<String>>);

/// Makes ready what the mounts need in the guest, and gives them back with guest paths.
pub(super) async fn prepare(
    uvm: &dyn Uvm,
    shared: &SharedVolumes,
    mounts: Vec<SpecMount>,
) -> Result<Vec<SpecMount>> {
    let mut out = Vec::with_capacity(mounts.len());
    for mut mount in mounts {
        match plan(&mount)? {
            Plan::Keep => {}
            Plan::SharedMemory => mount.source = GUEST_SHM.to_owned(),
            Plan::Copy => {
                let target = guest_path(&mount.source);
                copy(uvm, Path::new(&mount.source), &target).await?;
                mount.source = target;
            }
            Plan::InGuest => {
                let target = guest_path(&mount.source);
                // Held across the call: the second container must find it mounted.
                let mut made = shared.0.lock().await;
                if !made.contains(&target) {
                    uvm.add_mounts(vec![shared_directory(&target)]).await?;
                    made.insert(target.clone());
                }
                mount.source = target;
            }
        }
        out.push(mount);
    }
    Ok(out)
}

fn guest_path(source: &str) -> String {
    let digest = Sha256::digest(source.as_bytes());
    let name: String = digest[..12].iter().map(|b| format!("{b:02x}")).collect();
    format!("{GUEST_STATE_DIR}/volumes/{name}")
}

fn shared_directory(target: &str) -> proto::Mount {
    proto::Mount {
        source: "tmpfs".into(),
        target: target.to_owned(),
        type_: "tmpfs".into(),
        // As the kubelet makes them: for everybody.
        options: vec!["mode=777".into()],
        make_target: true,
        target_mode: 0o777,
        ..Default::default()
    }
}

/// Copies a file, or a directory's files, into the guest.
async fn copy(uvm: &dyn Uvm, source: &Path, target: &str) -> Result<()> {
    for file in collect(source, target)? {
        uvm.write_file(file).await?;
    }
    Ok(())
}

fn collect(source: &Path, target: &str) -> Result<Vec<proto::WriteFileRequest>> {
    let mut files = Vec::new();
    let mut size = 0;
    gather(source, target.to_owned(), &mut files, &mut size)?;
    Ok(files)
}

/// Links are followed: a projected volume is a directory of links into a hidden one.
fn gather(
    source: &Path,
    target: String,
    files: &mut Vec<proto::WriteFileRequest>,
    size: &mut u64,
) -> Result<()> {
    let failed = |e| Error::failed(format!("read the volume {}", source.display()), e);
    let metadata = fs::metadata(source).map_err(failed)?;
    if metadata.is_dir() {
        for entry in fs::read_dir(source).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            // `..data` and `..2026_11_21_…` are how the kubelet swaps versions.
            if name.as_encoded_bytes().starts_with(b"..") {
                continue;
            }
            let name = name.into_string().map_err(|name| {
                Error::InvalidArgument(format!("a file name of the volume is not UTF-8: {name:?}"))
            })?;
            gather(&source.join(&name), format!("{target}/{name}"), files, size)?;
        }
        return Ok(());
    }
    if !metadata.is_file() {
        return Err(Error::Unimplemented(format!(
            "{} is neither a file nor a directory; sockets and devices can't be copied into a μVM",
            source.display()
        )));
    }
    *size += metadata.len();
    if *size > LARGEST || files.len() >= MOST_FILES {
        return Err(Error::Unimplemented(format!(
            "the volume with {} is larger than {} MiB or has more than {MOST_FILES} files, which \
             needs virtio-fs",
            source.display(),
            LARGEST >> 20
        )));
    }
    files.push(proto::WriteFileRequest {
        path: target,
        data: fs::read(source).map_err(failed)?,
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        ..Default::default()
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn bind(source: &str, destination: &str, options: &[&str]) -> SpecMount {
        SpecMount {
            destination: destination.into(),
            kind: "bind".into(),
            source: source.into(),
            options: options.iter().map(|o| (*o).to_owned()).collect(),
        }
    }

    #[test]
    fn every_kind_of_volume_has_its_way() {
        let pod = "/var/lib/kubelet/pods/1/volumes";
        let tmpfs = SpecMount {
            kind: "tmpfs".into(),
            ..SpecMount::default()
        };
        assert_eq!(plan(&tmpfs).unwrap(), Plan::Keep);
        let shm = bind(
            "/run/containerd/sandboxes/1/shm",
            "/dev/shm",
            &["rbind", "rw"],
        );
        assert_eq!(plan(&shm).unwrap(), Plan::SharedMemory);
        let hosts = bind(
            "/var/lib/kubelet/pods/1/etc-hosts",
            "/etc/hosts",
            &["rbind", "rw"],
        );
        assert_eq!(plan(&hosts).unwrap(), Plan::Copy);
        let config = bind(
            &format!("{pod}/kubernetes.io~configmap/c"),
            "/c",
            &["rbind", "rw"],
        );
        assert_eq!(plan(&config).unwrap(), Plan::Copy);
        let empty = bind(
            &format!("{pod}/kubernetes.io~empty-dir/e"),
            "/e",
            &["rbind", "rw"],
        );
        assert_eq!(plan(&empty).unwrap(), Plan::InGuest);
        assert_eq!(
            plan(&bind("/etc/ssl", "/ssl", &["rbind", "ro"])).unwrap(),
            Plan::Copy
        );
    }

    #[test]
    fn writable_host_path_is_refused_not_copied() {
        let error = plan(&bind("/srv/data", "/data", &["rbind", "rw"])).unwrap_err();
        assert!(matches!(error, Error::Unimplemented(_)));
        assert!(error.to_string().contains("/srv/data"));
    }

    #[test]
    fn containers_of_a_pod_find_the_same_path() {
        assert_eq!(guest_path("/a"), guest_path("/a"));
        assert_ne!(guest_path("/a"), guest_path("/b"));
    }

    #[test]
    fn projected_volume_is_copied_through_its_links() {
        let dir = tempfile::tempdir().unwrap();
        let version = dir.path().join("..2026");
        fs::create_dir(&version).unwrap();
        fs::write(version.join("token"), "secret").unwrap();
        symlink("..2026", dir.path().join("..data")).unwrap();
        symlink("..data/token", dir.path().join("token")).unwrap();
        let files = collect(dir.path(), "/v").unwrap();
        assert_eq!(files.len(), 1);
        assert_eq!(files[0].path, "/v/token");
        assert_eq!(files[0].data, b"secret");
    }

    #[test]
    fn volume_that_is_too_large_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let big = fs::File::create(dir.path().join("big")).unwrap();
        big.set_len(LARGEST + 1).unwrap();
        let error = collect(dir.path(), "/v").unwrap_err();
        assert!(error.to_string().contains("virtio-fs"), "{error}");
    }
}
