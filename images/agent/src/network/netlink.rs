//! rtnetlink: messages, sent in one batch and acknowledged one by one.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use kiln_agent_api::proto;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope,
    RouteType, RouteVia,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::sys::socket::{
    AddressFamily as SocketFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv,
    sendto, socket,
};

use super::{NetworkError, Result};

/// A dump of the kernel's comes in pieces of at most this.
const PIECE: usize = 64 * 1024;

/// One thing to change, and how to call it if the kernel refuses.
#[derive(Debug)]
pub(super) struct Change {
    action: String,
    flags: u16,
    message: RouteNetlinkMessage,
}

/// A route in terms of the kernel.
#[derive(Debug)]
pub(super) struct Route {
    pub(super) destination: (IpAddr, u8),
    pub(super) gateway: Option<IpAddr>,
    pub(super) source: Option<IpAddr>,
    pub(super) device: Option<u32>,
    pub(super) metric: u32,
    pub(super) mtu: u32,
    pub(super) scope: u8,
    pub(super) onlink: bool,
    pub(super) table: u32,
    pub(super) kind: u32,
}

/// A socket to the kernel's routing service.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    pub(super) fn open() -> io::Result<Self> {
        let socket = socket(
            SocketFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Every interface.
    pub(super) fn links(&mut self) -> Result<Vec<RouteNetlinkMessage>> {
        self.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))
    }

    /// Every address.
    pub(super) fn addresses(&mut self) -> Result<Vec<RouteNetlinkMessage>> {
        self.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))
    }

    /// Makes changes, in order. The first one that is refused is the error; later ones may have been
    /// made all the same.
    pub(super) fn apply(&mut self, changes: &[Change]) -> Result<()> {
        let mut bytes = Vec::new();
        let mut open = BTreeMap::new();
        for change in changes {
            let sequence = self.next();
            let flags = NLM_F_REQUEST | NLM_F_ACK | change.flags;
            append(&mut bytes, change.message.clone(), flags, sequence);
            open.insert(sequence, change.action.as_str());
        }
        if open.is_empty() {
            return Ok(());
        }
        self.send(&bytes)?;
        let mut first = None;
        while !open.is_empty() {
            for (sequence, payload) in self.receive()? {
                let Some(action) = open.remove(&sequence) else {
                    continue;
                };
                if let NetlinkPayload::Error(error) = payload
                    && let Some(code) = error.code
                    && first.is_none()
                {
                    let source = io::Error::from_raw_os_error(-code.get());
                    first = Some(NetworkError::Refused {
                        action: action.to_owned(),
                        source,
                    });
                }
            }
        }
        first.map_or(Ok(()), Err)
    }

    fn dump(&mut self, question: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>> {
        let sequence = self.next();
        let mut bytes = Vec::new();
        append(&mut bytes, question, NLM_F_REQUEST | NLM_F_DUMP, sequence);
        self.send(&bytes)?;
        let mut answers = Vec::new();
        loop {
            for (number, payload) in self.receive()? {
                match payload {
                    _ if number != sequence => {}
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::InnerMessage(message) => answers.push(message),
                    NetlinkPayload::Error(error) => {
                        let code = error.code.map_or(libc::EIO, |code| -code.get());
                        let source = io::Error::from_raw_os_error(code);
                        let action = "list interfaces and addresses".to_owned();
                        return Err(NetworkError::Refused { action, source });
                    }
                    _ => {}
                }
            }
        }
    }

    fn next(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let kernel = NetlinkAddr::new(0, 0);
        sendto(self.socket.as_raw_fd(), bytes, &kernel, MsgFlags::empty())?;
        Ok(())
    }

    fn receive(&self) -> io::Result<Vec<(u32, NetlinkPayload<RouteNetlinkMessage>)>> {
        let mut buffer = vec![0; PIECE];
        let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = &buffer[..length];
        let mut messages = Vec::new();
        while !rest.is_empty() {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                .map_err(io::Error::other)?;
            let (header, payload) = message.into_parts();
            // Messages are padded to four bytes; the last one need not be.
            let whole = usize::try_from(header.length).map_err(io::Error::other)?;
            let padded = whole.next_multiple_of(4).max(4).min(rest.len());
            messages.push((header.sequence_number, payload));
            rest = &rest[padded..];
        }
        Ok(messages)
    }
}

