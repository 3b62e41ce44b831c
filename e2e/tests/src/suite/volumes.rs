//! Volumes as kubelet mounts them: files and directories of the node.

use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use kiln_e2e::harness::Case;
use kiln_e2e::node::LoopDevice;
use kiln_e2e::{ContainerSpec, Test, cases};
use sha2::{Digest, Sha256};

use super::same;

pub(crate) fn cases() -> Vec<Case> {
    cases![
        directory_is_the_same_inside_and_outside,
        file_and_subdirectory_mounts_hide_the_rest,
        read_only_volume_cannot_be_written_to,
        groups_of_a_user_count_on_a_volume,
        empty_dir_is_shared_between_containers,
        large_file_keeps_its_hash_both_ways,
        block_volume_is_a_disk_that_keeps_what_is_written,
    ]
}

async fn directory_is_the_same_inside_and_outside(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let data = test.scratch().join("data");
    std::fs::create_dir(&data)?;
    std::fs::write(data.join("from-node"), "before the start\n")?;
    let container = pod
        .start(&ContainerSpec::pause("main").mount(&data, "/data"))
        .await?;
    same!(
        container.read(&["cat", "/data/from-node"]).await?,
        "before the start"
    );
    std::fs::write(data.join("later"), "after the start\n")?;
    same!(
        container.read(&["cat", "/data/later"]).await?,
        "after the start"
    );
    container
        .shell(
            "cd /data && mkdir -p a/b && echo inside > a/b/file && ln -s b/file a/link && \
             ln a/b/file a/hard && mkfifo pipe && chmod 640 a/b/file && chown 1000:2000 a/b/file && \
             mv from-node renamed && rm later",
        )
        .await?;
    same!(std::fs::read_to_string(data.join("a/b/file"))?, "inside\n");
    same!(std::fs::read_to_string(data.join("a/link"))?, "inside\n");
    let meta = std::fs::metadata(data.join("a/hard"))?;
    same!(
        (meta.uid(), meta.gid(), meta.mode() & 0o7777, meta.nlink()),
        (1000, 2000, 0o640, 2)
    );
    ensure!(data.join("renamed").exists() && !data.join("later").exists());
    // Who may not, may not: modes count inside.
    let spec = ContainerSpec::pause("other")
        .mount(&data, "/data")
        .user(3000, 3000);
    let other = pod.start(&spec).await?;
    ensure!(other.exec(&["cat", "/data/a/b/file"]).await?.code != 0);
    std::fs::set_permissions(
        data.join("a/b/file"),
        std::fs::Permissions::from_mode(0o644),
    )?;
    same!(other.read(&["cat", "/data/a/b/file"]).await?, "inside");
    Ok(())
}

async fn file_and_subdirectory_mounts_hide_the_rest(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let secret = test.write("volume/secret", "hidden\n")?;
    let shown = test.write("volume/sub/shown", "shown\n")?;
    let single = test.write("single", "one file\n")?;
    let spec = ContainerSpec::pause("main")
        .mount(&single, "/etc/single")
        .mount(
            shown.parent().unwrap_or(Path::new("/")),
            "/opt/sub/path/that/is/new",
        )
        .mount_read_only(&single, "/etc/passwd");
    let container = pod.start(&spec).await?;
    same!(
        container
            .read(&["cat", "/etc/single", "/etc/passwd"])
            .await?,
        "one file\none file"
    );
    same!(
        container.read(&["ls", "/opt/sub/path/that/is/new"]).await?,
        "shown"
    );
    same!(
        container
            .exec(&["ls", "/opt/sub/path/that/is/new/../secret"])
            .await?
            .code,
        1
    );
    container.shell("echo changed > /etc/single").await?;
    same!(std::fs::read_to_string(&single)?, "changed\n");
    ensure!(
        container
            .exec(&["sh", "-c", "echo x > /etc/passwd"])
            .await?
            .code
            != 0
    );
    same!(std::fs::read_to_string(&secret)?, "hidden\n");
    Ok(())
}

async fn read_only_volume_cannot_be_written_to(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let file = test.write("volume/file", "as it was\n")?;
    let spec = ContainerSpec::pause("main")
        .mount_read_only(file.parent().unwrap_or(Path::new("/")), "/data");
    let container = pod.start(&spec).await?;
    same!(container.read(&["cat", "/data/file"]).await?, "as it was");
    for script in [
        "echo x > /data/file",
        "echo x > /data/new",
        "rm /data/file",
        "mkdir /data/dir",
        "chmod 777 /data/file",
        "mv /data/file /data/other",
        "touch /data/file",
    ] {
        let output = container.exec(&["sh", "-c", script]).await?;
        ensure!(output.code != 0, "allowed: {script}");
    }
    same!(std::fs::read_to_string(&file)?, "as it was\n");
    Ok(())
}

async fn empty_dir_is_shared_between_containers(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let shared = test.scratch().join("empty-dir");
    std::fs::create_dir(&shared)?;
    std::fs::set_permissions(&shared, std::fs::Permissions::from_mode(0o777))?;
    let writer = ContainerSpec::pause("writer")
        .mount(&shared, "/out")
        .user(1001, 1001);
    let writer = pod.start(&writer).await?;
    let reader = ContainerSpec::pause("reader")
        .mount(&shared, "/in")
        .user(1002, 1002);
    let reader = pod.start(&reader).await?;
    let hash = writer
        .read(&["testprog", "write", "/out/file", "3000000", "7"])
        .await?;
    same!(reader.read(&["testprog", "hash", "/in/file"]).await?, hash);
    // A file that grows is seen growing.
    for count in 1..=3 {
        writer.shell("echo line >> /out/growing").await?;
        same!(
            reader.shell("wc -l < /in/growing").await?,
            count.to_string()
        );
    }
    same!(
        reader
            .exec(&["sh", "-c", "echo x >> /in/growing"])
            .await?
            .code,
        1
    );
    Ok(())
}

