//! Containers' writable layers in kiln's pods: RAM first, the node's disk past a threshold.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use kiln_e2e::harness::Case;
use kiln_e2e::node::OVERLAY_BUDGET;
use kiln_e2e::{Container, ContainerSpec, Pod, PodSpec, Test, cases, wait};
use kiln_overlay::Budget;

use super::same;

const MIB: u64 = 1 << 20;
const RAM: &str = "kiln.dev/overlay-ram";
const DISK: &str = "kiln.dev/overlay-disk";
const FLUSH: &str = "kiln.dev/overlay-flush";
/// For what happens in the background.
const SOON: Duration = Duration::from_secs(60);

pub(crate) fn cases() -> Vec<Case> {
    let all = cases![
        writes_beyond_the_ram_go_to_the_disk_and_stay_right.limit(600),
        limit_is_a_full_disk_and_deleting_makes_room,
        deleted_files_give_ram_back,
        what_is_synced_is_on_the_disk_where_that_is_wanted,
        containers_of_a_pod_share_the_overlay_and_leave_nothing_in_it,
        what_containers_write_is_their_writable_layer,
        spill_disk_that_is_full_is_an_error_of_the_write_alone.alone(),
        pods_share_the_nodes_ram_for_writes_fairly.alone(),
    ];
    let named = |case: Case| case.only_with("kiln", "overlay");
    all.into_iter().map(named).collect()
}

async fn started(pod: &Pod, name: &str) -> Result<Container> {
    let spec = ContainerSpec::testprog(name, &["started"]);
    let container = pod.start(&spec).await?;
    container.log().wait_for("started", SOON).await?;
    Ok(container)
}

async fn put(container: &Container, path: &str, bytes: u64, seed: u64) -> Result<()> {
    let (bytes, seed) = (bytes.to_string(), seed.to_string());
    container
        .read(&["/bin/testprog", "put", path, &bytes, &seed])
        .await?;
    Ok(())
}

async fn check(container: &Container, path: &str, bytes: u64, seed: u64) -> Result<()> {
    let (bytes, seed) = (bytes.to_string(), seed.to_string());
    let said = container
        .read(&["/bin/testprog", "check", path, &bytes, &seed])
        .await?;
    same!(said, "right");
    Ok(())
}

/// What `kiln inspect` tells of the pod.
pub(super) fn inspect(pod: &Pod) -> Result<serde_json::Value> {
    let output = Command::new("kiln")
        .args(["--json", "inspect", pod.id()])
        .output()
        .context("kiln is not on the PATH")?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn figure(pod: &Pod, name: &str) -> Result<u64> {
    let said = inspect(pod)?;
    said["overlay"][name]
        .as_u64()
        .with_context(|| format!("no {name} in {said}"))
}

/// The files that the pod's VMM spills to.
fn spill_files(pod: &Pod) -> Result<Vec<Metadata>> {
    let vmm = inspect(pod)?["vmm_pid"].as_u64().context("no VMM")?;
    let mut found = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{vmm}/fd"))? {
        let path = entry?.path();
        let name = std::fs::read_link(&path)?;
        if name.starts_with("/var/lib/kiln/spill") {
            found.push(std::fs::metadata(&path)?);
        }
    }
    Ok(found)
}

fn spill_on_disk(pod: &Pod) -> Result<u64> {
    let files = spill_files(pod)?;
    Ok(files.iter().map(|file| file.blocks() * 512).sum())
}

