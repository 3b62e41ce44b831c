//! A pod's own volumes (`emptyDir`) as the kubelet makes them, on the disk and in memory.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kiln_e2e::harness::Case;
use kiln_e2e::node::{busybox, text};
use kiln_e2e::{ContainerSpec, Test, cases, wait};

use super::faults::{self, children_of, shim_of};
use super::kubelet::Folder;
use super::same;

/// How soon what was deleted is no longer counted.
const SEEN: Duration = Duration::from_secs(30);

pub(crate) fn cases() -> Vec<Case> {
    cases![
        disk_volume_is_one_file_system_of_the_pods_containers,
        disk_volume_outlives_its_sandbox,
        what_was_synced_to_a_disk_volume_outlives_a_kill.alone(),
        part_of_a_disk_volume_is_no_way_out_of_it,
        disk_volume_has_all_that_programs_do_with_files,
        pod_has_as_many_disk_volumes_as_it_likes,
        memory_volume_is_a_tmpfs_of_the_pods_containers,
        part_of_a_memory_volume_is_no_way_out_of_it,
    ]
}

impl Folder {
    /// A volume with the group of the pod's volumes.
    fn empty_dir(&self, name: &str) -> Result<Volume> {
        let top = self.directory("kubernetes.io~empty-dir", name)?;
        let parts = self.parts(name)?;
        let volume = Volume {
            top,
            parts,
            mounted: false,
        };
        volume.give()?;
        Ok(volume)
    }

    /// The same of medium `Memory`.
    fn memory(&self, name: &str) -> Result<Volume> {
        let mut volume = self.empty_dir(name)?;
        let options = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs"];
        busybox(&[&options[..], &[&text(&volume.top)]].concat())?;
        volume.mounted = true;
        volume.give()?;
        Ok(volume)
    }
}

/// A volume.
struct Volume {
    top: PathBuf,
    parts: PathBuf,
    mounted: bool,
}

impl Volume {
    fn give(&self) -> Result<()> {
        std::os::unix::fs::chown(&self.top, None, Some(2000))?;
        std::fs::set_permissions(&self.top, Permissions::from_mode(0o2777))?;
        Ok(())
    }

    /// A part of it as `subPath` asks for one: what is missing is made, and bound somewhere else.
    fn part(&self, name: &str, sub_path: &str) -> Result<PathBuf> {
        let part = self.top.join(sub_path);
        std::fs::create_dir_all(&part)?;
        let place = self.parts.join(name);
        std::fs::create_dir(&place)?;
        busybox(&["mount", "--bind", &text(&part), &text(&place)])?;
        Ok(place)
    }

    /// MiB that the kubelet counts.
    fn used(&self) -> Result<u64> {
        let said = busybox(&["du", "-sm", &text(&self.top)])?;
        let number = said.split_whitespace().next().context("no figure")?;
        Ok(number.parse()?)
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let parts = std::fs::read_dir(&self.parts).into_iter().flatten();
        let parts = parts.filter_map(|entry| Some(entry.ok()?.path()));
        let top = self.mounted.then(|| self.top.clone());
        for mounted in parts.chain(top) {
            // A failure shows in what is left on the node.
            let _ = busybox(&["umount", "-l", &text(&mounted)]);
        }
    }
}

/// MiB of the file system that a path is on.
fn size_of(path: &Path) -> Result<u64> {
    let said = busybox(&["df", "-m", "-P", &text(path)])?;
    let line = said.lines().last().context("no figures")?;
    let number = line.split_whitespace().nth(1).context("no size")?;
    Ok(number.parse()?)
}

