//! What a container is given and what it is: image, arguments, environment, user, privileges.

use anyhow::{Context, Result, ensure};
use kiln_e2e::harness::Case;
use kiln_e2e::{ContainerSpec, PodSpec, Test, cases};
use kiln_test_images::catalog::LONG_NAME;
use serde_json::{Value, json};

use super::same;

pub(crate) fn cases() -> Vec<Case> {
    cases![
        arguments_environment_and_directory_arrive_unchanged,
        user_and_groups_are_those_of_the_spec,
        capabilities_privileges_and_seccomp_are_those_of_the_spec,
        image_layers_lie_on_each_other_as_they_should,
        read_only_root_is_read_only,
        default_mounts_are_there_and_protected,
        pods_are_different_machines_to_themselves,
    ]
}

async fn report(test: &Test, spec: ContainerSpec) -> Result<Value> {
    let (code, log) = test.pod().await?.finish(&spec).await?;
    let lines = log.lines()?;
    same!(code, 0, "{lines:?}");
    let line = lines.first().context("no report")?;
    serde_json::from_str(&line.text).with_context(|| format!("{:?}", line.text))
}

async fn arguments_environment_and_directory_arrive_unchanged(test: Test) -> Result<()> {
    let odd = [
        "",
        "two words",
        "quote\"s'",
        "$HOME",
        "back\\slash",
        "ümläut",
    ];
    let spec = ContainerSpec::testprog("main", &["report"])
        .args(&odd)
        .env("EMPTY", "")
        .env("EQUALS", "a=b=c")
        .env("LINES", "one\ntwo")
        .env("FROM_IMAGE", "overridden")
        .workdir("/var/log");
    let report = report(&test, spec).await?;
    let args: Vec<&str> = report["args"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    same!(args[..2], ["/bin/testprog", "report"]);
    same!(args[2..], odd);
    same!(report["cwd"], "/var/log");
    same!(report["env"]["EMPTY"], "");
    same!(report["env"]["EQUALS"], "a=b=c");
    same!(report["env"]["LINES"], "one\ntwo");
    same!(report["env"]["FROM_IMAGE"], "overridden");
    ensure!(
        report["env"]["PATH"]
            .as_str()
            .is_some_and(|path| path.contains("/bin")),
        "{report}"
    );
    ensure!(report["env"]["HOSTNAME"] == report["hostname"], "{report}");
    Ok(())
}

async fn user_and_groups_are_those_of_the_spec(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let spec = ContainerSpec::pause("number")
        .user(4321, 5432)
        .groups(&[77, 88]);
    let number = pod.start(&spec).await?;
    let report = number.report().await?;
    same!(report["uid"], json!([4321, 4321, 4321, 4321]));
    same!(report["gid"], json!([5432, 5432, 5432, 5432]));
    let groups = report["groups"].to_string();
    ensure!(groups.contains("77") && groups.contains("88"), "{groups}");
    same!(report["capabilities"]["effective"], "0000000000000000");
    number.shell("echo x > /tmp/file").await?;
    same!(
        number.read(&["stat", "-c", "%u:%g", "/tmp/file"]).await?,
        "4321:5432"
    );
    ensure!(
        number
            .exec(&["sh", "-c", "echo x > /etc/passwd"])
            .await?
            .code
            != 0
    );

    let name = pod
        .start(&ContainerSpec::pause("name").user_name("user"))
        .await?;
    let report = name.report().await?;
    same!(report["uid"][0], 1000);
    same!(report["gid"][0], 1000);
    ensure!(
        report["groups"].to_string().contains("2000"),
        "{}",
        report["groups"]
    );
    Ok(())
}

async fn capabilities_privileges_and_seccomp_are_those_of_the_spec(test: Test) -> Result<()> {
    const NET_ADMIN: u64 = 1 << 12;
    const CHOWN: u64 = 1;
    let effective = |report: &Value| -> Result<u64> {
        let text = report["capabilities"]["effective"]
            .as_str()
            .context("no capabilities")?;
        Ok(u64::from_str_radix(text, 16)?)
    };
    let pod = test.run_pod(&PodSpec::new().privileged()).await?;
    let plain = pod.start(&ContainerSpec::pause("plain")).await?;
    let bits = effective(&plain.report().await?)?;
    ensure!(bits & CHOWN != 0 && bits & NET_ADMIN == 0, "{bits:x}");
    ensure!(
        plain
            .exec(&["ip", "link", "add", "d0", "type", "dummy"])
            .await?
            .code
            != 0
    );

    let changed = ContainerSpec::pause("changed")
        .capabilities(&["NET_ADMIN"], &["CHOWN"])
        .no_new_privileges()
        .default_seccomp();
    let changed = pod.start(&changed).await?;
    let report = changed.report().await?;
    let bits = effective(&report)?;
    ensure!(bits & CHOWN == 0 && bits & NET_ADMIN != 0, "{bits:x}");
    same!(report["no_new_privs"], 1);
    same!(report["seccomp"], 2);
    same!(changed.exec(&["chown", "1:1", "/tmp"]).await?.code, 1);

    let privileged = pod
        .start(&ContainerSpec::pause("privileged").privileged())
        .await?;
    let bits = effective(&privileged.report().await?)?;
    ensure!(bits & NET_ADMIN != 0 && bits & (1 << 21) != 0, "{bits:x}");
    privileged
        .shell("mkdir /tmp/m && mount -t tmpfs none /tmp/m && umount /tmp/m")
        .await?;
    Ok(())
}

async fn image_layers_lie_on_each_other_as_they_should(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let container = pod.start(&ContainerSpec::pause("main")).await?;
    same!(
        container.read(&["cat", "/etc/layered/overridden"]).await?,
        "from the layer above"
    );
    same!(container.read(&["ls", "/etc/layered"]).await?, "overridden");
    same!(container.read(&["ls", "/opt/opaque"]).await?, "above");
    same!(
        container.read(&["cat", &format!("/{LONG_NAME}")]).await?,
        "found"
    );
    let stat = container
        .read(&["stat", "-c", "%a %u %g", "/opt/owned", "/tmp", "/root"])
        .await?;
    same!(stat, "640 1000 2000\n1777 0 0\n700 0 0");
    let links = container
        .read(&["stat", "-c", "%h %i", "/opt/links/first"])
        .await?;
    same!(
        links,
        container
            .read(&["stat", "-c", "%h %i", "/opt/links/second"])
            .await?
    );
    ensure!(links.starts_with("2 "), "{links}");
    same!(container.read(&["readlink", "/bin/sh"]).await?, "busybox");
    same!(container.report().await?["env"]["FROM_IMAGE"], "yes");
    // Writing to what came from the image, in every way.
    container.shell("echo more >> /etc/layered/overridden && rm /opt/opaque/above && mv /opt/links /opt/moved && chmod 600 /opt/owned").await?;
    same!(
        container
            .shell("cat /etc/layered/overridden | wc -l")
            .await?,
        "2"
    );
    same!(
        container.read(&["cat", "/opt/moved/second"]).await?,
        "linked"
    );
    same!(container.read(&["ls", "-A", "/opt/opaque"]).await?, "");
    // And another container of the same image sees nothing of it.
    let other = pod.start(&ContainerSpec::pause("other")).await?;
    same!(
        other.read(&["cat", "/etc/layered/overridden"]).await?,
        "from the layer above"
    );
    same!(other.read(&["ls", "/opt/opaque"]).await?, "above");
    Ok(())
}

async fn read_only_root_is_read_only(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let volume = test.scratch().join("volume");
    std::fs::create_dir(&volume)?;
    let spec = ContainerSpec::pause("main")
        .read_only_root()
        .mount(&volume, "/data");
    let container = pod.start(&spec).await?;
    for path in ["/file", "/etc/file", "/tmp/file", "/opt/new/file"] {
        let output = container.exec(&["touch", path]).await?;
        ensure!(output.code != 0, "{path} can be written to");
    }
    container
        .read(&["touch", "/data/file", "/dev/shm/file"])
        .await?;
    ensure!(volume.join("file").exists());
    Ok(())
}

async fn default_mounts_are_there_and_protected(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let container = pod.start(&ContainerSpec::pause("main")).await?;
    let report = container.report().await?;
    let mounts = report["mounts"].as_array().context("no mounts")?;
    for (target, kind) in [
        ("/proc", "proc"),
        ("/dev", "tmpfs"),
        ("/dev/pts", "devpts"),
        ("/dev/shm", "tmpfs"),
        ("/dev/mqueue", "mqueue"),
        ("/sys", "sysfs"),
    ] {
        let found = mounts
            .iter()
            .any(|mount| mount["target"] == target && mount["type"] == kind);
        ensure!(found, "no {kind} at {target}: {mounts:?}");
    }
    for path in ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"] {
        ensure!(
            !container.read(&["cat", path]).await?.is_empty(),
            "{path} is empty"
        );
    }
    for device in ["null", "zero", "full", "random", "urandom", "tty"] {
        container
            .read(&["test", "-c", &format!("/dev/{device}")])
            .await?;
    }
    for protected in [
        "echo x > /proc/sys/kernel/domainname",
        "echo b > /proc/sysrq-trigger",
    ] {
        let output = container.exec(&["sh", "-c", protected]).await?;
        ensure!(output.code != 0, "allowed: {protected}");
    }
    same!(
        container.shell("head -c 1 /proc/kcore | wc -c").await?,
        "0",
        "bytes of /proc/kcore"
    );
    ensure!(
        container
            .exec(&["mount", "-t", "tmpfs", "none", "/mnt"])
            .await?
            .code
            != 0
    );
    ensure!(
        container
            .exec(&["mknod", "/tmp/disk", "b", "8", "0"])
            .await?
            .code
            == 0
    );
    ensure!(
        container.exec(&["cat", "/tmp/disk"]).await?.code != 0,
        "a disk can be read"
    );
    Ok(())
}

async fn pods_are_different_machines_to_themselves(test: Test) -> Result<()> {
    let mut seen = Vec::new();
    for _ in 0..2 {
        let pod = test.pod().await?;
        let container = pod.start(&ContainerSpec::pause("main")).await?;
        let random = container
            .read(&["sh", "-c", "head -c 16 /dev/urandom | sha256sum"])
            .await?;
        let mac = container
            .read(&["cat", "/sys/class/net/eth0/address"])
            .await?;
        let now: u64 = container.read(&["date", "+%s"]).await?.parse()?;
        let here = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)?
            .as_secs();
        ensure!(
            now.abs_diff(here) <= 3,
            "the clock says {now}, the node's {here}"
        );
        seen.push([
            container.read(&["hostname"]).await?,
            pod.ip().await?,
            mac,
            random,
        ]);
    }
    for (first, second) in seen[0].iter().zip(&seen[1]) {
        ensure!(first != second, "two pods have the same: {first}");
    }
    Ok(())
}
