//! The pod's network, which is the guest's: interfaces take over what CNI gave the pod on the host.
//!
//! All of a request goes to the kernel in two messages: one dump to find the interfaces, one batch
//! with every change. Addresses are usable at once (no duplicate address detection: the host's side
//! has done it).

mod netlink;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use kiln_agent_api::{GUEST_RESOLV_CONF, proto};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use thiserror::Error;

use self::netlink::{Change, Netlink};
use crate::uevent;

/// Why the network is not as asked for.
#[derive(Debug, Error)]
pub(crate) enum NetworkError {
    /// Something in the request can't be read.
    #[error("{what} {text:?} is not {expected}")]
    Parse {
        /// "address", "MAC", ...
        what: &'static str,
        /// What was sent.
        text: String,
        /// What should have been.
        expected: &'static str,
    },
    /// No such interface.
    #[error("the guest has no interface {0}; its interfaces are: {1}")]
    NoInterface(String, String),
    /// The kernel refused a change.
    #[error("cannot {action}: {source}")]
    Refused {
        /// The change.
        action: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The netlink socket failed.
    #[error("cannot talk to the kernel's routing service: {0}")]
    Socket(#[from] io::Error),
}

type Result<T> = std::result::Result<T, NetworkError>;

/// How long a plugged card may take to show.
const PLUG_LIMIT: Duration = Duration::from_secs(20);

/// An interface as the kernel has it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Link {
    index: u32,
    name: String,
    mac: Vec<u8>,
    ethernet: bool,
}

/// Brings the loopback interface up. Part of early boot.
pub(crate) fn loopback_up() -> Result<()> {
    let mut netlink = Netlink::open()?;
    let links = links_of(&netlink.links()?);
    let loopback = links.iter().find(|link| link.name == "lo");
    let Some(loopback) = loopback else {
        return Err(NetworkError::NoInterface("lo".to_owned(), names(&links)));
    };
    netlink.apply(&[netlink::link_up("lo", loopback.index, true)])
}

/// Makes the network what `request` says; answers with what it is then.
pub(crate) fn configure(request: &proto::Network) -> Result<proto::NetworkState> {
    let mut netlink = Netlink::open()?;
    let mut changes = Vec::new();
    let mut links = links_of(&netlink.links()?);
    // Only cards that are named by their addresses may still be on their way.
    let missing = |links: &[Link]| {
        let mut macs = request.interfaces.iter().map(|wanted| &wanted.find_mac);
        macs.any(|mac| {
            !mac.is_empty()
                && !links
                    .iter()
                    .any(|link| format_mac(&link.mac).eq_ignore_ascii_case(mac))
        })
    };
    uevent::wait_until(PLUG_LIMIT, || {
        if missing(&links) {
            links = links_of(&netlink.links()?);
        }
        Ok::<_, NetworkError>(!missing(&links))
    })?;
    for wanted in &request.interfaces {
        plan_interface(wanted, &mut links, &mut changes)?;
    }
    let index: BTreeMap<&str, u32> = links
        .iter()
        .map(|link| (link.name.as_str(), link.index))
        .collect();
    let device = |name: &str| {
        let known = index.get(name).copied();
        known.ok_or_else(|| NetworkError::NoInterface(name.to_owned(), names(&links)))
    };
    // A neighbour may be what makes a gateway reachable, so neighbours come first.
    for neighbour in &request.neighbours {
        let address = parse_address(&neighbour.address)?;
        let mac = parse_mac(&neighbour.mac)?;
        changes.push(netlink::neighbour(
            device(&neighbour.device)?,
            address,
            &mac,
        ));
    }
    for route in &request.routes {
        let device = if route.device.is_empty() {
            None
        } else {
            Some(device(&route.device)?)
        };
        changes.push(plan_route(route, device)?);
    }
    for rule in &request.rules {
        changes.push(plan_rule(rule)?);
    }
    netlink.apply(&changes)?;
    if let Some(dns) = request.dns.as_ref() {
        write_resolv_conf(Path::new(GUEST_RESOLV_CONF), dns).map_err(|source| {
            NetworkError::Refused {
                action: format!("write {GUEST_RESOLV_CONF}"),
                source,
            }
        })?;
    }
    state_by(&mut netlink)
}

/// What the network is.
pub(crate) fn state() -> Result<proto::NetworkState> {
    state_by(&mut Netlink::open()?)
}

fn plan_interface(
    wanted: &proto::Interface,
    links: &mut [Link],
    changes: &mut Vec<Change>,
) -> Result<()> {
    let found = if wanted.find_mac.is_empty() {
        let position = usize::try_from(wanted.find_position).unwrap_or(usize::MAX);
        links.iter().filter(|link| link.ethernet).nth(position)
    } else {
        let mac = parse_mac(&wanted.find_mac)?;
        links.iter().find(|link| link.mac == mac)
    };
    let Some(index) = found.map(|link| link.index) else {
        let which = if wanted.find_mac.is_empty() {
            format!("at position {}", wanted.find_position)
        } else {
            format!("with address {}", wanted.find_mac)
        };
        return Err(NetworkError::NoInterface(which, names(links)));
    };
    free_name(&wanted.name, index, links, changes);
    let Some(link) = links.iter_mut().find(|link| link.index == index) else {
        return Err(NetworkError::NoInterface(wanted.name.clone(), names(links)));
    };
    let name = if wanted.name.is_empty() {
        link.name.clone()
    } else {
        wanted.name.clone()
    };
    let mac = if wanted.mac.is_empty() {
        None
    } else {
        Some(parse_mac(&wanted.mac)?)
    };
    let mut attributes = Vec::new();
    if name != link.name {
        attributes.push(LinkAttribute::IfName(name.clone()));
    }
    if let Some(mac) = mac.filter(|mac| *mac != link.mac) {
        attributes.push(LinkAttribute::Address(mac));
    }
    if wanted.mtu != 0 {
        attributes.push(LinkAttribute::Mtu(wanted.mtu));
    }
    if !attributes.is_empty() {
        let action = format!("set name, address or MTU of {}", link.name);
        changes.push(netlink::link(action, link.index, attributes));
    }
    link.name.clone_from(&name);
    if wanted.no_arp {
        changes.push(netlink::link_no_arp(&name, link.index));
    }
    for text in &wanted.addresses {
        let (address, prefix) = parse_prefix(text)?;
        let routed = !wanted.without_route.contains(text);
        changes.push(netlink::address(
            &name,
            link.index,
            (address, prefix),
            routed,
        ));
    }
    changes.push(netlink::link_up(&name, link.index, !wanted.down));
    Ok(())
}

/// Gives another interface that has this name one of its own, since it would be in the way.
fn free_name(name: &str, index: u32, links: &mut [Link], changes: &mut Vec<Change>) {
    let other = |link: &&mut Link| link.name == name && link.index != index;
    if let Some(link) = links.iter_mut().find(other) {
        let away = format!("kiln{}", link.index);
        let action = format!("rename {}", link.name);
        let attributes = vec![LinkAttribute::IfName(away.clone())];
        changes.push(netlink::link(action, link.index, attributes));
        link.name = away;
    }
}

fn plan_route(route: &proto::Route, device: Option<u32>) -> Result<Change> {
    let gateway = optional(&route.gateway)?;
    let source = optional(&route.source)?;
    let destination = match (route.destination.as_str(), gateway) {
        ("", Some(IpAddr::V6(_))) => parse_prefix("::/0")?,
        ("", _) => parse_prefix("0.0.0.0/0")?,
        (text, _) => parse_prefix(text)?,
    };
    Ok(netlink::route(&netlink::Route {
        destination,
        gateway,
        source,
        device,
        metric: route.metric,
        mtu: route.mtu,
        scope: u8::try_from(route.scope).unwrap_or(0),
        onlink: route.onlink,
        table: route.table,
        kind: route.kind,
    }))
}

fn plan_rule(rule: &proto::Rule) -> Result<Change> {
    let prefix = |text: &str| (!text.is_empty()).then(|| parse_prefix(text)).transpose();
    let (source, destination) = (prefix(&rule.source)?, prefix(&rule.destination)?);
    Ok(netlink::rule(rule, source, destination))
}

fn state_by(netlink: &mut Netlink) -> Result<proto::NetworkState> {
    let mut state = proto::NetworkState::new();
    let mut addresses: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    for message in netlink.addresses()? {
        if let RouteNetlinkMessage::NewAddress(message) = message
            && let Some(address) = netlink::address_of(&message)
        {
            let text = format!("{address}/{}", message.header.prefix_len);
            addresses
                .entry(message.header.index)
                .or_default()
                .push(text);
        }
    }
    for message in netlink.links()? {
        if let RouteNetlinkMessage::NewLink(message) = message {
            let addresses = addresses.remove(&message.header.index).unwrap_or_default();
            state.interfaces.push(interface_state(&message, addresses));
        }
    }
    Ok(state)
}

fn interface_state(message: &LinkMessage, addresses: Vec<String>) -> proto::InterfaceState {
    let mut state = proto::InterfaceState::new();
    state.index = message.header.index;
    state.up = message.header.flags.contains(LinkFlags::Up);
    state.addresses = addresses;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => state.name.clone_from(name),
            LinkAttribute::Address(mac) => state.mac = format_mac(mac),
            LinkAttribute::Mtu(mtu) => state.mtu = *mtu,
            LinkAttribute::Stats64(stats) => {
                state.rx_bytes = stats.rx_bytes;
                state.rx_packets = stats.rx_packets;
                state.rx_errors = stats.rx_errors;
                state.rx_dropped = stats.rx_dropped;
                state.tx_bytes = stats.tx_bytes;
                state.tx_packets = stats.tx_packets;
                state.tx_errors = stats.tx_errors;
                state.tx_dropped = stats.tx_dropped;
            }
            _ => {}
        }
    }
    state
}

