//! What one test works with: a namespace of its own, clients, and the removal of everything in it.

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_cri::v1 as cri;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{Namespace, Pod, ServiceAccount};
use kiln_e2e::evidence::Marks;
use kiln_e2e::harness::Subject;
use kiln_e2e::{Cri, node, wait};
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, LogParams, ObjectMeta, PostParams};
use kube::runtime::wait::{Condition, await_condition, conditions};
use kube::{Client, Resource};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::cluster::Cluster;
use crate::kubectl::Kubectl;
use crate::{evidence, manifest, pods};

/// How long one step may take: many times what it needs on an emulated machine.
pub const STEP: Duration = Duration::from_secs(180);
/// The name of the tests' image, which is in containerd.
pub const IMAGE: &str = kiln_test_images::catalog::BUSYBOX;
/// Namespaces of tests begin with this.
const PREFIX: &str = "test-";
/// Everything that tests write on the node is below here.
const SCRATCH: &str = "/var/lib/kiln-k8s-tests";
/// Grace of pods that are still there when their test is over.
const LAST_GRACE: u32 = 1;
/// What is gone from the API is gone from the node by then.
const SETTLE: Duration = Duration::from_secs(60);

/// One run of one test with one runtime.
#[derive(Clone)]
pub struct Test {
    inner: Arc<Inner>,
}

struct Inner {
    name: String,
    handler: String,
    namespace: String,
    client: Client,
    cri: Cri,
    scratch: PathBuf,
}

impl Test {
    /// Prepares a run: `name` is the test's, `handler` the runtime's and that of its runtime class.
    pub async fn new(name: &str, handler: &str) -> Result<Self> {
        static RUNS: AtomicU32 = AtomicU32::new(0);
        let run = RUNS.fetch_add(1, Ordering::Relaxed);
        let namespace = format!("{PREFIX}{}-{run}", std::process::id());
        let client = Cluster::default().client().await?;
        let scratch = Path::new(SCRATCH).join(&namespace);
        std::fs::create_dir_all(&scratch)
            .with_context(|| format!("cannot create {}", scratch.display()))?;
        let containerd = kiln_e2e::api::connect().await?;
        let test = Test {
            inner: Arc::new(Inner {
                name: name.to_owned(),
                handler: handler.to_owned(),
                namespace,
                client,
                cri: Cri::new(containerd.channel()),
                scratch,
            }),
        };
        test.make_namespace().await?;
        Ok(test)
    }

    async fn make_namespace(&self) -> Result<()> {
        let namespace = Namespace {
            metadata: ObjectMeta {
                name: Some(self.namespace().to_owned()),
                ..Default::default()
            },
            ..Default::default()
        };
        let all: Api<Namespace> = Api::all(self.client().clone());
        all.create(&PostParams::default(), &namespace)
            .await
            .with_context(|| format!("cannot make namespace {}", self.namespace()))?;
        // Without it no pod can be made.
        self.until(
            "default",
            "to be made",
            |account: Option<&ServiceAccount>| account.is_some(),
        )
        .await
        .map(drop)
    }

    /// The runtime handler under test, such as `runc`; its runtime class has the same name.
    pub fn handler(&self) -> &str {
        &self.inner.handler
    }

    /// This run's namespace.
    pub fn namespace(&self) -> &str {
        &self.inner.namespace
    }

    /// A client with every right.
    pub fn client(&self) -> &Client {
        &self.inner.client
    }

    /// CRI, for what only the node knows.
    pub fn cri(&self) -> &Cri {
        &self.inner.cri
    }

    /// An empty directory on the node's disk, removed with the test.
    pub fn scratch(&self) -> &Path {
        &self.inner.scratch
    }

    /// Writes a file into the scratch directory.
    pub fn write(&self, name: &str, content: &str) -> Result<PathBuf> {
        let path = self.scratch().join(name);
        std::fs::write(&path, content).with_context(|| format!("{}", path.display()))?;
        Ok(path)
    }

    /// The real `kubectl`, in this run's namespace.
    pub fn kubectl(&self) -> Kubectl {
        Kubectl::new(self.namespace())
    }