async fn disk_volume_is_one_file_system_of_the_pods_containers(test: Test) -> Result<()> {
    let folder = Folder::make(&test)?;
    let volume = folder.empty_dir("data")?;
    let pod = folder.pod(&test).await?;
    let writer = ContainerSpec::pause("writer").user(1001, 1001);
    let writer = pod.start(&writer.mount(&volume.top, "/out")).await?;
    same!(
        writer.read(&["stat", "-c", "%a %u %g", "/out"]).await?,
        "2777 0 2000"
    );
    same!(writer.read(&["ls", "-A", "/out"]).await?, "");
    let size = "df -m -P /out | tail -n 1 | awk '{print $2}'";
    let size: u64 = writer.read(&["sh", "-c", size]).await?.parse()?;
    let whole = size_of(&volume.top)?;
    ensure!(
        size <= whole && size > whole - whole / 20,
        "{size} MiB of {whole}"
    );
    // Or else it would be measured, and not be seen, that it is shown by virtio-fs.
    same!(
        volume.top.join(".kiln-disk").exists(),
        test.handler() != "runc"
    );
    let reader = ContainerSpec::pause("reader").user(1002, 1002);
    let reader = pod
        .start(&reader.mount_read_only(&volume.top, "/in"))
        .await?;
    let hash = writer
        .read(&["testprog", "write", "/out/file", "33000000", "7"])
        .await?;
    same!(reader.read(&["testprog", "hash", "/in/file"]).await?, hash);
    same!(
        reader.read(&["stat", "-c", "%u %g", "/in/file"]).await?,
        "1001 2000"
    );
    ensure!(reader.exec(&["touch", "/in/new"]).await?.code != 0);
    // A file that grows is seen growing, and a lock held.
    for count in 1..=3 {
        writer.shell("echo line >> /out/growing").await?;
        same!(
            reader.shell("wc -l < /in/growing").await?,
            count.to_string()
        );
    }
    writer
        .shell("flock /out/lock sleep 1000 > /dev/null 2>&1 &")
        .await?;
    let taken = "while ! flock -n /in/lock true; do sleep 0.1; done";
    let taken = reader.exec_limited(&["sh", "-c", taken], 2).await;
    ensure!(
        !taken.is_ok_and(|done| done.code == 0),
        "a lock is held twice"
    );
    // The kubelet counts what is there, and no more what is not.
    writer.shell("sync").await?;
    let used = volume.used()?;
    ensure!((31..=40).contains(&used), "{used} MiB counted");
    writer.shell("rm /out/file; sync").await?;
    wait::until("less to be counted", SEEN, || async {
        Ok((volume.used()? <= 6).then_some(()))
    })
    .await
}

async fn disk_volume_outlives_its_sandbox(test: Test) -> Result<()> {
    let folder = Folder::make(&test)?;
    let volume = folder.empty_dir("data")?;
    let spec = || ContainerSpec::pause("main").mount(&volume.top, "/data");
    let pod = folder.pod(&test).await?;
    let first = pod.start(&spec()).await?;
    first
        .shell("cd /data && chmod 750 . && mkdir -p lost+found/a && echo text > lost+found/a/file && chown 5:6 lost+found")
        .await?;
    // As a container's end is: with a moment to write what is not yet written.
    pod.remove().await?;
    let pod = folder.pod(&test).await?;
    let next = pod.start(&spec()).await?;
    same!(
        next.read(&["cat", "/data/lost+found/a/file"]).await?,
        "text"
    );
    same!(
        next.read(&["stat", "-c", "%a %u %g", "/data"]).await?,
        "750 0 2000"
    );
    same!(
        next.read(&["stat", "-c", "%u %g", "/data/lost+found"])
            .await?,
        "5 6"
    );
    Ok(())
}

async fn what_was_synced_to_a_disk_volume_outlives_a_kill(test: Test) -> Result<()> {
    let folder = Folder::make(&test)?;
    let volume = folder.empty_dir("data")?;
    let pod = folder.pod(&test).await?;
    let script = "i=0; while :; do i=$((i + 1)); \
                  dd if=/bin/busybox of=/data/$i bs=64k count=2 conv=fsync 2> /dev/null && echo done $i; done";
    let writer = ContainerSpec::shell("writer", script).mount(&volume.top, "/data");
    let writer = pod.start(&writer).await?;
    writer
        .log()
        .wait_for("done 20", Duration::from_secs(60))
        .await?;
    let shim = shim_of(pod.id())?.context("no shim")?;
    for process in children_of(shim)? {
        faults::kill(process)?;
    }
    writer.wait_for(Duration::from_secs(60)).await?;
    let said = writer.log().stdout()?;
    let last = said
        .iter()
        .rev()
        .find_map(|line| line.strip_prefix("done "));
    let last = last.context("nothing was done")?.to_owned();
    pod.remove().await?;
    let pod = folder.pod(&test).await?;
    let next = pod
        .start(&ContainerSpec::pause("next").mount(&volume.top, "/data"))
        .await?;
    let script = format!(
        "head -c 131072 /bin/busybox | md5sum > /tmp/sum; \
         for i in $(seq {last}); do md5sum < /data/$i | cmp - /tmp/sum || echo $i is lost; done"
    );
    same!(next.shell(&script).await?, "");
    Ok(())
}

async fn disk_volume_has_all_that_programs_do_with_files(test: Test) -> Result<()> {
    let folder = Folder::make(&test)?;
    let volume = folder.empty_dir("data")?;
    let pod = folder.pod(&test).await?;
    let spec = ContainerSpec::pause("main").mount(&volume.top, "/data");
    let container = pod.start(&spec).await?;
    same!(
        container.read(&["testprog", "features", "/data"]).await?,
        "all"
    );
    Ok(())
}