fn links_of(messages: &[RouteNetlinkMessage]) -> Vec<Link> {
    let mut links: Vec<Link> = messages
        .iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(link) => Some(link),
            _ => None,
        })
        .map(|message| {
            let mut link = Link {
                index: message.header.index,
                name: String::new(),
                mac: Vec::new(),
                ethernet: message.header.link_layer_type == LinkLayerType::Ether,
            };
            for attribute in &message.attributes {
                match attribute {
                    LinkAttribute::IfName(name) => link.name.clone_from(name),
                    LinkAttribute::Address(mac) => link.mac.clone_from(mac),
                    _ => {}
                }
            }
            link
        })
        .collect();
    links.sort_by_key(|link| link.index);
    links
}

fn names(links: &[Link]) -> String {
    let each: Vec<_> = links
        .iter()
        .map(|link| format!("{} {}", link.name, format_mac(&link.mac)))
        .collect();
    each.join(", ")
}

fn optional(text: &str) -> Result<Option<IpAddr>> {
    if text.is_empty() {
        Ok(None)
    } else {
        parse_address(text).map(Some)
    }
}

fn parse_address(text: &str) -> Result<IpAddr> {
    text.parse().map_err(|_| NetworkError::Parse {
        what: "address",
        text: text.to_owned(),
        expected: "an IPv4 or IPv6 address",
    })
}