async fn writes_beyond_the_ram_go_to_the_disk_and_stay_right(test: Test) -> Result<()> {
    const LIMIT: u64 = 256 * MIB;
    const FILES: u64 = 16;
    const FILE: u64 = 128 * MIB;
    let pod = test
        .run_pod(&PodSpec::new().annotation(RAM, "256Mi"))
        .await?;
    let container = started(&pod, "main").await?;
    for seed in 0..FILES {
        put(&container, &format!("/file-{seed}"), FILE, seed).await?;
        let ram = figure(&pod, "ram")?;
        ensure!(ram <= LIMIT, "{ram} bytes of RAM, the threshold is {LIMIT}");
    }
    // All was synced, so it is in the overlay, and most of it beyond its RAM.
    let (ram, spill) = (figure(&pod, "ram")?, figure(&pod, "spill")?);
    ensure!(ram + spill >= FILES * FILE, "{ram} in RAM, {spill} on disk");
    let on_disk = spill_on_disk(&pod)?;
    ensure!(on_disk >= FILES * FILE - LIMIT, "{on_disk} bytes on disk");
    // What the guest has in its own memory would tell nothing; it has not enough for two of them.
    container
        .read(&["sh", "-c", "cat /file-0 /file-1 > /dev/null"])
        .await?;
    for seed in 0..FILES {
        check(&container, &format!("/file-{seed}"), FILE, seed).await?;
    }
    ensure!(
        figure(&pod, "read_spill")? > 0,
        "nothing was read from the disk"
    );
    same!(figure(&pod, "spill_errors")?, 0);
    let free = free_bytes(Path::new("/var/lib/kiln"))?;
    pod.remove().await?;
    // Nobody has the file open any more, and it has no name.
    wait::until("the disk's room", SOON, || async {
        let back = free_bytes(Path::new("/var/lib/kiln"))?.saturating_sub(free);
        Ok((back >= on_disk / 2).then_some(()))
    })
    .await
}

/// What containerd says that a container's writable layer takes.
async fn layer(container: &Container) -> Result<u64> {
    let stats = container.stats().await?;
    let used = stats.writable_layer.and_then(|layer| layer.used_bytes);
    // Before it has measured it for the first time.
    Ok(used.map_or(0, |bytes| bytes.value))
}

async fn what_containers_write_is_their_writable_layer(test: Test) -> Result<()> {
    let pod = test
        .run_pod(&PodSpec::new().annotation(RAM, "128Mi"))
        .await?;
    let (busy, idle) = (started(&pod, "busy").await?, started(&pod, "idle").await?);
    let reaches = |what: &'static str, limit: Duration, wanted: fn(u64) -> bool| {
        let busy = &busy;
        wait::until(what, limit, move || async move {
            Ok(wanted(layer(busy).await?).then_some(()))
        })
    };
    put(&busy, "/kept", 10_000_000, 1).await?;
    put(&busy, "/gone", 50_000_000, 2).await?;
    reaches("60 MB of writable layer", SOON, |bytes| bytes >= 60_000_000).await?;
    let used = layer(&busy).await?;
    ensure!(used < 70_000_000, "{used} bytes, where 60 MB were written");
    // All of it is in RAM.
    same!(figure(&pod, "spill")?, 0);
    busy.shell("rm /gone").await?;
    let thirty = Duration::from_secs(30);
    reaches("what is left", thirty, |bytes| bytes <= 20_000_000).await?;
    let used = layer(&idle).await?;
    ensure!(used < 1_000_000, "{used} bytes of one that wrote nothing");
    // Spilled, it counts as well.
    put(&idle, "/large", 200_000_000, 3).await?;
    wait::until("200 MB of the other's", SOON, || async {
        Ok((layer(&idle).await? >= 200_000_000).then_some(()))
    })
    .await?;
    ensure!(figure(&pod, "spill")? > 0, "nothing was spilled");
    // It takes its room on the node's disk once: it is part of what containerd counts.
    let links: Vec<_> = spill_files(&pod)?.iter().map(Metadata::nlink).collect();
    same!(links, [1]);
    let used = layer(&busy).await?;
    ensure!(used <= 20_000_000, "{used} bytes of one that keeps 10 MB");
    Ok(())
}