fn append(bytes: &mut Vec<u8>, message: RouteNetlinkMessage, flags: u16, sequence: u32) {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
    message.finalize();
    let start = bytes.len();
    bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
    message.serialize(&mut bytes[start..]);
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    }
}

/// Sets attributes of an interface.
pub(super) fn link(action: String, index: u32, attributes: Vec<LinkAttribute>) -> Change {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = attributes;
    Change {
        action,
        flags: 0,
        message: RouteNetlinkMessage::SetLink(message),
    }
}

/// Switches an interface on or off.
pub(super) fn link_up(name: &str, index: u32, up: bool) -> Change {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.change_mask = LinkFlags::Up;
    if up {
        message.header.flags = LinkFlags::Up;
    }
    let action = format!("set {name} {}", if up { "up" } else { "down" });
    Change {
        action,
        flags: 0,
        message: RouteNetlinkMessage::SetLink(message),
    }
}

/// Switches address resolution off.
pub(super) fn link_no_arp(name: &str, index: u32) -> Change {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.change_mask = LinkFlags::Noarp;
    message.header.flags = LinkFlags::Noarp;
    let action = format!("switch ARP off on {name}");
    Change {
        action,
        flags: 0,
        message: RouteNetlinkMessage::SetLink(message),
    }
}

/// Gives an interface an address, and its network a route.
pub(super) fn address(
    name: &str,
    index: u32,
    (address, prefix): (IpAddr, u8),
    routed: bool,
) -> Change {
    let mut message = AddressMessage::default();
    message.header.family = family(address);
    message.header.prefix_len = prefix;
    message.header.index = index;
    message.header.scope = AddressScope::Universe;
    message.header.flags = AddressHeaderFlags::empty();
    message.attributes.push(AddressAttribute::Local(address));
    message.attributes.push(AddressAttribute::Address(address));
    match address {
        IpAddr::V4(v4) if prefix < 31 => {
            let host_bits = u32::MAX.checked_shr(u32::from(prefix)).unwrap_or(0);
            let broadcast = (u32::from(v4) | host_bits).into();
            message
                .attributes
                .push(AddressAttribute::Broadcast(broadcast));
        }
        IpAddr::V4(_) | IpAddr::V6(_) => {}
    }
    let mut flags = AddressFlags::empty();
    flags.set(AddressFlags::Nodad, address.is_ipv6());
    flags.set(AddressFlags::Noprefixroute, !routed);
    if !flags.is_empty() {
        message.attributes.push(AddressAttribute::Flags(flags));
    }
    Change {
        action: format!("give {name} the address {address}/{prefix}"),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        message: RouteNetlinkMessage::NewAddress(message),
    }
}

