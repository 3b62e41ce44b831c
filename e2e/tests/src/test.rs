//! What one test works with, and the removal of everything that it made.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use containerd_client::Client;
use containerd_client::services::v1 as leases;
use k8s_cri::v1 as api;

use crate::api::{CRI_NAMESPACE, request};
use crate::node::{Census, TESTS_CGROUP};
use crate::pod::Identity;
use crate::{Cri, Pod, PodSpec, node, plain, wait};

/// Pods and plain containers of tests carry this label; its value is the test's id.
pub(crate) const LABEL: &str = "dev.kiln.e2e";
/// Everything that tests write on the node is below here.
const SCRATCH: &str = "/var/lib/kiln-e2e";
/// After a pod's removal, its traces may take this long to go.
const SETTLE: Duration = Duration::from_secs(10);
/// And everything else of it, which containerd may clean up when it is back, this long.
const NODE_SETTLES: Duration = Duration::from_secs(60);

/// One run of one test with one runtime.
#[derive(Clone)]
pub struct Test {
    inner: Arc<Inner>,
}

struct Inner {
    name: String,
    handler: String,
    id: String,
    client: Client,
    cri: Cri,
    scratch: PathBuf,
    counter: AtomicU32,
    /// Ids of pods and containers that this run made: nothing on the node may name them after it.
    made: Mutex<Vec<String>>,
    /// Snapshots that are there to be removed.
    spares: Mutex<Vec<String>>,
}

impl Test {
    /// Prepares a run: `name` is the test's, `handler` the runtime's.
    pub async fn new(name: &str, handler: &str) -> Result<Self> {
        static RUNS: AtomicU32 = AtomicU32::new(0);
        let run = RUNS.fetch_add(1, Ordering::Relaxed);
        let id = format!("{}-{run}", std::process::id());
        let client = crate::api::connect().await?;
        let scratch = Path::new(SCRATCH).join(&id);
        std::fs::create_dir_all(&scratch)
            .with_context(|| format!("cannot create {}", scratch.display()))?;
        Ok(Test {
            inner: Arc::new(Inner {
                name: name.to_owned(),
                handler: handler.to_owned(),
                id,
                cri: Cri::new(client.channel()),
                client,
                scratch,
                counter: AtomicU32::new(0),
                made: Mutex::new(Vec::new()),
                spares: Mutex::new(Vec::new()),
            }),
        })
    }

    /// The runtime handler under test, such as `runc`.
    pub fn handler(&self) -> &str {
        &self.inner.handler
    }

    /// The handler's runtime by containerd's name, such as `io.containerd.runc.v2`.
    pub fn runtime(&self) -> String {
        // `kiln-sandbox` is the same runtime, asked for another way.
        let name = self
            .handler()
            .split_once('-')
            .map_or(self.handler(), |(name, _)| name);
        format!("io.containerd.{name}.v2")
    }

    /// CRI.
    pub fn cri(&self) -> &Cri {
        &self.inner.cri
    }

    /// containerd's own API.
    pub fn client(&self) -> &Client {
        &self.inner.client
    }

    /// An empty directory on the node's disk, removed with the test.
    pub fn scratch(&self) -> &Path {
        &self.inner.scratch
    }

    /// Id of this run.
    pub fn id(&self) -> &str {
        &self.inner.id
    }

    /// Labels of everything that this run makes.
    pub fn labels(&self) -> HashMap<String, String> {
        HashMap::from([(LABEL.to_owned(), self.inner.id.clone())])
    }

    /// A name that nothing else on the node has.
    pub fn unique(&self, what: &str) -> String {
        let number = self.inner.counter.fetch_add(1, Ordering::Relaxed);
        format!("{what}-{}-{number}", self.inner.id)
    }

    /// Says that something with this id was made: after the test, nothing may be left of it.
    pub fn made(&self, id: &str) {
        if let Ok(mut made) = self.inner.made.lock() {
            made.push(id.to_owned());
        }
    }

    /// Writes a file into the scratch directory and returns its path.
    pub fn write(&self, name: &str, content: &str) -> Result<PathBuf> {
        let path = self.scratch().join(name);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::write(&path, content).with_context(|| format!("{}", path.display()))?;
        Ok(path)
    }