async fn large_file_keeps_its_hash_both_ways(test: Test) -> Result<()> {
    const SIZE: usize = 24 << 20;
    let pod = test.pod().await?;
    let data = test.scratch().join("data");
    std::fs::create_dir(&data)?;
    let hex = |bytes: &[u8]| -> String {
        Sha256::digest(bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    };
    let content: Vec<u8> = (0..SIZE as u64 / 8)
        .flat_map(|index| (index * 0x9e37_79b9).to_le_bytes())
        .collect();
    std::fs::write(data.join("from-node"), &content)?;
    let container = pod
        .start(&ContainerSpec::pause("main").mount(&data, "/data"))
        .await?;
    same!(
        container
            .read(&["testprog", "hash", "/data/from-node"])
            .await?,
        hex(&content)
    );
    let size = SIZE.to_string();
    let hash = container
        .read(&["testprog", "write", "/data/from-pod", &size, "3"])
        .await?;
    let back = std::fs::read(data.join("from-pod"))?;
    same!(back.len(), SIZE);
    same!(hex(&back), hash);
    // The root file system keeps what is written to it as well.
    let hash = container
        .read(&["testprog", "write", "/root-file", &size, "4"])
        .await?;
    same!(
        container.read(&["testprog", "hash", "/root-file"]).await?,
        hash
    );
    Ok(())
}

async fn block_volume_is_a_disk_that_keeps_what_is_written(test: Test) -> Result<()> {
    const SIZE: u64 = 24 << 20;
    let (file, other) = (test.scratch().join("volume"), test.scratch().join("fixed"));
    let volume = LoopDevice::over(&file, SIZE)?;
    let fixed = LoopDevice::over(&other, 1 << 20)?;
    let pod = test.pod().await?;
    let spec = ContainerSpec::pause("main")
        .device(volume.path(), "/dev/volume", "rwm")
        .device(fixed.path(), "/dev/fixed", "r");
    let container = pod.start(&spec).await?;
    for (device, bytes) in [("/dev/volume", SIZE), ("/dev/fixed", 1 << 20)] {
        let size = container.read(&["blockdev", "--getsize64", device]).await?;
        same!(size, bytes.to_string());
    }
    container
        .shell("test -b /dev/volume && yes 0123456789abcde | dd of=/dev/volume bs=1M count=20 iflag=fullblock conv=fsync")
        .await?;
    let written = std::fs::read(&file)?;
    let (data, rest) = written.split_at(20 << 20);
    ensure!(data.chunks(16).all(|line| line == b"0123456789abcde\n"));
    ensure!(rest.iter().all(|byte| *byte == 0));
    let refused = container.exec(&["sh", "-c", "echo x > /dev/fixed"]).await?;
    ensure!(refused.code != 0, "a read-only volume was written to");
    // Another container of the pod has it next.
    container.stop(Duration::from_secs(1)).await?;
    container.remove().await?;
    let spec = ContainerSpec::pause("next").device(volume.path(), "/dev/again", "rwm");
    let next = pod.start(&spec).await?;
    let line = next
        .read(&["dd", "if=/dev/again", "bs=16", "count=1", "skip=1000"])
        .await?;
    same!(line, "0123456789abcde");
    pod.remove().await
}

async fn groups_of_a_user_count_on_a_volume(test: Test) -> Result<()> {
    // As the kubelet leaves a volume of a pod with fsGroup: 2000.
    let data = test.scratch().join("data");
    std::fs::create_dir(&data)?;
    std::os::unix::fs::chown(&data, Some(0), Some(2000))?;
    std::fs::set_permissions(&data, Permissions::from_mode(0o2775))?;
    let pod = test.pod().await?;
    let spec = |name: &str| {
        ContainerSpec::pause(name)
            .user(1234, 3000)
            .mount(&data, "/data")
    };
    let member = pod.start(&spec("member").groups(&[2000, 4000])).await?;
    member
        .shell(
            "cd /data && echo text > file && mkdir dir && echo text > dir/file && ln -s file link && mkfifo pipe && \
             ln file hard && mv dir/file dir/moved && echo more >> file && rm hard && mkdir gone && rmdir gone",
        )
        .await?;
    for (name, mode) in [
        ("file", 0o644),
        ("dir", 0o2755),
        ("dir/moved", 0o644),
        ("pipe", 0o644),
    ] {
        let found = std::fs::symlink_metadata(data.join(name))?;
        same!(
            (name, found.uid(), found.gid(), found.mode() & 0o7777),
            (name, 1234, 2000, mode)
        );
    }
    same!(std::fs::symlink_metadata(data.join("link"))?.uid(), 1234);
    // Who is no member may not, and a member no more than the group.
    let stranger = pod.start(&spec("stranger")).await?;
    ensure!(stranger.exec(&["touch", "/data/strange"]).await?.code != 0);
    ensure!(stranger.exec(&["mkdir", "/data/strange"]).await?.code != 0);
    std::fs::write(data.join("of-root"), "text\n")?;
    std::fs::set_permissions(data.join("of-root"), Permissions::from_mode(0o640))?;
    same!(member.read(&["cat", "/data/of-root"]).await?, "text");
    ensure!(
        member
            .exec(&["sh", "-c", "echo x >> /data/of-root"])
            .await?
            .code
            != 0
    );
    ensure!(stranger.exec(&["cat", "/data/of-root"]).await?.code != 0);
    Ok(())
}
