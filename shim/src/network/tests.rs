//! Against real namespaces; they need root and `ip` (iproute2), and say so when they can't run.

use super::*;
use std::process::Command;

/// A network namespace with a veth pair whose inner end is set up the way the bridge plug-in does.
struct Bed {
    name: String,
    file: File,
}

fn ip(arguments: &str) -> bool {
    Command::new("ip")
        .args(arguments.split_whitespace())
        .status()
        .is_ok_and(|status| status.success())
}

impl Bed {
    fn new(name: &str) -> Option<Self> {
        let name = format!("kiln-test-{name}-{}", std::process::id());
        if !ip(&format!("netns add {name}")) {
            eprintln!("skipped: no network namespaces here (needs root and iproute2)");
            return None;
        }
        let file = File::open(format!("/run/netns/{name}")).unwrap();
        let bed = Self { name, file };
        for command in [
            "link set lo up",
            "link add eth0 address 0a:58:0a:58:00:05 mtu 1400 type veth peer name peer",
            "link set eth0 up",
            "link set peer up",
            "addr add 10.88.0.5/16 dev eth0",
            "addr add fd00:88::5/64 dev eth0 nodad",
            "route add default via 10.88.0.1 dev eth0",
            "route add 192.0.2.0/24 dev eth0 mtu 1300",
            "-6 route add default via fd00:88::1 dev eth0",
            "neigh add 10.88.0.9 lladdr 0a:00:00:00:00:09 dev eth0 nud permanent",
        ] {
            assert!(bed.ip(command), "ip {command}");
        }
        Some(bed)
    }

    fn ip(&self, command: &str) -> bool {
        ip(&format!("-n {} {command}", self.name))
    }

    fn tc(&self, command: &str) -> String {
        let output = Command::new("tc")
            .args(["-n", &self.name])
            .args(command.split_whitespace())
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        ip(&format!("netns del {}", self.name));
    }
}

#[test]
fn what_cni_set_up_is_what_the_guest_is_told() {
    let Some(bed) = Bed::new("inspect") else {
        return;
    };
    let network = inspect(&bed.file).unwrap();
    assert_eq!(network.interfaces.len(), 1, "{network:?}");
    let eth0 = &network.interfaces[0];
    assert_eq!((eth0.name.as_str(), eth0.mtu), ("eth0", 1400));
    assert_eq!(eth0.mac, [0x0a, 0x58, 0x0a, 0x58, 0, 5]);
    assert_eq!(eth0.addresses, ["10.88.0.5/16", "fd00:88::5/64"]);
    let routes: Vec<_> = network
        .routes
        .iter()
        .map(|r| {
            (
                r.destination.as_str(),
                r.gateway.as_str(),
                r.device.as_str(),
                r.mtu,
            )
        })
        .collect();
    assert_eq!(
        routes,
        [
            ("192.0.2.0/24", "", "eth0", 1300),
            ("0.0.0.0/0", "10.88.0.1", "eth0", 0),
            ("::/0", "fd00:88::1", "eth0", 0),
        ]
    );
    assert_eq!(network.neighbours.len(), 1);
    assert_eq!(network.neighbours[0].mac, "0a:00:00:00:00:09");
    let told = network.for_agent();
    assert_eq!(
        (told.interfaces[0].find_position, told.interfaces[0].mtu),
        (0, 1400)
    );
}

#[test]
fn policy_routing_and_peers_are_told_too() {
    let Some(bed) = Bed::new("policy") else {
        return;
    };
    for command in [
        "addr add 10.99.0.5 peer 10.99.0.1/32 dev eth0",
        "route add default via 10.88.0.7 dev eth0 table 100",
        "route add blackhole 198.51.100.0/24",
        // As the plug-in for routes by source does it.
        "route del 10.88.0.0/16 dev eth0",
        "route add 10.88.0.0/16 dev eth0 table 100 proto kernel",
        "rule add from 10.88.0.5 lookup 100 priority 500",
        "rule add fwmark 0x10/0xf0 lookup 100 priority 501",
        "-6 rule add to fd00:99::/64 unreachable priority 502",
        // Up, and nothing else; then one that is down, as fallback devices are, and a bridge's port.
        "tuntap add net1 mode tap",
        "link set net1 up",
        "tuntap add down9 mode tap",
        "link add bridge9 type bridge",
        "tuntap add port9 mode tap",
        "link set port9 up master bridge9",
    ] {
        assert!(bed.ip(command), "ip {command}");
    }
    let network = inspect(&bed.file).unwrap();
    let names: Vec<_> = network.interfaces.iter().map(|i| i.name.as_str()).collect();
    assert_eq!(names, ["eth0", "net1"]);
    let addresses = &network.interfaces[0].addresses;
    assert!(
        addresses.contains(&"10.99.0.5/32".to_owned()),
        "{addresses:?}"
    );
    assert_eq!(network.interfaces[0].without_route, ["10.88.0.5/16"]);
    let route = |destination: &str, table: u32| {
        let mut routes = network.routes.iter();
        let found = routes.find(|r| r.destination == destination && r.table == table);
        found.unwrap_or_else(|| panic!("no route to {destination}: {:?}", network.routes))
    };
    assert_eq!(route("10.99.0.1/32", 0).scope, routes::SCOPE_LINK);
    assert_eq!(route("0.0.0.0/0", 100).gateway, "10.88.0.7");
    assert_eq!(route("10.88.0.0/16", 100).device, "eth0");
    let hole = route("198.51.100.0/24", 0);
    assert_eq!((hole.kind, hole.device.as_str()), (6, ""));
    let rules: Vec<_> = network
        .rules
        .iter()
        .map(|r| {
            (
                r.priority,
                r.table,
                r.kind,
                r.source.as_str(),
                r.mark,
                r.mark_mask,
            )
        })
        .collect();
    assert_eq!(
        rules,
        [
            (500, 100, 0, "10.88.0.5/32", 0, 0),
            (501, 100, 0, "", 0x10, 0xf0),
            (502, 0, 7, "", 0, 0),
        ]
    );
    assert_eq!(network.rules[2].destination, "fd00:99::/64");
}

