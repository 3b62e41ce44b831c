//! Networks of every shape that CNI plug-ins make: the container has what they set up, and what it sends arrives.
//!
//! What is right is read from the namespace before the container is there, so for a runtime that puts its containers into that
//! namespace each test is about itself.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kiln_e2e::cni::{Namespace, OnNode, fixed, ip};
use kiln_e2e::harness::Case;
use kiln_e2e::plain::{Plain, PlainSpec};
use kiln_e2e::{Test, cases};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::sync::Mutex;

use super::network::{fetch, get};
use super::same;

pub(crate) fn cases() -> Vec<Case> {
    cases![
        bridge_with_both_families_bandwidth_and_a_port_of_the_node,
        ptp_with_a_small_mtu,
        macvlan_and_ipvlan,
        device_of_the_node_and_vlan,
        address_alone_with_a_gateway_on_the_link,
        ipv6_alone_with_large_frames,
        five_interfaces_with_rules_and_tables,
        interface_without_frames_is_refused_by_name,
    ]
}

/// Names and addresses on the node are the same for every runtime.
static TURN: Mutex<()> = Mutex::const_new(());
const STEP: Duration = Duration::from_secs(60);
const PORT: u16 = 8080;

/// A container in a namespace, which answers at [`PORT`].
struct Guest<'a> {
    namespace: &'a Namespace,
    task: Plain,
    execs: u32,
    right: Vec<BTreeSet<String>>,
}

/// All that is compared, by the same program on both sides.
const LOOK: [&str; 5] = [
    "ip address",
    "ip route",
    "ip -6 route",
    "ip rule",
    "ip -6 rule",
];

impl<'a> Guest<'a> {
    async fn start(test: &Test, namespace: &'a Namespace) -> Result<Guest<'a>> {
        let right = LOOK
            .iter()
            .map(|look| Ok(plain(&namespace.read("busybox", look)?)))
            .collect::<Result<_>>()?;
        let spec = PlainSpec::testprog(&["http", &PORT.to_string()]).netns(&namespace.path());
        let task = Plain::run(test, &spec).await?;
        task.streams.wait_for("listening").await?;
        Ok(Guest {
            namespace,
            task,
            execs: 0,
            right,
        })
    }

    async fn shell(&mut self, script: &str) -> Result<(u32, String)> {
        self.execs += 1;
        let name = format!("look{}", self.execs);
        let streams = self.task.exec(&name, &PlainSpec::shell(script)).await?;
        let code = self.task.wait(&name).await?;
        let said = streams.all_output().await?;
        self.task.delete_exec(&name).await?;
        Ok((code, said))
    }

    /// Compares everything with what the namespace had, and ends the container.
    async fn must_be_as_set_up(mut self, addresses: &[impl AsRef<str>]) -> Result<()> {
        for (look, right) in LOOK.iter().zip(std::mem::take(&mut self.right)) {
            let (_, said) = self.shell(&format!("busybox {look}")).await?;
            same!(plain(&said), right, "{look}");
        }
        for address in addresses {
            self.answers_at(address.as_ref()).await?;
        }
        self.end().await
    }

    /// From the node, large answer and small.
    async fn answers_at(&self, address: &str) -> Result<()> {
        let body = fetch(&format!("{address}:{PORT}"), &get("/bytes/200000")).await;
        let table = || self.namespace.read("ip", "-s link").unwrap_or_default();
        let body = body.with_context(table)?;
        same!(body.len(), 200_000, "{address}");
        Ok(())
    }

    async fn end(self) -> Result<()> {
        self.task.kill("", libc::SIGKILL, true).await?;
        self.task.wait("").await?;
        self.task.delete().await?;
        Ok(())
    }
}

/// Lines without what a kernel numbers or times, and without what each kernel adds by itself.
fn plain(text: &str) -> BTreeSet<String> {
    let mut lines = BTreeSet::new();
    let mut interface = String::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [first, rest @ ..] = words.as_slice() else {
            continue;
        };
        let number = first.strip_suffix(':').and_then(|n| n.parse::<u32>().ok());
        if let (Some(number), [name, ..]) = (number, rest) {
            if *name == "from" || name.starts_with("from") {
                lines.insert(format!("rule {number} {}", rest.join(" ")));
                continue;
            }
            let name = name.trim_end_matches(':');
            name.split('@')
                .next()
                .unwrap_or_default()
                .clone_into(&mut interface);
            let mtu = rest.iter().skip_while(|word| **word != "mtu").nth(1);
            let arp = if line.contains("NOARP") {
                " no ARP"
            } else {
                ""
            };
            if !is_not_cnis(&interface) {
                lines.insert(format!("{interface} mtu {}{arp}", mtu.unwrap_or(&"")));
            }
            continue;
        }
        if is_not_cnis(&interface) || line.contains("fe80:") || line.contains("ff00::") {
            continue;
        }
        match *first {
            "valid_lft" | "link/loopback" => {}
            "link/ether" | "inet6" => {
                lines.insert(format!(
                    "{interface} {first} {}",
                    rest.first().unwrap_or(&"")
                ));
            }
            _ => {
                // Who made a route, and what the kernel thinks of it, is not the plug-in's.
                let mut line = Vec::new();
                let mut words = words.iter().copied();
                while let Some(word) = words.next() {
                    match word {
                        "proto" => drop(words.next()),
                        "linkdown" | "pref" | "medium" | "noprefixroute" => {}
                        word => line.push(word),
                    }
                }
                lines.insert(format!("{interface} {}", line.join(" ")));
            }
        }
    }
    lines
}

