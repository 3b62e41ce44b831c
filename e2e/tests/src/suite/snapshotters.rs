//! Root file systems from containerd's snapshotters: directories of which an image is made, and images that are used as
//! they are.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use containerd_client::services::v1::DeleteImageRequest;
use kiln_e2e::api::{PLAIN_NAMESPACE, request};
use kiln_e2e::harness::Case;
use kiln_e2e::node::Census;
use kiln_e2e::plain::{Plain, PlainSpec};
use kiln_e2e::{Container, ContainerSpec, Pod, PodSpec, Test, cases, setup, wait};
use kiln_test_images::import::Importer;
use kiln_test_images::{Compression, Image, ImageBuilder, Layer};

use super::faults::{children_of, parent};
use super::overlay::inspect;
use super::same;

/// Images that kiln made of directories.
const MADE: &str = "/var/lib/kiln/store/images";
/// The handler whose pods are on the erofs snapshotter.
const EROFS_HANDLER: &str = "kiln-erofs";
/// For the removal of what nothing refers to any more.
const SOON: Duration = Duration::from_secs(30);

pub(crate) fn cases() -> Vec<Case> {
    let all = cases![
        task_on_overlayfs,
        task_on_erofs.since((2, 0)),
        task_of_many_layers_on_erofs.since((2, 0)),
        task_on_blockfile.since((2, 0)),
        pod_on_erofs.since((2, 0)),
    ];
    // Each counts what is on the node.
    let named = |case: Case| case.only_with("kiln", "snapshotters").alone();
    all.into_iter().map(named).collect()
}

/// An image that overrides, removes and hides what is in its lower layers. Its configuration is different for each
/// snapshotter: with that containerd notes where the layers are unpacked.
fn image(snapshotter: &str, more_layers: usize) -> Result<Image> {
    let (busybox, applets) = setup::busybox()?;
    let mut base = Layer::new()
        .dir("dev", 0o755)
        .dir("proc", 0o555)
        .dir("sys", 0o555)
        .file("bin/busybox", busybox, 0o755)
        .file("data/tool", "#!/bin/sh\necho the tool runs\n", 0o755)
        .file("data/changed", "from the layer below\n", 0o644)
        .file("data/removed", "must not be seen\n", 0o644)
        .file("data/opaque/below", "must not be seen\n", 0o644)
        .file("data/owned", "mine\n", 0o640)
        .owned_by("data/owned", 1000, 2000);
    for applet in applets {
        base = base.symlink(&format!("bin/{applet}"), "busybox");
    }
    let changes = Layer::new()
        .compressed(Compression::Gzip)
        .file("data/changed", "from the layer above\n", 0o644)
        .file("data/late", "must not be seen\n", 0o644)
        .whiteout("data/removed")
        .opaque("data/opaque", 0o755)
        .file("data/opaque/above", "seen\n", 0o644);
    let mut image = ImageBuilder::new()
        .layer(base)
        .layer(changes)
        .layer(Layer::new().whiteout("data/late"))
        .label("dev.kiln.test.snapshotter", snapshotter);
    for number in 0..more_layers {
        let name = format!("more/{number}");
        image = image.layer(Layer::new().file(&name, format!("{number}\n"), 0o644));
    }
    Ok(image.build()?)
}

