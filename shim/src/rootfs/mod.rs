//! A container's files: its root file system as a disk of the guest, its volumes, and the mounts
//! that put them together there.
//!
//! The root is a read-only image on a virtio-blk slot, with a directory of the μVM's scratch disk over it: an overlay that
//! lives in the VMM's RAM and spills to the node's disk. From a
//! snapshotter that gives directories (`overlayfs`, `native`) the image is an EROFS one, made once
//! for each chain of layers and kept on the node; one that gives a device or image file
//! (`blockfile`, `devmapper`) is used as it is, and so are the layers that are images (`erofs`), each
//! in a slot of its own, as long as those suffice. Volumes stay where they are and are shown to the
//! guest through the pod's shared directory; those that are the pod's alone are the guest's own, in its memory or as a disk of its,
//! and block volumes are disks of the guest.

mod copies;
mod devices;
mod empty_dir;
mod image;
mod kubelet;
mod layers;
mod mounts;
mod unnamed;
mod volumes;
mod written;

pub use volumes::POD_FILES;
pub use written::{Spilled, WritableLayer};

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::sync::Arc;

use containerd_shim_protos::api::Mount;
use kiln_agent_api::{proto, slots};
use kiln_uvm::share::Volume;

use crate::error::{Error, Result};
use crate::spec::Spec;
use crate::uvm::{GuestDisk, Uvm};
use copies::Copies;
use empty_dir::Disks;
use image::{Directories, Source};
use kiln_node::config::Config;
use kiln_uvm::root;
use kiln_uvm::timeline::{Timeline, step};
use layers::Layer;
use volumes::{InGuest, Whose};

/// How long the guest waits for a disk whose slot was just filled.
const DISK_WAIT_MS: u32 = 5000;
/// How many slots, the first ones, the layers of a container may take: half of what is baked by default. The others stay for
/// more containers and for block volumes, which would have to be plugged.
const LAYER_SLOTS: u8 = 4;

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

/// Those of a pod's volumes that the guest has to itself.
#[derive(Debug, Default)]
pub struct OwnVolumes {
    disks: Disks,
    copies: Copies,
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
    /// Those of the pod's volumes that the guest has to itself.
    pub own: &'a OwnVolumes,
    /// Of its start.
    pub timeline: &'a Timeline,
}

/// What a container's files hold on to, on the host and in the μVM's slots.
#[derive(Debug, Default)]
#[must_use = "storage must be released"]
pub struct Storage {
    disks: Vec<GuestDisk>,
    volumes: Vec<Volume>,
    layer: Option<Arc<WritableLayer>>,
}

impl Storage {
    /// Makes ready what the container needs.
    pub async fn prepare(
        wanted: &Wanted<'_>,
        config: &Config,
        uvm: &Arc<dyn Uvm>,
    ) -> Result<(Self, GuestFiles)> {
        let mut storage = Self::default();
        match storage.fill(wanted, config, uvm).await {
            Ok(files) => Ok((storage, files)),
            Err(error) => {
                storage.release(Some(uvm.as_ref())).await;
                Err(error)
            }
        }
    }

    async fn fill(
        &mut self,
        wanted: &Wanted<'_>,
        config: &Config,
        uvm: &Arc<dyn Uvm>,
    ) -> Result<GuestFiles> {
        let Wanted {
            id,
            bundle,
            spec,
            rootfs,
            pod_files,
            own,
            timeline,
        } = *wanted;
        // Volumes first: what can't be had is found out before a disk is attached.
        let users = UserNamespace::of(spec, rootfs)?;
        let wanted = spec.mounts()?;
        let store = &config.store;
        let whose = Whose {
            container: id,
            pod: spec.pod_uid(),
            own,
            place: empty_dir::Place { store, uvm },
        };
        let preparing = volumes::prepare(whose, &mut self.volumes, wanted);
        let InGuest { before, mut mounts } = timeline.of("host.volumes", preparing).await?;
        if pod_files {
            volumes::add_pods_own(&mut mounts, spec.root_is_read_only());
        }
        self.layer = WritableLayer::find(rootfs).map(Arc::new);
        let root = self
            .attach_root(image::find(rootfs, bundle)?, config, uvm.as_ref(), timeline)
            .await?;
        let mut mounts_in_guest = before;
        mounts_in_guest.extend(guest_mounts(id, &root, users));
        for (number, device) in spec.block_devices().iter().enumerate() {
            let disk = uvm
                .attach_disk(devices::open(device)?, device.read_only)
                .await?;
            let at = format!("{}/device-{number}", root::storage_path(id));
            let (in_guest, in_container) = devices::mounts(device, &disk, at);
            self.disks.push(disk);
            mounts_in_guest.push(in_guest);
            mounts.push(in_container);
        }
        Ok(GuestFiles {
            spec: spec.for_guest(&mounts)?,
            mounts: mounts_in_guest,
            rootfs: root::path(id),
        })
    }