/// The loopback interface and what kernels make in each namespace.
fn is_not_cnis(interface: &str) -> bool {
    [
        "lo", "tunl0", "sit0", "gre0", "gretap0", "erspan0", "ip6tnl0", "ip_vti0", "ip6_vti0",
        "ip6gre0",
    ]
    .contains(&interface)
}

fn bridge(name: &str, addresses: &[(&str, &str)]) -> Value {
    json!({"type": "bridge", "bridge": name, "isGateway": true, "ipam": fixed(addresses)})
}

async fn bridge_with_both_families_bandwidth_and_a_port_of_the_node(test: Test) -> Result<()> {
    let _turn = TURN.lock().await;
    let _bridge = OnNode::make("shape0", "type bridge")?;
    let mut namespace = Namespace::make(&test, "bridge")?;
    namespace.attach(
        "eth0",
        &[
            bridge(
                "shape0",
                &[("10.92.0.2/24", "10.92.0.1"), ("fd92::2/64", "fd92::1")],
            ),
            json!({"type": "bandwidth", "ingressRate": 80_000_000, "ingressBurst": 8_000_000,
                   "egressRate": 80_000_000, "egressBurst": 8_000_000}),
            json!({"type": "portmap", "capabilities": {"portMappings": true}, "runtimeConfig": {
                   "portMappings": [{"hostPort": 18092, "containerPort": PORT, "protocol": "tcp"}]}}),
        ],
    )?;
    let guest = Guest::start(&test, &namespace).await?;
    // By the node's own address and port.
    let connected = tokio::time::timeout(STEP, TcpStream::connect("10.92.0.1:18092"));
    connected
        .await
        .context("no answer")?
        .context("the port of the node")?;
    guest.must_be_as_set_up(&["10.92.0.2", "[fd92::2]"]).await
}

async fn ptp_with_a_small_mtu(test: Test) -> Result<()> {
    let _turn = TURN.lock().await;
    let mut namespace = Namespace::make(&test, "ptp")?;
    let ipam = fixed(&[("10.92.1.2/24", "10.92.1.1")]);
    namespace.attach("eth0", &[json!({"type": "ptp", "mtu": 1280, "ipam": ipam})])?;
    let guest = Guest::start(&test, &namespace).await?;
    guest.must_be_as_set_up(&["10.92.1.2"]).await
}

/// Two interfaces of the node at the ends of one cable, the second with an address.
fn cable(name: &str, address: &str) -> Result<(OnNode, OnNode)> {
    let (near, far) = (format!("{name}near"), format!("{name}far"));
    let near = OnNode::make(&near, &format!("type veth peer name {far}"))?;
    ip(&format!("link set {far} up"))?;
    Ok((near, OnNode(far).address(address)?))
}

async fn macvlan_and_ipvlan(test: Test) -> Result<()> {
    let _turn = TURN.lock().await;
    for (shape, mode, net) in [
        ("macvlan", "bridge", 2),
        ("ipvlan", "l2", 3),
        ("ipvlan", "l3", 4),
    ] {
        let far = format!("10.92.{net}.1");
        let ends = cable(&format!("{shape}{net}"), &format!("{far}/24"))?;
        let mut namespace = Namespace::make(&test, shape)?;
        let address = format!("10.92.{net}.2/24");
        // In mode l3 routes have no gateway, and what leaves the node by itself is routed by the node, which is the other end here.
        let (gateway, answers) = match mode {
            "l3" => ("", vec![]),
            _ => (far.as_str(), vec![format!("10.92.{net}.2")]),
        };
        let ipam = fixed(&[(&address, gateway)]);
        let plugin = json!({"type": shape, "master": ends.0.0, "mode": mode, "ipam": ipam});
        namespace.attach("eth0", &[plugin])?;
        let guest = Guest::start(&test, &namespace).await;
        let guest = guest.with_context(|| format!("{shape} in mode {mode}"))?;
        let checked = guest.must_be_as_set_up(&answers).await;
        checked.with_context(|| format!("{shape} in mode {mode}"))?;
    }
    Ok(())
}

