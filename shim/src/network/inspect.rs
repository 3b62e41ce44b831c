//! What CNI has set up.

use std::net::IpAddr;

use futures_util::TryStreamExt;
use kiln_agent_api::proto;
use rtnetlink::Handle;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState};

use super::{NetworkError, name_of, routes};
use crate::refusal;

/// An interface of the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its index in the namespace.
    pub index: u32,
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Its MTU.
    pub mtu: u32,
    /// Nobody answers for addresses there; frames are for whoever is at the other end.
    pub no_arp: bool,
    /// Its addresses with their prefix lengths.
    pub addresses: Vec<String>,
    /// Those of them whose networks have no route by them.
    pub without_route: Vec<String>,
}

/// All that the guest is to take over.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PodNetwork {
    /// Interfaces: `eth0`, if there is one, then the others by name.
    pub interfaces: Vec<Interface>,
    /// Routes.
    pub routes: Vec<proto::Route>,
    /// Rules of policy routing beside the kernel's own.
    pub rules: Vec<proto::Rule>,
    /// Permanent neighbours.
    pub neighbours: Vec<proto::Neighbour>,
}

impl PodNetwork {
    /// What the agent is told: the first interface is the card that the guest was baked with, the others are
    /// plugged, with their addresses.
    pub fn for_agent(&self) -> proto::Network {
        let interfaces = self.interfaces.iter().enumerate().map(|(n, i)| {
            let mac = mac_text(&i.mac);
            proto::Interface {
                find_mac: if n == 0 { String::new() } else { mac.clone() },
                name: i.name.clone(),
                mac,
                mtu: i.mtu,
                no_arp: i.no_arp,
                addresses: i.addresses.clone(),
                without_route: i.without_route.clone(),
                ..Default::default()
            }
        });
        proto::Network {
            interfaces: interfaces.collect(),
            routes: self.routes.clone(),
            rules: self.rules.clone(),
            neighbours: self.neighbours.clone(),
            ..Default::default()
        }
    }
}

pub(super) fn failed(action: &'static str) -> impl Fn(rtnetlink::Error) -> NetworkError {
    move |source| NetworkError::Netlink {
        action,
        name: "the pod's namespace".into(),
        source: Box::new(source),
    }
}

/// The index of an interface.
pub(super) async fn index_of(handle: &Handle, name: &str) -> Result<u32, NetworkError> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    let link = links
        .try_next()
        .await
        .map_err(|source| NetworkError::Netlink {
            action: "find the interface",
            name: name.to_owned(),
            source: Box::new(source),
        })?;
    link.map(|l| l.header.index)
        .ok_or_else(|| NetworkError::Netlink {
            action: "find the interface",
            name: name.to_owned(),
            source: Box::new(rtnetlink::Error::RequestFailed),
        })
}

pub(super) async fn inspect(handle: &Handle) -> Result<PodNetwork, NetworkError> {
    let mut links = links(handle).await?;
    let mut routes = addresses(handle, &mut links).await?;
    let mut interfaces = guests(&links)?;
    interfaces.sort_by_key(|i| (i.name != "eth0", i.name.clone()));
    let (found, connected) = routes::routes(handle, &interfaces).await?;
    routes.extend(found);
    for interface in &mut interfaces {
        let routed = |address: &&String| !connected.contains(interface.index, address);
        interface.without_route = interface.addresses.iter().filter(routed).cloned().collect();
    }
    // A route through a gateway needs the route to the gateway to be there before it.
    routes.sort_by_key(|r| !r.gateway.is_empty());
    let neighbours = neighbours(handle, &interfaces).await?;
    Ok(PodNetwork {
        interfaces,
        routes,
        rules: routes::rules(handle).await?,
        neighbours,
    })
}

/// An interface of the namespace, whatever it is.
struct Link {
    interface: Interface,
    mac: Option<[u8; 6]>,
    up: bool,
    /// It is a port of a bridge or a bond.
    is_port: bool,
    /// The interface of this namespace that it stands on: a VLAN's, for one.
    stands_on: Option<u32>,
}

/// Those of the links that the guest gets.
fn guests(links: &[Link]) -> Result<Vec<Interface>, NetworkError> {
    // The two ends of a cable name each other.
    let on: Vec<(u32, u32)> = links
        .iter()
        .filter_map(|link| Some((link.interface.index, link.stands_on?)))
        .collect();
    let upper_of = |index: u32| {
        let stands =
            |(upper, lower): &&(u32, u32)| *lower == index && !on.contains(&(index, *upper));
        on.iter().find(stands).map(|(upper, _)| *upper)
    };
    let name_of = |index: u32| {
        let mut links = links.iter().map(|link| &link.interface);
        let found = links.find(|interface| interface.index == index);
        found.map_or_else(String::new, |interface| interface.name.clone())
    };
    let mut interfaces = Vec::new();
    for link in links {
        let interface = &link.interface;
        let upper = upper_of(interface.index);
        let is_addressed = !interface.addresses.is_empty();
        // What has no address and is down is one of the kernel's fallback devices (tunl0, gretap0). Up and without an address
        // it is one that the pod's programs give one to, or use as it is.
        let is_cable_within = |lower| on.contains(&(lower, interface.index));
        let is_bare = link.up
            && !link.is_port
            && upper.is_none()
            && !link.stands_on.is_some_and(is_cable_within);
        match (is_addressed, upper, link.mac) {
            (true, Some(upper), _) => {
                return Err(refusal::stacked_interface(&name_of(upper), &interface.name).into());
            }
            (true, None, None) => {
                return Err(refusal::interface_without_mac(&interface.name).into());
            }
            (_, _, Some(mac)) if is_addressed || is_bare => interfaces.push(Interface {
                mac,
                ..interface.clone()
            }),
            _ => {}
        }
    }
    Ok(interfaces)
}

