//! What the cluster's programs are told: where files lie, their arguments, kubelet's configuration,
//! and kubeconfigs. Texts only; nothing here touches the node.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

/// The node's name, and the only one in the cluster.
pub const NODE: &str = "node";
/// The node's address, on the bridge that the node's set-up makes.
pub const NODE_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// Where services get their addresses.
pub const SERVICE_RANGE: &str = "10.96.0.0/16";
/// The API server's own among them: the first.
pub const API_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
/// Where kubelet and the API server find containerd.
pub const CONTAINERD: &str = "unix:///run/containerd/containerd.sock";

/// Names that the API server is called by.
pub const API_NAMES: [&str; 5] = [
    "localhost",
    NODE,
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
];

/// Addresses that the API server is called by.
pub fn api_addresses() -> [IpAddr; 3] {
    [Ipv4Addr::LOCALHOST, NODE_ADDRESS, API_SERVICE].map(IpAddr::V4)
}

/// Where a program listens on this node, and whether with TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Port {
    /// `http` or `https`.
    pub scheme: &'static str,
    /// The port, on 127.0.0.1.
    pub number: u16,
}

impl Port {
    /// As a URL.
    pub fn url(self) -> String {
        format!("{}://127.0.0.1:{}", self.scheme, self.number)
    }
}

/// etcd's, for clients.
pub const ETCD: Port = Port {
    scheme: "http",
    number: 2379,
};
/// The API server's.
pub const API: Port = Port {
    scheme: "https",
    number: 6443,
};
/// The controller manager's.
pub const CONTROLLERS: Port = Port {
    scheme: "https",
    number: 10257,
};
/// The scheduler's.
pub const SCHEDULER: Port = Port {
    scheme: "https",
    number: 10259,
};
/// Where kubelet says whether it is well.
pub const KUBELET_HEALTH: Port = Port {
    scheme: "http",
    number: 10248,
};

/// Users of the API that have a kubeconfig, with their groups.
pub const USERS: [(&str, &str, &[&str]); 4] = [
    ("admin", "admin", &["system:masters"]),
    ("kubelet", "system:node:node", &["system:nodes"]),
    ("controllers", "system:kube-controller-manager", &[]),
    ("scheduler", "system:kube-scheduler", &[]),
];

/// Where the cluster keeps its files.
#[derive(Debug, Clone)]
pub struct Layout {
    root: PathBuf,
}

impl Default for Layout {
    fn default() -> Self {
        Layout::at("/var/lib/kiln-k8s")
    }
}

impl Layout {
    /// Everything below `root`.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Layout { root: root.into() }
    }

    /// The folder of them all.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A file directly in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// A user's kubeconfig.
    pub fn kubeconfig(&self, user: &str) -> PathBuf {
        self.root.join(format!("{user}.conf"))
    }

    /// From where kubelet takes static pods.
    pub fn static_pods(&self) -> PathBuf {
        self.root.join("static-pods")
    }

    fn text(&self, name: &str) -> String {
        self.file(name).display().to_string()
    }
}

/// Logs of the cluster's programs are here, one file each.
pub const LOGS: &str = "/var/log/k8s";

/// etcd's arguments. What a node that is thrown away has written need not outlive a crash.
pub fn etcd(layout: &Layout) -> Vec<String> {
    vec![
        flag("data-dir", layout.text("etcd")),
        flag("listen-client-urls", ETCD.url()),
        flag("advertise-client-urls", ETCD.url()),
        flag("listen-peer-urls", "http://127.0.0.1:2380"),
        flag("log-level", "warn"),
        "--unsafe-no-fsync".to_owned(),
    ]
}

/// The API server's arguments.
pub fn api_server(layout: &Layout) -> Vec<String> {
    vec![
        flag("etcd-servers", ETCD.url()),
        flag("secure-port", API.number),
        flag("advertise-address", NODE_ADDRESS),
        flag("service-cluster-ip-range", SERVICE_RANGE),
        flag("authorization-mode", "Node,RBAC"),
        flag("allow-privileged", true),
        flag("profiling", false),
        flag("cert-dir", layout.text("tmp")),
        flag("tls-cert-file", layout.text("api.crt")),
        flag("tls-private-key-file", layout.text("api.key")),
        flag("client-ca-file", layout.text("ca.crt")),
        flag("kubelet-client-certificate", layout.text("admin.crt")),
        flag("kubelet-client-key", layout.text("admin.key")),
        flag("kubelet-certificate-authority", layout.text("ca.crt")),
        flag("kubelet-preferred-address-types", "InternalIP"),
        flag("service-account-issuer", "https://kubernetes.default.svc"),
        flag("service-account-key-file", layout.text("tokens.pub")),
        flag(
            "service-account-signing-key-file",
            layout.text("tokens.key"),
        ),
    ]
}

