//! What CNI has set up.

use std::net::IpAddr;

use futures_util::TryStreamExt;
use kiln_agent_api::proto;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressScope};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RouteProtocol, RouteType,
};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::{NetworkError, name_of};

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
    /// Its addresses with their prefix lengths.
    pub addresses: Vec<String>,
}

/// All that the guest is to take over.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PodNetwork {
    /// Interfaces: `eth0`, if there is one, then the others by name.
    pub interfaces: Vec<Interface>,
    /// Routes.
    pub routes: Vec<proto::Route>,
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
                addresses: i.addresses.clone(),
                ..Default::default()
            }
        });
        proto::Network {
            interfaces: interfaces.collect(),
            routes: self.routes.clone(),
            neighbours: self.neighbours.clone(),
            ..Default::default()
        }
    }
}

fn failed(action: &'static str) -> impl Fn(rtnetlink::Error) -> NetworkError {
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
    let mut interfaces = links(handle).await?;
    addresses(handle, &mut interfaces).await?;
    // Without an address it is one of the kernel's fallback devices (tunl0, sit0) or not CNI's.
    interfaces.retain(|i| !i.addresses.is_empty());
    interfaces.sort_by_key(|i| (i.name != "eth0", i.name.clone()));
    let mut routes = Vec::new();
    let v4 = RouteMessageBuilder::<std::net::Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<std::net::Ipv6Addr>::new().build();
    for family in [v4, v6] {
        let mut found = handle.route().get(family).execute();
        while let Some(route) = found
            .try_next()
            .await
            .map_err(failed("list the routes of"))?
        {
            routes.extend(translate_route(&route, &interfaces));
        }
    }
    // A route through a gateway needs the route to the gateway to be there before it.
    routes.sort_by_key(|r| !r.gateway.is_empty());
    let neighbours = neighbours(handle, &interfaces).await?;
    Ok(PodNetwork {
        interfaces,
        routes,
        neighbours,
    })
}

async fn links(handle: &Handle) -> Result<Vec<Interface>, NetworkError> {
    let mut interfaces = Vec::new();
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
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::Address(bytes) => mac = <[u8; 6]>::try_from(bytes.as_slice()).ok(),
                LinkAttribute::Mtu(n) => mtu = *n,
                _ => {}
            }
        }
        let name = name_of(&link).unwrap_or_default().to_owned();
        // One without a MAC address (a point-to-point tunnel) can't be bridged frame by frame.
        if let Some(mac) = mac {
            let addresses = Vec::new();
            interfaces.push(Interface {
                name,
                index: link.header.index,
                mac,
                mtu,
                addresses,
            });
        }
    }
    Ok(interfaces)
}

async fn addresses(handle: &Handle, interfaces: &mut [Interface]) -> Result<(), NetworkError> {
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
        let Some(interface) = interfaces
            .iter_mut()
            .find(|i| i.index == message.header.index)
        else {
            continue;
        };
        // With a peer, Local is the own address and Address the peer's.
        let local = message.attributes.iter().find_map(|a| match a {
            AddressAttribute::Local(ip) => Some(*ip),
            _ => None,
        });
        let address = local.or_else(|| {
            message.attributes.iter().find_map(|a| match a {
                AddressAttribute::Address(ip) => Some(*ip),
                _ => None,
            })
        });
        if let Some(ip) = address {
            interface
                .addresses
                .push(format!("{ip}/{}", message.header.prefix_len));
        }
    }
    Ok(())
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

/// What the guest is told of a route; `None` for those its kernel makes by itself.
fn translate_route(route: &RouteMessage, interfaces: &[Interface]) -> Option<proto::Route> {
    let header = &route.header;
    if header.table != RouteHeader::RT_TABLE_MAIN
        || header.kind != RouteType::Unicast
        || header.protocol == RouteProtocol::Kernel
        || header.flags.contains(RouteFlags::Cloned)
    {
        return None;
    }
    let v6 = header.address_family == AddressFamily::Inet6;
    let default = if v6 { "::" } else { "0.0.0.0" };
    let mut out = proto::Route {
        destination: format!("{default}/{}", header.destination_prefix_length),
        scope: u8::from(header.scope).into(),
        onlink: header.flags.contains(RouteFlags::Onlink),
        ..Default::default()
    };
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(a) => {
                out.destination = format!("{}/{}", ip_text(a)?, header.destination_prefix_length);
            }
            RouteAttribute::Gateway(a) => out.gateway = ip_text(a)?,
            RouteAttribute::PrefSource(a) => out.source = ip_text(a)?,
            RouteAttribute::Oif(index) => {
                out.device = interfaces.iter().find(|i| i.index == *index)?.name.clone();
            }
            RouteAttribute::Priority(metric) => out.metric = *metric,
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    if let RouteMetric::Mtu(mtu) = metric {
                        out.mtu = *mtu;
                    }
                }
            }
            _ => {}
        }
    }
    (!out.device.is_empty()).then_some(out)
}

fn ip_text(address: &RouteAddress) -> Option<String> {
    match address {
        RouteAddress::Inet(ip) => Some(ip.to_string()),
        RouteAddress::Inet6(ip) => Some(ip.to_string()),
        _ => None,
    }
}

fn mac_text(bytes: &[u8]) -> String {
    bytes
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect::<Vec<_>>()
        .join(":")
}
