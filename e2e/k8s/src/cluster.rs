//! The cluster: made once, started in order, each program waited for, stopped in reverse.

use std::fs;
use std::future::Future;
use std::io;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Node, ServiceAccount};
use kiln_e2e::harness::is_on_path;
use kube::api::Api;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::Value;

use crate::component::{self, Component};
use crate::config::{self, Layout, Port};
use crate::manifest;
use crate::pki::{self, Authority};

/// cgroups of the cluster's programs are below this one.
const CGROUPS: &str = "/sys/fs/cgroup/k8s";
/// How long a program may take to get ready: many times what it needs on an emulated machine.
const READY: Duration = Duration::from_secs(300);
/// How long one answer may take.
const ANSWER: Duration = Duration::from_secs(20);
/// Pause between two questions. Each costs an emulated machine some milliseconds.
const PAUSE: Duration = Duration::from_millis(300);

/// The runtime classes' names: those of their handlers.
pub const RUNTIME_CLASSES: [&str; 3] = ["runc", "kiln", "kiln-sandbox"];

/// Why there is no cluster.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Certificates.
    #[error(transparent)]
    Pki(#[from] pki::Error),
    /// A program.
    #[error(transparent)]
    Component(#[from] component::Error),
    /// The node is not prepared.
    #[error(
        "no interface of this node has the address {}; run this on a node of suite k8s, whose set-up makes one (docs/node.md)",
        config::NODE_ADDRESS
    )]
    Address(#[source] io::Error),
    /// A file or a folder.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The way to the API.
    #[error("cannot read the cluster's kubeconfig {}; `kiln-k8s up` writes it", path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: kube::config::KubeconfigError,
    },
    /// A connection to the API that cannot be set up.
    #[error("cannot make a client of {url}")]
    Client {
        /// Whose.
        url: String,
        /// The cause.
        #[source]
        source: kube::Error,
    },
    /// The API refused something.
    #[error("cannot {action}")]
    Api {
        /// What was asked for.
        action: &'static str,
        /// The cause.
        #[source]
        source: kube::Error,
    },
    /// A manifest of ours.
    #[error(transparent)]
    Manifest(#[from] manifest::Error),
}

/// A program of the cluster with the place where it says that it is ready.
struct Part {
    component: Component,
    port: Port,
    path: &'static str,
}

/// The cluster of this node.
pub struct Cluster {
    layout: Layout,
    /// Features of kubelet that are off by default.
    features: Vec<&'static str>,
    kubelet: &'static str,
}

impl Default for Cluster {
    fn default() -> Self {
        Cluster::new(Layout::default())
    }
}

impl Cluster {
    /// Whether this node has what one is made of.
    pub fn can_be_made() -> bool {
        is_on_path("kubelet")
    }

    /// The one whose files are there; whether it runs is another question.
    pub fn new(layout: Layout) -> Self {
        Cluster {
            layout,
            features: Vec::new(),
            kubelet: "kubelet",
        }
    }

    /// Takes another program as kubelet, when it is started the next time.
    pub fn with_kubelet(mut self, program: &'static str) -> Self {
        self.kubelet = program;
        self
    }

    /// Switches a feature of kubelet on, when it is started the next time.
    pub fn with_feature(mut self, name: &'static str) -> Self {
        self.features.push(name);
        self
    }

    /// Where its files are.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Its programs, in the order in which they need each other.
    fn parts(&self) -> Vec<Part> {
        let part = |name, arguments: fn(&Layout) -> Vec<String>, port, path| {
            let arguments = arguments(&self.layout);
            let component =
                Component::new(name, arguments, Path::new(CGROUPS), Path::new(config::LOGS));
            Part {
                component,
                port,
                path,
            }
        };
        vec![
            part("etcd", config::etcd, config::ETCD, "/readyz"),
            part("kube-apiserver", config::api_server, config::API, "/readyz"),
            part(
                "kube-controller-manager",
                config::controllers,
                config::CONTROLLERS,
                "/healthz",
            ),
            part(
                "kube-scheduler",
                config::scheduler,
                config::SCHEDULER,
                "/healthz",
            ),
            self.kubelet(),
        ]
    }

    fn kubelet(&self) -> Part {
        let arguments = config::kubelet(&self.layout);
        let component = Component::new(
            "kubelet",
            arguments,
            Path::new(CGROUPS),
            Path::new(config::LOGS),
        );
        Part {
            component: component.by(self.kubelet),
            port: config::KUBELET_HEALTH,
            path: "/healthz",
        }
    }

    /// Makes what is missing, starts what does not run, and waits until pods can be made. `tell` hears what is ready.
    pub async fn up(&self, tell: impl Fn(&str)) -> Result<(), Error> {
        UdpSocket::bind((config::NODE_ADDRESS, 0)).map_err(Error::Address)?;
        self.write_files()?;
        make_cgroup(Path::new(CGROUPS))?;
        let start = Instant::now();
        let ready = |what: &str| {
            tell(&format!(
                "{what} after {:.0} s",
                start.elapsed().as_secs_f64()
            ))
        };
        for part in self.parts() {
            self.start(&part).await?;
            ready(&format!("{} is ready", part.component.name));
        }
        let client = self.client().await?;
        self.make_runtime_classes(&client).await?;
        self.wait_for_node(&client).await?;
        self.wait_for_default_account(&client).await?;
        ready("pods can be made");
        Ok(())
    }

