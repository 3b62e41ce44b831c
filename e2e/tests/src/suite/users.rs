//! Pods with a user namespace of their own (`hostUsers: false`).

use std::os::unix::fs::{MetadataExt, chown};
use std::path::PathBuf;

use anyhow::{Result, ensure};
use kiln_e2e::harness::Case;
use kiln_e2e::{Container, ContainerSpec, PodSpec, Test, cases};

use super::same;

/// Who the pods' root is on the node.
const ROOT: u32 = 131_072;

pub(crate) fn cases() -> Vec<Case> {
    cases![
        user_namespace_has_the_map_that_was_asked_for.since((2, 0)),
        containers_and_execs_share_the_pods_user_namespace.since((2, 0)),
        volumes_of_a_user_namespace_belong_to_whom_they_do_on_the_node.since((2, 0)),
        root_of_a_user_namespace_has_the_image_and_no_more.since((2, 0)),
        user_namespace_that_can_not_be_had_is_refused_by_name,
    ]
}

async fn pod(test: &Test) -> Result<kiln_e2e::Pod> {
    test.run_pod(&PodSpec::new().users_at(ROOT)).await
}

fn words(text: &str) -> Vec<&str> {
    text.split_whitespace().collect()
}

async fn namespace_of(container: &Container) -> Result<String> {
    container.read(&["readlink", "/proc/self/ns/user"]).await
}

async fn user_namespace_has_the_map_that_was_asked_for(test: Test) -> Result<()> {
    let pod = pod(&test).await?;
    let spec = ContainerSpec::shell("log", "cat /proc/self/uid_map /proc/self/gid_map; id -u");
    let (code, log) = pod.finish(&spec.users_at(ROOT)).await?;
    let lines = log.stdout()?.join("\n");
    same!(code, 0, "{lines}");
    let root = ROOT.to_string();
    let map = ["0", &root, "65536"];
    same!(words(&lines), [&map[..], &map[..], &["0"]].concat());
    pod.remove().await
}

async fn containers_and_execs_share_the_pods_user_namespace(test: Test) -> Result<()> {
    let pod = pod(&test).await?;
    let first = pod
        .start(&ContainerSpec::pause("first").users_at(ROOT))
        .await?;
    let spec = ContainerSpec::pause("second")
        .user(1000, 1000)
        .groups(&[2000])
        .users_at(ROOT);
    let second = pod.start(&spec).await?;
    let shared = namespace_of(&first).await?;
    same!(namespace_of(&second).await?, shared);
    let own = std::fs::read_link("/proc/self/ns/user")?;
    ensure!(shared != own.display().to_string());
    same!(second.read(&["id", "-u"]).await?, "1000");
    ensure!(words(&second.read(&["id", "-G"]).await?).contains(&"2000"));
    let map = second.read(&["cat", "/proc/self/uid_map"]).await?;
    same!(words(&map), ["0", &*ROOT.to_string(), "65536"]);
    // A user's own streams can be opened by their names.
    second.shell("echo said > /dev/stdout").await?;
    pod.remove().await
}

async fn volumes_of_a_user_namespace_belong_to_whom_they_do_on_the_node(test: Test) -> Result<()> {
    let data = test.scratch().join("data");
    std::fs::create_dir(&data)?;
    for (name, uid) in [("roots", 0), ("users", 1000), ("strangers", ROOT)] {
        std::fs::write(data.join(name), "x\n")?;
        chown(data.join(name), Some(uid), Some(uid))?;
    }
    let file = test.write("single", "one file\n")?;
    let pod = pod(&test).await?;
    let spec = ContainerSpec::pause("main")
        .mount(&data, "/data")
        .mount_read_only(&file, "/etc/single")
        .users_at(ROOT);
    let container = pod.start(&spec).await?;
    let owners = "cd /data && stat -c '%u:%g' roots users strangers /etc/single";
    let seen = container.shell(owners).await?;
    same!(words(&seen), ["0:0", "1000:1000", "65534:65534", "0:0"]);
    container
        .shell("cd /data && echo root > made && mkdir dir && chown 33:34 dir && echo y > users")
        .await?;
    let owner = |path: PathBuf| -> Result<(u32, u32)> {
        let file = std::fs::metadata(path)?;
        Ok((file.uid(), file.gid()))
    };
    same!(owner(data.join("made"))?, (0, 0));
    same!(owner(data.join("dir"))?, (33, 34));
    // Nobody's, as far as its root can tell.
    let refused = container
        .exec(&["sh", "-c", "echo y > /data/strangers"])
        .await?;
    ensure!(refused.code != 0);
    same!(std::fs::read_to_string(data.join("strangers"))?, "x\n");
    let refused = container.exec(&["chown", "0:0", "/data/strangers"]).await?;
    ensure!(refused.code != 0);
    let other = ContainerSpec::pause("other")
        .user(1000, 1000)
        .mount(&data, "/mine")
        .users_at(ROOT);
    let other = pod.start(&other).await?;
    other
        .shell("cd /mine && cat made users && echo z > users")
        .await?;
    ensure!(other.exec(&["rm", "/mine/made"]).await?.code != 0);
    same!(std::fs::read_to_string(data.join("users"))?, "z\n");
    pod.remove().await
}

async fn root_of_a_user_namespace_has_the_image_and_no_more(test: Test) -> Result<()> {
    let pod = pod(&test).await?;
    let spec = ContainerSpec::pause("main").users_at(ROOT);
    let container = pod.start(&spec).await?;
    let seen = container
        .shell("stat -c '%u:%g' / /bin/busybox /etc/hosts")
        .await?;
    same!(words(&seen), ["0:0"; 3]);
    container
        .shell("echo x > /new && chown 5:6 /new && echo x > /dev/shm/y && mkdir /dir && rmdir /dir")
        .await?;
    same!(
        container.read(&["stat", "-c", "%u:%g", "/new"]).await?,
        "5:6"
    );
    // The node's memory, its devices and its settings are not this root's.
    for script in [
        "cat /dev/mem",
        "mknod /disk b 7 0",
        "echo 1 > /proc/sys/kernel/panic",
    ] {
        let output = container.exec(&["sh", "-c", script]).await?;
        ensure!(output.code != 0, "allowed: {script}");
    }
    // Low ports are the root's in any pod.
    container.shell("httpd -p 80 -h /").await?;
    pod.remove().await
}

/// Before 2.1, containerd has the runtime make the pod's network namespace, which runc does.
async fn user_namespace_that_can_not_be_had_is_refused_by_name(test: Test) -> Result<()> {
    match pod(&test).await {
        Ok(pod) => pod.remove().await,
        Err(refused) => {
            let said = format!("{refused:#}");
            for word in ["kiln:", "hostUsers: false", "is refused", "containerd 2.1"] {
                ensure!(said.contains(word), "{word:?} is not in {said:?}");
            }
            Ok(())
        }
    }
}