    /// Attaches what the root is made of.
    async fn attach_root(
        &mut self,
        source: Source,
        config: &Config,
        uvm: &dyn Uvm,
        timeline: &Timeline,
    ) -> Result<Root> {
        let image = match source {
            Source::Directories(directories) => image_of(config, directories, timeline).await?,
            Source::Layers {
                layers,
                directories,
                user_xattrs,
            } => {
                let attaching = self.attach_layers(&layers, uvm);
                if timeline.of(step::PLUG_ROOT, attaching).await? {
                    return Ok(Root {
                        disks: self.disks.clone(),
                        kind: "erofs".into(),
                        read_only: true,
                        user_xattrs,
                    });
                }
                tracing::debug!(
                    layers = layers.len(),
                    "too many layers for a slot each: they become one image"
                );
                image_of(config, directories, timeline).await?
            }
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
                let attaching = uvm.attach_disk(file, read_only);
                let disk = timeline.of(step::PLUG_ROOT, attaching).await?;
                self.disks.push(disk.clone());
                return Ok(Root {
                    disks: vec![disk],
                    kind,
                    read_only,
                    user_xattrs: false,
                });
            }
        };
        let attaching = uvm.attach_disk(image, true);
        let disk = timeline.of(step::PLUG_ROOT, attaching).await?;
        self.disks.push(disk.clone());
        Ok(Root {
            disks: vec![disk],
            kind: "erofs".into(),
            read_only: true,
            user_xattrs: false,
        })
    }

    /// Attaches layers, each as a disk, or none of them if there is no room for all.
    async fn attach_layers(&mut self, layers: &[Layer], uvm: &dyn Uvm) -> Result<bool> {
        let alone = layers.len() == 1;
        if !alone && layers.len() > usize::from(LAYER_SLOTS) {
            return Ok(false);
        }
        for layer in layers {
            let fits = match uvm.attach_disk(layer.file()?, true).await {
                Ok(disk) => {
                    // Slots are taken lowest first.
                    let fits = disk.slot < slots::FIRST_DISK + LAYER_SLOTS;
                    self.disks.push(disk);
                    fits || alone
                }
                Err(Error::ResourceExhausted(_)) if !alone => false,
                Err(error) => return Err(error),
            };
            if !fits {
                self.detach_disks(uvm).await;
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Where containerd looks for what the container wrote.
    pub fn layer(&self) -> Option<Arc<WritableLayer>> {
        self.layer.clone()
    }

    /// Gives back what is held. Without a μVM there is nothing left to give back to.
    pub async fn release(mut self, uvm: Option<&dyn Uvm>) {
        if let Some(layer) = self.layer.take() {
            layer.close();
        }
        let Some(uvm) = uvm else { return };
        for volume in &self.volumes {
            uvm.unshare(volume);
        }
        self.detach_disks(uvm).await;
    }

    async fn detach_disks(&mut self, uvm: &dyn Uvm) {
        for disk in self.disks.drain(..) {
            match uvm.detach_disk(&disk).await {
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

/// What is below a container's root, as the guest sees it.
#[derive(Debug, Clone)]
struct Root {
    /// Its disks, the topmost first.
    disks: Vec<GuestDisk>,
    /// The file system on each.
    kind: String,
    /// If not, the one disk is the root itself.
    read_only: bool,
    /// Whether the attributes of overlayfs on them are in `user.overlay.`.
    user_xattrs: bool,
}

async fn image_of(config: &Config, directories: Directories, timeline: &Timeline) -> Result<File> {
    let config = config.clone();
    let begun = timeline.now();
    let making = tokio::task::spawn_blocking(move || image::erofs(&config, &directories));
    let image = making
        .await
        .map_err(|e| Error::failed("make an image of the root file system", e))??;
    let step = match image.made {
        true => step::IMAGE_MAKE,
        false => step::IMAGE_FIND,
    };
    timeline.add(step, begun, timeline.now() - begun);
    // The lock that keeps the image goes with the file, to the VMM.
    Ok(image.file)
}

/// What a user namespace of the container's is to its root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum UserNamespace {
    /// There is none.
    None,
    /// The owners in the image are those outside of it.
    Outside,
    /// The owners in the image are those in it.
    Inside,
}

impl UserNamespace {
    fn of(spec: &Spec, rootfs: &[Mount]) -> Result<Self> {
        match (spec.user_namespace()?, image::owners(rootfs)?) {
            (None, None) => Ok(Self::None),
            (Some(_), None) => Ok(Self::Outside),
            (Some(users), Some(owners)) if users == owners => Ok(Self::Inside),
            (users, owners) => Err(Error::InvalidArgument(format!(
                "the root file system's owners ({owners:?}) are not those of the container's user \
                 namespace ({users:?})"
            ))),
        }
    }
}

/// The mounts, in order, that end with the root.
fn guest_mounts(id: &str, root: &Root, users: UserNamespace) -> Vec<proto::Mount> {
    let mut mounts = match (root.read_only, root.disks.as_slice()) {
        (false, [disk]) => root::disk_itself(id, disk, &root.kind),
        (_, disks) => root::layered(id, disks, &root.kind, root.user_xattrs),
    };
    for mount in &mut mounts {
        // The writable layer has the owners that the kernel gives what is made.
        let is_layer = mount.type_ != "overlay";
        mount.idmapped = users == UserNamespace::Inside && is_layer;
        mount.owned_by_user_namespace = users != UserNamespace::None && !is_layer;
    }
    mounts
}

#[cfg(test)]
mod tests;
