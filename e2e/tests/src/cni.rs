//! Network namespaces of a test's own, and interfaces in them as CNI plug-ins make them.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::Test;

const PLUGINS: &str = "/usr/lib/cni";
const VERSION: &str = "1.0.0";

/// Runs `ip` on the node.
pub fn ip(arguments: &str) -> Result<()> {
    run("ip", arguments).map(drop)
}

fn run(program: &str, arguments: &str) -> Result<String> {
    let output = Command::new(program)
        .args(arguments.split_whitespace())
        .output()
        .with_context(|| format!("the node has no {program}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {arguments}: {errors}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A network namespace. It is removed with this, after what plug-ins made for it.
pub struct Namespace {
    name: String,
    made: Vec<Made>,
}

/// What a chain of plug-ins has to take away again.
struct Made {
    interface: String,
    plugins: Vec<Value>,
}

impl Namespace {
    /// One that has only its loopback interface.
    pub fn make(test: &Test, name: &str) -> Result<Self> {
        let name = test.unique(name);
        ip(&format!("netns add {name}"))?;
        let namespace = Namespace {
            name,
            made: Vec::new(),
        };
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// Where containers find it.
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// Runs `ip` in it.
    pub fn ip(&self, arguments: &str) -> Result<()> {
        ip(&format!("-n {} {arguments}", self.name))
    }

    /// What a program says that runs in it.
    pub fn read(&self, program: &str, arguments: &str) -> Result<String> {
        let name = &self.name;
        run("ip", &format!("netns exec {name} {program} {arguments}"))
    }

    /// A cable from the node's interface `node` to an interface of the namespace.
    pub fn cable(&self, node: &str, interface: &str, mtu: u32) -> Result<()> {
        let name = &self.name;
        let peer = format!("type veth peer name {interface} mtu {mtu} netns {name}");
        ip(&format!("link add {node} mtu {mtu} {peer}"))?;
        ip(&format!("link set {node} up"))?;
        self.ip(&format!("link set {interface} up"))
    }

    /// Has a chain of plug-ins make an interface, as an engine would. Each is told what the one before it made.
    pub fn attach(&mut self, interface: &str, plugins: &[Value]) -> Result<Value> {
        self.made.push(Made {
            interface: interface.to_owned(),
            plugins: plugins.to_vec(),
        });
        let mut result = Value::Null;
        for plugin in plugins {
            let said = self.plugin("ADD", interface, plugin, &result)?;
            result =
                serde_json::from_str(&said).with_context(|| format!("{plugin} said {said}"))?;
        }
        Ok(result)
    }

    fn plugin(
        &self,
        command: &str,
        interface: &str,
        plugin: &Value,
        before: &Value,
    ) -> Result<String> {
        let mut configuration = plugin.clone();
        configuration["cniVersion"] = VERSION.into();
        configuration["name"] = "kiln-e2e".into();
        if !before.is_null() {
            configuration["prevResult"] = before.clone();
        }
        let kind = plugin["type"].as_str().unwrap_or_default();
        let mut child = Command::new(Path::new(PLUGINS).join(kind))
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", &self.name)
            .env("CNI_NETNS", self.path())
            .env("CNI_IFNAME", interface)
            .env("CNI_PATH", PLUGINS)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("the node has no CNI plug-in {kind}"))?;
        let input = child.stdin.take().context("no standard input")?;
        (&input).write_all(configuration.to_string().as_bytes())?;
        drop(input);
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{kind} {command}: {said}{errors}");
        Ok(said)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // What is left shows when the node's cleanliness is looked at, which is after every test.
        for made in self.made.iter().rev() {
            for plugin in made.plugins.iter().rev() {
                drop(self.plugin("DEL", &made.interface, plugin, &Value::Null));
            }
        }
        drop(ip(&format!("netns del {}", self.name)));
    }
}

/// An interface of the node's, removed with this.
pub struct OnNode(pub String);

impl OnNode {
    /// Made by `ip link add NAME …`, and up.
    pub fn make(name: &str, how: &str) -> Result<Self> {
        ip(&format!("link add {name} {how}"))?;
        let made = OnNode(name.to_owned());
        ip(&format!("link set {name} up"))?;
        Ok(made)
    }

    /// With an address.
    pub fn address(self, address: &str) -> Result<Self> {
        let nodad = if address.contains(':') { " nodad" } else { "" };
        ip(&format!("addr add {address} dev {}{nodad}", self.0))?;
        Ok(self)
    }
}

impl Drop for OnNode {
    fn drop(&mut self) {
        // It may have gone with the namespace that its other end was in.
        drop(
            Command::new("ip")
                .args(["link", "del", &self.0])
                .stderr(Stdio::null())
                .status(),
        );
    }
}

/// Fixed addresses, each with its gateway, and default routes through these.
pub fn fixed(addresses: &[(&str, &str)]) -> Value {
    let routes = addresses.iter().filter(|(_, gateway)| !gateway.is_empty());
    let routes = routes.map(|(_, gateway)| {
        let v6 = gateway.contains(':');
        json!({"dst": if v6 { "::/0" } else { "0.0.0.0/0" }, "gw": gateway})
    });
    let addresses = addresses.iter().map(|(address, gateway)| {
        if gateway.is_empty() {
            json!({"address": address})
        } else {
            json!({"address": address, "gateway": gateway})
        }
    });
    json!({
        "type": "static",
        "addresses": addresses.collect::<Vec<_>>(),
        "routes": routes.collect::<Vec<_>>(),
    })
}
