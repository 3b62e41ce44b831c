//! Routes of every table, and the rules that choose a table.
//!
//! What the guest's kernel makes by itself is left out. What can't be told to it is refused by name: a pod with half of its
//! routes would reach others than it should.

use std::collections::HashSet;
use std::net::IpAddr;

use futures_util::TryStreamExt;
use kiln_agent_api::proto;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RouteProtocol, RouteType, RouteVia,
};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use rtnetlink::{Handle, IpVersion, RouteMessageBuilder};

use super::NetworkError;
use super::inspect::{Interface, failed};
use crate::refusal::{self, Refusal};

/// RT_TABLE_LOCAL: the kernel fills it.
const LOCAL_TABLE: u32 = 255;
/// RT_SCOPE_LINK.
pub(super) const SCOPE_LINK: u32 = 253;
/// The kernel's own rules, by priority and table: local, main, default.
const OWN_RULES: [(u32, u32); 3] = [(0, 255), (32766, 254), (32767, 253)];
/// The kernel says so where a rule suppresses nothing.
const NOTHING: u32 = u32::MAX;

/// The networks that the kernel has routes to because an interface has an address in them.
#[derive(Debug, Default)]
pub(super) struct Connected(HashSet<(u32, IpAddr, u8)>);

impl Connected {
    /// Whether the address, with its prefix length, has such a route or needs none.
    pub(super) fn contains(&self, index: u32, address: &str) -> bool {
        let Some((ip, prefix)) = address.split_once('/').and_then(|(ip, prefix)| {
            Some((ip.parse::<IpAddr>().ok()?, prefix.parse::<u8>().ok()?))
        }) else {
            return true;
        };
        match ip {
            IpAddr::V4(_) if prefix >= 32 => true,
            IpAddr::V4(ip) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
                let network = (u32::from(ip) & mask).into();
                self.0.contains(&(index, IpAddr::V4(network), prefix))
            }
            IpAddr::V6(ip) => {
                let shift = 128_u32.saturating_sub(prefix.into());
                let mask = u128::MAX.checked_shl(shift).unwrap_or(0);
                let network = (u128::from(ip) & mask).into();
                self.0.contains(&(index, IpAddr::V6(network), prefix))
            }
        }
    }

    fn note(&mut self, route: &RouteMessage) {
        let (mut index, mut network) = (None, None);
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Destination(RouteAddress::Inet(ip)) => network = Some((*ip).into()),
                RouteAttribute::Destination(RouteAddress::Inet6(ip)) => {
                    network = Some((*ip).into())
                }
                RouteAttribute::Oif(number) => index = Some(*number),
                _ => {}
            }
        }
        if let (Some(index), Some(network)) = (index, network) {
            let prefix = route.header.destination_prefix_length;
            self.0.insert((index, network, prefix));
        }
    }
}

pub(super) async fn routes(
    handle: &Handle,
    interfaces: &[Interface],
) -> Result<(Vec<proto::Route>, Connected), NetworkError> {
    let mut routes = Vec::new();
    let mut connected = Connected::default();
    let v4 = RouteMessageBuilder::<std::net::Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<std::net::Ipv6Addr>::new().build();
    for family in [v4, v6] {
        let mut found = handle.route().get(family).execute();
        while let Some(route) = found
            .try_next()
            .await
            .map_err(failed("list the routes of"))?
        {
            if is_connected(&route) {
                connected.note(&route);
            } else {
                routes.extend(translate_route(&route, interfaces)?);
            }
        }
    }
    Ok((routes, connected))
}

/// Whether the kernel has made it by itself. The same in a table of somebody's own was put there.
fn is_connected(route: &RouteMessage) -> bool {
    let header = &route.header;
    header.protocol == RouteProtocol::Kernel && header.table == RouteHeader::RT_TABLE_MAIN
}

pub(super) async fn rules(handle: &Handle) -> Result<Vec<proto::Rule>, NetworkError> {
    let mut rules = Vec::new();
    for version in [IpVersion::V4, IpVersion::V6] {
        let mut found = handle.rule().get(version).execute();
        while let Some(rule) = found
            .try_next()
            .await
            .map_err(failed("list the rules of"))?
        {
            rules.extend(translate_rule(&rule)?);
        }
    }
    Ok(rules)
}

/// A verdict that needs no interface, by the kernel's number; 0 is none.
fn verdict(kind: RouteType) -> Option<u32> {
    match kind {
        RouteType::Unicast => Some(0),
        RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit | RouteType::Throw => {
            Some(u8::from(kind).into())
        }
        _ => None,
    }
}

