//! A container's files: its root file system as a disk of the guest, its volumes, and the mounts
//! that put them together there.
//!
//! The root is a read-only image on a virtio-blk slot, with a directory of the μVM's scratch disk over it: an overlay that
//! lives in the VMM's RAM and spills to the node's disk. From a
//! snapshotter that gives directories (`overlayfs`, `native`) the image is an EROFS one, made once
//! for each chain of layers and kept on the node; one that gives a device or image file
//! (`blockfile`, `devmapper`) is used as it is. Volumes stay where they are and are shown to the
//! guest through the pod's shared directory; block volumes are disks of the guest.

mod devices;
mod image;
mod volumes;

pub use volumes::POD_FILES;

use std::fs::{File, OpenOptions};
use std::path::Path;

use containerd_shim_protos::api::Mount;
use kiln_agent_api::proto;
use kiln_cache::Lowers;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::share::Volume;
use crate::spec::Spec;
use crate::uvm::{GuestDisk, Uvm};
use image::Source;

/// How long the guest waits for a disk whose slot was just filled.
const DISK_WAIT_MS: u32 = 5000;

/// What the guest is told to make of a container's files.
#[derive(Debug)]
pub struct GuestFiles {
    /// The specification, with guest paths only.
    pub spec: Vec<u8>,
    /// What to mount before the container is made.
    pub mounts: Vec<proto::Mount>,
    /// Where the root then lies.
    pub rootfs: String,
}

/// A container that wants files.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// Its id.
    pub id: &'a str,
    /// Its bundle.
    pub bundle: &'a Path,
    /// Its specification.
    pub spec: &'a Spec,
    /// containerd's mounts for its root.
    pub rootfs: &'a [Mount],
    /// Whether the pod's own files are the shim's to bring, and not containerd's.
    pub pod_files: bool,
}

/// What a container's files hold on to, on the host and in the μVM's slots.
#[derive(Debug, Default)]
#[must_use = "storage must be released"]
pub struct Storage {
    disks: Vec<GuestDisk>,
    volumes: Vec<Volume>,
}

impl Storage {
    /// Makes ready what the container needs.
    pub async fn prepare(
        wanted: &Wanted<'_>,
        config: &Config,
        uvm: &dyn Uvm,
    ) -> Result<(Self, GuestFiles)> {
        let mut storage = Self::default();
        match storage.fill(wanted, config, uvm).await {
            Ok(files) => Ok((storage, files)),
            Err(error) => {
                storage.release(Some(uvm)).await;
                Err(error)
            }
        }
    }

    async fn fill(
        &mut self,
        wanted: &Wanted<'_>,
        config: &Config,
        uvm: &dyn Uvm,
    ) -> Result<GuestFiles> {
        let Wanted {
            id,
            bundle,
            spec,
            rootfs,
            pod_files,
        } = *wanted;
        // Volumes first: what can't be had is found out before a disk is attached.
        let mut mounts = volumes::prepare(uvm, &mut self.volumes, spec.mounts()?)?;
        if pod_files {
            volumes::add_pods_own(&mut mounts, spec.root_is_read_only());
        }
        let (file, read_only, kind) = match image::find(rootfs, bundle)? {
            Source::Committed(lowers) => (
                image_of(config, lowers, true).await?,
                true,
                "erofs".to_owned(),
            ),
            Source::Fleeting(lowers) => (
                image_of(config, lowers, false).await?,
                true,
                "erofs".to_owned(),
            ),
            Source::Image {
                path,
                kind,
                read_only,
            } => {
                let file = OpenOptions::new()
                    .read(true)
                    .write(!read_only)
                    .open(&path)
                    .map_err(|e| Error::failed(format!("open the image {}", path.display()), e))?;
                (file, read_only, kind)
            }
        };
        let disk = uvm.attach_disk(file, read_only).await?;
        let mut mounts_in_guest = guest_mounts(id, &disk, &kind, read_only);
        self.disks.push(disk);
        for (number, device) in spec.block_devices().iter().enumerate() {
            let disk = uvm
                .attach_disk(devices::open(device)?, device.read_only)
                .await?;
            let at = format!("{}/device-{number}", storage_path(id));
            let (in_guest, in_container) = devices::mounts(device, &disk, at);
            self.disks.push(disk);
            mounts_in_guest.push(in_guest);
            mounts.push(in_container);
        }
        Ok(GuestFiles {
            spec: spec.for_guest(&mounts)?,
            mounts: mounts_in_guest,
            rootfs: rootfs_path(id),
        })
    }