fn parse_prefix(text: &str) -> Result<(IpAddr, u8)> {
    let wrong = || NetworkError::Parse {
        what: "address",
        text: text.to_owned(),
        expected: "an address with a prefix length, as in 10.0.0.7/24",
    };
    let (address, length) = text.split_once('/').ok_or_else(wrong)?;
    let address: IpAddr = address.parse().map_err(|_| wrong())?;
    let length: u8 = length.parse().map_err(|_| wrong())?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    if length > most {
        Err(wrong())
    } else {
        Ok((address, length))
    }
}

fn parse_mac(text: &str) -> Result<Vec<u8>> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).ok())
        .collect();
    match bytes {
        Some(bytes) if bytes.len() == 6 => Ok(bytes),
        _ => Err(NetworkError::Parse {
            what: "MAC",
            text: text.to_owned(),
            expected: "six bytes in hexadecimal, as in 02:00:00:00:00:01",
        }),
    }
}

fn format_mac(mac: &[u8]) -> String {
    let bytes: Vec<_> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(":")
}

fn write_resolv_conf(path: &Path, dns: &proto::Dns) -> io::Result<()> {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text += &format!("search {}\n", dns.searches.join(" "));
    }
    for server in &dns.nameservers {
        text += &format!("nameserver {server}\n");
    }
    if !dns.options.is_empty() {
        text += &format!("options {}\n", dns.options.join(" "));
    }
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_want_a_prefix_that_fits() {
        assert!(parse_prefix("10.0.0.7/24").is_ok());
        assert!(parse_prefix("fd00::7/64").is_ok());
        for wrong in ["10.0.0.7", "10.0.0.7/33", "fd00::7/129", "x/1", "10.0.0.7/"] {
            assert!(parse_prefix(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_mac_has_six_bytes() {
        assert_eq!(
            parse_mac("02:00:00:00:00:0f").expect("mac"),
            [2, 0, 0, 0, 0, 15]
        );
        for wrong in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:00:00",
            "zz:00:00:00:00:00",
        ] {
            assert!(parse_mac(wrong).is_err(), "{wrong}");
        }
        assert_eq!(format_mac(&[2, 0, 0, 0, 0, 15]), "02:00:00:00:00:0f");
    }

    #[test]
    fn an_interface_that_is_not_there_is_named_with_those_that_are() {
        let lo = Link {
            index: 1,
            name: "lo".into(),
            mac: vec![0; 6],
            ethernet: false,
        };
        let wanted = proto::Interface {
            find_position: 0,
            ..Default::default()
        };
        let error = plan_interface(&wanted, &mut [lo], &mut Vec::new()).expect_err("none");
        assert_eq!(
            error.to_string(),
            "the guest has no interface at position 0; its interfaces are: lo 00:00:00:00:00:00"
        );
    }

    #[test]
    fn a_name_that_another_interface_has_is_taken_from_it() {
        let card = |index: u32, name: &str| Link {
            index,
            name: name.into(),
            mac: vec![2, 0, 0, 0, 0, index as u8],
            ethernet: true,
        };
        let mut links = [card(2, "eth0"), card(3, "eth1")];
        let wanted = [
            proto::Interface {
                name: "eth1".into(),
                ..Default::default()
            },
            proto::Interface {
                find_mac: "02:00:00:00:00:03".into(),
                name: "net1".into(),
                ..Default::default()
            },
        ];
        let mut changes = Vec::new();
        for wanted in &wanted {
            plan_interface(wanted, &mut links, &mut changes).expect("plan");
        }
        let names = links.map(|link| link.name);
        assert_eq!(names, ["eth1", "net1"]);
    }

    #[test]
    fn resolv_conf_reads_as_the_resolver_wants_it() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("deep/resolv.conf");
        let dns = proto::Dns {
            nameservers: vec!["10.96.0.10".into(), "fd00::a".into()],
            searches: vec![
                "default.svc.cluster.local".into(),
                "svc.cluster.local".into(),
            ],
            options: vec!["ndots:5".into()],
            ..Default::default()
        };
        write_resolv_conf(&path, &dns).expect("write");
        assert_eq!(
            fs::read_to_string(path).expect("read"),
            "search default.svc.cluster.local svc.cluster.local\n\
             nameserver 10.96.0.10\nnameserver fd00::a\noptions ndots:5\n"
        );
    }
}