/// What the guest is told of a route; nothing of those that its kernel makes by itself.
fn translate_route(
    route: &RouteMessage,
    interfaces: &[Interface],
) -> Result<Option<proto::Route>, Refusal> {
    let header = &route.header;
    let is_cached = header.flags.contains(RouteFlags::Cloned);
    let Some(kind) = verdict(header.kind).filter(|_| !is_cached) else {
        return Ok(None);
    };
    let v6 = header.address_family == AddressFamily::Inet6;
    let default = if v6 { "::" } else { "0.0.0.0" };
    let mut out = proto::Route {
        destination: format!("{default}/{}", header.destination_prefix_length),
        scope: u8::from(header.scope).into(),
        onlink: header.flags.contains(RouteFlags::Onlink),
        table: header.table.into(),
        kind,
        ..Default::default()
    };
    let mut index = None;
    let mut unknown = None;
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(a) => {
                let ip = ip_text(a).unwrap_or_default();
                out.destination = format!("{ip}/{}", header.destination_prefix_length);
            }
            RouteAttribute::Gateway(a) => out.gateway = ip_text(a).unwrap_or_default(),
            RouteAttribute::Via(RouteVia::Inet6(ip)) => out.gateway = ip.to_string(),
            RouteAttribute::PrefSource(a) => out.source = ip_text(a).unwrap_or_default(),
            RouteAttribute::Oif(number) => index = Some(*number),
            RouteAttribute::Priority(metric) => out.metric = *metric,
            RouteAttribute::Table(table) => out.table = *table,
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    if let RouteMetric::Mtu(mtu) = metric {
                        out.mtu = *mtu;
                    }
                }
            }
            RouteAttribute::MultiPath(_) => unknown = Some("several next hops"),
            RouteAttribute::NhId(_) => unknown = Some("a next hop object"),
            RouteAttribute::Encap(_) => unknown = Some("an encapsulation"),
            _ => {}
        }
    }
    if out.table == LOCAL_TABLE {
        return Ok(None);
    }
    if out.table == u32::from(RouteHeader::RT_TABLE_MAIN) {
        out.table = 0;
    }
    if let Some(with) = unknown {
        return Err(refusal::route(&out.destination, with));
    }
    if kind == 0 {
        let interface = interfaces.iter().find(|i| Some(i.index) == index);
        match interface {
            Some(interface) => out.device.clone_from(&interface.name),
            // By the loopback interface: the guest has its own.
            None => return Ok(None),
        }
    }
    Ok(Some(out))
}

/// What the guest is told of a rule; nothing of the three that every kernel has.
fn translate_rule(rule: &RuleMessage) -> Result<Option<proto::Rule>, Refusal> {
    let header = &rule.header;
    let kind = match header.action {
        RuleAction::ToTable => Some(0),
        RuleAction::Blackhole | RuleAction::Unreachable | RuleAction::Prohibit => {
            Some(u8::from(header.action).into())
        }
        _ => None,
    };
    let mut out = proto::Rule {
        ipv6: header.family == AddressFamily::Inet6,
        table: header.table.into(),
        kind: kind.unwrap_or_default(),
        ..Default::default()
    };
    let mut carried =
        kind.is_some() && header.tos == 0 && !header.flags.contains(RuleFlags::Invert);
    for attribute in &rule.attributes {
        match attribute {
            RuleAttribute::Priority(number) => out.priority = *number,
            RuleAttribute::Table(table) => out.table = *table,
            RuleAttribute::Source(ip) => out.source = format!("{ip}/{}", header.src_len),
            RuleAttribute::Destination(ip) => out.destination = format!("{ip}/{}", header.dst_len),
            RuleAttribute::Iifname(name) => out.in_device.clone_from(name),
            RuleAttribute::Oifname(name) => out.out_device.clone_from(name),
            RuleAttribute::FwMark(mark) => out.mark = *mark,
            RuleAttribute::FwMask(mask) => out.mark_mask = *mask,
            RuleAttribute::Protocol(_)
            | RuleAttribute::L3MDev(false)
            | RuleAttribute::SuppressPrefixLen(NOTHING)
            | RuleAttribute::SuppressIfGroup(NOTHING) => {}
            _ => carried = false,
        }
    }
    let texts = [
        &out.source,
        &out.destination,
        &out.in_device,
        &out.out_device,
    ];
    let selects = out.mark != 0 || texts.iter().any(|text| !text.is_empty());
    if carried && !selects && OWN_RULES.contains(&(out.priority, out.table)) {
        return Ok(None);
    }
    if !carried {
        return Err(refusal::routing_rule(out.priority));
    }
    Ok(Some(out))
}

fn ip_text(address: &RouteAddress) -> Option<String> {
    match address {
        RouteAddress::Inet(ip) => Some(ip.to_string()),
        RouteAddress::Inet6(ip) => Some(ip.to_string()),
        _ => None,
    }
}
