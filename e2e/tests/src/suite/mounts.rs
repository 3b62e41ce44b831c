//! What is mounted below volumes: which of it can be written to, and which mounts are seen on the other side.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_cri::v1 as api;
use kiln_e2e::harness::Case;
use kiln_e2e::node::{busybox, text};
use kiln_e2e::{ContainerSpec, Test, cases, wait};

use super::same;

/// A guest goes by what it knows of a name for a second.
const SOON: Duration = Duration::from_secs(60);

pub(crate) fn cases() -> Vec<Case> {
    cases![
        read_only_volume_leaves_mounts_below_as_they_are,
        recursive_read_only_volume_leaves_nothing_writable.since((2, 4)),
        what_the_node_mounts_later_is_seen_only_where_asked_for,
        what_a_pod_mounts_is_seen_on_the_node_or_refused_by_name,
        pod_keeps_no_directory_of_the_node_from_removal,
        volume_of_hugepages_has_them_or_is_refused_by_name,
        runtime_handlers_tell_what_they_can.since((2, 4)),
    ]
}

/// A directory of the node that is a mount whose mounts others get, as the root of a node with systemd is.
struct Shared(PathBuf);

impl Shared {
    fn make(test: &Test) -> Result<Self> {
        let dir = test.scratch().join("shared");
        std::fs::create_dir(&dir)?;
        let shared = Shared(dir);
        shared.mount("")?;
        busybox(&["mount", "--make-shared", &text(&shared.0)])?;
        Ok(shared)
    }

    /// Mounts a tmpfs below it; empty: on it.
    fn mount(&self, name: &str) -> Result<PathBuf> {
        let target = self.0.join(name);
        std::fs::create_dir_all(&target)?;
        busybox(&["mount", "-t", "tmpfs", "below", &text(&target)])?;
        Ok(target)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // A failure shows in what is left on the node.
        let _ = busybox(&["umount", "-l", &text(&self.0)]);
    }
}

async fn read_only_volume_leaves_mounts_below_as_they_are(test: Test) -> Result<()> {
    let host = Shared::make(&test)?;
    let below = host.mount("below")?;
    let pod = test.pod().await?;
    let spec = ContainerSpec::pause("main").mount_read_only(&host.0, "/data");
    let container = pod.start(&spec).await?;
    ensure!(container.exec(&["touch", "/data/file"]).await?.code != 0);
    container.shell("echo inside > /data/below/file").await?;
    same!(std::fs::read_to_string(below.join("file"))?, "inside\n");
    ensure!(!host.0.join("file").exists());
    pod.remove().await
}

async fn recursive_read_only_volume_leaves_nothing_writable(test: Test) -> Result<()> {
    let host = Shared::make(&test)?;
    let below = host.mount("below")?;
    std::fs::write(below.join("file"), "as it was\n")?;
    let pod = test.pod().await?;
    let spec = ContainerSpec::pause("main").mount_all_read_only(&host.0, "/data");
    let container = pod.start(&spec).await?;
    same!(
        container.read(&["cat", "/data/below/file"]).await?,
        "as it was"
    );
    for script in [
        "echo x > /data/below/file",
        "touch /data/below/new",
        "touch /data/new",
    ] {
        let output = container.exec(&["sh", "-c", script]).await?;
        ensure!(output.code != 0, "allowed: {script}");
    }
    same!(std::fs::read_to_string(below.join("file"))?, "as it was\n");
    pod.remove().await
}

async fn what_the_node_mounts_later_is_seen_only_where_asked_for(test: Test) -> Result<()> {
    let host = Shared::make(&test)?;
    std::fs::create_dir(host.0.join("later"))?;
    let pod = test.pod().await?;
    let spec = ContainerSpec::pause("main")
        .mount_following_host(&host.0, "/follows")
        .mount(&host.0, "/private");
    let container = pod.start(&spec).await?;
    same!(container.read(&["ls", "/follows/later"]).await?, "");
    let later = host.mount("later")?;
    std::fs::write(later.join("file"), "mounted later\n")?;
    wait::until("the mount in the container", SOON, || async {
        let seen = container.exec(&["cat", "/follows/later/file"]).await?;
        Ok((seen.stdout == "mounted later\n").then_some(()))
    })
    .await?;
    // It is the node's own, not a copy.
    container
        .shell("echo changed > /follows/later/file")
        .await?;
    same!(std::fs::read_to_string(later.join("file"))?, "changed\n");
    same!(container.read(&["ls", "/private/later"]).await?, "");
    // What goes on the node goes in the container. Lazily: a guest holds what it has looked up, as an open file would.
    busybox(&["umount", "-l", &text(&later)])?;
    wait::until("the end of the mount in the container", SOON, || async {
        let seen = container.exec(&["ls", "/follows/later"]).await?;
        Ok((seen.code == 0 && seen.stdout.is_empty()).then_some(()))
    })
    .await?;
    pod.remove().await
}

