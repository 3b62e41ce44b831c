//! What a node needs before tests or benches can run: the images, in containerd.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use containerd_client::Client;
use k8s_cri::v1 as api;
use kiln_test_images::import::Importer;
use kiln_test_images::{Image, catalog};

use crate::api::{CRI_NAMESPACE, PLAIN_NAMESPACE, SNAPSHOTTER};
use crate::{Cri, wait};

/// The images of the catalog, made from this machine's programs.
#[derive(Debug, Clone)]
pub struct Images {
    /// The test image.
    pub busybox: Image,
    /// The sandbox image.
    pub pause: Image,
}

impl Images {
    /// Makes them from busybox and from the `kiln-testprog` beside this program (or where
    /// `KILN_TESTPROG` says).
    pub fn make() -> Result<Self> {
        let testprog = catalog::program(
            &testprog_path()?,
            "put kiln-testprog beside this program or name it in KILN_TESTPROG",
        )?;
        let (busybox, applets) = busybox()?;
        Ok(Images {
            busybox: catalog::busybox(&busybox, &applets, &testprog)?,
            pause: catalog::pause(&testprog)?,
        })
    }
}

/// The node's busybox (or the one that `KILN_BUSYBOX` names) with the names of its applets.
pub fn busybox() -> Result<(Vec<u8>, Vec<String>)> {
    let path = std::env::var_os("KILN_BUSYBOX")
        .map_or_else(|| catalog::BUSYBOX_PROGRAM.into(), PathBuf::from);
    let program = catalog::program(&path, "install Debian's package busybox-static")?;
    Ok((program, catalog::applets(&path)?))
}

/// Where `kiln-testprog` is.
pub fn testprog_path() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("KILN_TESTPROG") {
        return Ok(path.into());
    }
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    Ok(program
        .parent()
        .unwrap_or(Path::new("/"))
        .join("kiln-testprog"))
}

/// Puts the images into containerd, for CRI and for plain containers, and waits until CRI sees them.
pub async fn import(client: &Client, images: &Images) -> Result<()> {
    let both = [
        (catalog::PAUSE, &images.pause),
        (catalog::BUSYBOX, &images.busybox),
    ];
    let cri = Importer::new(client, CRI_NAMESPACE, SNAPSHOTTER);
    for (name, image) in both {
        cri.import(name, image).await?;
    }
    let plain = Importer::new(client, PLAIN_NAMESPACE, SNAPSHOTTER);
    plain.import(catalog::BUSYBOX, &images.busybox).await?;
    let cri = Cri::new(client.channel());
    for (name, image) in both {
        wait_for_image(&cri, name, image).await?;
    }
    Ok(())
}

/// The handler of an earlier build, which stands beside the one that is tested.
pub const OLD: &str = "kiln-old";
/// Where its programs and its store are.
const OLD_PROGRAM: &str = "/opt/kiln-old/kiln";
const OLD_STORE: &str = "/var/lib/kiln-old/store";

/// Bakes the μVM that pods of kiln's handlers are resumed from, as its user would. Says nothing and
/// takes no time if it is there.
pub fn bake() -> Result<()> {
    bake_by(&mut Command::new("kiln"))
}

/// The same for pods of one handler.
pub fn bake_for(handler: &str) -> Result<()> {
    match handler {
        OLD => bake_by(Command::new(OLD_PROGRAM).env("KILN_STORE", OLD_STORE)),
        _ => bake(),
    }
}

fn bake_by(kiln: &mut Command) -> Result<()> {
    let output = kiln
        .arg("bake")
        .output()
        .context("cannot run kiln, which must be on the node to test it")?;
    anyhow::ensure!(
        output.status.success(),
        "kiln bake: {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// Whether pods of this handler are resumed from baked μVMs.
pub fn needs_bake(handler: &str) -> bool {
    handler.starts_with("kiln")
}

/// CRI keeps its own list of images, which follows containerd's events.
async fn wait_for_image(cri: &Cri, name: &str, image: &Image) -> Result<()> {
    let what = format!("CRI's knowledge of image {name}");
    wait::until(&what, Duration::from_secs(30), || async {
        let spec = api::ImageSpec {
            image: name.to_owned(),
            ..Default::default()
        };
        let request = api::ImageStatusRequest {
            image: Some(spec),
            verbose: false,
        };
        let known = cri.image_status(request).await?.image;
        Ok(known
            .filter(|known| known.id == image.config.descriptor.digest)
            .map(|_| ()))
    })
    .await
}