#[test]
fn what_a_guest_could_not_have_is_refused_by_name() {
    let cases = [
        (
            "upper",
            "the interface upper7 on the interface eth0",
            "link add link eth0 name upper7 type macvlan",
        ),
        (
            "hops",
            "the route to 192.0.2.0/25",
            "route add 192.0.2.0/25 nexthop via 10.88.0.1 nexthop via 10.88.0.2",
        ),
        (
            "rule",
            "the routing rule of priority 7",
            "rule add uidrange 1-2 lookup 100 priority 7",
        ),
        (
            "not",
            "the routing rule of priority 8",
            "rule add not from 10.0.0.0/8 lookup 100 priority 8",
        ),
    ];
    for (name, what, command) in cases {
        let Some(bed) = Bed::new(name) else { return };
        assert!(bed.ip(command), "ip {command}");
        let error = inspect(&bed.file).unwrap_err().to_string();
        assert!(error.contains(&format!("kiln: {what}")), "{error}");
    }
    let Some(bed) = Bed::new("tun") else { return };
    if !bed.ip("tuntap add tun7 mode tun") {
        eprintln!("skipped: no tunnels here");
        return;
    }
    inspect(&bed.file).unwrap();
    assert!(bed.ip("addr add 10.98.0.5/24 dev tun7"));
    let error = inspect(&bed.file).unwrap_err().to_string();
    assert!(error.contains("the interface tun7"), "{error}");
}

#[test]
fn taps_are_wired_both_ways_and_removed_without_a_trace() {
    let Some(bed) = Bed::new("wire") else { return };
    let network = inspect(&bed.file).unwrap();
    let _taps = match connect(&bed.file, &network) {
        Ok(taps) => taps,
        Err(NetworkError::Tap { source, .. }) => {
            eprintln!("skipped: no taps here ({source})");
            return;
        }
        Err(
            error @ NetworkError::Netlink {
                action: "redirect the traffic of",
                ..
            },
        ) => {
            eprintln!(
                "skipped: no traffic control here ({})",
                crate::error::chain(&error)
            );
            return;
        }
        Err(error) => panic!("{}", crate::error::chain(&error)),
    };
    assert!(
        bed.tc("filter show dev eth0 ingress")
            .contains("Redirect to device kiln0")
    );
    assert!(
        bed.tc("filter show dev kiln0 ingress")
            .contains("Redirect to device eth0")
    );
    remove(&bed.file, &["eth0".into()], &["kiln0".into()]).unwrap();
    assert!(!bed.ip("link show kiln0"));
    assert!(!bed.tc("qdisc show dev eth0").contains("ingress"));
    // Once more, with nothing left to remove.
    remove(&bed.file, &["eth0".into()], &["kiln0".into()]).unwrap();
}

#[test]
fn taps_go_with_their_descriptors() {
    let Some(bed) = Bed::new("fd") else { return };
    let Ok(network) = inspect(&bed.file) else {
        return;
    };
    let Ok(taps) = connect(&bed.file, &network) else {
        eprintln!("skipped: no taps or no traffic control here");
        return;
    };
    assert!(bed.ip("link show kiln0"));
    drop(taps);
    // Another test's program that is just being started has a copy of them until it runs.
    let gone = (0..100).any(|_| {
        let gone = !bed.ip("link show kiln0");
        if !gone {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        gone
    });
    assert!(gone);
}

#[test]
fn namespace_without_cni_is_a_pod_without_interfaces() {
    let name = format!("kiln-test-empty-{}", std::process::id());
    if !ip(&format!("netns add {name}")) {
        eprintln!("skipped: no network namespaces here");
        return;
    }
    let file = File::open(format!("/run/netns/{name}")).unwrap();
    let network = inspect(&file);
    ip(&format!("netns del {name}"));
    assert_eq!(network.unwrap(), PodNetwork::default());
}

#[test]
fn every_connection_in_the_namespace_is_caught_with_its_port() {
    let Some(bed) = Bed::new("catch") else { return };
    let (listener, link) = match catch(&bed.file) {
        Ok(caught) => caught,
        Err(NetworkError::Forward(error)) => {
            eprintln!("skipped: no sk_lookup programs here ({error})");
            return;
        }
        Err(error) => panic!("{}", crate::error::chain(&error)),
    };
    listener.set_nonblocking(false).unwrap();
    for (address, port) in [("127.0.0.1", 80), ("127.0.0.1", 65000), ("[::1]", 8080)] {
        let to = format!("{address}:{port}");
        namespace::enter(&bed.file, || {
            std::net::TcpStream::connect(&to).map_err(NetworkError::Forward)
        })
        .unwrap();
        let (caught, _) = listener.accept().unwrap();
        assert_eq!(caught.local_addr().unwrap().port(), port, "{to}");
    }
    drop((listener, link));
    // A process that another test is just starting has all our descriptors until it runs its program.
    for _ in 0..100 {
        let after = namespace::enter(&bed.file, || {
            std::net::TcpStream::connect("127.0.0.1:80").map_err(NetworkError::Forward)
        });
        if after.is_err() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    panic!("nothing may be caught after the end");
}