/// Adds or replaces a route.
pub(super) fn route(route: &Route) -> Change {
    let (destination, prefix) = route.destination;
    let mut message = RouteMessage::default();
    message.header.address_family = family(destination);
    message.header.destination_prefix_length = prefix;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    if route.table != 0 {
        message.header.table = u8::try_from(route.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
        message.attributes.push(RouteAttribute::Table(route.table));
    }
    message.header.protocol = RouteProtocol::Static;
    message.header.kind = match u8::try_from(route.kind).unwrap_or(0) {
        0 => RouteType::Unicast,
        kind => RouteType::from(kind),
    };
    // Without a gateway IPv4 means "on this link", unless told otherwise.
    message.header.scope = match (route.scope, route.gateway, destination) {
        (0, None, IpAddr::V4(_)) if route.kind == 0 => RouteScope::Link,
        (scope, _, _) => RouteScope::from(scope),
    };
    if route.onlink {
        message.header.flags = RouteFlags::Onlink;
    }
    if prefix > 0 {
        message
            .attributes
            .push(RouteAttribute::Destination(destination.into()));
    }
    message
        .attributes
        .extend(route.gateway.map(|gateway| match (gateway, destination) {
            // The next hop of an IPv4 route can be an IPv6 neighbour.
            (IpAddr::V6(gateway), IpAddr::V4(_)) => RouteAttribute::Via(RouteVia::Inet6(gateway)),
            _ => RouteAttribute::Gateway(gateway.into()),
        }));
    if let Some(source) = route.source {
        message
            .attributes
            .push(RouteAttribute::PrefSource(source.into()));
    }
    if let Some(device) = route.device {
        message.attributes.push(RouteAttribute::Oif(device));
    }
    if route.metric != 0 {
        message
            .attributes
            .push(RouteAttribute::Priority(route.metric));
    }
    if route.mtu != 0 {
        message
            .attributes
            .push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(route.mtu)]));
    }
    let by = route
        .gateway
        .map_or_else(String::new, |gateway| format!(" by {gateway}"));
    Change {
        action: format!("add the route to {destination}/{prefix}{by}"),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        message: RouteNetlinkMessage::NewRoute(message),
    }
}

/// Adds a rule that chooses a table.
pub(super) fn rule(
    rule: &proto::Rule,
    source: Option<(IpAddr, u8)>,
    destination: Option<(IpAddr, u8)>,
) -> Change {
    let mut message = RuleMessage::default();
    message.header.family = if rule.ipv6 {
        AddressFamily::Inet6
    } else {
        AddressFamily::Inet
    };
    message.header.action = match u8::try_from(rule.kind).unwrap_or(0) {
        0 => RuleAction::ToTable,
        kind => RuleAction::from(kind),
    };
    let mut attributes = vec![RuleAttribute::Priority(rule.priority)];
    if rule.table != 0 {
        message.header.table = u8::try_from(rule.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
        attributes.push(RuleAttribute::Table(rule.table));
    }
    if let Some((address, prefix)) = source {
        message.header.src_len = prefix;
        attributes.push(RuleAttribute::Source(address));
    }
    if let Some((address, prefix)) = destination {
        message.header.dst_len = prefix;
        attributes.push(RuleAttribute::Destination(address));
    }
    let name = |name: &str| (!name.is_empty()).then(|| name.to_owned());
    attributes.extend(name(&rule.in_device).map(RuleAttribute::Iifname));
    attributes.extend(name(&rule.out_device).map(RuleAttribute::Oifname));
    if rule.mark != 0 || rule.mark_mask != 0 {
        attributes.push(RuleAttribute::FwMark(rule.mark));
        attributes.push(RuleAttribute::FwMask(rule.mark_mask));
    }
    message.attributes = attributes;
    Change {
        action: format!("add the routing rule of priority {}", rule.priority),
        flags: NLM_F_CREATE,
        message: RouteNetlinkMessage::NewRule(message),
    }
}

/// Tells where a neighbour is, for good.
pub(super) fn neighbour(index: u32, address: IpAddr, mac: &[u8]) -> Change {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.kind = RouteType::Unicast;
    let destination = match address {
        IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
        IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
    };
    message
        .attributes
        .push(NeighbourAttribute::Destination(destination));
    message
        .attributes
        .push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
    Change {
        action: format!("add the neighbour {address}"),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        message: RouteNetlinkMessage::NewNeighbour(message),
    }
}

/// The address in a message about one.
pub(super) fn address_of(message: &AddressMessage) -> Option<IpAddr> {
    let local = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            AddressAttribute::Local(address) => Some(*address),
            _ => None,
        });
    let plain = || {
        message
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                AddressAttribute::Address(address) => Some(*address),
                _ => None,
            })
    };
    local.or_else(plain)
}