    /// Stops everything, the last first. Pods go on running, as they do when a node's kubelet ends.
    pub fn down(&self) -> Result<(), Error> {
        for part in self.parts().iter().rev() {
            part.component.stop()?;
        }
        match fs::remove_dir(CGROUPS) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::File {
                action: "remove",
                path: CGROUPS.into(),
                source,
            }),
            _ => Ok(()),
        }
    }

    /// Whether the API server runs.
    pub fn is_up(&self) -> bool {
        self.parts().iter().all(|part| part.component.is_running())
    }

    /// Stops kubelet, does something, and starts it again; waits until the node is Ready.
    pub async fn without_kubelet<E: From<Error>>(
        &self,
        doing: impl Future<Output = Result<(), E>>,
    ) -> Result<(), E> {
        let part = self.kubelet();
        part.component.stop().map_err(Error::from)?;
        doing.await?;
        self.start(&part).await?;
        Ok(self.wait_for_node(&self.client().await?).await?)
    }

    /// Stops a program and starts it again.
    pub async fn restart(&self, name: &str) -> Result<(), Error> {
        for part in self.parts() {
            if part.component.name == name {
                part.component.stop()?;
                self.start(&part).await?;
            }
        }
        Ok(())
    }

    /// A client with every right.
    pub async fn client(&self) -> Result<Client, Error> {
        self.client_of(config::API).await
    }

    async fn client_of(&self, port: Port) -> Result<Client, Error> {
        let path = self.layout.kubeconfig("admin");
        let unreadable = |source| Error::Kubeconfig {
            path: path.clone(),
            source,
        };
        let file = Kubeconfig::read_from(&path).map_err(unreadable)?;
        let options = KubeConfigOptions::default();
        let mut config = Config::from_custom_kubeconfig(file, &options)
            .await
            .map_err(unreadable)?;
        let url = port.url();
        if let Ok(parsed) = url.parse() {
            config.cluster_url = parsed;
        }
        Client::try_from(config).map_err(|source| Error::Client { url, source })
    }

    async fn start(&self, part: &Part) -> Result<(), Error> {
        part.component.start()?;
        let client = self.client_of(part.port).await?;
        self.wait(&part.component, || async {
            let request = http::Request::get(part.path).body(Vec::new());
            let request = request.map_err(|error| error.to_string())?;
            match client.request_text(request).await {
                Ok(_) => Ok(()),
                Err(error) => Err(error.to_string()),
            }
        })
        .await
    }

    /// Asks until there is an answer, as long as a program that is needed for it runs.
    async fn wait<F>(&self, component: &Component, probe: impl Fn() -> F) -> Result<(), Error>
    where
        F: Future<Output = Result<(), String>>,
    {
        let start = Instant::now();
        loop {
            let why = match tokio::time::timeout(ANSWER, probe()).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(why)) => why,
                Err(_) => format!("no answer in {} s", ANSWER.as_secs()),
            };
            component.check()?;
            if start.elapsed() > READY {
                return Err(component.not_ready(READY, why).into());
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn wait_for_node(&self, client: &Client) -> Result<(), Error> {
        let nodes: Api<Node> = Api::all(client.clone());
        let component = self.part("kubelet");
        self.wait(&component, || async {
            let node = nodes.get(config::NODE).await;
            unready(&node.map_err(|error| error.to_string())?).map_or(Ok(()), Err)
        })
        .await
    }

    /// No pod can be made in a namespace without it, and the controller manager makes it.
    async fn wait_for_default_account(&self, client: &Client) -> Result<(), Error> {
        let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), "default");
        let component = self.part("kube-controller-manager");
        self.wait(&component, || async {
            let account = accounts.get("default").await;
            account.map(drop).map_err(|error| error.to_string())
        })
        .await
    }

    fn part(&self, name: &'static str) -> Component {
        Component::new(
            name,
            Vec::new(),
            Path::new(CGROUPS),
            Path::new(config::LOGS),
        )
    }

    async fn make_runtime_classes(&self, client: &Client) -> Result<(), Error> {
        for name in RUNTIME_CLASSES {
            for object in manifest::parse(&runtime_class(name)?)? {
                manifest::apply(client, None, &object)
                    .await
                    .map_err(|source| Error::Api {
                        action: "make the runtime classes",
                        source,
                    })?;
            }
        }
        Ok(())
    }

    fn write_files(&self) -> Result<(), Error> {
        for folder in [self.layout.root().to_owned(), self.layout.static_pods()] {
            fs::create_dir_all(&folder).map_err(|source| Error::File {
                action: "make",
                path: folder,
                source,
            })?;
        }
        let write = |name: &str, text: &str| pki::write_private(&self.layout.file(name), text);
        write(
            "kubelet.json",
            &config::kubelet_configuration(&self.layout, &self.features).to_string(),
        )?;
        // Made whole once: what was signed by another authority would be of no use.
        let complete = self.layout.file("certificates-are-complete");
        if complete.exists() {
            return Ok(());
        }
        let authority = Authority::new("kiln-k8s")?;
        write("ca.crt", authority.certificate())?;
        let api = authority.server("kiln-k8s", &config::API_NAMES, &config::api_addresses())?;
        write("api.crt", &api.certificate)?;
        write("api.key", &api.key)?;
        let (private, public) = pki::token_key()?;
        write("tokens.key", &private)?;
        write("tokens.pub", &public)?;
        for (name, user, groups) in config::USERS {
            let pair = authority.client(user, groups)?;
            write(&format!("{name}.crt"), &pair.certificate)?;
            write(&format!("{name}.key"), &pair.key)?;
            write(
                &format!("{name}.conf"),
                &config::kubeconfig(name).to_string(),
            )?;
        }
        write("certificates-are-complete", "")?;
        Ok(())
    }
}