    /// Objects of a kind in this run's namespace.
    pub fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client().clone(), self.namespace())
    }

    /// Applies a manifest. `${RUNTIME}`, `${IMAGE}`, `${NAMESPACE}` and `${SCRATCH}` are filled in. A document without a
    /// kind is the spec of a pod called `pod` ([`manifest::pod`]).
    pub async fn apply(&self, text: &str) -> Result<()> {
        self.apply_with(text, &[]).await
    }

    /// Applies a manifest with more to fill in.
    pub async fn apply_with(&self, text: &str, values: &[(&str, &str)]) -> Result<()> {
        for object in self.objects(text, values)? {
            manifest::apply(self.client(), Some(self.namespace()), &object)
                .await
                .with_context(|| format!("cannot apply\n{text}"))?;
        }
        Ok(())
    }

    /// A manifest's objects, filled in.
    pub fn objects(&self, text: &str, values: &[(&str, &str)]) -> Result<Vec<DynamicObject>> {
        let complete = |document: Value| match document.get("kind") {
            Some(_) => document,
            None => manifest::pod(document, self.handler(), IMAGE),
        };
        Ok(manifest::parse_with(&self.fill(text, values), complete)?)
    }

    /// A manifest, filled in.
    pub fn fill(&self, text: &str, values: &[(&str, &str)]) -> String {
        let text = manifest::fill(text, values);
        let scratch = self.scratch().display().to_string();
        let known = [
            ("RUNTIME", self.handler()),
            ("IMAGE", IMAGE),
            ("NAMESPACE", self.namespace()),
            ("SCRATCH", scratch.as_str()),
        ];
        manifest::fill(&text, &known)
    }

    /// Waits until an object is as it should be; the object then (nothing if it is to be gone and is).
    pub async fn until_some<K, C>(&self, name: &str, what: &str, is: C) -> Result<Option<K>>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
        K: Clone + Debug + DeserializeOwned + Send + 'static,
        C: Condition<K>,
    {
        let api: Api<K> = self.api();
        let waiting = async {
            loop {
                // A watch that ends, or is told that it is too old, is begun anew.
                let is = |object: Option<&K>| is.matches_object(object);
                match await_condition(api.clone(), name, is).await {
                    Err(error) => {
                        eprintln!("waiting for {name} {what}, once more: {error}");
                        tokio::time::sleep(Duration::from_secs(1)).await;
                    }
                    Ok(found) => break found,
                }
            }
        };
        match tokio::time::timeout(STEP, waiting).await {
            Ok(found) => Ok(found),
            Err(_) => {
                let now = api.get_opt(name).await;
                bail!(
                    "waited {} s for {} {name} {what}; it is now: {now:#?}",
                    STEP.as_secs(),
                    K::kind(&())
                )
            }
        }
    }

    /// Waits until an object is as it should be.
    pub async fn until<K, C>(&self, name: &str, what: &str, is: C) -> Result<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
        K: Clone + Debug + DeserializeOwned + Send + 'static,
        C: Condition<K>,
    {
        let found = self.until_some(name, what, is).await?;
        found.with_context(|| format!("{name} was removed while it was waited for it {what}"))
    }

    /// Waits until a pod is Ready.
    pub async fn ready(&self, name: &str) -> Result<Pod> {
        let ready = |pod: Option<&Pod>| pod.is_some_and(pods::is_ready);
        self.until(name, "to be Ready", ready).await
    }

    /// Applies a manifest with one pod called `pod`, and waits until that is Ready.
    pub async fn run(&self, text: &str) -> Result<Pod> {
        self.apply(text).await?;
        self.ready("pod").await
    }

    /// Waits until all containers of a pod have ended for good.
    pub async fn ended(&self, name: &str) -> Result<Pod> {
        self.until(name, "to end", |pod: Option<&Pod>| {
            pod.is_some_and(|pod| matches!(pods::phase(pod), "Succeeded" | "Failed"))
        })
        .await
    }

    /// Applies a manifest with one pod called `pod` whose containers end by themselves; its log when they have.
    pub async fn finish(&self, text: &str) -> Result<String> {
        self.apply(text).await?;
        let pod = self.ended("pod").await?;
        let log = self.log("pod", None).await?;
        if pods::phase(&pod) != "Succeeded" {
            bail!("the pod failed: {:#?}\nits log: {log}", pod.status);
        }
        Ok(log)
    }

    /// What a container (the pod's only one, if none is named) has written so far.
    pub async fn log(&self, pod: &str, container: Option<&str>) -> Result<String> {
        let how = LogParams {
            container: container.map(str::to_owned),
            ..Default::default()
        };
        self.api::<Pod>()
            .logs(pod, &how)
            .await
            .with_context(|| format!("cannot read the log of pod {pod}"))
    }

    /// Waits for a line in a container's log that begins with `prefix`; the rest of the line.
    pub async fn logged(&self, pod: &str, container: Option<&str>, prefix: &str) -> Result<String> {
        let what = format!("a line {prefix:?} in the log of pod {pod}");
        wait::until(&what, STEP, || async {
            let log = self.log(pod, container).await?;
            Ok(log
                .lines()
                .find_map(|line| line.strip_prefix(prefix).map(str::to_owned)))
        })
        .await
    }

    /// Asks for other limits (which are requests, too) of the container `main` of the pod `pod`.
    pub async fn resize(&self, limits: Value) -> Result<()> {
        let resources = json!({"limits": limits, "requests": limits});
        let container = json!({"name": "main", "resources": resources});
        let patch = json!({"spec": {"containers": [container]}});
        let patch = format!("--patch={patch}");
        let command = ["patch", "pod", "pod", "--subresource=resize", &patch];
        self.kubectl().run(&command).await.map(drop)
    }

    /// Deletes a pod and waits until it is gone.
    pub async fn delete(&self, name: &str) -> Result<()> {
        let api = self.api::<Pod>();
        let pod = api.get(name).await?;
        let uid = pod.metadata.uid.unwrap_or_default();
        api.delete(name, &DeleteParams::default()).await?;
        self.until_some(name, "to be gone", conditions::is_deleted::<Pod>(&uid))
            .await
            .map(drop)
    }

    /// A command in a container of pod `pod`, by kubectl; its output.
    pub async fn exec(&self, script: &str) -> Result<String> {
        self.kubectl()
            .run(&["exec", "pod", "--", "sh", "-c", script])
            .await
    }

    /// The CRI ids of all sandboxes of this run.
    async fn sandboxes(&self) -> Result<Vec<String>> {
        let mut filter = cri::PodSandboxFilter::default();
        filter.label_selector.insert(
            "io.kubernetes.pod.namespace".to_owned(),
            self.namespace().to_owned(),
        );
        let request = cri::ListPodSandboxRequest {
            filter: Some(filter),
        };
        let list = self.cri().list_pod_sandbox(request).await?.items;
        Ok(list.into_iter().map(|sandbox| sandbox.id).collect())
    }

    /// Names of all containers and pods of this run, as the node knows them.
    async fn ids(&self, pods: &[Pod], sandboxes: &[String]) -> Result<Vec<String>> {
        let mut ids: Vec<String> = pods
            .iter()
            .filter_map(|pod| pod.metadata.uid.clone())
            .collect();
        for sandbox in sandboxes {
            let filter = cri::ContainerFilter {
                pod_sandbox_id: sandbox.clone(),
                ..Default::default()
            };
            let request = cri::ListContainersRequest {
                filter: Some(filter),
            };
            let list = self.cri().list_containers(request).await?.containers;
            ids.extend(list.into_iter().map(|container| container.id));
        }
        ids.extend_from_slice(sandboxes);
        Ok(ids)
    }

    async fn remove_all(&self) -> Result<()> {
        let all: Api<Namespace> = Api::all(self.client().clone());
        // From here on nothing new is made in it. It goes by itself when it is empty.
        all.delete(self.namespace(), &DeleteParams::default())
            .await
            .context("cannot delete the namespace")?;
        let pods = self.api::<Pod>();
        let there = pods.list(&ListParams::default()).await?.items;
        for pod in &there {
            let name = pod.metadata.name.clone().unwrap_or_default();
            let how = DeleteParams::default().grace_period(LAST_GRACE);
            match pods.delete(&name, &how).await {
                Err(kube::Error::Api(answer)) if answer.code == 404 => {}
                Err(error) => return Err(error).context(format!("cannot delete pod {name}")),
                Ok(_) => {}
            }
        }
        let sandboxes = self.sandboxes().await?;
        let ids = self.ids(&there, &sandboxes).await?;
        wait::until("the removal of all pods", Self::CLEAN_UP_LIMIT, || async {
            let left = pods.list(&ListParams::default()).await?.items;
            Ok(left.is_empty().then_some(()))
        })
        .await?;
        // kubelet does so too, once a minute.
        for pod_sandbox_id in self.sandboxes().await? {
            let request = cri::RemovePodSandboxRequest { pod_sandbox_id };
            self.cri().remove_pod_sandbox(request).await?;
        }
        let gone = wait::until("removal of all traces", SETTLE, || async {
            Ok(node::traces(&ids)?.is_empty().then_some(()))
        });
        if gone.await.is_err() {
            let traces = node::traces(&ids)?;
            if !traces.is_empty() {
                bail!("left behind on the node:\n  {}", traces.join("\n  "));
            }
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

impl Subject for Test {
    const LIMIT: Duration = Duration::from_secs(400);
    const CLEAN_UP_LIMIT: Duration = Duration::from_secs(180);

    async fn prepare(name: &str, handler: &str) -> Result<Self> {
        Test::new(name, handler).await
    }

    async fn keep(&self, marks: &Marks, failure: &str) -> Result<PathBuf> {
        evidence::keep(self, marks, failure).await
    }

    async fn clean_up(&self) -> Result<()> {
        self.remove_all().await
    }
}

/// Removes what earlier, killed runs of the tests left behind.
pub(crate) async fn remove_leftovers(client: &Client) -> Result<()> {
    let all: Api<Namespace> = Api::all(client.clone());
    for namespace in all.list(&ListParams::default()).await?.items {
        let name = namespace.metadata.name.unwrap_or_default();
        if name.starts_with(PREFIX) {
            all.delete(&name, &DeleteParams::default()).await?;
        }
    }
    if Path::new(SCRATCH).exists() {
        std::fs::remove_dir_all(SCRATCH).with_context(|| format!("cannot remove {SCRATCH}"))?;
    }
    Ok(())
}