    /// Gives back what is held. Without a μVM there is nothing left to give back to.
    pub async fn release(self, uvm: Option<&dyn Uvm>) {
        let Some(uvm) = uvm else { return };
        for volume in &self.volumes {
            uvm.unshare(volume);
        }
        for disk in &self.disks {
            match uvm.detach_disk(disk).await {
                Ok(()) | Err(Error::Unavailable(_)) => {}
                Err(error) => {
                    tracing::warn!(
                        disk = disk.path,
                        error = error.chain(),
                        "a disk stays attached"
                    );
                }
            }
        }
    }
}

async fn image_of(config: &Config, lowers: Lowers, committed: bool) -> Result<File> {
    let config = config.clone();
    let making = tokio::task::spawn_blocking(move || image::erofs(&config, &lowers, committed));
    let lease = making
        .await
        .map_err(|e| Error::failed("make an image of the root file system", e))??;
    // The lock that keeps the image goes with the file, to the VMM.
    Ok(lease.file)
}

fn rootfs_path(id: &str) -> String {
    format!("{}/containers/{id}/rootfs", kiln_agent_api::GUEST_STATE_DIR)
}

fn storage_path(id: &str) -> String {
    format!("{}/storage/{id}", kiln_agent_api::GUEST_STATE_DIR)
}

/// The mounts, in order, that end with the root.
fn guest_mounts(id: &str, disk: &GuestDisk, kind: &str, read_only: bool) -> Vec<proto::Mount> {
    let base = storage_path(id);
    let device = |target: String, options: &[&str]| proto::Mount {
        source: disk.path.clone(),
        target,
        type_: kind.to_owned(),
        options: options.iter().map(|o| (*o).to_owned()).collect(),
        wait_ms: DISK_WAIT_MS,
        make_target: true,
        target_mode: 0o755,
        min_size: disk.size,
        ..Default::default()
    };
    if !read_only {
        return vec![device(rootfs_path(id), &[])];
    }
    let lower = format!("{base}/lower");
    let rw = format!("{}/{id}", kiln_agent_api::GUEST_SCRATCH);
    let (upper, work) = (format!("{rw}/upper"), format!("{rw}/work"));
    vec![
        device(lower.clone(), &["ro"]),
        proto::Mount {
            source: "overlay".into(),
            target: rootfs_path(id),
            type_: "overlay".into(),
            options: vec![
                format!("lowerdir={lower}"),
                format!("upperdir={upper}"),
                format!("workdir={work}"),
            ],
            make_target: true,
            target_mode: 0o755,
            make_directories: vec![rw, upper, work],
            ..Default::default()
        },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> GuestDisk {
        GuestDisk {
            slot: 3,
            path: "/dev/vdc".into(),
            size: 4096,
        }
    }

    #[test]
    fn read_only_image_gets_a_writable_layer_on_the_scratch_disk() {
        let mounts = guest_mounts("c1", &disk(), "erofs", true);
        let targets: Vec<_> = mounts.iter().map(|m| m.target.as_str()).collect();
        assert_eq!(
            targets,
            [
                "/run/kiln/storage/c1/lower",
                "/run/kiln/containers/c1/rootfs"
            ]
        );
        assert_eq!(
            (mounts[0].source.as_str(), mounts[0].min_size),
            ("/dev/vdc", 4096)
        );
        assert!(
            mounts[1]
                .options
                .contains(&"upperdir=/run/kiln/scratch/c1/upper".to_owned())
        );
        // The one that holds the others goes last.
        assert_eq!(mounts[1].make_directories[0], "/run/kiln/scratch/c1");
    }

    #[test]
    fn writable_image_is_the_root_itself() {
        let mounts = guest_mounts("c1", &disk(), "ext4", false);
        assert_eq!(mounts.len(), 1);
        assert_eq!(mounts[0].target, "/run/kiln/containers/c1/rootfs");
    }
}