    /// Runs a pod with nothing special.
    pub async fn pod(&self) -> Result<Pod> {
        self.run_pod(&PodSpec::new()).await
    }

    /// Runs a pod.
    pub async fn run_pod(&self, spec: &PodSpec) -> Result<Pod> {
        let config = self.pod_config(spec)?;
        let handler = spec.handler.as_deref().unwrap_or(self.handler());
        let pod = Pod::run(self.cri().clone(), config, handler).await?;
        self.made(pod.id());
        Ok(pod)
    }

    /// The configuration with which [`Test::run_pod`] would run a pod.
    pub fn pod_config(&self, spec: &PodSpec) -> Result<api::PodSandboxConfig> {
        let name = self.unique("pod");
        let logs = self.scratch().join("logs").join(&name);
        std::fs::create_dir_all(&logs)?;
        let below = match &spec.class {
            None => name.clone(),
            Some(class) if class.is_empty() => format!("kubepods/pod{name}"),
            Some(class) => format!("kubepods/{class}/pod{name}"),
        };
        let identity = Identity {
            uid: spec.uid.clone().unwrap_or_else(|| format!("uid-{name}")),
            labels: self.labels(),
            logs: logs.display().to_string(),
            cgroup: format!("{}/{below}", self.cgroup()),
            name,
        };
        Ok(spec.to_api(&identity))
    }

    /// The cgroup below which all of this run's pods lie.
    pub fn cgroup(&self) -> String {
        format!("{TESTS_CGROUP}/{}", self.inner.id)
    }

    /// Removes the (empty) cgroups of this run's pods, which are kubelet's part, not the runtime's.
    pub fn remove_pod_cgroups(&self) -> std::io::Result<()> {
        node::remove_cgroup(&self.cgroup())
    }

    /// Waits until nothing is on the node that was not there before.
    pub async fn node_is_as(&self, before: &Census) -> Result<()> {
        let more = || -> Result<Vec<String>> {
            let mut more = Census::take()?.more_than(before);
            // containerd's cleaning up after runc's shim finds its socket by a file that the pod's removal may take first.
            if self.handler() == "runc" {
                more.retain(|item| !item.starts_with("shim sockets"));
            }
            Ok(more)
        };
        let same = wait::until("the node as it was before", NODE_SETTLES, || async {
            // In use while a shim that has answered for the last time is about to end; kubelet too tries again.
            if let Err(error) = self.remove_pod_cgroups()
                && error.raw_os_error() != Some(libc::EBUSY)
            {
                return Err(error.into());
            }
            self.collect_garbage().await?;
            Ok(more()?.is_empty().then_some(()))
        });
        same.await.with_context(|| match more() {
            Ok(more) => more.join("\n"),
            Err(error) => error.to_string(),
        })
    }

    /// Makes empty snapshots, of which each collection of garbage removes one.
    ///
    /// A containerd that is killed while it makes a snapshot leaves a directory that belongs to none, and can make no other
    /// one of that number. It looks for such directories only when a snapshot was removed.
    pub async fn spare_snapshots(&self, count: usize) -> Result<()> {
        for _ in 0..count {
            let key = self.unique("spare");
            plain::keep_snapshot(self.client(), &key).await?;
            if let Ok(mut all) = self.inner.spares.lock() {
                all.push(key);
            }
        }
        Ok(())
    }

    /// Removes those that are left of them.
    pub async fn remove_spare_snapshots(&self) -> Result<()> {
        let spares = self
            .inner
            .spares
            .lock()
            .map(|mut all| std::mem::take(&mut *all));
        for spare in spares.unwrap_or_default() {
            plain::remove_snapshot(self.client(), &spare).await?;
        }
        Ok(())
    }