async fn device_of_the_node_and_vlan(test: Test) -> Result<()> {
    let _turn = TURN.lock().await;
    let ends = cable("device", "10.92.5.1/24")?;
    let tagged = OnNode::make("devicefar.7", &format!("link {} type vlan id 7", ends.1.0))?
        .address("10.92.6.1/24")?;
    let mut namespace = Namespace::make(&test, "device")?;
    let vlan = json!({"type": "vlan", "master": ends.0.0, "vlanId": 7,
                      "ipam": fixed(&[("10.92.6.2/24", "10.92.6.1")])});
    namespace.attach("eth0", &[vlan])?;
    let guest = Guest::start(&test, &namespace).await?;
    guest.must_be_as_set_up(&["10.92.6.2"]).await?;
    drop((namespace, tagged));

    let mut namespace = Namespace::make(&test, "device")?;
    let device = json!({"type": "host-device", "device": ends.0.0,
                        "ipam": fixed(&[("10.92.5.2/24", "10.92.5.1")])});
    namespace.attach("eth0", &[device])?;
    let guest = Guest::start(&test, &namespace).await?;
    guest.must_be_as_set_up(&["10.92.5.2"]).await
}

/// As Calico does it: the address is a network of its own, and a gateway that nobody has answers by the node's proxy.
async fn address_alone_with_a_gateway_on_the_link(test: Test) -> Result<()> {
    let _turn = TURN.lock().await;
    let namespace = Namespace::make(&test, "alone")?;
    let node = OnNode("shape7".to_owned());
    namespace.cable(&node.0, "eth0", 1450)?;
    std::fs::write("/proc/sys/net/ipv4/conf/shape7/proxy_arp", "1")?;
    // Otherwise the kernel lets some of a second pass before it answers for another.
    std::fs::write("/proc/sys/net/ipv4/neigh/shape7/proxy_delay", "0")?;
    let _node = node.address("10.92.77.1/32")?;
    // The node answers for what it knows a way to, by another interface.
    let _up = OnNode::make("shape7up", "type bridge")?;
    ip("route add 169.254.1.1/32 dev shape7up")?;
    ip("route add 10.92.7.2/32 dev shape7")?;
    for command in [
        "addr add 10.92.7.2/32 dev eth0",
        "route add 169.254.1.1 dev eth0 scope link",
        "route add default via 169.254.1.1 dev eth0",
    ] {
        namespace.ip(command)?;
    }
    let guest = Guest::start(&test, &namespace).await?;
    guest.must_be_as_set_up(&["10.92.7.2"]).await
}

async fn ipv6_alone_with_large_frames(test: Test) -> Result<()> {
    let _turn = TURN.lock().await;
    let namespace = Namespace::make(&test, "ipv6")?;
    let node = OnNode("shape8".to_owned());
    namespace.cable(&node.0, "eth0", 9000)?;
    let _node = node.address("fd92:8::1/64")?;
    namespace.ip("addr add fd92:8::2/64 dev eth0 nodad")?;
    namespace.ip("route add default via fd92:8::1 dev eth0")?;
    let guest = Guest::start(&test, &namespace).await?;
    guest.must_be_as_set_up(&["[fd92:8::2]"]).await
}

/// As multus and the plug-in for routes by source leave it.
async fn five_interfaces_with_rules_and_tables(test: Test) -> Result<()> {
    let _turn = TURN.lock().await;
    let mut namespace = Namespace::make(&test, "five")?;
    let mut bridges = Vec::new();
    for n in 0..5 {
        let name = format!("five{n}");
        bridges.push(OnNode::make(&name, "type bridge")?);
        let (own, gateway) = (format!("10.92.2{n}.2/24"), format!("10.92.2{n}.1"));
        let mut plugins = vec![bridge(&name, &[(&own, &gateway)])];
        if n > 0 {
            plugins.push(json!({"type": "sbr"}));
        }
        let interface = if n == 0 {
            "eth0".to_owned()
        } else {
            format!("net{n}")
        };
        namespace.attach(&interface, &plugins)?;
    }
    let guest = Guest::start(&test, &namespace).await?;
    let addresses: Vec<String> = (0..5).map(|n| format!("10.92.2{n}.2")).collect();
    guest.must_be_as_set_up(&addresses).await
}

async fn interface_without_frames_is_refused_by_name(test: Test) -> Result<()> {
    let _turn = TURN.lock().await;
    let namespace = Namespace::make(&test, "tunnel")?;
    namespace.ip("tuntap add tun7 mode tun")?;
    namespace.ip("addr add 10.92.9.2/24 dev tun7")?;
    match Guest::start(&test, &namespace).await {
        Ok(guest) => guest.must_be_as_set_up(&[""; 0]).await,
        Err(refused) => {
            let said = format!("{refused:#}");
            for word in ["kiln: the interface tun7", "is refused", "macvlan"] {
                ensure!(said.contains(word), "{word:?} is not in {said:?}");
            }
            Ok(())
        }
    }
}