async fn what_is_synced_is_on_the_disk_where_that_is_wanted(test: Test) -> Result<()> {
    const FILE: u64 = 8 * MIB;
    for (flush, least, most) in [("disk", FILE, u64::MAX), ("none", 0, 0)] {
        let spec = PodSpec::new()
            .annotation(RAM, "256Mi")
            .annotation(FLUSH, flush);
        let pod = test.run_pod(&spec).await?;
        let container = started(&pod, "main").await?;
        put(&container, "/file", FILE, 1).await?;
        let spilled = figure(&pod, "spilled")?;
        ensure!(
            (least..=most).contains(&spilled),
            "{flush}: {spilled} bytes written to the disk"
        );
        check(&container, "/file", FILE, 1).await?;
        pod.remove().await?;
    }
    Ok(())
}

fn free_bytes(path: &Path) -> Result<u64> {
    let path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())?;
    let mut figures = std::mem::MaybeUninit::<libc::statvfs>::zeroed();
    // SAFETY: the path ends with a zero byte, and the buffer is one statvfs.
    let result = unsafe { libc::statvfs(path.as_ptr(), figures.as_mut_ptr()) };
    ensure!(result == 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the call succeeded, and zeroes were valid before.
    let figures = unsafe { figures.assume_init() };
    Ok(figures.f_bfree * figures.f_frsize)
}

async fn limit_is_a_full_disk_and_deleting_makes_room(test: Test) -> Result<()> {
    let spec = PodSpec::new()
        .annotation(RAM, "32Mi")
        .annotation(DISK, "40Mi");
    let pod = test.run_pod(&spec).await?;
    let container = started(&pod, "main").await?;
    put(&container, "/kept", 16 * MIB, 1).await?;
    // 40 MiB and three quarters of the RAM's 32.
    let size = 128 * MIB;
    let output = container
        .exec(&["/bin/testprog", "put", "/large", &size.to_string(), "2"])
        .await?;
    ensure!(output.code != 0, "128 MiB fit into 64");
    ensure!(
        output.stderr.contains("No space left on device"),
        "{}",
        output.stderr
    );
    check(&container, "/kept", 16 * MIB, 1).await?;
    container.read(&["rm", "/large"]).await?;
    put(&container, "/again", 24 * MIB, 3).await?;
    check(&container, "/again", 24 * MIB, 3).await?;
    same!(figure(&pod, "spill_errors")?, 0);
    Ok(())
}

async fn deleted_files_give_ram_back(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let container = started(&pod, "main").await?;
    put(&container, "/file", 48 * MIB, 1).await?;
    let full = figure(&pod, "ram")?;
    ensure!(full >= 48 * MIB, "{full} bytes of RAM for 48 MiB");
    container.shell("rm /file; sync").await?;
    wait::until("the RAM of the deleted file", SOON, || async {
        Ok((figure(&pod, "ram")? < 8 * MIB).then_some(()))
    })
    .await
}

async fn containers_of_a_pod_share_the_overlay_and_leave_nothing_in_it(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let first = started(&pod, "first").await?;
    let second = started(&pod, "second").await?;
    first.shell("echo first > /mine").await?;
    let output = second.exec(&["cat", "/mine"]).await?;
    ensure!(output.code != 0, "a container sees another one's files");
    put(&first, "/large", 24 * MIB, 1).await?;
    let full = figure(&pod, "ram")?;
    ensure!(full >= 24 * MIB, "{full} bytes of RAM for 24 MiB");
    first.stop(Duration::from_secs(1)).await?;
    first.remove().await?;
    wait::until("the RAM of the removed container", SOON, || async {
        Ok((figure(&pod, "ram")? < 8 * MIB).then_some(()))
    })
    .await?;
    // One with the same name begins anew.
    let third = started(&pod, "third").await?;
    let output = third.exec(&["ls", "/mine", "/large"]).await?;
    ensure!(output.code != 0, "{}", output.stdout);
    Ok(())
}