    /// Has containerd remove what nothing refers to any more, such as the files of removed snapshots, which it does in
    /// its own time otherwise.
    async fn collect_garbage(&self) -> Result<()> {
        let id = self.unique("garbage");
        let spare = self.inner.spares.lock().ok().and_then(|mut all| all.pop());
        if let Some(spare) = spare {
            plain::remove_snapshot(self.client(), &spare).await?;
        }
        let lease = leases::CreateRequest {
            id: id.clone(),
            ..Default::default()
        };
        let mut service = self.client().leases();
        service.create(request(CRI_NAMESPACE, lease)?).await?;
        let end = leases::DeleteRequest { id, sync: true };
        service.delete(request(CRI_NAMESPACE, end)?).await?;
        Ok(())
    }

    /// Ids of this run's sandboxes that containerd still knows.
    pub(crate) async fn sandboxes(&self) -> Result<Vec<String>> {
        sandboxes(self.cri(), Some(&self.inner.id)).await
    }

    /// Ids of this run's CRI containers that containerd still knows.
    pub(crate) async fn containers(&self) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for sandbox in self.sandboxes().await? {
            let filter = api::ContainerFilter {
                pod_sandbox_id: sandbox,
                ..Default::default()
            };
            let request = api::ListContainersRequest {
                filter: Some(filter),
            };
            let list = self.cri().list_containers(request).await?.containers;
            found.extend(list.into_iter().map(|container| container.id));
        }
        Ok(found)
    }

    /// Removes all that this run made and checks that no trace of it is left on the node.
    pub async fn clean_up(&self) -> Result<()> {
        for container in self.containers().await? {
            self.made(&container);
        }
        remove_sandboxes(self.cri(), Some(&self.inner.id)).await?;
        plain::remove_all(self.client(), Some(&self.inner.id)).await?;
        let ids = self
            .inner
            .made
            .lock()
            .map(|made| made.clone())
            .unwrap_or_default();
        for id in &ids {
            plain::remove_snapshot(self.client(), id).await?;
        }
        let gone = wait::until("removal of all traces", SETTLE, || async {
            let traces = node::traces(&ids)?;
            Ok((traces.is_empty() && self.remove_pod_cgroups().is_ok()).then_some(()))
        });
        if gone.await.is_err() {
            let traces = node::traces(&ids)?;
            if !traces.is_empty() {
                bail!("left behind on the node:\n  {}", traces.join("\n  "));
            }
            self.remove_pod_cgroups()
                .context("left behind on the node: a cgroup that is in use")?;
        }
        std::fs::remove_dir_all(self.scratch())
            .with_context(|| format!("left behind on the node: {}", self.scratch().display()))
    }
}

impl std::fmt::Display for Test {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}::{}", self.inner.handler, self.inner.name)
    }
}

/// Sandboxes made by tests: of one run, or of all.
async fn sandboxes(cri: &Cri, run: Option<&str>) -> Result<Vec<String>> {
    let mut filter = api::PodSandboxFilter::default();
    if let Some(run) = run {
        filter
            .label_selector
            .insert(LABEL.to_owned(), run.to_owned());
    }
    let request = api::ListPodSandboxRequest {
        filter: Some(filter),
    };
    let items = cri.list_pod_sandbox(request).await?.items;
    let ours = items
        .into_iter()
        .filter(|sandbox| sandbox.labels.contains_key(LABEL));
    Ok(ours.map(|sandbox| sandbox.id).collect())
}

async fn remove_sandboxes(cri: &Cri, run: Option<&str>) -> Result<()> {
    for pod_sandbox_id in sandboxes(cri, run).await? {
        let stop = api::StopPodSandboxRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
        };
        cri.stop_pod_sandbox(stop).await?;
        let remove = api::RemovePodSandboxRequest { pod_sandbox_id };
        cri.remove_pod_sandbox(remove).await?;
    }
    Ok(())
}

/// Removes what earlier, killed runs of the tests left behind.
pub(crate) async fn remove_leftovers(client: &Client) -> Result<()> {
    let cri = Cri::new(client.channel());
    remove_sandboxes(&cri, None).await?;
    plain::remove_all(client, None).await?;
    if Path::new(SCRATCH).exists() {
        std::fs::remove_dir_all(SCRATCH).with_context(|| format!("cannot remove {SCRATCH}"))?;
    }
    // In use only if a process escaped from an earlier run; the tests will then show it.
    let _ = node::remove_cgroup(TESTS_CGROUP);
    Ok(())
}