async fn links(handle: &Handle) -> Result<Vec<Link>, NetworkError> {
    let mut all = Vec::new();
    let mut links = handle.link().get().execute();
    while let Some(link) = links
        .try_next()
        .await
        .map_err(failed("list the interfaces of"))?
    {
        if link.header.flags.contains(LinkFlags::Loopback) {
            continue;
        }
        let (mut mac, mut mtu) = (None, 0);
        let (mut is_port, mut stands_on, mut is_elsewhere) = (false, None, false);
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::Address(bytes) => mac = <[u8; 6]>::try_from(bytes.as_slice()).ok(),
                LinkAttribute::Mtu(n) => mtu = *n,
                LinkAttribute::Controller(_) => is_port = true,
                LinkAttribute::Link(index) => stands_on = Some(*index),
                LinkAttribute::LinkNetNsId(_) => is_elsewhere = true,
                _ => {}
            }
        }
        all.push(Link {
            interface: Interface {
                name: name_of(&link).unwrap_or_default().to_owned(),
                index: link.header.index,
                mac: [0; 6],
                mtu,
                no_arp: link.header.flags.contains(LinkFlags::Noarp),
                addresses: Vec::new(),
                without_route: Vec::new(),
            },
            mac,
            up: link.header.flags.contains(LinkFlags::Up),
            is_port,
            stands_on: stands_on.filter(|_| !is_elsewhere),
        });
    }
    Ok(all)
}

/// Puts the addresses at their interfaces. Gives the routes to peers, which the kernel makes with an address.
async fn addresses(handle: &Handle, links: &mut [Link]) -> Result<Vec<proto::Route>, NetworkError> {
    let mut routes = Vec::new();
    let mut found = handle.address().get().execute();
    while let Some(message) = found
        .try_next()
        .await
        .map_err(failed("list the addresses of"))?
    {
        // The guest makes link-local addresses from its MAC address by itself.
        if message.header.scope == AddressScope::Link {
            continue;
        }
        let link = links
            .iter_mut()
            .map(|link| &mut link.interface)
            .find(|i| i.index == message.header.index);
        let (Some(interface), Some((ip, peer))) = (link, own_and_peer(&message)) else {
            continue;
        };
        let mut prefix = message.header.prefix_len;
        if peer != ip {
            // The prefix is the peer's, who is at the other end of the wire.
            routes.push(proto::Route {
                destination: format!("{peer}/{prefix}"),
                device: interface.name.clone(),
                scope: routes::SCOPE_LINK,
                ..Default::default()
            });
            prefix = if ip.is_ipv4() { 32 } else { 128 };
        }
        interface.addresses.push(format!("{ip}/{prefix}"));
    }
    Ok(routes)
}

/// The address, and the peer's: without a peer its own again.
fn own_and_peer(message: &AddressMessage) -> Option<(IpAddr, IpAddr)> {
    let local = message.attributes.iter().find_map(|a| match a {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    let address = message.attributes.iter().find_map(|a| match a {
        AddressAttribute::Address(ip) => Some(*ip),
        _ => None,
    });
    // IPv6 says Local only where there is a peer.
    let own = local.or(address)?;
    Some((own, address.unwrap_or(own)))
}

async fn neighbours(
    handle: &Handle,
    interfaces: &[Interface],
) -> Result<Vec<proto::Neighbour>, NetworkError> {
    let mut out = Vec::new();
    let mut found = handle.neighbours().get().execute();
    while let Some(n) = found
        .try_next()
        .await
        .map_err(failed("list the neighbours of"))?
    {
        if n.header.state != NeighbourState::Permanent {
            continue;
        }
        let Some(interface) = interfaces.iter().find(|i| i.index == n.header.ifindex) else {
            continue;
        };
        let (mut ip, mut mac) = (None, None);
        for attribute in &n.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(a)) => {
                    ip = Some(IpAddr::V4(*a))
                }
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(a)) => {
                    ip = Some(IpAddr::V6(*a));
                }
                NeighbourAttribute::LinkLayerAddress(b) if b.len() == 6 => mac = Some(mac_text(b)),
                _ => {}
            }
        }
        // Multicast groups are listed as permanent neighbours, too.
        if let (Some(ip), Some(mac)) = (ip.filter(|ip| !ip.is_multicast()), mac) {
            out.push(proto::Neighbour {
                address: ip.to_string(),
                mac,
                device: interface.name.clone(),
                ..Default::default()
            });
        }
    }
    Ok(out)
}

fn mac_text(bytes: &[u8]) -> String {
    bytes
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect::<Vec<_>>()
        .join(":")
}