/// Why a node can't take pods; nothing if it can.
fn unready(node: &Node) -> Option<String> {
    let conditions = node
        .status
        .as_ref()
        .and_then(|status| status.conditions.as_ref());
    let ready = conditions
        .into_iter()
        .flatten()
        .find(|condition| condition.type_ == "Ready");
    match ready {
        None => return Some("it has not said yet whether it is ready".to_owned()),
        Some(ready) if ready.status != "True" => {
            return Some(ready.message.clone().unwrap_or_default());
        }
        Some(_) => {}
    }
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_ref());
    let taint = taints.into_iter().flatten().next()?;
    Some(format!("it has the taint {}", taint.key))
}

/// A runtime class. Those of kiln's handlers have the overhead that the chart counts.
fn runtime_class(name: &str) -> Result<String, Error> {
    let mut class = serde_json::json!({
        "apiVersion": "node.k8s.io/v1",
        "kind": "RuntimeClass",
        "metadata": {"name": name},
        "handler": name,
    });
    if name.starts_with("kiln") {
        class["overhead"] = serde_json::json!({"podFixed": overhead()?});
    }
    Ok(class.to_string())
}

/// What a kiln pod takes besides its containers, as the chart has it.
pub fn overhead() -> Result<Value, Error> {
    let values: Value = manifest::value(include_str!("../../../charts/kiln/values.yaml"))?;
    Ok(values["runtimeClass"]["overhead"].clone())
}

fn make_cgroup(path: &Path) -> Result<(), Error> {
    let made = fs::create_dir_all(path).and_then(|()| {
        let controllers = fs::read_to_string(path.join("cgroup.controllers"))?;
        let all: Vec<String> = controllers
            .split_whitespace()
            .map(|name| format!("+{name}"))
            .collect();
        fs::write(path.join("cgroup.subtree_control"), all.join(" "))
    });
    made.map_err(|source| Error::File {
        action: "make cgroup",
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(value: Value) -> Node {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_node_is_ready_if_it_says_so_and_nothing_keeps_pods_away() {
        let said = |status: &str| serde_json::json!([{"type": "Ready", "status": status, "message": "why"}]);
        let silent = node(serde_json::json!({}));
        assert!(unready(&silent).is_some());
        let not = node(serde_json::json!({"status": {"conditions": said("False")}}));
        assert_eq!(unready(&not).as_deref(), Some("why"));
        let tainted = node(serde_json::json!({
            "spec": {"taints": [{"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}]},
            "status": {"conditions": said("True")},
        }));
        assert!(unready(&tainted).unwrap().contains("not-ready"));
        let ready = node(serde_json::json!({"status": {"conditions": said("True")}}));
        assert_eq!(unready(&ready), None);
    }

    #[test]
    fn kilns_runtime_class_has_the_charts_overhead() {
        let class: Value = serde_json::from_str(&runtime_class("kiln").unwrap()).unwrap();
        let fixed = &class["overhead"]["podFixed"];
        assert!(
            fixed["memory"].is_string() && fixed["cpu"].is_string(),
            "{fixed}"
        );
        let class: Value = serde_json::from_str(&runtime_class("runc").unwrap()).unwrap();
        assert!(class["overhead"].is_null());
    }

    #[test]
    fn files_are_made_once_and_each_user_has_a_readable_kubeconfig() {
        let folder = tempfile::tempdir().unwrap();
        let cluster = Cluster::new(Layout::at(folder.path()));
        cluster.write_files().unwrap();
        let authority = fs::read_to_string(cluster.layout().file("ca.crt")).unwrap();
        for (user, ..) in config::USERS {
            let read = Kubeconfig::read_from(cluster.layout().kubeconfig(user)).unwrap();
            assert_eq!(read.current_context.as_deref(), Some("kiln"));
        }
        cluster.write_files().unwrap();
        let again = fs::read_to_string(cluster.layout().file("ca.crt")).unwrap();
        assert_eq!(authority, again);
    }
}