/// Looks at everything that the layers do to each other, and then changes some of it.
const SCRIPT: &str = "set -e
cd /data
cat changed
ls . opaque
./tool
stat -c '%a %u:%g' owned
echo written > changed
echo new > new
rm tool
echo inside > opaque/new
sync
cat changed new opaque/*
ls
cat /more/* 2> /dev/null || true
";
const SAID: &str = "from the layer above
.:
changed
opaque
owned
tool

opaque:
above
the tool runs
640 1000:2000
written
new
seen
inside
changed
new
opaque
owned
";

fn names(dir: impl AsRef<Path>) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// How often a process has a file of this name open.
fn opened(pid: u32, name: &str) -> Result<usize> {
    let fds = format!("/proc/{pid}/fd");
    let mut count = 0;
    for entry in fs::read_dir(&fds).with_context(|| fds.clone())? {
        let path = fs::read_link(entry?.path()).unwrap_or_default();
        count += usize::from(path.ends_with(name));
    }
    Ok(count)
}

/// The VMM of a task, by the process that stands for the task: both are the shim's.
fn vmm_beside(pid: u32) -> Result<u32> {
    let children = children_of(parent(pid)?)?;
    let is_vmm = |pid: &u32| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm"));
        name.is_ok_and(|name| name.trim() == "kiln-vmm")
    };
    children.into_iter().find(is_vmm).context("no VMM")
}

/// What a task's root was made of.
#[derive(Debug, PartialEq, Eq)]
struct Used {
    /// Images that kiln made for it.
    made: usize,
    /// Layers of the erofs snapshotter that its VMM has open.
    layers: usize,
}

/// Runs a task of the image and leaves the node as it was.
async fn task_on(test: &Test, snapshotter: &str, more_layers: usize) -> Result<Used> {
    // A node's first task leaves directories for those to come.
    let first = Plain::run(test, &PlainSpec::shell("true")).await?;
    first.wait("").await?;
    first.remove().await?;
    let before = Census::take()?;
    let snapshots =
        format!("/var/lib/containerd/io.containerd.snapshotter.v1.{snapshotter}/snapshots");
    let (snapshots_before, made_before) = (names(&snapshots), names(MADE));

    let name = format!("kiln.test/{snapshotter}-{more_layers}:1");
    Importer::new(test.client(), PLAIN_NAMESPACE, snapshotter)
        .import(&name, &image(snapshotter, more_layers)?)
        .await?;
    let spec = PlainSpec::shell(SCRIPT).image(&name, snapshotter);
    let task = Plain::create(test, &spec).await?;
    let used = Used {
        made: names(MADE).difference(&made_before).count(),
        layers: opened(vmm_beside(task.pid)?, "layer.erofs")?,
    };
    task.start().await?;
    let status = task.wait("").await?;
    same!(task.streams.all_errors().await?, "");
    let more: String = (0..more_layers)
        .map(|number| format!("{number}\n"))
        .collect();
    same!(task.streams.all_output().await?, format!("{SAID}{more}"));
    same!(status, 0);

    // What was written is not in what other containers are made of.
    let again = Plain::run(
        test,
        &PlainSpec::shell("cat /data/changed").image(&name, snapshotter),
    )
    .await?;
    same!(again.wait("").await?, 0);
    same!(again.streams.all_output().await?, "from the layer above\n");

    task.remove().await?;
    again.remove().await?;
    let delete = DeleteImageRequest {
        name,
        sync: true,
        ..Default::default()
    };
    let mut images = test.client().images();
    images.delete(request(PLAIN_NAMESPACE, delete)?).await?;
    test.node_is_as(&before).await?;
    wait::until("the removal of the image's snapshots", SOON, || async {
        Ok(names(&snapshots).is_subset(&snapshots_before).then_some(()))
    })
    .await?;
    Ok(used)
}

async fn task_on_overlayfs(test: Test) -> Result<()> {
    let used = task_on(&test, "overlayfs", 0).await?;
    same!(used, Used { made: 1, layers: 0 });
    Ok(())
}

async fn task_on_erofs(test: Test) -> Result<()> {
    let used = task_on(&test, "erofs", 0).await?;
    same!(used, Used { made: 0, layers: 3 });
    Ok(())
}

async fn task_of_many_layers_on_erofs(test: Test) -> Result<()> {
    let used = task_on(&test, "erofs", 6).await?;
    same!(used, Used { made: 1, layers: 0 });
    Ok(())
}

async fn task_on_blockfile(test: Test) -> Result<()> {
    let used = task_on(&test, "blockfile", 0).await?;
    same!(used, Used { made: 0, layers: 0 });
    Ok(())
}

async fn pod_on_erofs(test: Test) -> Result<()> {
    // CRI unpacks its images for the handler's snapshotter when they are first used there, and they stay.
    pod_of_two(&test).await?;
    let before = Census::take()?;
    let made = names(MADE);
    pod_of_two(&test).await?;
    test.node_is_as(&before).await?;
    same!(names(MADE), made, "images made");
    Ok(())
}

/// Runs a pod with two containers of three layers, of which the second one finds no slots for them, and removes it.
async fn pod_of_two(test: &Test) -> Result<()> {
    let pod = test.run_pod(&PodSpec::new().handler(EROFS_HANDLER)).await?;
    let first = pod.start(&ContainerSpec::pause("first")).await?;
    let vmm = vmm_of(&pod)?;
    same!(opened(vmm, "layer.erofs")?, 3);
    let second = pod.start(&ContainerSpec::pause("second")).await?;
    same!(opened(vmm, "layer.erofs")?, 3);
    for container in [&first, &second] {
        is_the_test_image(container).await?;
    }
    pod.remove().await
}

fn vmm_of(pod: &Pod) -> Result<u32> {
    let pid = inspect(pod)?["vmm_pid"].as_u64().context("no VMM")?;
    Ok(pid.try_into()?)
}

async fn is_the_test_image(container: &Container) -> Result<()> {
    let script = "cat /etc/layered/overridden; ls /etc/layered /opt/opaque; \
                  stat -c '%a %u:%g' /opt/owned; echo mine > /etc/layered/overridden; cat /etc/layered/*";
    same!(
        container.shell(script).await?,
        "from the layer above\n/etc/layered:\noverridden\n\n/opt/opaque:\nabove\n640 1000:2000\nmine"
    );
    Ok(())
}