/// A node with little RAM for overlays: whoever is alone has all of it, and gives half of it up when another pod writes.
async fn pods_share_the_nodes_ram_for_writes_fairly(test: Test) -> Result<()> {
    const NODE: u64 = 64 * MIB;
    const FILE: u64 = 80 * MIB;
    let spec = PodSpec::new().annotation(RAM, "96Mi");
    let (first, second) = (test.run_pod(&spec).await?, test.run_pod(&spec).await?);
    let (one, two) = (
        started(&first, "main").await?,
        started(&second, "main").await?,
    );
    // Every start of a pod sets it to what the configuration says, so nothing has to be put back.
    Budget::open_or_make(Path::new(OVERLAY_BUDGET), NODE)?.set_total(NODE);

    put(&one, "/file", FILE, 1).await?;
    let alone = figure(&first, "ram")?;
    ensure!(
        alone > NODE / 2 && alone <= NODE,
        "{alone} bytes of RAM for the only pod that writes"
    );
    put(&two, "/file", FILE, 2).await?;
    // Above its share a pod spills in the background.
    let shares = || anyhow::Ok([figure(&first, "ram")?, figure(&second, "ram")?]);
    // What it gives up beyond its half is the other one's to take.
    wait::until("fair shares", SOON, || async {
        let [one, two] = shares()?;
        let fair = one <= NODE / 2 && one.min(two) >= NODE / 4 && one + two <= NODE;
        Ok(fair.then_some(()))
    })
    .await
    .with_context(|| format!("{:?} of {NODE} bytes", shares()))?;
    for (pod, container, seed) in [(&first, &one, 1), (&second, &two, 2)] {
        check(container, "/file", FILE, seed).await?;
        same!(figure(pod, "spill_errors")?, 0);
    }
    // Who is gone leaves its share to the others.
    first.remove().await?;
    put(&two, "/more", FILE, 3).await?;
    wait::until("the share of the removed pod", SOON, || async {
        Ok((figure(&second, "ram")? > NODE / 2).then_some(()))
    })
    .await
}

/// A small file system in a file, mounted where spill files go as long as this lives.
struct SmallDisk(&'static str);

impl SmallDisk {
    const DIRECTORY: &'static str = "/var/lib/kiln/spill";

    fn mount(image: &Path) -> Result<Self> {
        let image = image.to_str().context("odd path")?;
        run("truncate", &["-s", "48M", image])?;
        run("mke2fs", &["-q", "-t", "ext4", image])?;
        std::fs::create_dir_all(Self::DIRECTORY)?;
        run("busybox", &["mount", "-o", "loop", image, Self::DIRECTORY])?;
        Ok(SmallDisk(Self::DIRECTORY))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // A failure shows in what is left on the node.
        let _ = run("busybox", &["umount", "-d", self.0]);
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("running {program}"))?;
    ensure!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

async fn spill_disk_that_is_full_is_an_error_of_the_write_alone(test: Test) -> Result<()> {
    let small = SmallDisk::mount(&test.scratch().join("small"))?;
    let spec = PodSpec::new().annotation(RAM, "16Mi");
    let pod = test.run_pod(&spec).await?;
    let container = started(&pod, "main").await?;
    put(&container, "/kept", 8 * MIB, 1).await?;
    let size = 80 * MIB;
    let output = container
        .exec(&["/bin/testprog", "put", "/large", &size.to_string(), "2"])
        .await?;
    ensure!(
        output.code != 0,
        "80 MiB fit into 16 MiB of RAM and a disk of 48"
    );
    ensure!(figure(&pod, "spill_errors")? > 0, "the disk was not full");
    // What was acknowledged is there, the VMM lives, and with room all goes on.
    check(&container, "/kept", 8 * MIB, 1).await?;
    container.shell("rm /large; sync").await?;
    // ext4 tells of what it has freed after the sync, in its own time.
    wait::until("the room of the deleted file", SOON, || async {
        let held = figure(&pod, "ram")? + figure(&pod, "spill")?;
        Ok((held < 16 * MIB).then_some(()))
    })
    .await?;
    put(&container, "/again", 8 * MIB, 3).await?;
    check(&container, "/again", 8 * MIB, 3).await?;
    pod.remove().await?;
    drop(small);
    Ok(())
}