async fn pod_has_as_many_disk_volumes_as_it_likes(test: Test) -> Result<()> {
    const COUNT: usize = 30;
    let folder = Folder::make(&test)?;
    let volumes = (0..COUNT).map(|number| folder.empty_dir(&format!("v{number}")));
    let volumes = volumes.collect::<Result<Vec<_>>>()?;
    let pod = folder.pod(&test).await?;
    for name in ["first", "second"] {
        let spec = volumes.iter().enumerate();
        let spec = spec.fold(ContainerSpec::pause(name), |spec, (number, volume)| {
            spec.mount(&volume.top, &format!("/v{number}"))
        });
        let container = pod.start(&spec).await?;
        let script = format!(
            "for i in $(seq 0 {}); do echo {name} $i >> /v$i/file; cat /v$i/file; done | sort | uniq -c | grep -c ' 1 '",
            COUNT - 1
        );
        let lines = if name == "first" { COUNT } else { 2 * COUNT };
        same!(container.shell(&script).await?, lines.to_string());
    }
    Ok(())
}

async fn memory_volume_is_a_tmpfs_of_the_pods_containers(test: Test) -> Result<()> {
    let folder = Folder::make(&test)?;
    let volume = folder.memory("cache")?;
    let pod = folder.pod(&test).await?;
    let spec = |name: &str| ContainerSpec::pause(name).mount(&volume.top, "/cache");
    let first = pod.start(&spec("first").user(1000, 1000)).await?;
    same!(
        first.read(&["stat", "-f", "-c", "%T", "/cache"]).await?,
        "tmpfs"
    );
    same!(
        first.read(&["stat", "-c", "%a %u %g", "/cache"]).await?,
        "2777 0 2000"
    );
    let size = "df -m /cache | tail -n 1 | awk '{print $2}'";
    same!(first.read(&["sh", "-c", size]).await?, "8");
    // As large as it was to be, and no larger.
    let fill = "dd if=/dev/zero of=/cache/big bs=1M count=7 2> /dev/null && rm /cache/big && \
                ! dd if=/dev/zero of=/cache/big bs=1M count=9 2> /dev/null && rm /cache/big";
    first.shell(fill).await?;
    first
        .shell("echo kept > /cache/file && cp /bin/busybox /cache/true && /cache/true")
        .await?;
    let reader = ContainerSpec::pause("reader").mount_read_only(&volume.top, "/cache");
    let reader = pod.start(&reader).await?;
    same!(reader.read(&["cat", "/cache/file"]).await?, "kept");
    ensure!(reader.exec(&["touch", "/cache/file"]).await?.code != 0);
    // It is the pod's: a container's end changes nothing, and the next one finds all of it.
    first.remove().await?;
    reader.remove().await?;
    let last = pod.start(&spec("last")).await?;
    same!(
        last.read(&["stat", "-c", "%u %g", "/cache/file"]).await?,
        "1000 2000"
    );
    same!(last.read(&["cat", "/cache/file"]).await?, "kept");
    Ok(())
}

async fn part_of_a_memory_volume_is_no_way_out_of_it(test: Test) -> Result<()> {
    let folder = Folder::make(&test)?;
    let volume = folder.memory("cache")?;
    part_is_no_way_out(test, folder, volume).await
}

async fn part_of_a_disk_volume_is_no_way_out_of_it(test: Test) -> Result<()> {
    let folder = Folder::make(&test)?;
    let volume = folder.empty_dir("data")?;
    part_is_no_way_out(test, folder, volume).await
}

async fn part_is_no_way_out(test: Test, folder: Folder, volume: Volume) -> Result<()> {
    let pod = folder.pod(&test).await?;
    let part = volume.part("0", "deep/part")?;
    let spec = ContainerSpec::pause("main")
        .mount(&volume.top, "/all")
        .mount(&part, "/part");
    let main = pod.start(&spec).await?;
    main.shell("echo text > /part/file && cmp /part/file /all/deep/part/file")
        .await?;
    same!(main.read(&["ls", "-A", "/part"]).await?, "file");
    // The way to a part may have become a link by the time that it is looked for again.
    main.shell(
        "mv /all/deep /all/was && ln -s / /all/deep && mkdir /all/root && ln -s / /all/root/part",
    )
    .await?;
    let other = ContainerSpec::pause("other").mount(&part, "/part");
    match pod.start(&other).await {
        // The node has bound what it found when the pod began.
        Ok(other) => same!(other.read(&["ls", "-A", "/part"]).await?, "file"),
        Err(error) => {
            let error = format!("{error:#}");
            ensure!(
                error.contains("deep/part") && error.contains("link"),
                "{error}"
            );
        }
    }
    Ok(())
}