async fn pod_keeps_no_directory_of_the_node_from_removal(test: Test) -> Result<()> {
    let host = Shared::make(&test)?;
    let below = host.mount("below")?;
    std::fs::write(below.join("file"), "mounted before\n")?;
    let pod = test.pod().await?;
    let spec = ContainerSpec::pause("main")
        .mount(&host.0, "/data")
        .mount_read_only(&host.0, "/only");
    let container = pod.start(&spec).await?;
    let read = ["cat", "/data/below/file"];
    same!(container.read(&read).await?, "mounted before");
    let tests = text(test.scratch().parent().context("no parent")?);
    let stray: Vec<String> = kiln_e2e::node::mounts()?
        .into_iter()
        .filter(|mount| mount.ends_with("(tmpfs of below)") && !mount.starts_with(&tests))
        .collect();
    same!(stray, Vec::<String>::new());
    busybox(&["umount", &text(&below)])?;
    std::fs::remove_dir(&below).context("removing what the pod has mounted")?;
    // Which has the node's directory still, and can go on.
    container.shell("echo inside > /data/file").await?;
    same!(std::fs::read_to_string(host.0.join("file"))?, "inside\n");
    pod.remove().await
}

async fn what_a_pod_mounts_is_seen_on_the_node_or_refused_by_name(test: Test) -> Result<()> {
    let host = Shared::make(&test)?;
    std::fs::create_dir(host.0.join("inside"))?;
    let config = kiln_e2e::PodSpec::new().privileged();
    let pod = test.run_pod(&config).await?;
    let spec = ContainerSpec::pause("main")
        .privileged()
        .mount_both_ways(&host.0, "/data");
    match pod.start(&spec).await {
        Ok(container) => {
            let script = "mount -t tmpfs inside /data/inside && echo inside > /data/inside/file";
            container.shell(script).await?;
            let seen = std::fs::read_to_string(host.0.join("inside/file"))?;
            same!(seen, "inside\n");
        }
        Err(refused) => {
            is_refusal_of(&refused, &["Bidirectional", "/data", "HostToContainer"])?;
        }
    }
    pod.remove().await
}

async fn volume_of_hugepages_has_them_or_is_refused_by_name(test: Test) -> Result<()> {
    let host = Shared::make(&test)?;
    let volume = host.0.join("pages");
    std::fs::create_dir(&volume)?;
    busybox(&["mount", "-t", "hugetlbfs", "pages", &text(&volume)])?;
    let pod = test.pod().await?;
    let spec = ContainerSpec::pause("main").mount(&volume, "/pages");
    match pod.start(&spec).await {
        Ok(container) => {
            let kind = container
                .read(&["stat", "-f", "-c", "%t", "/pages"])
                .await?;
            same!(kind, "958458f6");
        }
        Err(refused) => is_refusal_of(&refused, &["medium: HugePages", "/pages", "runc"])?,
    }
    pod.remove().await
}

fn is_refusal_of(error: &anyhow::Error, words: &[&str]) -> Result<()> {
    let said = format!("{error:#}");
    for word in ["kiln:", "is refused"].iter().chain(words) {
        ensure!(said.contains(word), "{word:?} is not in {said:?}");
    }
    Ok(())
}

async fn runtime_handlers_tell_what_they_can(test: Test) -> Result<()> {
    let status = test.cri().status(api::StatusRequest::default()).await?;
    let handlers = &status.runtime_handlers;
    let own = handlers
        .iter()
        .find(|handler| handler.name == test.handler());
    let features = own.and_then(|handler| handler.features.as_ref());
    let features = features.with_context(|| format!("no features among {handlers:?}"))?;
    ensure!(features.recursive_read_only_mounts, "{features:?}");
    ensure!(features.user_namespaces, "{features:?}");
    Ok(())
}