/// The controller manager's arguments.
pub fn controllers(layout: &Layout) -> Vec<String> {
    let mut arguments = secured(layout, "controllers");
    arguments.extend([
        "--use-service-account-credentials".to_owned(),
        flag("root-ca-file", layout.text("ca.crt")),
        flag(
            "service-account-private-key-file",
            layout.text("tokens.key"),
        ),
    ]);
    arguments
}

/// The scheduler's arguments.
pub fn scheduler(layout: &Layout) -> Vec<String> {
    secured(layout, "scheduler")
}

/// What both have in common. One of each is all there is: nobody to elect a leader among.
fn secured(layout: &Layout, user: &str) -> Vec<String> {
    vec![
        flag("kubeconfig", layout.kubeconfig(user).display()),
        flag("bind-address", Ipv4Addr::LOCALHOST),
        flag("leader-elect", false),
        flag("tls-cert-file", layout.text("api.crt")),
        flag("tls-private-key-file", layout.text("api.key")),
    ]
}

/// kubelet's arguments.
pub fn kubelet(layout: &Layout) -> Vec<String> {
    vec![
        flag("config", layout.text("kubelet.json")),
        flag("kubeconfig", layout.kubeconfig("kubelet").display()),
        flag("hostname-override", NODE),
        flag("node-ip", NODE_ADDRESS),
        flag("v", 2),
    ]
}

/// kubelet's configuration, with features that are off by default.
pub fn kubelet_configuration(layout: &Layout, features: &[&str]) -> Value {
    let gates: Map<String, Value> = features
        .iter()
        .map(|name| ((*name).to_owned(), true.into()))
        .collect();
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": layout.text("ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs",
        "clusterDNS": ["10.96.0.10"],
        "clusterDomain": "cluster.local",
        "containerRuntimeEndpoint": CONTAINERD,
        // A test that fills a disk is about its pod's limit, not about the node's.
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "2%", "imagefs.available": "2%"},
        // Images were put there by hand, and nobody could pull them again.
        "imageGCHighThresholdPercent": 100,
        "failSwapOn": false,
        "featureGates": gates,
        "resolvConf": "/etc/resolv.conf",
        "serializeImagePulls": false,
        "allowedUnsafeSysctls": ["net.core.somaxconn", "kernel.msgmax"],
        "staticPodPath": layout.static_pods(),
        // Changes of config maps are to be seen soon, and a container that ended is started again soon.
        "syncFrequency": "10s",
        "tlsCertFile": layout.text("api.crt"),
        "tlsPrivateKeyFile": layout.text("api.key"),
    })
}

/// A kubeconfig: the authority's certificate and the user's pair, all as PEM in files beside it.
pub fn kubeconfig(user: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "kiln",
        "clusters": [{"name": "kiln", "cluster": {
            "server": API.url(),
            "certificate-authority": "ca.crt",
        }}],
        "users": [{"name": user, "user": {
            "client-certificate": format!("{user}.crt"),
            "client-key": format!("{user}.key"),
        }}],
        "contexts": [{"name": "kiln", "context": {"cluster": "kiln", "user": user}}],
    })
}

fn flag(name: &str, value: impl std::fmt::Display) -> String {
    format!("--{name}={value}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_that_a_program_is_told_of_is_below_the_layouts_root() {
        let layout = Layout::at("/r");
        for arguments in [
            etcd(&layout),
            api_server(&layout),
            controllers(&layout),
            scheduler(&layout),
            kubelet(&layout),
        ] {
            for argument in &arguments {
                let (_, value) = argument.split_once('=').unwrap_or((argument, ""));
                assert!(
                    !value.starts_with('/') || value.starts_with("/r/"),
                    "{argument}"
                );
            }
            assert!(arguments.iter().any(|argument| argument.contains("/r/")));
        }
    }

    #[test]
    fn each_program_with_a_kubeconfig_is_a_user_that_has_one() {
        let layout = Layout::at("/r");
        for arguments in [controllers(&layout), scheduler(&layout), kubelet(&layout)] {
            let path = arguments
                .iter()
                .find_map(|argument| argument.strip_prefix("--kubeconfig="))
                .unwrap();
            let known = USERS
                .iter()
                .any(|(user, ..)| layout.kubeconfig(user) == Path::new(path));
            assert!(known, "{path}");
        }
    }

    #[test]
    fn a_kubeconfig_names_one_cluster_and_one_user() {
        let config = kubeconfig("admin");
        let context = &config["contexts"][0];
        assert_eq!(config["current-context"], context["name"]);
        assert_eq!(context["context"]["cluster"], config["clusters"][0]["name"]);
        assert_eq!(context["context"]["user"], config["users"][0]["name"]);
        assert_eq!(
            config["clusters"][0]["cluster"]["server"],
            "https://127.0.0.1:6443"
        );
    }
}
